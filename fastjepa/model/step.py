"""One training step of Video JEPA with its probes, each thing done once.

Shapes: video (B, C, T, H, W) in [0, 1]; digit_location (B, T, 8, 8) of 0 and 1; a state (B, D, T, H, W).
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.model.batch_norm import has_hooks
from fastjepa.model.jepa import JEPA, check_channels, parallel_unroll
from fastjepa.model.losses import Group, ProjectionPath, SquareLossSeq, VCLoss, projected_losses
from fastjepa.model.networks import DetHead, ResNet5
from fastjepa.model.probes import JEPAProbe, detection_loss, is_probe, probe_head, probe_parameters
from fastjepa.model.running_stats import calls_in_order
from fastjepa.profiling import span

LOSSES = ("regularizer", "predcost")
# The parts that a step computes in another way than by calling them: their classes and the methods that it replaces.
PUBLISHED: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "jepa": (JEPA, ("unroll", "encode")),
    "encoder": (ResNet5, ("forward", "_frames")),
    "regularizer": (VCLoss, ("forward",)),
    "predcost": (SquareLossSeq, ("forward",)),
    "image_decoder": (JEPAProbe, ("forward",)),
    "detection_head": (JEPAProbe, ("forward",)),
}


class StepLosses(NamedTuple):
    """The losses of one step, all scalars on the training device. total = jepa + recon + det, jepa = vc + pred.

    vc is the regularizer's loss, whatever it is; std and cov are NaN if it does not tell them.
    """

    total: Tensor
    jepa: Tensor
    vc: Tensor
    vc_unweighted: Tensor
    std: Tensor
    cov: Tensor
    pred: Tensor
    recon: Tensor
    det: Tensor

    def detach(self) -> StepLosses:
        """The same values, cut from the graph that computed them."""
        return StepLosses(*(loss.detach() for loss in self))


class TrainStep:
    """One optimisation step; usable without the trainer: `losses = step(video, digit_location)`.

    One encoding serves the JEPA and both probes, each state is projected once, and BatchNorm's running buffers end
    where the original's repeated calls leave them: losses, gradients and buffers are those of the original's step. The
    losses come back as tensors: nothing waits for the device.

    A part that is not known to be the published one is called as its author wrote it, as often as the original calls
    it: the JEPA's `unroll` and `encode` (`jepa_problem` says why), its losses (`loss_problem`), its encoder, a probe's
    `forward`. All parts are looked at in each call, because they may change between two. Under torch.compile, it is
    what the last look outside found.

    Args:
        jepa: a JEPA whose predictor reads states only, in train mode.
        image_decoder: the reconstruction probe: its head, which sees the state detached, or a `JEPAProbe` around the
            head whose `hcost` is `nn.MSELoss()`.
        detection_head: the detection probe, likewise; as a `JEPAProbe`, its `hcost` is `nn.BCELoss()`. It gives
            probabilities (B, T, 8, 8). One that is not fastjepa's runs outside autocast, in its parameters' precision.
        optimizer: steps after each backward; None leaves the gradients in place (zeroed before each step).
        steps: prediction steps of the unroll, ≥ 1.
        autocast_dtype: torch.bfloat16 runs the networks in bf16 autocast; losses are computed in fp32 or better.
        projection: how the losses are computed: see `fastjepa.model.losses.projected_losses`; "fused" by the losses
            that `fastjepa.accelerate` swapped in. "auto" does what those were made for, if there are such.
        group: the processes over which each batch is split, each with a step of the same JEPA; None: this one alone.
            Every one has the losses of the whole batch, and, after a call, its gradients.

    Raises:
        ValueError: `steps` < 1; a part of the JEPA is missing, or its predictor is recurrent; a probe of another JEPA,
            or with another loss; an explicit projection where a loss is not the published one.
    """

    def __init__(
        self,
        jepa: nn.Module,
        image_decoder: nn.Module,
        detection_head: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        steps: int,
        autocast_dtype: torch.dtype | None = None,
        projection: ProjectionPath = "auto",
        group: Group | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        for name in ("encoder", "predictor", *LOSSES):
            if not isinstance(getattr(jepa, name, None), nn.Module):
                raise ValueError(f"jepa has no module {name!r}; a step takes a JEPA of fastjepa or eb_jepa")
        if getattr(jepa.predictor, "is_rnn", False):
            raise ValueError(
                f"jepa.predictor is recurrent ({type(jepa.predictor).__name__}), and a step unrolls in parallel; train "
                "such a model with a loop of your own around jepa.unroll"
            )
        self.jepa = cast(JEPA, jepa)  # or one that has its interface
        self.probes = {"image_decoder": image_decoder, "detection_head": detection_head}
        self.image_decoder = probe_head("image_decoder", image_decoder, jepa, nn.MSELoss)
        self.detection_head = probe_head("detection_head", detection_head, jepa, nn.BCELoss)
        self.optimizer = optimizer
        self.steps = steps
        self.autocast_dtype = autocast_dtype
        self.projection = projection
        self.group = group
        self._problems: dict[str, str] = {}  # of the parts that are called as they are: why
        self._look()

    @property
    def jepa_problem(self) -> str | None:
        """Why the JEPA's own `unroll` and `encode` are called; None where it is the published composition."""
        self._look()
        return self._problems.get("jepa")

    @property
    def loss_problem(self) -> str | None:
        """Why the losses of the JEPA are called as they are; None where they are the published ones."""
        self._look()
        return self._problem_of_losses()

    def __call__(self, video: Tensor, digit_location: Tensor, clips: int | None = None) -> StepLosses:
        """Zero the gradients, compute losses and gradients, step the optimizer; returns the losses, detached.

        Args:
            video: (B, C, T, H, W), T ≥ 3; of several processes, this one's part of the batch.
            digit_location: (B, T, 8, 8).
            clips: of several processes, how many clips the whole batch has; default: each has as many as here.

        Raises:
            ValueError, TypeError: as `losses`; a part that is not this process's.
            LostRanksError: another process has ended, or does not answer.
        """
        self.zero_grad()
        losses = self.losses(video, digit_location, clips)
        with span("backward"):
            losses.total.backward()
        if self.group is not None:
            with span("sum of gradients"):
                modules = (self.jepa, self.image_decoder, self.detection_head)
                self.group.sum_gradients(p for module in modules for p in module.parameters())
        if self.optimizer is not None:
            with span("optimizer"):
                self.optimizer.step()
        return losses.detach()

    def zero_grad(self) -> None:
        """Drop all gradients of the JEPA and the probes."""
        for module in (self.jepa, *self.probes.values()):
            module.zero_grad(set_to_none=True)

    def losses(self, video: Tensor, digit_location: Tensor, clips: int | None = None) -> StepLosses:
        """The losses of one step, with graph. Moves BatchNorm's running buffers as one step of the original does.

        In a group, these are the losses of the whole batch, and a backward pass from `total` leaves this process's part
        of the gradients, whose sum over the processes is the whole.

        Raises:
            ValueError: shapes that do not fit, fewer than 3 frames; a part was replaced by one that `projection` or
                `group.sync_stats` does not support.
            TypeError: a video that is not floating point; an `unroll` of the JEPA's own that returns something else.
        """
        check_batch(video, digit_location)
        check_channels(self.jepa.encoder, video)
        self._look()
        compute = self._as_written if "jepa" in self._problems else self._deduplicated
        group = self.group
        if group is None:  # and nothing of several processes: torch.compile takes this as one graph
            return compute(video, digit_location)
        if group.sync_stats and (problem := self._problems.get("jepa") or self._problem_of_losses()):
            raise ValueError(f"sync_stats=True is for the published model and losses: {problem}; use sync_stats=False")
        with group.batch(len(video), clips):
            losses = compute(video, digit_location)
            if group.sync_stats:
                return losses
            # The values are the means over all clips; their gradients are this process's part.
            return StepLosses(*group.mean(torch.stack(losses)).unbind())

    # ---- what is known to be the published model ----

    def _look(self) -> None:
        """See what may have changed since the last call."""
        if torch.compiler.is_compiling():
            return
        parts = {"jepa": self.jepa, **{n: getattr(self.jepa, n) for n in ("encoder", *LOSSES)}, **self.probes}
        self._problems = {}
        for name, part in parts.items():
            part = getattr(part, "_orig_mod", part)  # torch.compile computes what it is around
            if name in self.probes and not is_probe(part):  # a head, of which nothing is asked
                continue
            if (problem := _problem_of_object(name, part) or self._problem_of_class(name, part)) is not None:
                self._problems[name] = problem
        problem = self._problem_of_losses() or self._problems.get("jepa")
        if problem is not None and self.projection in ("closed_form", "fused"):
            raise ValueError(f"projection={self.projection!r} is not supported: {problem}; use 'auto'")

    def _problem_of_class(self, name: str, part: nn.Module) -> str | None:
        """Why a part's class is not known to compute what the published one does; None if it is. A subclass may know
        more; asked in every call.
        """
        if getattr(part, "is_fused", False) or hasattr(part, "projection_path"):  # `accelerate` swapped it in
            return None
        published, methods = PUBLISHED[name]
        if not isinstance(part, published):
            return f"{type(part).__name__} is not fastjepa's {published.__name__}"
        own = [method for method in methods if getattr(type(part), method) is not getattr(published, method)]
        return f"{type(part).__name__} has its own {', '.join(own)}" if own else None

    def _problem_of_losses(self) -> str | None:
        return next((f"{name}: {self._problems[name]}" for name in LOSSES if name in self._problems), None)

    # ---- the deduplicated step ----

    def _synced_group(self) -> Group | None:
        return self.group if self.group is not None and self.group.sync_stats else None

    def _deduplicated(self, video: Tensor, digit_location: Tensor) -> StepLosses:
        with self._autocast(video.device):
            with span("encode"):
                state = self._encode(video)
            state, predictions = parallel_unroll(self.jepa.predictor, state, None, self.steps)
        with span("losses"):
            of_jepa = self._published_losses if self._problem_of_losses() is None else self._losses_as_they_are
            vc, vc_unweighted, std, cov, pred = of_jepa(state, predictions)
            recon = self._probe_loss("image_decoder", video, video, state)
            det = self._probe_loss("detection_head", video, digit_location, state)
            if (group := self._synced_group()) is not None:
                recon, det = group.mean(torch.stack((recon, det))).unbind()
        jepa = vc + pred
        return StepLosses(jepa + recon + det, jepa, vc, vc_unweighted, std, cov, pred, recon, det)

    def _encode(self, video: Tensor) -> Tensor:
        """The states; the encoder's buffers move as by the calls for the JEPA and for each head."""
        encoder = self.jepa.encoder
        calls = 1 + sum(name not in self._problems for name in self.probes)
        if "encoder" not in self._problems:
            (state,) = calls_in_order(encoder, [0] * calls, [lambda: encoder(video)])
            return state
        state = encoder(video)
        with torch.no_grad():
            for _ in range(calls - 1):
                encoder(video)
        return state

    def _published_losses(self, state: Tensor, predictions: list[Tensor]) -> tuple[Tensor, ...]:
        """vc, unweighted, std, cov and pred of the published losses, each state projected once."""
        regularizer: Any = self.jepa.regularizer
        predcost: Any = self.jepa.predcost
        found, path = None, getattr(regularizer, "projection_path", None)  # of one that `accelerate` swapped in
        if path is not None and self.projection in ("auto", path):
            found = regularizer.step_losses(predcost, state, predictions)
        if found is None:
            projectors, group = (regularizer.proj, predcost.proj), self._synced_group()
            found = projected_losses(*projectors, state, predictions, path=self.projection, group=group)
        std, cov, preds = found
        vc = regularizer.std_coeff * std + regularizer.cov_coeff * cov
        return vc, std + cov, std, cov, preds.sum() / self.steps

    def _losses_as_they_are(self, state: Tensor, predictions: list[Tensor]) -> tuple[Tensor, ...]:
        """The same of any losses, called as the original calls them, but in fp32 or better where autocast is on."""
        dtype = state.dtype if self.autocast_dtype is None else torch.promote_types(state.dtype, torch.float32)
        with torch.autocast(state.device.type, enabled=False):
            state = state.to(dtype)
            vc, vc_unweighted, parts = self.jepa.regularizer(state, None)
            pred = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=state.device)
            for prediction in predictions:
                pred = pred + self.jepa.predcost(state, prediction.to(dtype)) / self.steps
        return vc, vc_unweighted, _part(parts, "std_loss", vc), _part(parts, "cov_loss", vc), pred

    # ---- a step as its JEPA's author wrote it ----

    def _as_written(self, video: Tensor, digit_location: Tensor) -> StepLosses:
        with self._autocast(video.device):
            _, unrolled = self.jepa.unroll(video, None, nsteps=self.steps)
        if not isinstance(unrolled, tuple) or len(unrolled) != 5:
            raise TypeError(
                f"{type(self.jepa).__name__}.unroll must return (states, losses) with losses = (total, vc, "
                f"vc_unweighted, parts, prediction); losses are a {type(unrolled).__name__}"
            )
        jepa, vc, vc_unweighted, parts, pred = unrolled
        recon = self._probe_loss("image_decoder", video, video, None)
        det = self._probe_loss("detection_head", video, digit_location, None)
        std, cov = _part(parts, "std_loss", vc), _part(parts, "cov_loss", vc)
        return StepLosses(jepa + recon + det, jepa, vc, vc_unweighted, std, cov, pred, recon, det)

    def _probe_loss(self, name: str, video: Tensor, targets: Tensor, state: Tensor | None) -> Tensor:
        """A probe's loss: its own, or its head's on the state, which the JEPA encodes where there is none yet."""
        with self._autocast(video.device):
            if name in self._problems:
                loss: Tensor = self.probes[name](video, targets)
                return loss
            state = (self.jepa.encode(video) if state is None else state).detach()
        return self._reconstruct(state, targets) if name == "image_decoder" else self._detect(state, targets)

    def _reconstruct(self, state: Tensor, video: Tensor) -> Tensor:
        with self._autocast(video.device):
            image = self.image_decoder(state)
        dtype = torch.promote_types(video.dtype, torch.float32)
        return F.mse_loss(image.to(dtype), video.to(dtype))

    def _detect(self, state: Tensor, digit_location: Tensor) -> Tensor:
        head = self.detection_head
        if type(head) is DetHead:
            with self._autocast(state.device):
                return detection_loss(head(state), digit_location)
        # The original's takes its sigmoid of bf16 numbers: from 0.998 on it is 1, where an empty cell costs 100 and its
        # gradient is 0. (The head is small, and sees maps of 8×8: its precision costs nothing.)
        parameter = next(head.parameters(), None)
        dtype = torch.promote_types(state.dtype, torch.float32) if parameter is None else parameter.dtype
        with torch.autocast(state.device.type, enabled=False):
            return detection_loss(head(state.to(dtype)), digit_location)

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)


def _problem_of_object(name: str, part: nn.Module) -> str | None:
    """What is set on a part, not on its class, that its published class does not do."""
    own = [method for method in PUBLISHED[name][1] if method in part.__dict__]
    if own:
        return f"{type(part).__name__} has its own {', '.join(own)}"
    # A loss's projector may not be called either; the encoder is called.
    called = part.modules() if name in LOSSES else () if name == "encoder" else (part,)
    return next((f"{type(module).__name__} has hooks" for module in called if has_hooks(module)), None)


def _part(parts: Any, name: str, like: Tensor) -> Tensor:
    """What a regularizer tells of a part of its loss, as a tensor; the original's tells Python numbers."""
    value = parts.get(name, float("nan")) if isinstance(parts, dict) else float("nan")
    return value.to(like) if isinstance(value, Tensor) else torch.full_like(like.detach(), float(value))


def build_optimizer(
    jepa: nn.Module, image_decoder: nn.Module, detection_head: nn.Module, lr: float, **options: Any
) -> torch.optim.Adam:
    """One Adam, as in the original: the JEPA at `lr`, the image decoder at `lr`/10, the detection head at `lr`.

    Probes may stand for their heads. `options` go to `torch.optim.Adam` (`capturable`, `fused`).
    """
    probe_head("image_decoder", image_decoder, jepa, nn.MSELoss)
    probe_head("detection_head", detection_head, jepa, nn.BCELoss)
    return torch.optim.Adam(
        [
            {"params": list(jepa.parameters()), "lr": lr},
            {"params": probe_parameters(image_decoder), "lr": lr / 10},
            {"params": probe_parameters(detection_head), "lr": lr},
        ],
        lr=lr,
        **options,
    )


def check_batch(video: Tensor, digit_location: Tensor) -> None:
    """Raise ValueError or TypeError if the two do not form a training batch; looks at shapes and dtypes only."""
    if not video.is_floating_point():
        raise TypeError(f"video must be floating point in [0, 1], got {video.dtype}; divide uint8 video by 255")
    if video.dim() != 5:
        raise ValueError(f"video must be (B, C, T, H, W), got shape {tuple(video.shape)}")
    if video.shape[2] < 3:
        raise ValueError(f"training takes clips of at least 3 frames (two give the context), got T = {video.shape[2]}")
    wanted = (video.shape[0], video.shape[2], DetHead.CELLS, DetHead.CELLS)
    if tuple(digit_location.shape) != wanted:
        raise ValueError(f"digit_location must be (B, T, 8, 8) = {wanted}, got shape {tuple(digit_location.shape)}")
