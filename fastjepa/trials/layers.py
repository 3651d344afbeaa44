"""Which layers our own convolutions make faster than torch's do: each alone, at the sizes at which it runs.

A layer takes microseconds where a clip is rolled out alone, less than a host needs to launch it. So calls are recorded
as a CUDA graph, many in one, and the device times the replay, with the caches as the calls before left them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.harness.timing import HostTimer, Timer, WarmDeviceTimer, quantile
from fastjepa.calibration.layers import LAYERS
from fastjepa.fused.folded_layers import INPUT, FoldedLayer, encoder_layers, sizes_of, unet_layers
from fastjepa.fused.folded_run import Sources, run_layer
from fastjepa.fused.folded_weights import FoldedWeights, LayerWeights
from fastjepa.graphs.capture import Recording

SECONDS = 2.0 / len(LAYERS)  # for the rounds of each
MOST_ROUNDS = 7
TURN_MS, MOST_CALLS = 0.5, 20  # a turn repeats a call until it takes about so long, but not more often


class Pair(NamedTuple):
    """Two ways to run one layer, on the same numbers; neither waits for the device."""

    ours: Callable[[], Tensor]
    torchs: Callable[[], Tensor]


def pairs_of_networks(
    encoder: nn.Module, predictor: Any, video: Tensor, dtype: torch.dtype, *, tf32: bool
) -> Iterator[tuple[str, Pair]]:
    """Every launch of the folded networks by its name in `calibration.layers`, one at a time: its maps are made then.

    Args:
        encoder, predictor: folded, or of a form that can be.
        video: (B, C, T, H, W): all frames are encoded at once, and B states predicted.
        dtype: in which networks compute. Images stay fp32 for our first convolution, which reads them as they are.
        tf32: whether our convolutions multiply fp32 in TF32.
    """
    B, C, T, H, W = video.shape
    launches = encoder_layers(encoder)
    yield from _pairs("encoder", launches, (C,), (B * T, H, W), dtype, video.device, tf32)
    size, D = sizes_of(launches, H, W)[launches[-1].name], launches[-1].out_channels
    states = (D,) * predictor.context_length
    yield from _pairs("predictor", unet_layers(predictor.predictor), states, (B, *size), dtype, video.device, tf32)


def _pairs(
    part: str,
    launches: Sequence[FoldedLayer],
    sources: tuple[int, ...],  # the channels of each map that it is given
    frames: tuple[int, int, int],  # how many, and their height and width
    dtype: torch.dtype,
    device: torch.device,
    tf32: bool,
) -> Iterator[tuple[str, Pair]]:
    count, *size = frames
    sizes = sizes_of(launches, *size)
    channels = {INPUT: sources} | {layer.name: (layer.out_channels,) for layer in launches}
    generator = torch.Generator(device).manual_seed(0)

    def maps(name: str) -> Sources:
        shapes = [(count, n, *sizes[name]) for n in channels[name]]
        drawn = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
        if part == "encoder" and name == INPUT:
            return tuple(drawn)
        return tuple(x.to(dtype, memory_format=torch.channels_last) for x in drawn)

    for layer in launches:
        if f"{part}.{layer.name}" not in LAYERS:
            continue  # a head too large to be part of the launch before it
        ours, torchs = (FoldedWeights([layer], names, dtype, device).of[layer.name] for names in ([layer.name], []))
        read = {name: maps(name) for name in layer.read}
        made = (count, layer.out_channels, *layer.size(*sizes[layer.sources[0]]))
        out = torch.empty(made, dtype=dtype, device=device, memory_format=torch.channels_last)
        yield (
            f"{part}.{layer.name}",
            Pair(
                partial(run_layer, layer, ours, read, out, by_kernel=True, tf32=tf32),
                partial(_by_torch, layer, torchs, read, out, dtype),
            ),
        )


def _by_torch(
    layer: FoldedLayer, weights: LayerWeights, read: dict[str, Sources], out: Tensor, dtype: torch.dtype
) -> Tensor:
    """Torch's way, for which images are cast and laid out first; what has its form stays as it is."""
    laid = {
        name: tuple(x.to(dtype).contiguous(memory_format=torch.channels_last) for x in sources)
        for name, sources in read.items()
    }
    return run_layer(layer, weights, laid, out, by_kernel=False, tf32=False)


@torch.no_grad()
def faster_layers(pairs: Iterable[tuple[str, Pair]], device: torch.device) -> tuple[str, ...]:
    """The names of the layers that our way runs faster, sorted: by medians of rounds in which the two take turns."""
    timer = WarmDeviceTimer(device) if device.type == "cuda" else HostTimer(device, "layer")
    faster = []
    gc.collect()
    gc.freeze()  # each recording collects garbage, and need not look at what was there before all of them
    try:
        for name, pair in pairs:
            ours, torchs = _milliseconds(pair, device, timer)
            if ours < torchs:
                faster.append(name)
    finally:
        gc.unfreeze()
    return tuple(sorted(faster))


def _milliseconds(pair: Pair, device: torch.device, timer: Timer) -> tuple[float, float]:
    """What a turn of each takes."""
    calls = _calls(pair, timer)
    turns = [Recording(_repeated(call, calls), device, name="a layer") for call in pair]
    times: tuple[list[float], list[float]] = ([], [])
    for turn in turns:
        turn.replay()
    begun = time.monotonic()
    for _ in range(MOST_ROUNDS):
        for turn, found in zip(turns, times, strict=True):
            timer.time(turn.replay)
            found.extend(timer.milliseconds())
        if time.monotonic() - begun > SECONDS:
            break
    return quantile(times[0], 0.5), quantile(times[1], 0.5)


def _calls(pair: Pair, timer: Timer) -> int:
    """How often a turn repeats a call: the same of both."""
    for call in pair:
        call()  # to load, compile and choose
    for call in pair:
        timer.time(call)
    return max(1, min(MOST_CALLS, int(TURN_MS / max(1e-6, min(timer.milliseconds())))))


def _repeated(call: Callable[[], Tensor], calls: int) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(calls):
            call()

    return turn
