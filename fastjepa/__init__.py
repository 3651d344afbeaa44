"""Video JEPA, readable and fast: `model` is the eager reference, everything else makes it faster or usable.

docs/architecture.md has the rooms and which may import which. What is named below is imported when it is first asked
for: importing this package takes no time, and neither do commands that need no torch. Nothing here imports Triton.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

__version__ = "0.1.0"  # pyproject.toml reads it here

__all__ = [
    "JEPA",
    "TrainStep",
    "accelerate",
    "build_jepa",
    "load_eb_jepa_checkpoint",
    "load_eb_jepa_run",
    "load_pretrained",
    "restore",
    "save_eb_jepa_checkpoint",
    "verify",
]

# Type checkers see the imports; a running program looks the same names up when they are first asked for.
if TYPE_CHECKING:
    from fastjepa.eb_jepa import TrainStep, load_eb_jepa_checkpoint, load_eb_jepa_run, save_eb_jepa_checkpoint
    from fastjepa.fused.swap import accelerate, restore
    from fastjepa.model.jepa import JEPA, build_jepa
    from fastjepa.storage.export import load_pretrained
    from fastjepa.verification import verify
else:
    _DEFINED_IN = {
        "JEPA": "fastjepa.model.jepa",
        "TrainStep": "fastjepa.eb_jepa",
        "accelerate": "fastjepa.fused.swap",
        "build_jepa": "fastjepa.model.jepa",
        "load_eb_jepa_checkpoint": "fastjepa.eb_jepa",
        "load_eb_jepa_run": "fastjepa.eb_jepa",
        "load_pretrained": "fastjepa.storage.export",
        "restore": "fastjepa.fused.swap",
        "save_eb_jepa_checkpoint": "fastjepa.eb_jepa",
        "verify": "fastjepa.verification",
    }

    def __getattr__(name: str) -> Any:  # PEP 562; a type checker that saw it would believe in any name
        if name not in _DEFINED_IN:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_DEFINED_IN[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
