"""The sizes of a Video JEPA read from the shapes of its weights, and modules filled with weights from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastjepa.files.safe_files import CheckpointError
from fastjepa.files.state_dicts import check_tensors

Module = TypeVar("Module", bound=nn.Module)
Tensors = Mapping[str, Any]  # from outside: the values are tensors only once checked


def encoder_sizes(encoder: Tensors) -> dict[str, int]:
    """`dobs`, `henc` and `dstc` from the tensors of a ResNet5. Raises CheckpointError if they are not of one."""
    henc, dobs = _shape(encoder, "conv1.weight", 4)[:2]
    return {"dobs": dobs, "henc": henc, "dstc": _shape(encoder, "layer3.conv2.weight", 4)[0]}


def predictor_sizes(predictor: Tensors) -> dict[str, int]:
    """`hpre`, `dstc` and `context_length` from the tensors of a StateOnlyPredictor over a ResUNet."""
    hpre, in_d = _shape(predictor, "predictor.conv1.weight", 4)[:2]
    dstc = _shape(predictor, "predictor.head.weight", 4)[0]
    if dstc == 0 or in_d == 0 or in_d % dstc:
        raise CheckpointError(f"a predictor of {in_d} input channels cannot read whole states of {dstc} channels")
    return {"hpre": hpre, "dstc": dstc, "context_length": in_d // dstc}


def projector_sizes(projector: Tensors) -> str:
    """The sizes of a Projector, as its constructor takes them: "16-64-64"."""
    # Linear weights are matrices, BatchNorm's are vectors; keys are net.<position>.weight.
    positions = sorted(
        int(key.split(".")[1])
        for key, value in projector.items()
        if key.startswith("net.") and key.endswith(".weight") and key.split(".")[1].isdecimal()
        if isinstance(value, Tensor) and value.dim() == 2
    )
    if not positions:
        raise CheckpointError("the projector has no Linear layer")
    shapes = [_shape(projector, f"net.{position}.weight", 2) for position in positions]
    return "-".join(str(size) for size in (shapes[0][1], *(shape[0] for shape in shapes)))


def decoder_sizes(decoder: Tensors) -> dict[str, int]:
    """`in_d`, `out_d` and `hidden`, the first arguments of ImageDecoder."""
    hidden, in_d = _shape(decoder, "net.0.weight", 4)[:2]
    return {"in_d": in_d, "out_d": _shape(decoder, "net.2.weight", 4)[0], "hidden": hidden}


def detection_head_sizes(head: Tensors) -> dict[str, int]:
    """`in_d`, `h_d` and `out_d`, the arguments of DetHead."""
    h_d, in_d = _shape(head, "head.0.0.weight", 5)[:2]
    return {"in_d": in_d, "h_d": h_d, "out_d": _shape(head, "head.0.2.weight", 5)[0]}


def check_compatible(sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Raise CheckpointError if parts, each with its sizes as above, do not fit the encoder. Heads may be missing."""
    dstc, dobs = sizes["encoder"]["dstc"], sizes["encoder"]["dobs"]
    reads = {
        "predictor": sizes["predictor"]["dstc"],
        **{name: sizes[name]["in_d"] for name in ("decoder", "detection_head") if name in sizes},
    }
    for name, channels in reads.items():
        if channels != dstc:
            raise CheckpointError(f"the encoder makes states of {dstc} channels, the {name} reads {channels}")
    if "decoder" in sizes and sizes["decoder"]["out_d"] != dobs:
        raise CheckpointError(
            f"the encoder reads images of {dobs} channels, the decoder paints {sizes['decoder']['out_d']}"
        )


def checked_device(device: str | torch.device) -> torch.device:
    """The device. Raises ValueError if nothing can be put there."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used here: {error}") from error


def build_filled(what: str, build: Callable[[], Module], tensors: Tensors) -> Module:
    """The module that `build` makes, with exactly these tensors as its state, in their floating dtype, on the CPU.

    It is built without memory and without drawing random numbers, and filled only if every key and shape fits.

    Raises:
        CheckpointError: they do not fit, or their floating dtypes differ.
    """
    dtypes = {value.dtype for value in tensors.values() if isinstance(value, Tensor) and value.is_floating_point()}
    if len(dtypes) != 1:
        raise CheckpointError(f"{what} has tensors of {len(dtypes)} floating dtypes, expected one")
    try:
        with torch.device("meta"):
            module = build().to(dtypes.pop())
    except (ValueError, RuntimeError) as error:  # sizes of 0, or beyond what a tensor can have
        raise CheckpointError(f"{what} has sizes of which no model can be built: {error}") from error
    check_tensors(what, module.state_dict(), tensors)
    for key, value in tensors.items():
        # A file can claim a huge shape over little data (stride 0); what it claims is about to be allocated.
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise CheckpointError(f"{what}: {key} is larger than the data it has")
    module.to_empty(device="cpu")
    module.load_state_dict(dict(tensors))
    return module


def _shape(tensors: Tensors, key: str, rank: int) -> tuple[int, ...]:
    value = tensors.get(key)
    if not isinstance(value, Tensor) or value.dim() != rank:
        found = "missing" if value is None else f"{tuple(value.shape) if isinstance(value, Tensor) else type(value)}"
        raise CheckpointError(f"cannot tell the sizes of the model: {key} is {found}, expected a {rank}-D tensor")
    return tuple(value.shape)
