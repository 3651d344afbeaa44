"""Video JEPA, readable and fast: `model` is the eager reference, everything else makes it faster or usable.

docs/architecture.md has the rooms and which may import which. Importing this imports no Triton.
"""

import importlib.util
from pathlib import Path

# Installed, fastjepa.kernels is where pyproject.toml puts the folder kernels/; in a checkout it is the link beside this
# file. Where a checkout has no links (Windows, an archive), the folder above is looked into, so that `python train.py`
# works all the same.
_checkout = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("fastjepa.kernels") is None and (_checkout / "kernels" / "launch.py").is_file():
    __path__.append(str(_checkout))

# ruff: noqa: E402 - the path comes before what is found through it
from fastjepa.fused.swap import accelerate, restore
from fastjepa.model.jepa import JEPA, build_jepa
from fastjepa.storage.eb_jepa_checkpoint import load_eb_jepa_checkpoint
from fastjepa.storage.export import load_pretrained

__all__ = ["JEPA", "accelerate", "build_jepa", "load_eb_jepa_checkpoint", "load_pretrained", "restore"]
