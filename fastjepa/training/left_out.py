"""What a run leaves out because a package is missing: said when it begins, so that nothing fails after hours."""

from __future__ import annotations

import logging

from fastjepa.optional_packages import install_command, missing_packages
from fastjepa.training.board import BOARD_PACKAGES
from fastjepa.training.progress import PROGRESS_PACKAGES

logger = logging.getLogger(__name__)

PICTURES, WEIGHTS = "pictures", "exported weights"

_NEEDS = {
    "TensorBoard events": BOARD_PACKAGES,
    "the progress bar": PROGRESS_PACKAGES,
    PICTURES: ("matplotlib", "PIL"),
    WEIGHTS: ("safetensors",),
}


def left_out() -> dict[str, list[str]]:
    """What a run cannot make here, with the names of the packages that it lacks."""
    return {what: missing for what, modules in _NEEDS.items() if (missing := missing_packages(*modules))}


def say_what_is_left_out() -> None:
    """One warning for each thing that is left out, naming the packages and what to type for them."""
    for what, packages in left_out().items():
        logger.warning(
            "left out: %s, because of what is not installed: %s; %s",
            what,
            ", ".join(packages),
            install_command(packages),
        )
