"""Going on with a training run of the original: everything in its `latest.pth.tar` that training needs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.files.safe_files import CheckpointError
from fastjepa.files.state_dicts import plain_state, strip_compile_prefix
from fastjepa.files.tensor_files import shown
from fastjepa.model.jepa import JEPA
from fastjepa.model.networks import DetHead, ImageDecoder
from fastjepa.model.probes import build_probes
from fastjepa.model.step import build_optimizer
from fastjepa.storage.adam_state import plan_adam_load, reorder_adam_state
from fastjepa.storage.checkpoint import load_modules
from fastjepa.storage.eb_jepa_checkpoint import below, is_state_dict, jepa_of_state, read_eb_jepa_file
from fastjepa.storage.sizes import (
    build_filled,
    check_compatible,
    checked_device,
    decoder_sizes,
    detection_head_sizes,
    encoder_sizes,
    predictor_sizes,
    projector_sizes,
)

_LARGEST_COUNT = 2**53  # beyond it a float no longer counts

# The original's video script saves no heads. Where a user's own script did, this is where they are looked for: under
# the script's names for them, with or without the `_state_dict` that its other scripts append.
_HEAD_ENTRIES = {
    "image_decoder": ("image_decoder", "pixel_decoder", "decoder"),
    "detection_head": ("detection_head", "dethead"),
}
_USED = {"model_state_dict", "optimizer_state_dict", "epoch", "step"}


@dataclass(frozen=True)
class EbJepaRun:
    """A training run of the original, where its checkpoint left it.

    Attributes:
        jepa, image_decoder, detection_head: in train mode.
        optimizer: Adam over the three as `build_optimizer` makes it, with the file's moments, step counts and settings.
        epoch: epochs done, which is the number (from 0) of the one to go on with, as the original's `load_checkpoint`
            returns it.
        step: optimiser steps done.
        new_heads: which of "image_decoder" and "detection_head" the file does not have; they begin anew.
        unused: entries of the file that nothing here goes on with, for example `scheduler_state_dict`.
    """

    jepa: JEPA
    image_decoder: ImageDecoder
    detection_head: DetHead
    optimizer: torch.optim.Adam
    epoch: int
    step: int
    new_heads: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The three modules in the order of the optimizer's groups."""
        return {name: getattr(self, name) for name in ("jepa", *_HEAD_ENTRIES)}

    @property
    def sizes(self) -> dict[str, int | str]:
        """`dobs`, `henc`, `dstc`, `hpre`, `projector` and `hdet`, as the flags of a run call them."""
        return {
            **encoder_sizes(self.jepa.encoder.state_dict()),
            "hpre": predictor_sizes(self.jepa.predictor.state_dict())["hpre"],
            "projector": projector_sizes(below(self.jepa.state_dict(), "regularizer.proj.")),
            "hdet": detection_head_sizes(self.detection_head.state_dict())["h_d"],
        }

    def copy_into(self, modules: Mapping[str, nn.Module], optimizer: torch.optim.Adam) -> None:
        """Copy weights, buffers and Adam's state into other modules of the same sizes, in place. All or nothing.

        The modules may be accelerated or compiled, on any device; `new_heads` stay as they are there, without state.

        Args:
            modules: "jepa", "image_decoder" and "detection_head".
            optimizer: over them, as `build_optimizer` makes it. Its learning rates become those of `self.optimizer`.

        Raises:
            CheckpointError: something does not fit; then nothing has changed.
        """
        mine = self.modules
        try:
            names = [parameter_names(mine[name]) for name in mine]
            theirs = [parameter_names(modules[name]) for name in mine]  # in whatever order they are
            load_optimizer = plan_adam_load(optimizer, reorder_adam_state(self.optimizer.state_dict(), names, theirs))
        except ValueError as error:
            raise CheckpointError(f"the optimizer does not fit: {error}") from error
        kept = [name for name in mine if name not in self.new_heads]
        state = {"modules": {name: plain_state(mine[name]) for name in kept}}
        load_modules(state, {name: modules[name] for name in kept})
        load_optimizer()


def load_eb_jepa_run(
    path: str | os.PathLike[str],
    *,
    std_coeff: float = 10.0,
    cov_coeff: float = 100.0,
    device: str | torch.device = "cpu",
) -> EbJepaRun:
    """Everything in a checkpoint of eb_jepa with which training goes on: the model, Adam's state, epoch and step.

    The loss coefficients are not in the file, and neither are the heads, as the original's script writes it: those
    begin anew, drawn by torch's generator, as wide as that script makes them (the detection head has the predictor's
    width), and without Adam state, because moments of lost weights are of no use. Where a script of the user's saved
    them too, they are read: from `image_decoder`, `pixel_decoder` or `decoder`, and from `detection_head` or `dethead`,
    each also with `_state_dict` after it; either the head's own state_dict or that of the JEPAProbe around it.

    Raises:
        CheckpointError: missing, damaged, holding pickled objects, not a Video JEPA of the published form, or without
            an Adam state that fits it; the message names the file and the entry.
        ValueError: the device is not there.
    """
    device = checked_device(device)
    content = read_eb_jepa_file(path)
    try:
        return run_of_content(content, std_coeff=std_coeff, cov_coeff=cov_coeff, device=device)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be continued: {error}") from error


def run_of_content(
    content: Mapping[str, Any],
    *,
    std_coeff: float = 10.0,
    cov_coeff: float = 100.0,
    device: torch.device | None = None,
) -> EbJepaRun:
    """`load_eb_jepa_run` with what the file holds. Raises CheckpointError."""
    jepa = jepa_of_state(content["model_state_dict"], std_coeff=std_coeff, cov_coeff=cov_coeff)
    epoch, step = _count(content, "epoch", -1) + 1, _count(content, "step", 0)
    encoder, hpre = encoder_sizes(jepa.encoder.state_dict()), predictor_sizes(jepa.predictor.state_dict())["hpre"]
    entries = {head: _head_entry(content, head) for head in _HEAD_ENTRIES}
    decoder, head = build_probes(dobs=encoder["dobs"], dstc=encoder["dstc"], hdet=hpre)
    probes: dict[str, Any] = {"image_decoder": decoder, "detection_head": head}
    for name, entry in entries.items():
        if entry is not None:
            probes[name] = _head(name, entry, content[entry])
    check_compatible(
        {
            "encoder": encoder,
            "predictor": predictor_sizes(jepa.predictor.state_dict()),
            "decoder": decoder_sizes(probes["image_decoder"].state_dict()),
            "detection_head": detection_head_sizes(probes["detection_head"].state_dict()),
        }
    )
    dtype = next(jepa.parameters()).dtype
    new_heads = tuple(name for name, entry in entries.items() if entry is None)
    for name in new_heads:
        probes[name].to(dtype)
    modules: dict[str, Any] = {"jepa": jepa, **probes}
    for name, module in modules.items():
        check_finite(entries.get(name) or "model_state_dict", module.state_dict())
        module.to(device)
    optimizer = build_optimizer(
        jepa, probes["image_decoder"], probes["detection_head"], lr=1e-3
    )  # the file has its own
    _load_adam(optimizer, content.get("optimizer_state_dict"), modules, new_heads, step)
    used = {*_USED, *entries.values()}
    unused = tuple(sorted(key if isinstance(key, str) else shown(key) for key in content if key not in used))
    return EbJepaRun(**modules, optimizer=optimizer, epoch=epoch, step=step, new_heads=new_heads, unused=unused)


def parameter_names(module: nn.Module) -> list[str]:
    """The names of its parameters in the order in which an optimizer gets them, without torch.compile's prefixes."""
    return [strip_compile_prefix(name) for name, _ in module.named_parameters()]


def check_finite(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError, naming the tensor, if one has a NaN or an infinity."""
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{what}: {key} has NaN or infinite values")


def _count(content: Mapping[str, Any], name: str, least: int) -> int:
    value = content.get(name)
    if type(value) is not int or not least <= value < _LARGEST_COUNT:
        found = "missing" if name not in content else shown(value)
        raise CheckpointError(f"{name} is {found}, expected a whole number from {least} to 2**53")
    return value


def _head_entry(content: Mapping[str, Any], head: str) -> str | None:
    names = [name + suffix for name in _HEAD_ENTRIES[head] for suffix in ("_state_dict", "")]
    found = [name for name in names if name in content]
    if len(found) > 1:
        raise CheckpointError(f"it has the {head} twice, as {' and '.join(found)}")
    return found[0] if found else None


def _head(name: str, entry: str, state: Any) -> nn.Module:
    """The head with these tensors, in train mode on the CPU."""
    if not is_state_dict(state):
        raise CheckpointError(f"{entry} is not a dict of tensors")
    tensors = {strip_compile_prefix(key): value for key, value in state.items()}
    if any(key.startswith("jepa.") for key in tensors):  # of a JEPAProbe, which has the JEPA as well
        tensors = below(tensors, "head.")
    try:
        if name == "image_decoder":
            decoder = decoder_sizes(tensors)
            return build_filled(
                entry, lambda: ImageDecoder(decoder["in_d"], decoder["out_d"], decoder["hidden"]), tensors
            )
        sizes = detection_head_sizes(tensors)
        return build_filled(entry, lambda: DetHead(**sizes), tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{entry}: {error}") from error


def _load_adam(
    optimizer: torch.optim.Adam, saved: Any, modules: Mapping[str, nn.Module], new_heads: tuple[str, ...], step: int
) -> None:
    """Put the file's Adam state into an optimizer over `modules`, except that of new heads."""
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        raise CheckpointError(
            "it has no optimizer_state_dict with Adam's state; fastjepa.load_eb_jepa_checkpoint reads the JEPA alone"
        )
    names = [(module, name) for module in modules for name in parameter_names(modules[module])]
    dropped = {index for index, (module, _) in enumerate(names) if module in new_heads}
    state = {index: value for index, value in saved["state"].items() if index not in dropped}
    try:
        load = plan_adam_load(optimizer, {**saved, "state": state})
    except ValueError as error:
        raise CheckpointError(f"optimizer_state_dict does not fit: {error}") from error
    for index, (module, name) in enumerate(names):
        if index not in state:
            # Only what was never stepped has none: all of a head that began anew, or everything before the first step.
            others = any(names[other][0] == module for other in state)
            if others or (module == "jepa" and step > 0):
                raise CheckpointError(f"optimizer_state_dict has no state of {module}.{name}, after {step} steps")
            continue
        check_finite(f"optimizer_state_dict, {module}.{name}", state[index])
        if (state[index]["exp_avg_sq"] < 0).any():
            raise CheckpointError(f"optimizer_state_dict, {module}.{name}: exp_avg_sq is negative")
    load()
