"""Rollouts in one launch: every step writes its prediction where the next step reads it.

Shapes: states (B, D, T, H, W); context c, the number of states that predict the next one (2 as published). *Frames* are
states one after another, (T, B, D, H, W), each in the layout that the network computes in.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastjepa.fused.inference import Convolutions, InferencePredictor, for_evaluation
from fastjepa.fused.inference.networks import as_states, inference_problem, new_frames
from fastjepa.graphs.cache import MAX_RECORDINGS, RecordingCache, Watch
from fastjepa.graphs.capture import Recording
from fastjepa.kernels.checks import FLOAT_DTYPES, check_tensor
from fastjepa.model.jepa import eval_mode
from fastjepa.profiling import span

_NewFrames = Callable[[int], Tensor]


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
        if self._inference is not None:
            self._inference.refresh()

    def _follow_jepa(self) -> None:
        """Take over the JEPA's predictor if it was swapped, as `accelerate` and `restore` do, or its network was."""
        predictor = self._predictor if self._jepa is None else self._jepa.predictor
        replaced = predictor is not self._predictor
        if self._inference is not None and self._inference is not predictor:  # made here, from the network of then
            replaced |= self._inference.predictor is not self._plain().predictor
        if replaced:
            self._take(predictor)
            self._cache.clear()

    def _take(self, predictor: Any) -> None:
        """Prepare what runs in the place of this predictor."""
        self._predictor = predictor
        self._inference: InferencePredictor | None = None
        asked, is_inference = self._convolutions, isinstance(predictor, InferencePredictor)
        if is_inference and asked in ("auto", predictor.convolutions):
            self._inference = predictor
        elif asked == "fused":
            plain = self._plain()
            if (problem := inference_problem(plain, "predictor")) is not None:
                raise ValueError(f"convolutions='fused' is not supported here: {problem}")
            self._inference = InferencePredictor.from_eager(
                plain, predictor.autocast_dtype if is_inference else None, asked
            )
        elif self._fold_batch_norm:
            folded = for_evaluation(self._plain(), "predictor")
            if isinstance(folded, InferencePredictor):
                self._inference = folded
                if is_inference:
                    folded.autocast_dtype = predictor.autocast_dtype

    def _plain(self) -> Any:
        """The predictor, or the one that it stands for."""
        return self._predictor.source if isinstance(self._predictor, InferencePredictor) else self._predictor

    def _check_states(self, states: Tensor, least: int) -> int:
        weight = next(self._predictor.parameters())
        context = self._predictor.context_length
        dtypes = (*FLOAT_DTYPES, torch.float64)
        check_tensor("GraphedRollout", "states", states, shape=(None,) * 5, dtypes=dtypes)
        if states.device != weight.device:
            raise ValueError(f"GraphedRollout: states is on {states.device}, the predictor on {weight.device}")
        if states.shape[2] < least:
            raise ValueError(f"this rollout takes at least {least} frames, got {states.shape[2]}")
        if states.numel() == 0:
            raise ValueError(f"states is empty: {tuple(states.shape)}")
        return int(context)

    def _recorded(self, kind: Literal["rollout", "tails"], states: Tensor, steps: int) -> _Recorded:
        inference = self._inference if self._inference is not None and self._inference.problem() is None else None

        def make() -> _Recorded:
            own = self._predictor.autocast_dtype if isinstance(self._predictor, InferencePredictor) else None
            work: _Work = _Plain(self._plain()) if inference is None else _Inference(inference)
            recorded = _RecordedRollout if kind == "rollout" else _RecordedTails
            return recorded(work, states, steps, own or self.autocast_dtype, self._recording_options)

        signature = (kind, tuple(states.shape), states.dtype, steps, inference is None)
        return self._cache.get(signature, states.device, make)


class _Plain:
    """What predicts: a network that runs as it is."""

    def __init__(self, predictor: Any) -> None:
        self.module, self.network = predictor, predictor.predictor
        self.context: int = predictor.context_length
        self._channels_last = _is_channels_last(self.network)

    def prepare(self, states: Tensor, count: int) -> torch.dtype:
        """Get ready to predict up to `count` frames of these states at once. Returns the dtype of frames."""
        return states.dtype

    def update(self) -> None:
        """Before a replay."""

    def new_frames(self, count: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for frames, laid out as the network computes."""
        return new_frames(count, like, dtype) if self._channels_last else like.new_empty(count, *like.shape[1:])

    def new_results(self, count: int, like: Tensor) -> Tensor:
        """Memory in which frames of one clip lie together: who reads them frame by frame copies nothing."""
        B, *shape = like.shape[1:]
        return self.new_frames(B, like.new_empty(0, count, *shape), like.dtype).transpose(0, 1)

    def step(self, frames: Tensor, out: Tensor) -> None:
        """Frames (c + n - 1, B, D, H, W) → the n that follow each c of them, into `out` (n, B, D, H, W)."""
        windows = torch.cat([frames[first : first + len(out)] for first in range(self.context)], 2).flatten(0, 1)
        # As a video of one frame: the form that the original's networks accept too.
        out.copy_(self.network(windows.unsqueeze(2)).squeeze(2).unflatten(0, out.shape[:2]))


class _Inference:
    """What predicts: an inference network, whose frames are read and written where they lie."""

    def __init__(self, predictor: InferencePredictor) -> None:
        self.module, self.network = predictor, predictor.predictor
        self.context = predictor.context_length

    def prepare(self, states: Tensor, count: int) -> torch.dtype:
        self.module.check_states(states)
        self._run = self.module.ready_for(states, count)
        return self.module.compute_dtype()

    def update(self) -> None:
        self.module.update()

    def new_frames(self, count: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        return new_frames(count, like, dtype)

    def new_results(self, count: int, like: Tensor) -> Tensor:
        return new_frames(count, like)

    def step(self, frames: Tensor, out: Tensor) -> None:
        self.module.step(self._run, frames, out)


_Work = _Plain | _Inference


class _Recorded:
    """One recording: its frames, its results, and how they are filled.

    Args:
        work: what predicts.
        states: (B, D, T, H, W) of the first call.
        steps: of the rollout.
        autocast_dtype: around it.
        options: of `Recording`.
    """

    results: list[Tensor]  # views of static memory

    def __init__(
        self, work: _Work, states: Tensor, steps: int, autocast_dtype: torch.dtype | None, options: dict[str, Any]
    ) -> None:
        self.work, self.context, self.steps = work, work.context, steps
        self._autocast_dtype = autocast_dtype
        given = states.permute(2, 0, 1, 3, 4)
        # Static memory is written in whatever mode the calls are.
        with torch.inference_mode(False), torch.no_grad(), self._autocast(states.device.type):
            dtype = work.prepare(states, self.most(len(given)))
            self.same_dtype = dtype == states.dtype
            self.allocate(
                len(given),
                lambda count: work.new_frames(count, given, dtype),
                lambda count: work.new_results(count, given),
            )
        # Recorded on real states: on garbage, a warm-up could take other paths through library code, or trap on NaN.
        self.fill(states)
        self.recording = Recording(self._body, states.device, name="the rollout", **options)
        self.watch = Watch([work.module], modes=False)  # the recording is in eval mode whatever the predictor is in

    def outdated(self) -> bool:
        return self.watch.changed()

    @torch.no_grad()
    def run(self, states: Tensor) -> list[Tensor]:
        self.work.update()
        self.fill(states)
        self.recording.replay()
        return self.results

    @torch.no_grad()
    def _body(self) -> None:
        with eval_mode(self.work.network), self._autocast(self.results[0].device.type):
            self.predict()

    def _autocast(self, device_type: str) -> AbstractContextManager[Any]:
        own = self._autocast_dtype
        return nullcontext() if own is None else torch.autocast(device_type, dtype=own)

    def most(self, given: int) -> int:
        """Frames that are predicted at once, at most."""
        raise NotImplementedError

    def allocate(self, given: int, new_frames: _NewFrames, new_results: _NewFrames) -> None:
        """Make frames, and results in the dtype of the states: the same where that is the frames'."""
        raise NotImplementedError

    def fill(self, states: Tensor) -> None:
        """Write given states to where they are read."""
        raise NotImplementedError

    def predict(self) -> None:
        """The work that is recorded."""
        raise NotImplementedError


class _RecordedRollout(_Recorded):
    """Autoregressive: frame k + c is predicted from the frames k … k + c - 1 before it."""

    def most(self, given: int) -> int:
        return 1

    def allocate(self, given: int, new_frames: _NewFrames, new_results: _NewFrames) -> None:
        count = self.context + self.steps
        self.sequence = new_frames(count)
        self.result = self.sequence if self.same_dtype else new_results(count)
        self.results = [as_states(self.result)]

    def fill(self, states: Tensor) -> None:
        as_states(self.sequence[: self.context]).copy_(states)
        if not self.same_dtype:
            as_states(self.result[: self.context]).copy_(states)

    def predict(self) -> None:
        c = self.context
        for step in range(self.steps):
            with span(f"rollout step {step + 1}"):
                self.work.step(self.sequence[step : step + c], self.sequence[step + c : step + c + 1])
        if not self.same_dtype:
            self.result[c:] = self.sequence[c:]


class _RecordedTails(_Recorded):
    """Incremental: step s reads frames s … T - 2, of which the last ones were predicted by the step before, and
    predicts frames s + c … T - 1, all at once.
    """

    def most(self, given: int) -> int:
        return given - self.context

    def allocate(self, given: int, new_frames: _NewFrames, new_results: _NewFrames) -> None:
        self.current = [new_frames(given - s) for s in range(self.steps + 1)]  # frames s … T - 1
        self.made = [current[self.context - 1 :] for current in self.current[1:]]
        self.apart = not self.same_dtype or isinstance(self.work, _Plain)
        self.tails = [new_results(len(made)) for made in self.made] if self.apart else self.made
        self.results = [as_states(tail) for tail in self.tails]

    def fill(self, states: Tensor) -> None:
        as_states(self.current[0]).copy_(states)

    def predict(self) -> None:
        final = self.context - 1  # frames that a step does not predict anew
        for s, (current, made) in enumerate(zip(self.current, self.made, strict=False)):
            with span(f"rollout step {s + 1}"):
                self.current[s + 1][:final] = current[1 : 1 + final]
                self.work.step(current[:-1], made)
            if self.apart:
                self.tails[s].copy_(made)


def _is_channels_last(network: nn.Module) -> bool:
    """Whether the network computes channels-last: it is fused, or its convolutions' weights lie so in memory."""
    if any(getattr(module, "is_fused", False) for module in network.modules()):
        return True
    weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    return any(
        weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous() for weight in weights
    )


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
