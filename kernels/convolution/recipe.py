"""The layers of the published networks at the sizes of the recipe: what configurations are chosen and audited for."""

from __future__ import annotations

from dataclasses import replace

from fastjepa.kernels.convolution.layer import Layer, Precision

IMAGE, WIDTH, STATE, PIXELS = 1, 32, 16, 64  # channels of an image, of the first maps, of a state; height and width


def predictor_layers(frames: int, precision: Precision = "bf16", pixels: int = PIXELS) -> dict[str, Layer]:
    """The launches of one step of a rollout of `frames` clips, by the name of their (last) convolution; the head is
    part of the last.
    """
    h = WIDTH
    full = Layer((h,), h, frames, pixels, pixels, precision=precision)
    layers = {"conv1": replace(full, sources=(STATE, STATE)), "enc1.conv1": full}
    layers["enc1.conv2"] = replace(full, residual=True)
    for level, name in enumerate(("enc2", "enc3", "bott"), start=1):
        side, before, c = pixels >> level, h << (level - 1), h << level
        layers[f"{name}.conv1"] = Layer((before,), c, frames, 2 * side, 2 * side, stride=2, precision=precision)
        layers[f"{name}.conv2"] = Layer(
            (c,), c, frames, side, side, shortcut=(before,), shortcut_stride=2, precision=precision
        )
    for level in (2, 1, 0):
        side, c, number = pixels >> level, h << level, level + 1
        layers[f"up{number}"] = Layer((2 * c,), c, frames, side // 2, side // 2, kernel_size=2, precision=precision)
        layers[f"dec{number}.conv1"] = Layer((c, c), c, frames, side, side, precision=precision)
        layers[f"dec{number}.conv2"] = Layer(
            (c,), c, frames, side, side, shortcut=(c, c), head=0 if level else STATE, precision=precision
        )
    return layers


def encoder_layers(frames: int, precision: Precision = "bf16", pixels: int = PIXELS) -> dict[str, Layer]:
    """The launches of the encoder on `frames` frames."""
    h = WIDTH
    full = Layer((h,), h, frames, pixels, pixels, precision=precision)
    return {
        "conv1": replace(full, sources=(IMAGE,)),
        "layer1.conv1": full,
        "layer1.conv2": replace(full, residual=True),
        "layer2.conv1": replace(full, out=2 * h),
        "layer2.conv2": replace(full, sources=(2 * h,), out=2 * h, shortcut=(h,)),
        "layer3.conv1": replace(full, sources=(2 * h,), out=STATE),
        "layer3.conv2": replace(full, sources=(STATE,), out=STATE, shortcut=(2 * h,)),
    }
