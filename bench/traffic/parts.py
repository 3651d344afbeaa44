"""To which part of the work an operator belongs: by the code that calls it, or that called it in the forward pass.

Autograd's anomaly mode writes the Python stack of its creation into every node of the graph, so that the backward pass
can be asked whose it is. Gradients that autograd adds where two meet, and those that our own code adds for it, are a
part of their own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fastjepa.environment import ROOT

CONVOLUTIONS = "convolutions"
ACTIVATIONS = "BatchNorm and activation"
LAYOUT = "concatenation, layout and casts"
ACCUMULATION = "gradient accumulation"
LOSSES = "losses"
PROBES = "probes"
BUFFERS = "buffers"
OPTIMIZER = "optimizer"
PARTS = (CONVOLUTIONS, ACTIVATIONS, LAYOUT, ACCUMULATION, LOSSES, PROBES, BUFFERS, OPTIMIZER)

# (end of a file's path, function or None for any) → part; the innermost that is known says it.
_PLACES: tuple[tuple[str, str | None, str], ...] = (
    ("model/step.py", "_reconstruct", PROBES),
    ("model/step.py", "_detect", PROBES),
    ("model/probes.py", None, PROBES),
    ("model/step.py", "_projected", LOSSES),
    ("model/losses.py", None, LOSSES),
    ("model/projected_losses.py", None, LOSSES),
    ("model/running_stats.py", "advance_buffers", BUFFERS),
    ("model/running_stats.py", "_count", BUFFERS),
    ("moving_mnist/clips.py", None, LAYOUT),
    ("optim/optimizer.py", None, OPTIMIZER),
)
_OURS = tuple(str(ROOT / folder) for folder in ("fastjepa", "kernels"))
_HEADS = {"ImageDecoder", "DetHead"}
_LAYOUT_OPERATORS = {
    "cat", "clone", "copy_", "_to_copy", "_foreach_copy_", "slice_backward", "zeros", "zero_", "zeros_like",
    "new_zeros", "fill_", "constant_pad_nd", "select_backward", "upsample_bilinear2d", "upsample_bilinear2d_backward",
}  # fmt: skip
_ADDITIONS = {"add", "add_"}


def part_of(name: str, args: tuple[Any, ...], out: Any) -> str:
    """The part of an operator, called "aten.cat" or "fastjepa::batch_norm_forward", that runs now."""
    node = torch._C._current_autograd_node()
    found = _of_place(_stack() if node is None else _stack_of(node))
    if found is not None:
        return found
    operator = name.rpartition(".")[2] if name.startswith("aten.") else name
    if "convolution" in operator:
        return CONVOLUTIONS
    if operator == "fastjepa::gather_frames" or (node is not None and operator in _ADDITIONS):
        return ACCUMULATION
    if operator in _LAYOUT_OPERATORS:
        return LAYOUT
    if operator in _ADDITIONS and isinstance(args[0], Tensor) and args[0].dtype == torch.int64:
        return BUFFERS  # num_batches_tracked
    return ACTIVATIONS


def _of_place(stack: Iterator[tuple[str, str]]) -> str | None:
    innermost = True  # of our own code
    for file, function in stack:
        if function in _HEADS or (innermost and file.endswith("training/evaluation.py")):
            return PROBES
        innermost = innermost and not file.startswith(_OURS)
        for ending, wanted, part in _PLACES:
            if file.endswith(ending) and wanted in (None, function):
                return part
    return None


def _stack() -> Iterator[tuple[str, str]]:
    """(file, function) of the callers, the innermost first; of the heads' methods, the class instead of a name."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = type(frame.f_locals.get("self")).__name__
        yield frame.f_code.co_filename, name if name in _HEADS else frame.f_code.co_name
        frame = frame.f_back


_LINE = re.compile(r'File "(.*)", line \d+, in (.*)')


def _stack_of(node: Any) -> Iterator[tuple[str, str]]:
    """The same of the call in the forward pass that made a node."""
    for entry in reversed(node.metadata.get("traceback_", ())):
        if (match := _LINE.search(entry)) is not None:
            yield match[1], match[2]
