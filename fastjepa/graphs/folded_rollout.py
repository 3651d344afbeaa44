"""Recordings of rollouts of a folded predictor, whose frames lie one after another and are read where they lie.

A replay reads the folded weights, which stay where they are and are filled again before it if a parameter has changed.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastjepa.fused.folded_networks import FoldedPredictor, as_states
from fastjepa.graphs.cache import Watch
from fastjepa.graphs.capture import Recording
from fastjepa.profiling import span


class RecordedFolded:
    """One recording: its frames (T, B, H, W, D), its results, and how they are filled.

    Args:
        predictor: whose rollouts these are.
        states: (B, D, T, H, W) of the first call.
        steps: of the rollout.
        autocast_dtype: around it, if the predictor has none of its own.
        options: of `Recording`.
    """

    results: list[Tensor]

    def __init__(
        self,
        predictor: FoldedPredictor,
        states: Tensor,
        steps: int,
        autocast_dtype: torch.dtype | None,
        options: dict[str, Any],
    ) -> None:
        self.predictor = predictor
        self.context = predictor.context_length
        self.steps = steps
        self.dtype = states.dtype
        device = states.device
        around = nullcontext() if autocast_dtype is None else torch.autocast(device.type, dtype=autocast_dtype)
        # Static memory is written in whatever mode the calls are.
        with torch.inference_mode(False), torch.no_grad(), around:
            predictor.check_states(states)
            self.compute_dtype = predictor.compute_dtype()
            self.allocate(states)
            self.ready = predictor.ready(states, self.most)
        # Recorded on real states: on garbage, a warm-up could trap on NaN.
        self.fill(states)
        self.recording = Recording(self._body, device, name="the rollout", **options)
        self.watch = Watch([predictor], modes=False)  # the recording is in eval mode whatever the predictor is in

    def outdated(self) -> bool:
        """Whether a replay would read something else than the caller has now."""
        return self.watch.changed()

    @torch.no_grad()
    def run(self, states: Tensor) -> list[Tensor]:
        """The results for these states, in static memory."""
        self.ready.weights.update()
        self.fill(states)
        self.recording.replay()
        return self.results

    @torch.no_grad()
    def _body(self) -> None:
        self.predict()

    def frames(self, count: int, states: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for frames (count, B, H, W, D)."""
        B, D, _, H, W = states.shape
        return states.new_empty(count, B, H, W, D, dtype=dtype)

    @property
    def most(self) -> int:
        """Frames that are predicted at once, at most."""
        return 1

    def allocate(self, states: Tensor) -> None:
        """Make frames and results."""
        raise NotImplementedError

    def fill(self, states: Tensor) -> None:
        """Write given states to where they are read."""
        raise NotImplementedError

    def predict(self) -> None:
        """The work that is recorded."""
        raise NotImplementedError


class RecordedFoldedRollout(RecordedFolded):
    """Autoregressive: frame k + c is predicted from the frames k … k + c - 1 before it."""

    def allocate(self, states: Tensor) -> None:
        """Frames in the dtype in which is computed, and results in that of the states: the same where these agree."""
        count = self.context + self.steps
        self.sequence = self.frames(count, states, self.compute_dtype)
        agree = self.compute_dtype == self.dtype
        self.result = self.sequence if agree else self.frames(count, states, self.dtype)
        self.results = [as_states(self.result)]

    def fill(self, states: Tensor) -> None:
        """The c given frames."""
        for frames in {id(frames): frames for frames in (self.sequence, self.result)}.values():
            as_states(frames[: self.context]).copy_(states)

    def predict(self) -> None:
        """One frame a step, where the next step reads it."""
        c = self.context
        for step in range(self.steps):
            with span(f"rollout step {step + 1}"):
                after = self.sequence[step + c : step + c + 1]
                self.predictor.step(self.ready, self.sequence[step : step + c], after)
        if self.result is not self.sequence:
            self.result[c:] = self.sequence[c:]


class RecordedFoldedTails(RecordedFolded):
    """Parallel: step s reads the frames s … T - 2, of which the last ones were predicted by the step before, and
    predicts frames s + c … T - 1, all at once.
    """

    @property
    def most(self) -> int:
        """Frames of the first step."""
        return len(self.current[0]) - self.context

    def allocate(self, states: Tensor) -> None:
        """For each step the frames s … T - 1 that it reads, and behind the last those that it makes."""
        frames = states.shape[2]
        self.current = [self.frames(frames - s, states, self.compute_dtype) for s in range(self.steps + 1)]
        tails = [current[self.context - 1 :] for current in self.current[1:]]
        agree = self.compute_dtype == self.dtype
        self.tails = tails if agree else [self.frames(len(tail), states, self.dtype) for tail in tails]
        self.results = [as_states(tail) for tail in self.tails]

    def fill(self, states: Tensor) -> None:
        """All given frames."""
        as_states(self.current[0]).copy_(states)

    def predict(self) -> None:
        """Every step's tail."""
        for s, (current, following) in enumerate(zip(self.current, self.current[1:], strict=False)):
            with span(f"rollout step {s + 1}"):
                self.predictor.tail_step(self.ready, current, following)
            if self.compute_dtype != self.dtype:
                self.tails[s].copy_(following[self.context - 1 :])
