"""One training step of Video JEPA with its probes: each thing done once, or literally as the original repeats it.

Shapes: video (B, C, T, H, W) in [0, 1]; digit_location (B, T, 8, 8) of 0 and 1; a state (B, D, T, H, W).
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.distributed.batch_norm import global_statistics
from fastjepa.distributed.losses import global_mean
from fastjepa.distributed.ranks import Ranks
from fastjepa.kernels.shares import Shares
from fastjepa.model.jepa import JEPA, parallel_unroll
from fastjepa.model.loss_recognition import predcost_problem, regularizer_problem, std_margin
from fastjepa.model.networks import DetHead, ResNet5
from fastjepa.model.probes import detection_loss, probe_head
from fastjepa.model.projected_losses import ProjectionPath, projected_losses, shared_layers
from fastjepa.model.running_stats import batch_norm_calls, repeated_updates
from fastjepa.profiling import span

ENCODER_CALLS = 3  # the original's: one for the JEPA, one for each probe


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

    The default does each thing once: one encoding serves the JEPA and both probes, the state is projected once, and
    BatchNorm's running buffers are advanced to where the original's repeated calls leave them. `literal=True`
    repeats everything as the original does. Both compute the same losses, gradients and buffers. Nothing here waits
    for the device: the losses come back as tensors. An encoder that calls a BatchNorm more than once, frame by frame
    say, is called as often as the original calls it, for its buffers.

    The JEPA, heads and probes may be those of `eb_jepa`. Losses of the JEPA are recognised by what they compute
    (`fastjepa.model.loss_recognition`); other ones are called as they are, as often as the original calls them, and
    `loss_problem` says why. Then only the encoding is done once, and what such a loss does (`.item()`, say) may wait.

    Args:
        jepa: a JEPA of fastjepa or eb_jepa whose predictor reads states only, in train mode.
        image_decoder: the reconstruction probe: its head, which sees the state detached, or a `JEPAProbe` around the
            head whose `hcost` is `nn.MSELoss()`.
        detection_head: the detection probe, likewise; as a `JEPAProbe`, its `hcost` is `nn.BCELoss()`. It gives
            probabilities (B, T, 8, 8). One that is not fastjepa's runs outside autocast, in its parameters' precision.
        optimizer: steps after each backward; None leaves the gradients in place (zeroed before each step).
        steps: prediction steps of the unroll, ≥ 1.
        literal: repeat the work as the original does, through the JEPA's own `unroll`.
        autocast_dtype: torch.bfloat16 runs the networks in bf16 autocast; losses are computed in fp32 or better, but
            for those of eb_jepa in a literal step, which do as autocast says.
        projection: how the projected losses are computed; see `fastjepa.model.projected_losses.projected_losses`.
        ranks: the processes over which each batch is split, each with a step of the same JEPA; default: this one alone.
            Every one has the losses of the whole batch, and, after a call, its gradients.
        sync_stats: BatchNorm and the losses take the statistics of the whole batch, so that N processes compute what
            one would; False: each process those of its own part, as plain data parallel training does, with gradients
            and losses averaged by how many clips each has.

    Raises:
        ValueError: `steps` < 1; a part of the JEPA is missing, or its predictor is recurrent; a probe of another JEPA,
            or with another loss; `literal` with a projection other than "auto" and "eager"; a closed form or kernels
            asked for where a loss is not the published one; statistics of several processes for such losses, or for a
            literal step.
    """

    def __init__(
        self,
        jepa: nn.Module,
        image_decoder: nn.Module,
        detection_head: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        steps: int,
        literal: bool = False,
        autocast_dtype: torch.dtype | None = None,
        projection: ProjectionPath = "auto",
        ranks: Ranks | None = None,
        sync_stats: bool = True,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if literal and projection not in ("auto", "eager"):
            raise ValueError(f"the literal step projects eagerly; projection={projection!r} cannot be served")
        for name in ("encoder", "predictor", "regularizer", "predcost"):
            if not isinstance(getattr(jepa, name, None), nn.Module):
                raise ValueError(f"jepa has no module {name!r}; a step takes a JEPA of fastjepa or eb_jepa")
        if getattr(jepa.predictor, "is_rnn", False):
            raise ValueError(
                f"jepa.predictor is recurrent ({type(jepa.predictor).__name__}), and a step unrolls in parallel; train "
                "such a model with a loop of your own around jepa.unroll"
            )
        self.jepa = cast(JEPA, jepa)  # or one that has its interface
        self.image_decoder = probe_head("image_decoder", image_decoder, jepa, nn.MSELoss)
        self.detection_head = probe_head("detection_head", detection_head, jepa, nn.BCELoss)
        self.optimizer = optimizer
        self.steps = steps
        self.literal = literal
        self.autocast_dtype = autocast_dtype
        self.projection = projection
        self.ranks = ranks or Ranks()
        self.sync_stats = sync_stats
        if literal and sync_stats and not self.ranks.alone:
            raise ValueError("the literal step takes the statistics of each process alone; give sync_stats=False")
        self._encoder_seen: nn.Module | None = None  # the last one that was looked at
        self._encoder_repeats = False  # whether a call of it calls a BatchNorm more than once
        self._look_at_losses()

    @property
    def loss_problem(self) -> str | None:
        """Why the losses of the JEPA are called as they are; None where they are the published ones."""
        if self._losses_seen_changed():
            self._look_at_losses()
        return self._loss_problem

    def __call__(self, video: Tensor, digit_location: Tensor, clips: int | None = None) -> StepLosses:
        """Zero the gradients, compute losses and gradients, step the optimizer; returns the losses, detached.

        Args:
            video, digit_location: the batch, or this process's part of it (`Ranks.part`).
            clips: how many the whole batch has, where several processes train; default: as many on each as here.

        Raises:
            ValueError, TypeError: as `losses`; a part that is not this process's.
            LostRanksError: another process has ended, or does not answer.
        """
        self.zero_grad()
        losses = self.losses(video, digit_location, clips)
        with span("backward"):
            losses.total.backward()
        if (shares := self._shares(video, clips)) is not None:
            with span("sum of gradients"):
                modules = (self.jepa, self.image_decoder, self.detection_head)
                self.ranks.sum_gradients((p for module in modules for p in module.parameters()), drop_own=shares.empty)
        if self.optimizer is not None:
            with span("optimizer"):
                self.optimizer.step()
        return losses.detach()

    def zero_grad(self) -> None:
        """Drop all gradients of the JEPA and the probes."""
        for module in (self.jepa, self.image_decoder, self.detection_head):
            module.zero_grad(set_to_none=True)

    def losses(self, video: Tensor, digit_location: Tensor, clips: int | None = None) -> StepLosses:
        """The losses of one step, with graph. Moves BatchNorm's running buffers as one step of the original does.

        Where several processes train, these are the losses of the whole batch, and a backward pass from `total` leaves
        this process's part of the gradients: their sum over the processes is the whole.

        Raises:
            ValueError: shapes that do not fit, fewer than 3 frames; a loss was replaced by one that `projection` does
                not serve, or that is not for statistics of several processes.
            TypeError: a video that is not floating point.
        """
        check_batch(video, digit_location)
        shares = self._shares(video, clips)
        if shares is not None and not self.sync_stats:
            of_own_clips = self._literal if self.literal else self._step_losses
            # What is told is the mean over all clips; what it is differentiated by is this process's part of that.
            return StepLosses(*global_mean(torch.stack(of_own_clips(video, digit_location)), shares).unbind())
        if self.literal:
            return self._literal(video, digit_location)
        if shares is not None and self.loss_problem is not None:
            raise ValueError(
                f"statistics of several processes are for the published losses ({self.loss_problem}); give "
                "sync_stats=False"
            )
        return self._step_losses(video, digit_location, shares)

    def _shares(self, video: Tensor, clips: int | None) -> Shares | None:
        ranks, own = self.ranks, len(video)
        shares = ranks.shares(own * ranks.size if clips is None else clips)
        if shares is not None and own != max(1, shares.counts[ranks.rank]):
            raise ValueError(
                f"video has {own} clips, and of {clips} clips on {ranks.size} processes {shares.counts[ranks.rank]} "
                f"are those of process {ranks.rank} (where it has none, it takes one that is not its own)"
            )
        return shares

    def _step_losses(self, video: Tensor, digit_location: Tensor, shares: Shares | None = None) -> StepLosses:
        # Nothing of several processes where there is one: torch.compile takes this as one graph.
        of_all = contextlib.nullcontext() if shares is None else global_statistics(shares)
        with of_all:
            with self._autocast(video.device):
                with span("encode"):
                    state = self._encode(video)
                state, predictions = parallel_unroll(self.jepa.predictor, state, None, self.steps)
            with span("losses"):
                if self.loss_problem is None:
                    vc, vc_unweighted, std, cov, pred = self._projected(state, predictions, shares)
                else:
                    vc, vc_unweighted, std, cov, pred = self._as_they_are(state, predictions)
                jepa = vc + pred
                recon = self._reconstruct(state.detach(), video)
                det = self._detect(state.detach(), digit_location)
                if shares is not None:
                    recon, det = global_mean(torch.stack((recon, det)), shares).unbind()
        return StepLosses(jepa + recon + det, jepa, vc, vc_unweighted, std, cov, pred, recon, det)

    def _encode(self, video: Tensor) -> Tensor:
        """The states; the encoder's buffers move as by the original's calls."""
        encoder = self.jepa.encoder
        # The published network is known to call each BatchNorm once; another one is looked at, at its first step.
        known = type(encoder) is ResNet5 or getattr(encoder, "is_fused", False)
        if not known and encoder is not self._encoder_seen:
            self._encoder_repeats = batch_norm_calls(encoder, video) > 1
            self._encoder_seen = encoder
        if known or not self._encoder_repeats:
            with repeated_updates(encoder, ENCODER_CALLS):
                return encoder(video)
        state: Tensor = encoder(video)
        with torch.no_grad():
            for _ in range(ENCODER_CALLS - 1):
                encoder(video)
        return state

    def _projected(
        self, state: Tensor, predictions: list[Tensor], shares: Shares | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """vc, unweighted, std, cov and pred of the published losses, each state projected once."""
        regularizer: Any = self.jepa.regularizer
        predcost: Any = self.jepa.predcost
        std, cov, preds = projected_losses(
            regularizer.proj, predcost.proj, state, predictions, path=self._projection_path(), shares=shares
        )
        vc = regularizer.std_coeff * std + regularizer.cov_coeff * cov
        return vc, std + cov, std, cov, preds.sum() / self.steps

    def _as_they_are(self, state: Tensor, predictions: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The same of any losses, called as the original calls them, but in fp32 or better."""
        dtype = torch.promote_types(state.dtype, torch.float32)
        with torch.autocast(state.device.type, enabled=False):
            state = state.to(dtype)
            vc, vc_unweighted, parts = self.jepa.regularizer(state, None)
            pred = torch.zeros((), dtype=dtype, device=state.device)
            for prediction in predictions:
                pred = pred + self.jepa.predcost(state, prediction.to(dtype)) / self.steps
        return vc, vc_unweighted, _part(parts, "std_loss", vc), _part(parts, "cov_loss", vc), pred

    def _losses_seen_changed(self) -> bool:
        regularizer, predcost, margin = self._losses_seen
        jepa = self.jepa
        return jepa.regularizer is not regularizer or jepa.predcost is not predcost or std_margin(regularizer) != margin

    def _look_at_losses(self) -> None:
        """Try what the JEPA's losses compute; once for each, because it takes milliseconds."""
        jepa = self.jepa
        self._losses_seen = (jepa.regularizer, jepa.predcost, std_margin(jepa.regularizer))
        self._loss_problem: str | None = None
        for name, problem_of in (("regularizer", regularizer_problem), ("predcost", predcost_problem)):
            if (problem := problem_of(getattr(jepa, name))) is not None:
                self._loss_problem = f"{name}: {problem}"
                break
        if self._loss_problem is not None and self.projection in ("closed_form", "fused"):
            raise ValueError(f"projection={self.projection!r} cannot be served: {self._loss_problem}; use 'auto'")

    def _projection_path(self) -> ProjectionPath:
        """What was asked for; "auto" is what the regularizer says, if it was swapped in and says something, and if that
        covers the projectors: two different ones, or one in eval mode, are called as they are.
        """
        regularizer: Any = self.jepa.regularizer
        predcost: Any = self.jepa.predcost
        if self.projection != "auto" or isinstance(shared_layers(regularizer.proj, predcost.proj), str):
            return self.projection
        return getattr(regularizer, "projection_path", "auto")

    def _literal(self, video: Tensor, digit_location: Tensor) -> StepLosses:
        with self._autocast(video.device):
            _, unrolled = self.jepa.unroll(video, None, nsteps=self.steps, unroll_mode="parallel")
            recon_state = self.jepa.encode(video)
            det_state = self.jepa.encode(video)
        assert unrolled is not None
        jepa, vc, vc_unweighted, parts, pred = unrolled
        std, cov = _part(parts, "std_loss", vc), _part(parts, "cov_loss", vc)
        recon = self._reconstruct(recon_state, video)
        det = self._detect(det_state, digit_location)
        total = jepa + recon + det
        return StepLosses(total, jepa, vc, vc_unweighted, std, cov, pred, recon, det)

    def _reconstruct(self, state: Tensor, video: Tensor) -> Tensor:
        with self._autocast(video.device):
            image = self.image_decoder(state)
        return F.mse_loss(image.to(video.dtype), video)

    def _detect(self, state: Tensor, digit_location: Tensor) -> Tensor:
        head = self.detection_head
        if type(head) is DetHead:
            with self._autocast(state.device):
                return detection_loss(head(state), digit_location)
        # Ours takes its sigmoid in fp32 whatever autocast says. The original's takes it of bf16 numbers: what is more
        # than 0.998 becomes 1, where the loss of an empty cell is 100 and its gradient 0. (The head is small, and sees
        # maps of 8×8: its precision costs nothing.)
        parameter = next(head.parameters(), None)
        dtype = torch.promote_types(state.dtype, torch.float32) if parameter is None else parameter.dtype
        with torch.autocast(state.device.type, enabled=False):
            return detection_loss(head(state.to(dtype)), digit_location)

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)


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
    image_decoder = probe_head("image_decoder", image_decoder, jepa, nn.MSELoss)
    detection_head = probe_head("detection_head", detection_head, jepa, nn.BCELoss)
    return torch.optim.Adam(
        [
            {"params": list(jepa.parameters()), "lr": lr},
            {"params": list(image_decoder.parameters()), "lr": lr / 10},
            {"params": list(detection_head.parameters()), "lr": lr},
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
