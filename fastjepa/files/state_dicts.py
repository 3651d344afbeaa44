"""State_dicts from outside: keys as they are without torch.compile, and tensors that are what a module expects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.files.safe_files import CheckpointError


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state_dict, sharing memory, with the same keys whether or not parts went through torch.compile."""
    return {strip_compile_prefix(key): value for key, value in module.state_dict().items()}


def strip_compile_prefix(key: str) -> str:
    """A state_dict key without the `_orig_mod.` that torch.compile puts before the names of what it wrapped."""
    return key.replace("_orig_mod.", "")


def check_tensors(what: str, expected: Mapping[str, Tensor], given: Any) -> None:
    """Raise CheckpointError unless `given` has exactly the expected keys, with tensors of equal shape and dtype."""
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{what} is not a dict of tensors")
    problems = [f"{key} is missing" for key in expected if key not in given]
    problems += [f"{key} is not expected" for key in given if key not in expected]
    for key, target in expected.items():
        value = given.get(key, target)
        if value is target:
            continue
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            problems.append(f"{key} is not a plain tensor")
        elif (value.shape, value.dtype) != (target.shape, target.dtype):
            found = f"{tuple(value.shape)} {value.dtype}"
            problems.append(f"{key} is {found}, expected {tuple(target.shape)} {target.dtype}")
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{what} does not fit: {'; '.join(problems[:5])}{more}")
