"""The job that the suites measure: the default recipe of Video JEPA at some size, its inputs, and its work counted."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.harness.case import BACKWARD, BOTH, FORWARD, Work
from bench.harness.variants import Tensors
from fastjepa.model.jepa import JEPA, build_jepa
from fastjepa.model.networks import DetHead, ImageDecoder
from fastjepa.model.probes import build_probes
from fastjepa.moving_mnist import ClipSet

STD_COEFF, COV_COEFF = 10.0, 100.0
HIDDEN = OUT = 64  # features of the projector


@dataclass(frozen=True)
class Recipe:
    """Sizes of a training job; the defaults are the published ones. `pixels` is the side of the square frames."""

    batch: int = 64
    frames: int = 10
    pixels: int = 64
    henc: int = 32
    hpre: int = 32
    dstc: int = 16
    steps: int = 4

    @property
    def rows(self) -> int:
        """N: how many vectors the projector sees in one call."""
        return self.batch * self.frames * self.pixels**2

    def __str__(self) -> str:
        widths = "" if (self.henc, self.hpre) == (32, 32) else f" widths {self.henc}, {self.hpre}"
        return f"B={self.batch} T={self.frames} {self.pixels}x{self.pixels} D={self.dstc} K={self.steps}{widths}"


TINY = Recipe(batch=2, frames=5, pixels=16, henc=4, hpre=4, dstc=4, steps=2)

GRAPH = "CUDA graph"  # the step's last variant

Model = tuple[JEPA, ImageDecoder, DetHead]


def build_model(recipe: Recipe, device: torch.device, dtype: torch.dtype = torch.float32) -> Model:
    """The JEPA and its probes with the same weights every time: drawn on the CPU in fp32, then moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2025)
        jepa = build_jepa(
            dobs=1, henc=recipe.henc, hpre=recipe.hpre, dstc=recipe.dstc,
            std_coeff=STD_COEFF, cov_coeff=COV_COEFF,
        )  # fmt: skip
        decoder, head = build_probes(dobs=1, dstc=recipe.dstc)
    return jepa.to(device, dtype), decoder.to(device, dtype), head.to(device, dtype)


def make_batch(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Random bytes / 255 as video (B, 1, T, H, W) and digit maps (B, T, 8, 8) with 3 % of the cells set.

    In fp32 also where `dtype` is narrower: in mixed precision a batch is fp32, and activations are not.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    indices = torch.arange(recipe.batch, device=device)
    video, digit_location = make_clips(recipe, device).batch(indices, dtype)
    return {"video": video, "digit_location": digit_location}


def make_clips(recipe: Recipe, device: torch.device, batches: int = 1) -> ClipSet:
    """The clips of which `make_batch` is the first batch."""
    generator = torch.Generator().manual_seed(2025)
    shape = (batches * recipe.batch, recipe.frames)
    video = torch.randint(0, 256, (*shape, recipe.pixels, recipe.pixels), generator=generator, dtype=torch.uint8)
    maps = torch.rand(*shape, DetHead.CELLS, DetHead.CELLS, generator=generator) < 0.03
    return ClipSet(video, maps.to(torch.uint8)).to(device)


@contextlib.contextmanager
def arithmetic(precision: str, *, fastest: bool = False) -> Iterator[None]:
    """Products of fp32 tensors in tf32 on a GPU if `precision` is "tf32", in fp32 otherwise. Set for each call, because
    variants take turns.

    cuDNN's algorithms are those of the trainer: deterministic, and chosen by its rules. With `fastest` it measures them
    all, the ones with atomics too, and takes the fastest: two runs then differ in the last bits.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    cudnn.deterministic, cudnn.benchmark = not fastest, fastest
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


# ---- work: FLOPs of convolutions and linear layers, and the elements they must move ----------------------------------


@dataclass(frozen=True)
class Layers:
    """One call of a network: FLOPs forward, FLOPs backward, and elements that its layers read and write forward."""

    forward: int
    backward: int
    elements: int


def count(network: nn.Module, *inputs: Tensor) -> Layers:
    """Count one call of `network`; nothing is computed, so sizes do not matter.

    A layer's products are 2 · (multiply–adds). Backward does them once for the weights' gradient and once for its
    input's, which is left out where no gradient is wanted: `inputs` that do not require one.
    """
    network = copy.deepcopy(network).to("meta")
    forward = backward = elements = 0

    def add(layer: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal forward, backward, elements
        x = arguments[0]
        weight = layer.weight
        assert isinstance(weight, Tensor)
        # Each input position of a transposed convolution, and each output position of the others, uses every weight
        # of one of its channels.
        transposed = isinstance(layer, nn.ConvTranspose2d)
        positions = x.numel() // weight.shape[0] if transposed else out.numel() // weight.shape[0]
        products = 2 * positions * weight.numel()
        forward += products
        backward += products * (2 if x.requires_grad else 1)
        elements += x.numel() + out.numel()

    kinds = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
    hooks = [layer.register_forward_hook(add) for layer in network.modules() if isinstance(layer, kinds)]
    network(*(x.to("meta").requires_grad_(x.requires_grad) for x in inputs))
    for hook in hooks:
        hook.remove()
    return Layers(forward, backward, elements)


@dataclass(frozen=True)
class StepWork:
    """FLOPs of one training step as the original does it and with each thing done once, and the bytes of the latter."""

    original_flops: int
    flops: int
    elements: int

    def once(self, dtype: torch.dtype) -> Work:
        """What any implementation cannot do without, with activations stored in `dtype`."""
        return Work(self.elements * dtype.itemsize, self.flops)


def step_work(recipe: Recipe) -> StepWork:
    """Count one training step. Bytes: each layer reads its input and writes its output once forward, once for the
    input's gradient and once for the weights'; the losses are those of the closed form (`losses_work`).
    """
    jepa, decoder, head = build_model(recipe, torch.device("meta"))
    video = torch.empty(recipe.batch, 1, recipe.frames, recipe.pixels, recipe.pixels, device="meta")
    state = torch.empty(recipe.batch, recipe.dstc, *video.shape[2:], device="meta")
    rows = torch.empty(state.numel() // recipe.dstc, recipe.dstc, device="meta")
    encoder = count(jepa.encoder, video)
    predictor = count(jepa.predictor, state.clone().requires_grad_())
    projector = count(jepa.regularizer.proj, rows.requires_grad_())  # type: ignore[arg-type]
    probes = [count(probe, state) for probe in (decoder, head)]
    steps = recipe.steps
    networks = encoder.forward + encoder.backward + steps * (predictor.forward + predictor.backward)
    networks += sum(probe.forward + probe.backward for probe in probes)
    closed = losses_work(recipe, BOTH, torch.float32)
    elements = 3 * (encoder.elements + steps * predictor.elements + sum(probe.elements for probe in probes))
    return StepWork(
        # The encoder runs twice more for the probes, forward only, and the projector 1 + 2·steps times. The covariance
        # of N rows of `out` features comes on top.
        original_flops=networks
        + 2 * encoder.forward
        + (1 + 2 * steps) * (projector.forward + projector.backward)
        + 3 * 2 * recipe.rows * OUT**2,
        flops=networks + closed.flops,
        elements=elements + closed.bytes_moved // 4,
    )


def losses_work(recipe: Recipe, phase: str, dtype: torch.dtype) -> Work:
    """What the closed form of the projected losses needs, at least.

    The states are read twice forward (moments; projections), since BatchNorm needs the statistics of all rows first,
    and for the same reason twice backward, where their gradients are written.
    """
    states = recipe.steps + 1
    bytes_per_pass = states * recipe.rows * recipe.dstc * dtype.itemsize
    project, square, moments = 2 * HIDDEN * recipe.dstc, 2 * HIDDEN**2, 2 * recipe.dstc**2
    # Forward: x xᵀ, W1 x, and r rᵀ or ΔΔᵀ. Backward: W1 x and G r in both passes, dy xᵀ in one, W1ᵀ dh in the other.
    forward = Work(2 * bytes_per_pass, states * recipe.rows * (moments + project + square))
    backward = Work(3 * bytes_per_pass, states * recipe.rows * (2 * (project + square) + 2 * project))
    if phase == FORWARD:
        return forward
    if phase == BACKWARD:
        return backward
    return Work(forward.bytes_moved + backward.bytes_moved, forward.flops + backward.flops)
