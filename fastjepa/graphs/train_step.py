"""Whole training steps in one launch: batch gather, forward, losses, probes, backward, Adam, loss sums."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.fused.match import std_margin
from fastjepa.fused.watch import Watch
from fastjepa.graphs.cache import MAX_RECORDINGS, RecordingCache
from fastjepa.graphs.capture import Recording
from fastjepa.kernels.checks import check_tensor
from fastjepa.model.step import StepLosses, TrainStep
from fastjepa.moving_mnist import Clips, ClipSet
from fastjepa.profiling import span


class GraphedTrainStep:
    """Training steps as CUDA graphs on a GPU, and the same code plainly on a CPU; the contract is that of
    `fastjepa.graphs.capture`. `losses = graphed(indices)` trains on those clips.

    There is one recording for each shape of `indices`: one for full batches, one for a ragged last batch, and so on.
    Of several processes (`TrainStep`'s ranks), each is called with the whole batch's indices and takes its own part.
    A replay equals the plain step with the same optimizer bit for bit. The learning rate is a tensor on the device
    (see `make_capturable`): fill it, or let a scheduler of torch.optim do so, and the next call uses it.

    After a call `.grad` of every parameter is the gradient of that step, as after a plain one (None where it has none);
    after K steps in one launch, of the last. On a GPU it is memory of the graph, where the next call of this object, or
    of anything else that was recorded in the same pool, writes again: clone what must last.

    Args:
        step: the step, of a JEPA and probes of fastjepa or eb_jepa; losses that it must call as they are
            (`TrainStep.loss_problem`) must not wait for the device. Its optimizer must be `torch.optim.Adam`; it is
            made capturable, in place.
        clips: where batches come from, resident on the device of the parameters: a `ClipSet`.
        accumulators: float64 tensors (9,) to which every step adds its losses, in the order of `StepLosses`.
        dtype: of the video.
        warmup_runs, pool: see `fastjepa.graphs.capture.Recording`.
        max_recordings: how many shapes are kept; the least recently used goes first.

    Raises:
        ValueError: the step has no optimizer; clips or accumulators that do not fit; on a GPU, processes that exchange
            their statistics by way of the host.
        TypeError: the optimizer is not Adam; the clips are not resident.
    """

    def __init__(
        self,
        step: TrainStep,
        clips: Clips,
        *,
        accumulators: Sequence[Tensor] = (),
        dtype: torch.dtype = torch.float32,
        warmup_runs: int | None = None,
        pool: Any = None,
        max_recordings: int = MAX_RECORDINGS,
    ) -> None:
        if step.optimizer is None:
            raise ValueError("the step has no optimizer: a graphed step would compute gradients that nobody can read")
        if not isinstance(clips, ClipSet):
            raise TypeError(
                f"clips must be a ClipSet, resident on the device, because a graph gathers its batches there; got "
                f"{type(clips).__name__}, which reads them from disk. Read them into memory with clips.resident() if "
                "they fit there, or train without a graph (--cuda_graph off)"
            )
        device = next(step.jepa.parameters()).device
        if clips.device != device:
            raise ValueError(f"clips are on {clips.device}, the parameters on {device}; move them with clips.to(...)")
        group: Any = step.group
        if device.type == "cuda" and group is not None and not group.ranks.can_be_recorded:
            raise ValueError(f"what goes over {group.ranks.backend} cannot be in a CUDA graph; NCCL's collectives can")
        for i, accumulator in enumerate(accumulators):
            check_tensor(
                "GraphedTrainStep", f"accumulators[{i}]", accumulator, shape=(len(StepLosses._fields),),
                dtypes=(torch.float64,), device=device,
            )  # fmt: skip
        self.step = step
        self.clips = clips
        self.accumulators = tuple(accumulators)
        self.dtype = dtype
        first, *_ = rates = [float(group["lr"]) for group in step.optimizer.param_groups]
        self.optimizer = make_capturable(step.optimizer)
        self._lr_ratios = [rate / first for rate in rates]
        self._recording_options = {"warmup_runs": warmup_runs, "pool": pool}
        self._cache: RecordingCache[_RecordedStep] = RecordingCache(max_recordings)

    @property
    def recordings_made(self) -> int:
        """How many recordings were ever made; constant in a loop that repeats its shapes."""
        return self._cache.made

    def __call__(self, indices: Tensor, *, copy: bool = True) -> StepLosses:
        """One step on the clips `indices` (B,), or K steps in one launch on (K, B): K batches, one after another.

        Args:
            indices: int64 on the device of the clips, each in [0, N): not checked, that would be a wait.
            copy: return losses of the caller's own. False returns views of static memory, which the next call with the
                same shape overwrites.

        Returns:
            The losses, detached: scalars, or (K,) for K steps in one launch.

        Raises:
            ValueError: a wrong shape or device, or no clips.
            TypeError: not int64.
            GraphCaptureError: the step does something that a graph cannot hold.
        """
        if isinstance(indices, Tensor) and indices.dim() not in (1, 2):
            raise ValueError(f"indices must be (B,) or, for K steps in one launch, (K, B); got {tuple(indices.shape)}")
        check_tensor("GraphedTrainStep", "indices", indices, dtypes=(torch.int64,), device=self.clips.device)
        if indices.numel() == 0:
            raise ValueError(f"indices has shape {tuple(indices.shape)}: there is no clip in it")
        step, regularizer = self.step, self.step.jepa.regularizer
        signature = (
            tuple(indices.shape), step.steps, type(step), step.autocast_dtype, step.projection,
            getattr(regularizer, "std_coeff", None), getattr(regularizer, "cov_coeff", None), std_margin(regularizer),
            getattr(step.group, "sync_stats", None), step.jepa_problem, step.loss_problem,
        )  # fmt: skip
        losses = self._cache.get(signature, indices.device, lambda: _RecordedStep(self, indices)).run(indices)
        values = losses.clone() if copy else losses
        return StepLosses(*values.unbind(-1))

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step: `lr` for the first group of the optimizer, the JEPA's, and the others
        in the proportion that they had on construction. Does not wait for the device.
        """
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"lr must be a positive number, got {lr}")
        make_capturable(self.optimizer)
        for group, ratio in zip(self.optimizer.param_groups, self._lr_ratios, strict=True):
            group["lr"].fill_(lr * ratio)


def make_capturable(optimizer: torch.optim.Optimizer) -> torch.optim.Adam:
    """Make Adam fit for a CUDA graph, in place: fused, with its step counts and learning rates on the device.

    Learning rates become float32 tensors; torch.optim's schedulers fill such tensors in place. Does nothing to an
    optimizer that is so already. Returns the same object.

    Raises:
        TypeError: it is not `torch.optim.Adam`.
    """
    if not isinstance(optimizer, torch.optim.Adam):
        raise TypeError(f"a graphed step needs torch.optim.Adam, got {type(optimizer).__name__}")
    for group in optimizer.param_groups:
        group.update(capturable=True, fused=True, foreach=False)
        device, lr = group["params"][0].device, group["lr"]
        if not (isinstance(lr, Tensor) and (lr.device, lr.dtype) == (device, torch.float32)):
            group["lr"] = torch.tensor(float(lr), dtype=torch.float32, device=device)
    for parameter, state in optimizer.state.items():
        if "step" in state and state["step"].device != parameter.device:
            state["step"] = state["step"].to(parameter.device)
    return optimizer


class _RecordedStep:
    """One recording, with the indices that it reads and the losses that it leaves."""

    def __init__(self, owner: GraphedTrainStep, indices: Tensor) -> None:
        make_capturable(owner.optimizer)  # again: load_state_dict brings other settings with it
        self._owner = owner
        self._model = nn.ModuleList((owner.step.jepa, owner.step.image_decoder, owner.step.detection_head))
        self._trained = [*self._model.parameters(), *self._model.buffers()]
        self._parts = [*self._model.modules()]
        self._modes = self._modes_now()
        self.indices = indices.clone()
        dtype = torch.promote_types(next(owner.step.jepa.parameters()).dtype, torch.float32)
        self.losses = torch.empty(*indices.shape[:-1], len(StepLosses._fields), dtype=dtype, device=indices.device)
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = []
        self._recording = Recording(
            self._body, indices.device, name="the training step", no_trace=self._no_trace, **owner._recording_options
        )
        self._watch: Watch | None = None

    def outdated(self) -> bool:
        return self._watch is not None and (self._watch.changed() or self._modes_now() != self._modes)

    def _modes_now(self) -> list[bool]:
        """What is in train mode, and what is not frozen."""
        return [part.training for part in self._parts] + [tensor.requires_grad for tensor in self._trained]

    def run(self, indices: Tensor) -> Tensor:
        self.indices.copy_(indices)
        self._recording.replay()
        # A replay changes memory and counts nothing; who keeps something that was made of the weights looks at counts.
        torch.autograd.graph.increment_version(self._trained)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient  # a plain step in between, or another recording, left its own there
        if self._watch is None:  # only now: on a CPU, which warms nothing up, Adam has made its state just now
            owner = self._owner
            self._watch = Watch([self._model])
            for tensor in (owner.clips.video, owner.clips.digit_maps, *owner.accumulators):
                self._watch.tensor(tensor)
            _watch_optimizer(self._watch, owner.optimizer)
        return self.losses

    @torch.enable_grad()
    def _body(self) -> None:
        group: Any = self._owner.step.group
        batches, all_losses = self.indices.view(-1, self.indices.shape[-1]), self.losses.view(-1, self.losses.shape[-1])
        for batch, out in zip(batches, all_losses, strict=True):
            with span("data"):
                part = batch if group is None else group.ranks.part(batch)  # that this process trains on
                video, digit_location = self._owner.clips.batch(part, self._owner.dtype)
            losses = torch.stack(self._owner.step(video, digit_location, clips=len(batch)))
            out.copy_(losses)
            for accumulator in self._owner.accumulators:
                accumulator.add_(losses)
        # The last run is the capture, whose gradients are where every replay writes them. Held, they keep that memory
        # from the recordings that are made after this one in the same pool.
        self._gradients = [(p, p.grad) for p in self._model.parameters()]

    @contextlib.contextmanager
    def _no_trace(self) -> Iterator[None]:
        """Put back what steps change: parameters, buffers, Adam's state, loss sums, gradients."""
        state = self._owner.optimizer.state
        before = {parameter for parameter, values in state.items() if values}
        of_adam = (t for parameter in before for t in state[parameter].values())
        tensors = [*self._trained, *self._owner.accumulators, *of_adam]
        saved = [tensor.detach().clone() for tensor in tensors]
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, saved, strict=True):
                    tensor.copy_(value)
                for parameter in state.keys() - before:
                    for value in state[parameter].values():
                        value.zero_()  # what Adam starts from
            self._owner.step.zero_grad()


def _watch_optimizer(watch: Watch, optimizer: torch.optim.Optimizer) -> None:
    """Its state and hyperparameters, where `load_state_dict` puts new ones."""
    for name in ("state", "param_groups"):
        watch.same(vars(optimizer), name)
        watch.size(getattr(optimizer, name))
    for state in optimizer.state.values():
        watch.objects(state)
    for group in optimizer.param_groups:
        watch.size(group["params"])
        for parameter in group["params"]:
            watch.tensor(parameter)
        for key in group.keys() - {"params"}:
            (watch.same if isinstance(group[key], Tensor) else watch.equal)(group, key)
