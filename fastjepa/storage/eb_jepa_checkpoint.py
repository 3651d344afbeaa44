"""Reading checkpoints of the original Video JEPA example (`latest.pth.tar` of eb_jepa)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastjepa.files.safe_files import CheckpointError
from fastjepa.files.state_dicts import check_tensors, strip_compile_prefix
from fastjepa.files.tensor_files import read_tensor_file
from fastjepa.model.jepa import JEPA, build_jepa
from fastjepa.storage.sizes import build_filled, encoder_sizes, predictor_sizes, projector_sizes

# The original registers two modules twice: the encoder also encodes actions, and both losses share the projector.
_ALIASES = {"action_encoder.": "encoder.", "predcost.proj.": "regularizer.proj."}


def load_eb_jepa_checkpoint(path: str | os.PathLike[str], *, std_coeff: float = 10.0, cov_coeff: float = 100.0) -> JEPA:
    """The JEPA in a checkpoint of eb_jepa: a dict with `model_state_dict`; its other entries are ignored (to go on
    training with them: `fastjepa.load_eb_jepa_run`).

    All sizes follow from the shapes; keys may have `_orig_mod.` anywhere, as torch.compile leaves them. The loss
    coefficients are not in the file, nor are strides of the encoder, which is taken to keep the resolution. The result
    is on the CPU, in train mode, in the file's floating dtype.

    Raises:
        CheckpointError: missing, damaged, holding pickled objects, or not a Video JEPA of the published form.
    """
    content = read_eb_jepa_file(path)
    try:
        return jepa_of_state(content["model_state_dict"], std_coeff=std_coeff, cov_coeff=cov_coeff)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error


def read_eb_jepa_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint of eb_jepa holds: a dict with a dict `model_state_dict`, and whatever else, unchecked.

    Raises:
        CheckpointError: missing, damaged, holding pickled objects, or without a model.
    """
    content = read_tensor_file(path)
    if not isinstance(content, dict) or not is_state_dict(content.get("model_state_dict")):
        raise CheckpointError(f"{path} is not a checkpoint of eb_jepa: it has no model_state_dict")
    return content


def jepa_of_state(state: Mapping[str, Any], *, std_coeff: float, cov_coeff: float) -> JEPA:
    """The JEPA with these tensors. Raises CheckpointError if they are not those of a published Video JEPA."""
    state = {strip_compile_prefix(key): value for key, value in state.items()}
    second = {key: value for key, value in state.items() if key.startswith(tuple(_ALIASES))}
    tensors = {key: value for key, value in state.items() if key not in second}
    for alias, original in _ALIASES.items():
        tensors.update({alias + key: value for key, value in below(tensors, original).items()})
    jepa = _build(tensors, std_coeff, cov_coeff)
    _check_aliases(jepa.state_dict(), second)
    return jepa


def is_state_dict(value: object) -> bool:
    """Whether it is a dict with names as keys; what they name is not looked at."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose keys start with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _build(state: dict[str, Any], std_coeff: float, cov_coeff: float) -> JEPA:
    encoder, predictor = encoder_sizes(below(state, "encoder.")), predictor_sizes(below(state, "predictor."))
    projector = projector_sizes(below(state, "regularizer.proj."))
    dstc, context = encoder["dstc"], predictor["context_length"]
    if context != 2 or predictor["dstc"] != dstc:
        raise CheckpointError(
            f"the encoder makes states of {dstc} channels; the predictor reads {context} states of "
            f"{predictor['dstc']} channels, expected 2 states of {dstc}"
        )
    return build_filled(
        "model_state_dict",
        lambda: build_jepa(
            **encoder, hpre=predictor["hpre"], projector=projector, std_coeff=std_coeff, cov_coeff=cov_coeff
        ),
        state,
    )


def _check_aliases(built: dict[str, Tensor], second: dict[str, Any]) -> None:
    """Entries under the second name of a module, where the file has them, must repeat those under the first."""
    check_tensors("model_state_dict", {key: built[key] for key in second if key in built}, second)
    for key, value in second.items():
        # Equal NaNs are the same here: whether the weights are finite is not what this decides.
        if not torch.allclose(built[key], value, rtol=0, atol=0, equal_nan=True):
            first = next(name + key.removeprefix(alias) for alias, name in _ALIASES.items() if key.startswith(alias))
            raise CheckpointError(f"{key} and {first} differ; in the published model they are one")
