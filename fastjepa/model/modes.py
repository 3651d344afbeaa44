"""Running modules in eval mode without disturbing their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; each module's own mode afterwards."""
    before = [{module: module.training for module in root.modules()} for root in modules]
    try:
        for root in modules:
            root.eval()
        with torch.no_grad():
            yield
    finally:
        for modes in before:
            for module, training in modes.items():
                module.training = training
