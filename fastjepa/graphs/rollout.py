"""Rollouts in one launch: what `JEPA.rollout` and an evaluation compute step by step, recorded.

Shapes: states (B, D, T, H, W); context c, the number of states that predict the next one (2 as published).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastjepa.fused.inference import Convolutions, InferencePredictor, for_evaluation
from fastjepa.fused.inference.networks import inference_problem
from fastjepa.fused.watch import Watch
from fastjepa.graphs.cache import MAX_RECORDINGS, RecordingCache
from fastjepa.graphs.capture import Recording
from fastjepa.kernels.checks import FLOAT_DTYPES, check_tensor
from fastjepa.model.jepa import eval_mode, own_method, parallel_tails, roll_out_plainly


class GraphedRollout:
    """Rollouts of a predictor in eval mode, without gradients: a CUDA graph on a GPU, the same code plainly on a CPU.

    The contract is that of `fastjepa.graphs.capture`; there is one recording for each (batch, context, steps, size,
    dtype). Weights changed in place count from the next call on. Results equal the eager unroll's: bit for bit where
    the same kernels run, as they do in a plain network whose BatchNorm is not folded.

    Args:
        predictor_or_jepa: a `StateOnlyPredictor`, or anything with one as `predictor`.
        steps: how many frames `__call__` predicts unless told otherwise.
        autocast_dtype: torch.bfloat16 runs the network in bf16 autocast; states keep their dtype.
        fold_batch_norm: run a predictor of the published structure as an `InferencePredictor`, with BatchNorm folded
            into the convolutions: faster. One that is of another structure, or fused, or has hooks runs as it is. A
            predictor that is an `InferencePredictor` already runs as one either way.
        convolutions: "fused" (Triton kernels) or "eager" (torch's); "auto": as an `InferencePredictor` that is given
            says, as `accelerate` makes one, and torch's in one that is made here.
        warmup_runs, pool: see `fastjepa.graphs.capture.Recording`.
        max_recordings: how many signatures are kept; the least recently used goes first.

    Raises:
        ValueError: no predictor, or `steps` < 1; another `convolutions`; "fused" or "eager" without `fold_batch_norm`;
            "fused" for a predictor that is not of the published structure, or computes something else.
        RuntimeError: "fused" where kernels cannot run.
    """

    def __init__(
        self,
        predictor_or_jepa: nn.Module,
        steps: int = 8,
        *,
        autocast_dtype: torch.dtype | None = None,
        fold_batch_norm: bool = False,
        convolutions: Convolutions = "auto",
        warmup_runs: int | None = None,
        pool: Any = None,
        max_recordings: int = MAX_RECORDINGS,
    ) -> None:
        predictor: Any = predictor_or_jepa
        self._jepa: Any = None
        if not hasattr(predictor, "context_length"):
            self._jepa, predictor = predictor, getattr(predictor, "predictor", None)
        if not isinstance(predictor, nn.Module) or not hasattr(predictor, "context_length"):
            raise ValueError(
                "a rollout needs a predictor with a `context_length`, or a JEPA with one as `predictor`; got "
                f"{type(predictor_or_jepa).__name__}"
            )
        _check_steps(steps)
        if convolutions not in get_args(Convolutions):
            raise ValueError(f"convolutions must be one of {', '.join(get_args(Convolutions))}; got {convolutions!r}")
        if convolutions != "auto" and not fold_batch_norm:
            raise ValueError(f"convolutions={convolutions!r} have BatchNorm folded in; give fold_batch_norm=True")
        self.steps = steps
        self.autocast_dtype = autocast_dtype
        self._fold_batch_norm = fold_batch_norm
        self._convolutions = convolutions
        self._take(predictor)
        self._recording_options = {"warmup_runs": warmup_runs, "pool": pool}
        self._cache: RecordingCache[_Recorded] = RecordingCache(max_recordings)

    @property
    def recordings_made(self) -> int:
        """How many recordings were ever made; constant in a loop that repeats its signatures."""
        return self._cache.made

    @property
    def predictor(self) -> nn.Module:
        """Whose rollouts these are: that of the JEPA now, if one was given."""
        self._follow_jepa()
        predictor: nn.Module = self._predictor
        return predictor

    def __call__(self, states: Tensor, steps: int | None = None, *, copy: bool = True) -> Tensor:
        """Predict `steps` frames beyond the given ones, each from the last c states (predicted ones included).

        Args:
            states: (B, D, T, H, W), T ≥ c, on the predictor's device; fp32, bf16, fp16 or fp64. Only the last c matter.
            steps: default: those given on construction.
            copy: return a tensor of the caller's own. False returns a view of static memory, which the next call with
                the same signature overwrites, and saves the copy.

        Returns:
            The last c given states, then the predicted ones: (B, D, c + steps, H, W) in the dtype of `states`.

        Raises:
            ValueError: a wrong shape or device, too few frames, `steps` < 1.
            TypeError: not a floating point tensor.
            GraphCaptureError: the predictor does something that a graph cannot hold.
        """
        steps = self.steps if steps is None else steps
        _check_steps(steps)
        self._follow_jepa()
        context = self._check_states(states, least=self._predictor.context_length)
        given = states[:, :, -context:]
        result = self._recorded("rollout", given, steps).run(given)[0]
        return result.clone(memory_format=torch.contiguous_format) if copy else result

    def tails(self, states: Tensor, steps: int, *, copy: bool = True) -> list[Tensor]:
        """The de-duplicated parallel rollout of an evaluation, `training.evaluation.rollout_tails`, in one launch.

        Args:
            states: (B, D, T, H, W), T > c.
            steps: 1 to T - c.
            copy: as in `__call__`.

        Returns:
            For s = 0 … steps - 1 the predictions of frames s + c … T - 1 after s + 1 steps, (B, D, T - c - s, H, W).

        Raises:
            As `__call__`.
        """
        self._follow_jepa()
        context = self._check_states(states, least=self._predictor.context_length + 1)
        most = states.shape[2] - context
        if not 1 <= steps <= most:
            raise ValueError(f"steps must be between 1 and T - {context} = {most}, got {steps}")
        results = self._recorded("tails", states, steps).run(states)
        return [tail.clone(memory_format=torch.contiguous_format) for tail in results] if copy else list(results)

    def refresh(self) -> None:
        """Fold the weights of now. Needed only after changes that torch does not see, as of `InferencePredictor`."""
        self._follow_jepa()
        if isinstance(self._runs, InferencePredictor):
            self._runs.refresh()

    def _follow_jepa(self) -> None:
        """Take over the JEPA's predictor if it was swapped, as `accelerate` and `restore` do, or its network was."""
        predictor = self._predictor if self._jepa is None else self._jepa.predictor
        runs_plainly = self._runs is self._predictor
        if predictor is not self._predictor or not (runs_plainly or predictor.predictor is self._runs.predictor):
            self._take(predictor)
            self._cache.clear()

    def _take(self, predictor: Any) -> None:
        """Prepare what runs in the place of this predictor."""
        self._predictor = self._runs = predictor
        asked = self._convolutions
        if not self._fold_batch_norm:
            return
        if isinstance(predictor, InferencePredictor):
            if asked not in ("auto", predictor.convolutions):
                self._runs = InferencePredictor.from_eager(predictor.source, predictor.autocast_dtype, asked)
        elif asked == "fused":
            if (problem := inference_problem(predictor, "predictor")) is not None:
                raise ValueError(f"convolutions='fused' is not supported here: {problem}")
            self._runs = InferencePredictor.from_eager(predictor, None, asked)
        else:
            self._runs = for_evaluation(predictor, "predictor")

    def _check_states(self, states: Tensor, least: int) -> int:
        device = next(self._predictor.parameters()).device
        dtypes = (*FLOAT_DTYPES, torch.float64)
        check_tensor("GraphedRollout", "states", states, shape=(None,) * 5, dtypes=dtypes, device=device)
        if states.shape[2] < least:
            raise ValueError(f"this rollout takes at least {least} frames, got {states.shape[2]}")
        if states.numel() == 0:
            raise ValueError(f"states is empty: {tuple(states.shape)}")
        return int(self._predictor.context_length)

    def _recorded(self, kind: Literal["rollout", "tails"], states: Tensor, steps: int) -> _Recorded:
        runs = self._runs
        problem = runs.problem() if isinstance(runs, InferencePredictor) else None  # then another network runs
        make = partial(_Recorded, kind, runs, states, steps, self.autocast_dtype, self._recording_options)
        return self._cache.get((kind, tuple(states.shape), states.dtype, steps, problem), states.device, make)


class _Recorded:
    """One recording of a predictor, with the states that it reads and the results that it leaves."""

    def __init__(
        self,
        kind: Literal["rollout", "tails"],
        predictor: Any,
        states: Tensor,
        steps: int,
        autocast_dtype: torch.dtype | None,
        options: dict[str, Any],
    ) -> None:
        self._kind, self._predictor, self._steps, self._autocast_dtype = kind, predictor, steps, autocast_dtype
        B, D, T, H, W = states.shape
        # Static memory is written in whatever mode the calls are. Recorded on real states: on garbage, a warm-up could
        # take other paths through library code, or trap on NaN.
        with torch.inference_mode(False), torch.no_grad(), self._autocast(states.device.type):
            self._states = states.clone()
            self.results = [states.new_empty(B, D, T + steps, H, W)] if kind == "rollout" else []
            if isinstance(predictor, InferencePredictor) and predictor.problem() is None:
                # Held: the recording reads and writes what belongs to it.
                self._run = predictor.ready_for(states, 1 if kind == "rollout" else T - predictor.context_length)
        self._recording = Recording(self._body, states.device, name="the rollout", **options)
        self._watch = Watch([predictor])

    def outdated(self) -> bool:
        return self._watch.changed()

    @torch.no_grad()
    def run(self, states: Tensor) -> list[Tensor]:
        if isinstance(self._predictor, InferencePredictor):
            self._predictor.update()
        self._states.copy_(states)
        self._recording.replay()
        return self.results

    def _body(self) -> None:
        predictor, states, steps = self._predictor, self._states, self._steps
        with eval_mode(predictor), self._autocast(states.device.type):
            if self._kind == "rollout":
                roll_out = own_method(predictor, "roll_out") or partial(roll_out_plainly, predictor)
                roll_out(states, steps, self.results[0])
                return
            tails = own_method(predictor, "tails") or partial(parallel_tails, predictor)
            for s, tail in enumerate(tails(states, steps)):
                if len(self.results) <= s:  # in the first run, which is never the capture
                    with torch.inference_mode(False):
                        self.results.append(torch.empty_like(tail, dtype=states.dtype))
                self.results[s].copy_(tail)

    def _autocast(self, device_type: str) -> AbstractContextManager[Any]:
        own = self._autocast_dtype
        return nullcontext() if own is None else torch.autocast(device_type, dtype=own)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
