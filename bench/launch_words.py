"""What a launch configuration is called in tables and rows."""

from __future__ import annotations

from typing import Any

from fastjepa.kernels.launch import LaunchConfig


def describe(value: Any) -> str:
    """A candidate in a few words."""
    if isinstance(value, tuple):
        return ", ".join(map(describe, value))
    if isinstance(value, LaunchConfig):
        blocks = " ".join(f"{name}={size}" for name, size in value.blocks.items())
        return f"{blocks} warps={value.num_warps} stages={value.num_stages}"
    if hasattr(value, "config"):  # a `Launch`, of a convolution
        return f"{value.form} {describe(value.config)}{' early' if value.launch_early else ''}"
    return " ".join(f"{n}={v}" for n, v in vars(value).items()) if hasattr(value, "__dict__") else str(value)
