"""The JEPA: an encoder, a predictor unrolled through time, and the losses of an unroll.

Shapes: a video is (B, C, T, H, W), its states (B, D, T, H, W).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.files.safe_files import write_atomic
from fastjepa.files.state_dicts import check_tensors, plain_state, strip_compile_prefix
from fastjepa.files.tensor_files import read_tensor_file
from fastjepa.kernels.frame_windows import reference
from fastjepa.model.batch_norm import has_hooks
from fastjepa.model.losses import SquareLossSeq, VCLoss
from fastjepa.model.networks import Projector, ResNet5, ResUNet, StateOnlyPredictor
from fastjepa.profiling import span

# total, vc, vc_unweighted, {"std_loss", "cov_loss"}, prediction
UnrollLosses = tuple[Tensor, Tensor, Tensor, dict[str, Tensor], Tensor]


class JEPA(nn.Module):
    """Joint Embedding Predictive Architecture for video (arXiv 2602.03604), with the interface of `eb_jepa`.

    Attributes:
        single_unroll: the predictor's `is_rnn` (False if it has none): an autoregressive unroll then reads one state at
            a time, whatever `ctxt_window_time` says.
        ploss, rloss: 0; the original has them, and does nothing with them.
    """

    def __init__(
        self,
        encoder: nn.Module,
        aencoder: nn.Module,
        predictor: nn.Module,
        regularizer: nn.Module,
        predcost: nn.Module,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.action_encoder = aencoder
        self.predictor = predictor
        self.single_unroll: bool = getattr(predictor, "is_rnn", False)
        self.regularizer = regularizer
        self.predcost = predcost
        self.ploss = 0
        self.rloss = 0

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the state_dict to `file` with `torch.save`, whole or not at all; everything is on the CPU there.

        Raises:
            CheckpointError: the system refused; what was there before is intact.
        """
        state = {name: tensor.detach().cpu() for name, tensor in plain_state(self).items()}
        write_atomic(file, partial(torch.save, state))

    def load(self, file: str | os.PathLike[str]) -> None:
        """Fill weights and buffers, where they are, from what `save` wrote, here or in the original.

        Raises:
            CheckpointError: missing, damaged, with pickled objects (no code from the file runs), or not the state of
                this model; it names what does not fit, and nothing was changed.
        """
        state = read_tensor_file(file)
        if isinstance(state, dict) and all(isinstance(name, str) for name in state):
            state = {strip_compile_prefix(name): value for name, value in state.items()}
        check_tensors(str(file), plain_state(self), state)
        names = {strip_compile_prefix(name): name for name in self.state_dict()}
        self.load_state_dict({names[name]: value for name, value in state.items()})

    @torch.no_grad()
    def encode(self, observations: Tensor) -> Tensor:
        """Video (B, C, T, H, W) → states (B, D, T, H, W), without gradients. Raises ValueError for other channels."""
        check_channels(self.encoder, observations)
        return self.encoder(observations)

    @torch.no_grad()
    def infer(self, observations: Tensor, actions: Tensor | None = None) -> Tensor:
        """One-step predictions (B, D, T-2, H, W) of every frame from its two encoded predecessors."""
        states, _ = self.unroll(observations, actions, compute_loss=False, return_all_steps=True)
        return states[0]

    def rollout(
        self, video: Tensor | None = None, steps: int = 8, *, states: Tensor | None = None, chunk: int | None = None
    ) -> Tensor:
        """Predict `steps` frames beyond the given ones, in eval mode and without gradients; the modes stay as they are.

        Args:
            video: (B, C, T, H, W), T ≥ the predictor's context (2 as published); encoded first.
            steps: how many frames to predict, ≥ 1, to any horizon.
            states: (B, D, T, H, W) instead of a video.
            chunk: encode and predict this many clips at a time, for less memory; default: all at once.

        Returns:
            The T given states followed by the predicted ones: (B, D, T + steps, H, W).

        Raises:
            ValueError: both or none of video and states, another rank, too few frames, `steps` or `chunk` < 1.
            TypeError: not floating point.
        """
        with eval_mode(self):
            return autoregressive_rollout(self.encoder, self.predictor, video, steps, states=states, chunk=chunk)

    def unroll(
        self,
        observations: Tensor,
        actions: Tensor | None = None,
        nsteps: int = 1,
        unroll_mode: str = "parallel",
        ctxt_window_time: int = 1,
        compute_loss: bool = True,
        return_all_steps: bool = False,
    ) -> tuple[Tensor | list[Tensor], UnrollLosses | None]:
        """Predict the future of the encoded video, step after step, each step reading the one before.

        *parallel*: every frame at once. p⁰ = z; each step predicts all frames from p and keeps the first
        `context_length` encoded ones: pᵏ = cat(z[:, :, :2], predictor(pᵏ⁻¹) without its last entry).
        *autoregressive*: starts from the first `ctxt_window_time` encoded frames and appends one frame a step.

        Args:
            observations: (B, C, T, H, W) floating point.
            actions: (B, A, ·) or None; encoded by the action encoder and passed to the predictor.
            nsteps: how many steps, ≥ 1.
            unroll_mode: "parallel" or "autoregressive".
            ctxt_window_time: the autoregressive window, in frames; 1 if the predictor is recurrent.
            compute_loss: also return the losses; each step's prediction loss is divided by `nsteps`.
            return_all_steps: return the list over steps instead of the last step's states.

        Returns:
            States: the last pᵏ (B, D, T, H, W) in parallel mode, the sequence (B, D, window + nsteps, H, W) in
            autoregressive mode; or the list over steps: predictions (B, D, T-2, H, W), or the growing sequence.
            Losses: (total, vc, vc_unweighted, {"std_loss", "cov_loss"}, prediction), or None.

        Raises:
            ValueError: an unknown mode, a rank other than 5, too few frames, `nsteps` < 1, or, in autoregressive mode,
                beyond the actions.
        """
        if unroll_mode not in ("parallel", "autoregressive"):
            raise ValueError(f"unroll_mode must be one of parallel, autoregressive; got {unroll_mode!r}")
        if nsteps < 1:
            raise ValueError(f"nsteps must be at least 1, got {nsteps}")
        if observations.dim() != 5:
            raise ValueError(f"expected a video (B, C, T, H, W), got shape {tuple(observations.shape)}")
        check_channels(self.encoder, observations)
        parallel, frames = unroll_mode == "parallel", observations.shape[2]
        context = getattr(self.predictor, "context_length", 0)
        window = 1 if self.single_unroll else ctxt_window_time
        if not parallel and window < max(context, 1):
            raise ValueError(f"ctxt_window_time must be at least {max(context, 1)} for this predictor, got {window}")
        needed = context + 1 if parallel else window + nsteps if compute_loss else window
        if frames < needed:
            raise ValueError(f"this {unroll_mode} unroll takes at least {needed} frames, got T = {frames}")
        if actions is not None and not parallel and nsteps > actions.shape[2]:
            raise ValueError(f"nsteps is {nsteps}, but there are only {actions.shape[2]} actions")

        encoded_actions = None if actions is None else self.action_encoder(actions)
        state = self.encoder(observations)
        if parallel:
            state, sequences = parallel_unroll(self.predictor, state, encoded_actions, nsteps)
            compared = [(state, sequence) for sequence in sequences]
        else:
            sequences, compared = autoregressive_unroll(self.predictor, state, encoded_actions, nsteps, window)
        losses = None
        if compute_loss:
            vc, vc_unweighted, parts = self.regularizer(state, actions)
            pred = torch.stack([self.predcost(*pair) / nsteps for pair in compared]).sum()
            losses = (vc + pred, vc, vc_unweighted, parts, pred)
        if not return_all_steps:
            return sequences[-1], losses
        return [sequence[:, :, context:] for sequence in sequences] if parallel else sequences, losses


def autoregressive_unroll(
    predictor: nn.Module, state: Tensor, actions: Tensor | None, nsteps: int, window: int
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The sequence after each step, and what the prediction cost compares: each predicted frame and the encoded one."""
    sequences, compared = [], []
    current = state[:, :, :window]
    for i in range(nsteps):
        step_actions = None if actions is None else actions[:, :, max(0, i + 1 - window) : i + 1]
        prediction = predictor(current[:, :, -window:], step_actions)[:, :, -1:]
        current = torch.cat((current, prediction), dim=2)
        sequences.append(current)
        # The prediction goes first, as in the original: a projector's buffers remember the order.
        compared.append((prediction, state[:, :, window + i : window + i + 1]))
    return sequences, compared


def check_channels(encoder: nn.Module, video: Tensor) -> None:
    """Raise ValueError if a video (B, C, T, H, W) or frames (N, C, H, W) have not the channels that the encoder's first
    convolution takes; of an encoder without a `conv1` nothing is known.
    """
    channels = getattr(getattr(encoder, "conv1", None), "in_channels", video.shape[1] if video.dim() > 1 else 0)
    if video.dim() in (4, 5) and video.shape[1] != channels:
        raise ValueError(
            f"the encoder takes a video (B, C, T, H, W) or frames (N, C, H, W) with C = {channels}, got shape "
            f"{tuple(video.shape)}; of a video (B, T, C, H, W), give video.transpose(1, 2)"
        )


def parallel_unroll(
    predictor: nn.Module, state: Tensor, actions: Tensor | None, nsteps: int
) -> tuple[Tensor, list[Tensor]]:
    """The steps of a parallel unroll: pᵏ = cat(z[:, :, :c], predictor(pᵏ⁻¹) without its last entry), p⁰ = z, where c is
    the predictor's `context_length` (0 if it has none). A fused predictor does them in its `unroll_parallel`.

    Args:
        predictor: of states and encoded actions.
        state: z (B, D, T, H, W), whose first c frames every step keeps.
        actions: encoded, or None.
        nsteps: K ≥ 1.

    Returns:
        z, to be used in the losses in place of the one given, and p¹ … pᴷ, each like z.
    """
    fused = own_method(predictor, "unroll_parallel")
    if fused is not None:
        unrolled: tuple[Tensor, list[Tensor]] = fused(state, nsteps)
        return unrolled
    return unroll_step_by_step(predictor, state, nsteps, actions)


def unroll_step_by_step(
    predictor: nn.Module, state: Tensor, nsteps: int, actions: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """`parallel_unroll` by calls of the predictor."""
    context_length = getattr(predictor, "context_length", 0)
    sequences, current = [], state
    for step in range(1, nsteps + 1):
        with span(f"prediction step {step}"):
            # The last entry predicts the frame after the video: it is dropped, but it did count in BatchNorm.
            current = reference.sequence(state[:, :, :context_length], predictor(current, actions))
        sequences.append(current)
    return state, sequences


def build_jepa(
    *, dobs: int, henc: int, hpre: int, dstc: int, std_coeff: float, cov_coeff: float, projector: str | None = None
) -> JEPA:
    """The published Video JEPA: `dobs` image channels, `henc` / `hpre` widths, `dstc` state channels.

    `projector` defaults to "{dstc}-64-64"; one projector serves both losses, as in the original.

    Raises:
        ValueError: a size below 1, or a projector whose first size is not `dstc`.
    """
    for name, value in (("dobs", dobs), ("henc", henc), ("hpre", hpre), ("dstc", dstc)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    sizes = f"{dstc}-64-64" if projector is None else projector
    proj = Projector(sizes)
    if proj.net[0].in_features != dstc:
        raise ValueError(f"the projector {sizes!r} must start with dstc = {dstc}")
    encoder = ResNet5(dobs, henc, dstc)
    predictor = StateOnlyPredictor(ResUNet(2 * dstc, hpre, dstc))
    return JEPA(encoder, encoder, predictor, VCLoss(std_coeff, cov_coeff, proj), SquareLossSeq(proj))


@torch.no_grad()
def autoregressive_rollout(
    encode: Callable[[Tensor], Tensor],
    predictor: Any,
    video: Tensor | None,
    steps: int,
    *,
    states: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """`JEPA.rollout` by `encode`, video → states, and a predictor of every next state from `context_length` = c states.

    Equals `unroll(..., unroll_mode="autoregressive", ctxt_window_time=c)`; the caller sees to eval mode. A predictor
    with a method `roll_out(states, steps, out)`, as an inference network has, does all steps in that.
    """
    given = video if states is None else states
    if given is None or (video is not None and states is not None):
        raise ValueError("rollout takes either a video or states=..., not both and not neither")
    for name, count in (("steps", steps), ("chunk", chunk)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if given.dim() != 5:
        name, letter = ("video", "C") if states is None else ("states", "D")
        raise ValueError(f"{name} must be (B, {letter}, T, H, W), got shape {tuple(given.shape)}")
    frames = given.shape[2]
    if frames < predictor.context_length:
        raise ValueError(f"a rollout starts from at least {predictor.context_length} frames, got {frames}")
    roll_out = own_method(predictor, "roll_out") or partial(roll_out_plainly, predictor)
    out: Tensor | None = None
    first = 0
    for part in given.split(chunk or max(1, len(given))):
        if states is None:
            with span("encode"):
                part = encode(part)
        if out is None:
            out = part.new_empty(len(given), part.shape[1], frames + steps, *part.shape[3:])
        roll_out(part, steps, out[first : first + len(part)])
        first += len(part)
    assert out is not None, "split gives at least one part"
    return out


def roll_out_plainly(predictor: Any, states: Tensor, steps: int, out: Tensor) -> Tensor:
    """States (B, D, T, H, W) and `steps` predicted ones behind them, step by step, in `out` (B, D, T + steps, H, W)."""
    context, frames = predictor.context_length, states.shape[2]
    out[:, :, :frames] = states
    for step in range(steps):
        with span(f"rollout step {step + 1}"):
            at = frames + step
            out[:, :, at : at + 1] = predictor(out[:, :, at - context : at])[:, :, -1:]
    return out


def parallel_tails(predictor: Any, states: Tensor, steps: int) -> Iterator[Tensor]:
    """The frames of a parallel rollout in eval mode that each step computes anew.

    With frozen BatchNorm, prediction i of step k + 1 equals prediction i of step k for i < k. For s = 0 … steps - 1
    this yields the predictions of frames s + c … T - 1 after s + 1 steps, (B, D, T - c - s, H, W).
    """
    context, current = predictor.context_length, states
    for s in range(steps):
        # Predictions of frames s + c … T - 1 read the frames s … T - 2; what lies before them is final.
        with span(f"rollout step {s + 1}"):
            tail = predictor(current[:, :, s:-1], None)
        yield tail
        current = torch.cat((current[:, :, : s + context], tail), dim=2)


def own_method(module: Any, name: str) -> Callable[..., Any] | None:
    """A method of a module's class that does the work of several calls; None if it has none, or where something waits
    for the calls: a hook, or what is wrapped around it (torch.compile), which would hand on what it is asked for.
    """
    method = getattr(type(module), name, None)
    return None if method is None or has_hooks(module) else partial(method, module)


@contextlib.contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; each module's own mode afterwards."""
    before = {module: module.training for root in modules for module in root.modules()}
    try:
        for root in modules:
            root.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in before.items():
            module.training = training
