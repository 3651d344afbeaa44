"""Video JEPA, readable and fast: `model` is the eager reference, everything else makes it faster or usable.

docs/architecture.md has the rooms and which may import which. Importing this imports no Triton.
"""

import importlib.util
import sys
from pathlib import Path

# Installed, fastjepa.kernels is where pyproject.toml puts the folder kernels/; in a checkout it is the link beside this
# file. Where a checkout has no links (Windows, an archive), the folder is loaded from where it lies, so that
# `python train.py` works all the same.
_here = Path(__file__).resolve().parent
_kernels = _here.parent / "kernels"
if not (_here / "kernels").is_dir() and (_kernels / "launch.py").is_file():
    _spec = importlib.util.spec_from_file_location(
        "fastjepa.kernels", _kernels / "__init__.py", submodule_search_locations=[str(_kernels)]
    )
    assert _spec is not None
    assert _spec.loader is not None
    kernels = sys.modules["fastjepa.kernels"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(kernels)

# ruff: noqa: E402 - the path comes before what is found through it
from fastjepa.fused.swap import accelerate, restore
from fastjepa.model.jepa import JEPA, build_jepa
from fastjepa.storage.eb_jepa_checkpoint import load_eb_jepa_checkpoint
from fastjepa.storage.eb_jepa_export import save_eb_jepa_checkpoint
from fastjepa.storage.eb_jepa_run import load_eb_jepa_run
from fastjepa.storage.export import load_pretrained
from fastjepa.verification import verify

__all__ = [
    "JEPA",
    "accelerate",
    "build_jepa",
    "load_eb_jepa_checkpoint",
    "load_eb_jepa_run",
    "load_pretrained",
    "restore",
    "save_eb_jepa_checkpoint",
    "verify",
]
