"""The state of every global random number generator as plain values (tensors, numbers), fit for any checkpoint."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def rng_snapshot() -> dict[str, Any]:
    """The generators of Python's `random`, numpy's legacy global one, torch on the CPU and on every CUDA device.

    CUDA generators are recorded only if this process uses CUDA: asking would otherwise initialise it.
    """
    version, words, gauss_next = random.getstate()
    # The legacy global generator is the one that libraries draw from when nobody passed them a Generator.
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    assert isinstance(numpy_state, dict)
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss_next": gauss_next},
        "numpy": {
            "bit_generator": str(numpy_state["bit_generator"]),
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def check_rng_snapshot(state: Mapping[str, Any]) -> None:
    """Raise (ValueError, TypeError, KeyError, RuntimeError, ...) if `load_rng_snapshot` could not take this state.

    Each state is tried on a generator made for the purpose, so that the global ones stay as they are.
    """
    random.Random().setstate(_python_state(state["python"]))
    np.random.RandomState().set_state(_numpy_state(state["numpy"]))
    torch.Generator().set_state(state["torch"])
    for index, cuda_state in enumerate(_cuda_states(state)):
        torch.Generator(device=f"cuda:{index}").set_state(cuda_state)


def load_rng_snapshot(state: Mapping[str, Any]) -> None:
    """Set the global generators to what `rng_snapshot` returned. CUDA devices that are not here now are skipped."""
    random.setstate(_python_state(state["python"]))
    np.random.set_state(_numpy_state(state["numpy"]))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    for index, cuda_state in enumerate(_cuda_states(state)):
        torch.cuda.set_rng_state(cuda_state, index)


def _python_state(state: Mapping[str, Any]) -> tuple[int, tuple[int, ...], float | None]:
    return state["version"], tuple(state["words"].tolist()), state["gauss_next"]


def _numpy_state(state: Mapping[str, Any]) -> dict[str, Any]:
    # numpy copies key and pos without looking, and an index beyond the 624 words would be read out of bounds.
    key, pos = state["key"], state["pos"]
    if key.dtype != torch.int64 or key.shape != (624,) or type(pos) is not int or not 0 <= pos <= 624:
        raise ValueError("the numpy state is not one of MT19937")
    return {
        "bit_generator": state["bit_generator"],
        "state": {"key": key.numpy().astype(np.uint32), "pos": pos},
        "has_gauss": state["has_gauss"],
        "gauss": state["gauss"],
    }


def _cuda_states(state: Mapping[str, Any]) -> list[torch.Tensor]:
    states = list(state["cuda"])
    return states[: torch.cuda.device_count()] if torch.cuda.is_available() else []
