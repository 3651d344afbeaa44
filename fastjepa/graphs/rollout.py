"""Rollouts in one launch: every step writes its prediction into the inputs of the steps that read it.

Shapes: states (B, D, T, H, W); context c, the number of states that predict the next one (2 as published). A *window*
is c consecutive states side by side in the channels, (B, c·D, H, W): what the predictor's network reads.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastjepa.fused.folded_networks import FoldedPredictor
from fastjepa.fused.folding import folded_batch_norm
from fastjepa.fused.match import network_trial_problem, predictor_problem
from fastjepa.graphs.cache import MAX_RECORDINGS, RecordingCache, Watch
from fastjepa.graphs.capture import Recording
from fastjepa.graphs.folded_rollout import RecordedFolded, RecordedFoldedRollout, RecordedFoldedTails
from fastjepa.kernels.checks import FLOAT_DTYPES, check_tensor
from fastjepa.model.jepa import eval_mode
from fastjepa.model.networks import ResUNet, StateOnlyPredictor
from fastjepa.profiling import span

Convolutions = Literal["auto", "fused", "eager"]


class GraphedRollout:
    """Rollouts of a predictor in eval mode, without gradients: a CUDA graph on a GPU, the same code plainly on a CPU.

    The contract is that of `fastjepa.graphs.capture`; there is one recording for each (batch, context, steps, size,
    dtype). Weights changed in place count from the next call on. Results equal the eager unroll's: bit for bit where
    the same kernels run, as they do in a plain network whose BatchNorm is not folded.

    Args:
        predictor_or_jepa: a `StateOnlyPredictor`, or anything with one as `predictor`.
        steps: how many frames `__call__` predicts unless told otherwise.
        autocast_dtype: torch.bfloat16 runs the network in bf16 autocast; states keep their dtype.
        fold_batch_norm: run a copy of the network with BatchNorm folded into the convolutions. Faster; but the copy
            sees weights changed in place only after `refresh()`.
        convolutions: what a folded network convolves with. "fused": kernels that do everything around a convolution in
            its launch, for a predictor of the published structure; weights changed in place count from the next call
            on, without `refresh()`. "eager": torch's own. "auto": kernels where the predictor is a `FoldedPredictor`,
            as `accelerate` makes one where it is faster; no kernels otherwise.
        warmup_runs, pool: see `fastjepa.graphs.capture.Recording`.
        max_recordings: how many signatures are kept; the least recently used goes first.

    Raises:
        ValueError: no predictor, or `steps` < 1; another `convolutions`; "fused" without `fold_batch_norm`, or for a
            predictor that is not of the published structure, or computes something else.
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
        if convolutions == "fused" and not fold_batch_norm:
            raise ValueError("convolutions='fused' have BatchNorm folded into them; give fold_batch_norm=True")
        self.steps = steps
        self.autocast_dtype = autocast_dtype
        self._fold_batch_norm = fold_batch_norm
        self._convolutions = convolutions
        self._ours: FoldedPredictor | None = None
        self._folded: nn.Module | None = None
        self._take(predictor)
        self._recording_options = {"warmup_runs": warmup_runs, "pool": pool}
        self._cache: RecordingCache[_Recorded | RecordedFolded] = RecordingCache(max_recordings)

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
        """With `fold_batch_norm`: fold the weights of now, into the memory that the recordings read."""
        self._follow_jepa()
        if self._ours is not None:
            self._ours.refresh()
            return
        plain = self._plain()
        if self._folded is None or self._folded is plain:
            return
        fresh = folded_batch_norm(plain)
        pairs = list(zip(self._folded.state_dict().values(), fresh.state_dict().values(), strict=True))
        if any((old.device, old.dtype) != (new.device, new.dtype) for old, new in pairs):
            self._folded = fresh  # the predictor has moved
            self._cache.clear()
            return
        with torch.no_grad():
            for old, new in pairs:
                old.copy_(new)

    def _follow_jepa(self) -> None:
        """Take over the JEPA's predictor if it was swapped, as `accelerate` and `restore` do, or its network was."""
        predictor = self._predictor if self._jepa is None else self._jepa.predictor
        replaced = predictor is not self._predictor
        if self._ours is not None and self._ours is not predictor:  # made here, from the network of then
            replaced |= self._ours.predictor is not predictor.predictor
        if replaced:
            self._take(predictor)
            self._cache.clear()

    def _take(self, predictor: Any) -> None:
        """Prepare what runs in the place of this predictor."""
        self._predictor = predictor
        self._ours = self._folded = None
        asked = self._convolutions
        is_folded = isinstance(predictor, FoldedPredictor)
        if is_folded and (asked == "auto" or (asked == "fused" and predictor.kernel_layers)):
            self._ours = predictor
        elif asked == "fused":
            plain = self._plain()
            if (problem := _trial_problem(plain)) is not None:
                raise ValueError(f"convolutions='fused' cannot be served: {problem}")
            self._ours = FoldedPredictor.from_eager(plain, predictor.autocast_dtype if is_folded else None)
        elif self._fold_batch_norm:
            self._folded = folded_batch_norm(self._plain())

    def _plain(self) -> Any:
        """The predictor, or the one that it stands for."""
        return self._predictor.source if isinstance(self._predictor, FoldedPredictor) else self._predictor

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

    def _recorded(self, kind: Literal["rollout", "tails"], states: Tensor, steps: int) -> _Recorded | RecordedFolded:
        def make() -> _Recorded | RecordedFolded:
            options = self._recording_options
            if self._ours is not None:
                of_ours = RecordedFoldedRollout if kind == "rollout" else RecordedFoldedTails
                return of_ours(self._ours, states, steps, self.autocast_dtype, options)
            predictor = self._plain() if self._folded is None else self._folded
            own = self._predictor.autocast_dtype if isinstance(self._predictor, FoldedPredictor) else None
            of_others = _RecordedRollout if kind == "rollout" else _RecordedTails
            return of_others(predictor, states, steps, own or self.autocast_dtype, options)

        return self._cache.get((kind, tuple(states.shape), states.dtype, steps), states.device, make)


class _Recorded:
    """One recording: its windows, its results, and how they are filled."""

    results: list[Tensor]

    def __init__(
        self,
        predictor: Any,
        states: Tensor,
        steps: int,
        autocast_dtype: torch.dtype | None,
        options: dict[str, Any],
    ) -> None:
        self.network: nn.Module = predictor.predictor
        self.context: int = predictor.context_length
        self.steps = steps
        self.autocast_dtype = autocast_dtype
        self.allocate(states)
        # Recorded on real states: on garbage, a warm-up could take other paths through library code, or trap on NaN.
        self.fill(states)
        self.recording = Recording(self._body, states.device, name="the rollout", **options)
        self.watch = Watch([predictor], modes=False)  # the recording is in eval mode whatever the predictor is in

    def outdated(self) -> bool:
        return self.watch.changed()

    @torch.no_grad()
    def run(self, states: Tensor) -> list[Tensor]:
        self.fill(states)
        self.recording.replay()
        return self.results

    @torch.no_grad()
    def _body(self) -> None:
        device = self.results[0].device.type
        with eval_mode(self.network):
            if self.autocast_dtype is None:
                self.predict()
            else:
                with torch.autocast(device, dtype=self.autocast_dtype):
                    self.predict()

    def frames(self, windows: Tensor) -> Tensor:
        """Windows (N, c·D, H, W) → the predicted states (N, D, H, W)."""
        # As a video of one frame: the form that the original's networks accept too.
        return self.network(windows.unsqueeze(2)).squeeze(2)

    def allocate_windows(self, count: int, states: Tensor) -> Tensor:
        """(count, B, c·D, H, W), laid out as the network reads them, so that each is read where it lies."""
        B, D, _, H, W = states.shape
        return self.allocate_maps(count, B, self.context * D, H, W, like=states)

    def allocate_maps(self, *shape: int, like: Tensor) -> Tensor:
        """Feature maps (…, C, H, W), laid out as the network's are."""
        if _is_channels_last(self.network):
            *batch, C, H, W = shape
            return like.new_empty(*batch, H, W, C).movedim(-1, -3)
        return like.new_empty(shape)

    def allocate(self, states: Tensor) -> None:
        raise NotImplementedError

    def fill(self, states: Tensor) -> None:
        raise NotImplementedError

    def predict(self) -> None:
        raise NotImplementedError


class _RecordedRollout(_Recorded):
    """Autoregressive: window k holds frames k … k + c - 1 and predicts frame k + c. The last c windows are only partly
    used, so that every frame f also stands first in window f, and the result is a view of the windows.
    """

    def allocate(self, states: Tensor) -> None:
        self.D = states.shape[1]
        self.windows = self.allocate_windows(self.context + self.steps, states)
        self.results = [self.windows[:, :, : self.D].permute(1, 2, 0, 3, 4)]

    def fill(self, states: Tensor) -> None:
        for frame in range(self.context):
            self._put(frame, states[:, :, frame])

    def _put(self, frame: int, state: Tensor) -> None:
        """Write one frame into every window that holds it."""
        for place in range(min(self.context, frame + 1)):
            self.windows[frame - place][:, place * self.D : (place + 1) * self.D].copy_(state)

    def predict(self) -> None:
        for step in range(self.steps):
            with span(f"rollout step {step + 1}"):
                self._put(step + self.context, self.frames(self.windows[step]))


class _RecordedTails(_Recorded):
    """Parallel: window w holds frames w … w + c - 1 of the clip and predicts frame w + c. Step s runs the windows from
    s on, all at once; what they predict replaces the frames that the next step reads.
    """

    def allocate(self, states: Tensor) -> None:
        B, D, T, H, W = states.shape
        self.D, self.T = D, T
        self.windows = self.allocate_windows(T - self.context, states)
        # Frames of one clip lie together, as in the plain rollout: who reads them frame by frame copies nothing.
        self.tails = [
            self.allocate_maps(B, T - self.context - s, D, H, W, like=states).transpose(0, 1) for s in range(self.steps)
        ]
        self.results = [tail.permute(1, 2, 0, 3, 4) for tail in self.tails]

    def fill(self, states: Tensor) -> None:
        frames = states.permute(2, 0, 1, 3, 4)  # (T, B, D, H, W)
        for place in range(self.context):
            self._places(0, place).copy_(frames[place : place + len(self.windows)])

    def _places(self, first: int, place: int) -> Tensor:
        """The states that stand at one place of the windows from `first` on: (windows, B, D, H, W)."""
        return self.windows[first:, :, place * self.D : (place + 1) * self.D]

    def predict(self) -> None:
        for s, tail in enumerate(self.tails):
            with span(f"rollout step {s + 1}"):
                # Frame by frame in one batch; n frames s + c … T - 1.
                predicted = self.frames(self.windows[s:].flatten(0, 1)).unflatten(0, (len(self.windows) - s, -1))
                tail.copy_(predicted)
                for place in range(self.context):
                    # Frame s + c + j stands at `place` of window s + c + j - place.
                    target = self._places(s + self.context - place, place)
                    target.copy_(predicted[: len(target)])


def _is_channels_last(network: nn.Module) -> bool:
    """Whether the network computes channels-last: it is fused, or its convolutions' weights lie so in memory."""
    if any(getattr(module, "is_fused", False) for module in network.modules()):
        return True
    weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    return any(
        weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous() for weight in weights
    )


def _trial_problem(predictor: Any) -> str | None:
    """Why a predictor that is not known computes something else than the published one, for all its structure."""
    network = getattr(predictor, "predictor", None)
    if (type(predictor), type(network)) == (StateOnlyPredictor, ResUNet) or getattr(network, "is_fused", False):
        return None
    return predictor_problem(predictor) or network_trial_problem(predictor, "predictor")


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
