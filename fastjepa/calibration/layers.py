"""The launches of the networks with BatchNorm folded, by name: of each, our kernels or torch's may be the faster.

A launch is named for its (last) convolution: a shortcut, a residual and the head are part of it. The folded networks
call theirs the same (`layer_names`), without the name of the part before it.
"""

from __future__ import annotations

from collections.abc import Sequence

_OF_BLOCK = ("conv1", "conv2")
ENCODER_LAYERS = ("conv1", *(f"layer{i}.{conv}" for i in (1, 2, 3) for conv in _OF_BLOCK))
PREDICTOR_LAYERS = (
    "conv1",
    *(f"{block}.{conv}" for block in ("enc1", "enc2", "enc3", "bott") for conv in _OF_BLOCK),
    *(name for i in (3, 2, 1) for name in (f"up{i}", *(f"dec{i}.{conv}" for conv in _OF_BLOCK))),
)
LAYERS_OF = {"encoder": ENCODER_LAYERS, "predictor": PREDICTOR_LAYERS}
LAYERS = tuple(f"{part}.{name}" for part, names in LAYERS_OF.items() for name in names)


def checked_layers(name: str, layers: Sequence[str]) -> tuple[str, ...]:
    """The layers, if they are those of `LAYERS`, sorted, each once; `name` is what they were given as.

    Raises:
        ValueError: they are not.
    """
    for layer in layers:
        if layer not in LAYERS:
            raise ValueError(f"{name} must be names of layers as {LAYERS[0]} or {LAYERS[-1]}; got {layer!r:.40}")
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"{name} must be sorted, and each layer in it once")
    return tuple(layers)


def join_layers(layers: Sequence[str]) -> str:
    """Layers as `Choice.convolutions` names them."""
    return "all" if set(layers) == set(LAYERS) else ",".join(sorted(layers))
