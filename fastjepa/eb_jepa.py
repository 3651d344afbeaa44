"""The original project, eb_jepa: its training step as it is written, and its checkpoints, read and written.

A checkpoint of its video example (`latest.pth.tar`) is a dict: `model_state_dict`, `optimizer_state_dict` (Adam over
the JEPA, the image decoder and the detection head), `epoch` (the last one finished, counted from 0) and `step`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.config import Config, preset_config, resolve_preset
from fastjepa.files.safe_files import CheckpointError, write_atomic
from fastjepa.files.state_dicts import check_tensors, plain_state, strip_compile_prefix
from fastjepa.files.tensor_files import read_tensor_file, shown
from fastjepa.fused.match import (
    composition_problem,
    encoder_problem,
    network_trial_problem,
    predcost_problem,
    probe_problem,
    regularizer_problem,
    std_margin,
)
from fastjepa.model.jepa import JEPA, build_jepa
from fastjepa.model.networks import DetHead, ImageDecoder
from fastjepa.model.probes import build_probes
from fastjepa.model.step import TrainStep as PlainTrainStep
from fastjepa.model.step import build_optimizer
from fastjepa.storage.adam_state import plain_execution, plain_tensor, plan_adam_load
from fastjepa.storage.checkpoint import load_modules
from fastjepa.storage.sizes import (
    build_filled,
    checked_device,
    decoder_sizes,
    detection_head_sizes,
    encoder_sizes,
    predictor_sizes,
    projector_sizes,
)

# The original registers two modules twice: the encoder also encodes actions, and both losses share the projector.
_ALIASES = {"action_encoder.": "encoder.", "predcost.proj.": "regularizer.proj."}

# The original's video script saves no heads. Where a user's own script did, this is where they are looked for: under
# the script's names for them, with or without the `_state_dict` that its other scripts append.
_HEAD_ENTRIES = {
    "image_decoder": ("image_decoder", "pixel_decoder", "decoder"),
    "detection_head": ("detection_head", "dethead"),
}


class TrainStep(PlainTrainStep):
    """`fastjepa.model.step.TrainStep` that also does each thing once for classes of other code which compute what the
    published ones do. Each is tried once on a copy; hooks and what is set on the objects are looked at in every call.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._tried: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str | None]] = weakref.WeakKeyDictionary()
        super().__init__(*arguments, **options)

    def _problem_of_class(self, name: str, part: nn.Module) -> str | None:
        if super()._problem_of_class(name, part) is None:
            return None
        state = (type(part), std_margin(part))
        if part not in self._tried or self._tried[part][0] != state:
            self._tried[part] = (state, _TRIALS[name](part))
        return self._tried[part][1]


class OriginalStep(PlainTrainStep):
    """The training step as the original writes it: three encodings and 1 + 2·steps projections, through the JEPA's own
    `unroll` and `encode`.
    """

    def _problem_of_class(self, name: str, part: nn.Module) -> str | None:
        return "the original's step is asked for" if name == "jepa" else super()._problem_of_class(name, part)


_TRIALS: dict[str, Callable[[nn.Module], str | None]] = {
    "jepa": composition_problem,
    "encoder": lambda encoder: encoder_problem(encoder) or network_trial_problem(encoder, "encoder"),
    "regularizer": regularizer_problem,
    "predcost": predcost_problem,
    "image_decoder": probe_problem,
    "detection_head": probe_problem,
}


def load_eb_jepa_checkpoint(path: str | os.PathLike[str], *, std_coeff: float = 10.0, cov_coeff: float = 100.0) -> JEPA:
    """The JEPA in a checkpoint of eb_jepa; its other entries are ignored (to train on: `load_eb_jepa_run`).

    All sizes follow from the shapes; keys may have `module.` in front and `_orig_mod.` anywhere, as DDP and
    torch.compile leave them. The loss coefficients are not in the file, nor are strides of the encoder, which is taken
    to keep the resolution. The result is on the CPU, in train mode, in the file's floating dtype.

    Raises:
        CheckpointError: missing, damaged, holding pickled objects, or not a Video JEPA of the published form.
    """
    content = _read(path)
    with _prefixed(f"{path} cannot be used"):
        return _jepa_of(content["model_state_dict"], std_coeff=std_coeff, cov_coeff=cov_coeff)


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
        hdet = detection_head_sizes(self.detection_head.state_dict())["h_d"]
        return {**_sizes(self.jepa.state_dict()), "hdet": hdet}

    def copy_into(self, modules: Mapping[str, nn.Module], optimizer: torch.optim.Adam) -> None:
        """Copy weights, buffers and Adam's state into other modules of the same sizes, in place. All or nothing.

        The modules may be accelerated or compiled, on any device; `new_heads` stay as they are there, without state.
        `optimizer` is over them as `build_optimizer` makes it, and gets the learning rates of `self.optimizer`.
        Raises CheckpointError if something does not fit; then nothing has changed.
        """
        mine = self.modules
        for name, module in mine.items():
            if _parameter_names(modules[name]) != _parameter_names(module):
                raise CheckpointError(f"{name} has other parameters than the checkpoint's, or in another order")
        with _prefixed("the optimizer does not fit"):
            load_optimizer = plan_adam_load(optimizer, self.optimizer.state_dict())
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
    begin anew, drawn by torch's generator, the detection head as wide as the predictor, without Adam state. Where a
    script of the user's saved them too, they are read: from `image_decoder`, `pixel_decoder` or `decoder`, and from
    `detection_head` or `dethead`, each also with `_state_dict` after it; the head's own state_dict or a JEPAProbe's.

    Raises:
        CheckpointError: missing, damaged, holding pickled objects, not a Video JEPA of the published form, or without
            an Adam state that fits it (AdamW's goes on as AdamW's where the file tells); it names file and entry.
        ValueError: the device is not there.
    """
    device = checked_device(device)
    content = _read(path)
    with _prefixed(f"{path} cannot be continued"):
        return _run_of(content, std_coeff=std_coeff, cov_coeff=cov_coeff, device=device)


def save_eb_jepa_checkpoint(
    path: str | os.PathLike[str],
    jepa: nn.Module,
    optimizer: torch.optim.Adam | None = None,
    *,
    epoch: int,
    step: int,
    image_decoder: nn.Module | None = None,
    detection_head: nn.Module | None = None,
) -> None:
    """Write a checkpoint that the original loads: `load_checkpoint(path, jepa, optimizer)`, which returns `epoch`.

    The model is written as the original has it, under both names of the encoder and of the projector, whatever
    `accelerate` or torch.compile did to it; Adam's state without how it was computed (fused, capturable). Heads are
    further entries, `image_decoder_state_dict` and `detection_head_state_dict`, which `load_checkpoint` returns.

    Args:
        path: a file, replaced atomically.
        jepa: of the published form, this project's or the original's.
        optimizer: over the JEPA, the image decoder and the detection head, as `fastjepa.model.step.build_optimizer`
            and the original's script make it; None writes no Adam state.
        epoch, step: how many are done, ≥ 0.
        image_decoder, detection_head: the heads alone, without the JEPA that a probe has.

    Raises:
        ValueError: `epoch` or `step` is no such number, or the optimizer is over other parameters.
        CheckpointError: another model, NaN or infinite values, or the system refused; what was at `path` is intact.
    """
    given = {"jepa": jepa, "image_decoder": image_decoder, "detection_head": detection_head}
    modules = {name: plain_state(module) for name, module in given.items() if module is not None}
    adam = None if optimizer is None else _state_of_adam(optimizer, given)
    write_eb_jepa_checkpoint(path, modules, adam, epoch=epoch, step=step)


def write_eb_jepa_checkpoint(
    path: str | os.PathLike[str],
    modules: Mapping[str, Mapping[str, Tensor]],
    optimizer: Mapping[str, Any] | None,
    *,
    epoch: int,
    step: int,
) -> None:
    """`save_eb_jepa_checkpoint` with state_dicts: of "jepa" and what heads there are, and of the optimizer, as the
    checkpoint of a run holds them. Nothing is written that `load_eb_jepa_run` would refuse. Raises the same.
    """
    if not all(map(_is_state_dict, modules.values())):
        raise CheckpointError("it does not have the modules of a run")
    for name, value in (("epoch", epoch), ("step", step)):
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} must be a whole number ≥ 0, got {value!r}")
    jepa = _jepa_of(modules["jepa"], std_coeff=0.0, cov_coeff=0.0)  # in memory of its own, contiguous
    names = _parameter_names(jepa)
    if [key for key in map(_plain_key, modules["jepa"]) if key in names] != names:
        raise CheckpointError("the JEPA has its parameters in another order than the original")
    # The original counts the last epoch that it finished.
    content: dict[str, Any] = {"model_state_dict": dict(jepa.state_dict()), "epoch": epoch - 1, "step": step}
    for name in sorted(modules.keys() - {"jepa"}):
        content[f"{name}_state_dict"] = {key: plain_tensor(value) for key, value in modules[name].items()}
    if optimizer is None:
        _check_finite("the JEPA", jepa.state_dict())
    else:
        try:
            content["optimizer_state_dict"] = plain_execution(optimizer)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"the optimizer is not Adam over a JEPA and its heads: {error!r}") from error
        _run_of(content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, lambda file: file.write(buffer.getbuffer()))


def defaults_from_eb_jepa(path: Path, preset: str, device: torch.device, *, own_lr: bool = False) -> Config:
    """The defaults of a run that goes on from this file: those of the preset ("auto" takes the published recipe, which
    the file is of), with its sizes and, unless the run is given its own, its learning rate, which a schedule may have
    brought to 0. Raises CheckpointError if the file cannot be used, ValueError for an unknown preset.
    """
    defaults = preset_config("full" if preset == "auto" else resolve_preset(preset, device))
    with _prefixed(f"--from_eb_jepa {path}"):
        run = load_eb_jepa_run(path)
        lr = defaults.lr if own_lr else float(run.optimizer.param_groups[0]["lr"])
        return dataclasses.replace(defaults, **run.sizes, lr=lr, from_eb_jepa=path)  # type: ignore[arg-type]


def run_to_begin_with(config: Config) -> EbJepaRun | None:
    """The run of the original that a new run goes on from; None if there is none.

    Raises CheckpointError if the file cannot be used, ValueError if an option contradicts it.
    """
    path = config.from_eb_jepa
    if path is None or config.resume is not None:
        return None
    with _prefixed(f"--from_eb_jepa {path}"):
        run = load_eb_jepa_run(path, std_coeff=config.std_coeff, cov_coeff=config.cov_coeff)
    asked = {name: getattr(config, name) for name in run.sizes}
    asked["projector"] = config.projector or f"{config.dstc}-64-64"
    differing = [
        f"--{name} {asked[name]} (the file has {size})" for name, size in run.sizes.items() if size != asked[name]
    ]
    if differing:
        raise ValueError(f"--from_eb_jepa {path} is of another size than asked for: {', '.join(differing)}")
    if kinds := {str(p.dtype) for module in run.modules.values() for p in module.parameters()} - {"torch.float32"}:
        raise ValueError(f"--from_eb_jepa {path} has weights in {', '.join(kinds)}; training takes torch.float32")
    if run.epoch >= config.epochs or (config.max_steps is not None and run.step >= config.max_steps):
        raise ValueError(
            f"--from_eb_jepa {path} ended after epoch {run.epoch} and step {run.step}, and --epochs and --max_steps "
            "count those too: give more"
        )
    return run


def begin_with(
    run: EbJepaRun, config: Config, modules: Mapping[str, nn.Module], optimizer: torch.optim.Adam
) -> list[str]:
    """`EbJepaRun.copy_into` the modules of a new run, with the configuration's learning rate; what there is to tell."""
    for group, rate in zip(run.optimizer.param_groups, (config.lr, config.lr / 10, config.lr), strict=True):
        group["lr"] = rate
    run.copy_into(modules, optimizer)
    lines = [
        f"goes on from {config.from_eb_jepa} after epoch {run.epoch}, step {run.step}; it has no loss coefficients, "
        f"taken are std {config.std_coeff:g} and cov {config.cov_coeff:g}"
    ]
    if run.new_heads:
        names = " and ".join(name.replace("_", " ") for name in run.new_heads)
        lines.append(f"it has no weights of {names}: begun anew, with fresh Adam state")
    if run.unused:
        lines.append(f"not used of it: {', '.join(map(shown, run.unused))}")
    return lines


@contextlib.contextmanager
def _prefixed(what: str) -> Iterator[None]:
    """Put `what` before the message of a file that does not fit."""
    try:
        yield
    except (CheckpointError, ValueError) as error:
        raise CheckpointError(f"{what}: {error}") from error


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the file holds: a dict with a dict `model_state_dict`, and whatever else, unchecked."""
    content = read_tensor_file(path)
    if not isinstance(content, dict) or not _is_state_dict(content.get("model_state_dict")):
        raise CheckpointError(f"{path} is not a checkpoint of eb_jepa: it has no model_state_dict")
    return content


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _plain_key(key: str) -> str:
    return strip_compile_prefix(key).removeprefix("module.")


def _below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _parameter_names(module: nn.Module) -> list[str]:
    """In the order in which an optimizer gets them."""
    return [_plain_key(name) for name, _ in module.named_parameters()]


def _check_finite(what: str, tensors: Mapping[str, Tensor]) -> None:
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{what}: {key} has NaN or infinite values")


def _jepa_of(state: Mapping[str, Any], *, std_coeff: float, cov_coeff: float) -> JEPA:
    """The JEPA with these tensors. Raises CheckpointError if they are not those of a published Video JEPA."""
    state = {_plain_key(key): value for key, value in state.items()}
    tensors = {key: value for key, value in state.items() if not key.startswith(tuple(_ALIASES))}
    for alias, original in _ALIASES.items():
        tensors.update({alias + key: value for key, value in _below(tensors, original).items()})
    build = partial(build_jepa, **_sizes(tensors), std_coeff=std_coeff, cov_coeff=cov_coeff)
    jepa = build_filled("model_state_dict", build, tensors)
    # What the file has under a module's second name must repeat the first.
    check_tensors("model_state_dict", {key: tensors[key] for key in state if key in tensors}, state)
    for key, value in state.items():
        if not torch.allclose(tensors[key], value, rtol=0, atol=0, equal_nan=True):
            first = next(name + key.removeprefix(alias) for alias, name in _ALIASES.items() if key.startswith(alias))
            raise CheckpointError(f"{key} and {first} differ; in the published model they are one")
    return jepa


def _sizes(jepa: Mapping[str, Any]) -> dict[str, Any]:
    """What `build_jepa` takes for a state_dict of these shapes."""
    return {
        **encoder_sizes(_below(jepa, "encoder.")),
        "hpre": predictor_sizes(_below(jepa, "predictor."))["hpre"],
        "projector": projector_sizes(_below(jepa, "regularizer.proj.")),
    }


def _run_of(
    content: Mapping[str, Any], *, std_coeff: float = 0.0, cov_coeff: float = 0.0, device: torch.device | None = None
) -> EbJepaRun:
    jepa = _jepa_of(content["model_state_dict"], std_coeff=std_coeff, cov_coeff=cov_coeff)
    epoch, step = _count(content, "epoch", -1) + 1, _count(content, "step", 0)
    sizes = _sizes(jepa.state_dict())
    probes = build_probes(dobs=sizes["dobs"], dstc=sizes["dstc"], hdet=sizes["hpre"])
    entries = {name: _head_entry(content, name) for name in _HEAD_ENTRIES}
    modules: dict[str, Any] = {"jepa": jepa}
    for (name, entry), new in zip(entries.items(), probes, strict=True):
        dtype = next(jepa.parameters()).dtype
        modules[name] = new.to(dtype) if entry is None else _head(name, entry, content[entry], sizes)
    for name, module in modules.items():
        _check_finite(entries.get(name) or "model_state_dict", module.state_dict())
        module.to(device)
    new_heads = tuple(name for name, entry in entries.items() if entry is None)
    optimizer = build_optimizer(**modules, lr=1e-3)  # the file has its own
    _load_adam(optimizer, content.get("optimizer_state_dict"), modules, new_heads, step)
    used = {"model_state_dict", "optimizer_state_dict", "epoch", "step", *entries.values()}
    unused = tuple(sorted(key if isinstance(key, str) else shown(key) for key in content if key not in used))
    return EbJepaRun(**modules, optimizer=optimizer, epoch=epoch, step=step, new_heads=new_heads, unused=unused)


def _count(content: Mapping[str, Any], name: str, least: int) -> int:
    value = content.get(name)
    if type(value) is not int or not least <= value < 2**53:  # beyond it a float no longer counts
        found = "missing" if name not in content else shown(value)
        raise CheckpointError(f"{name} is {found}, expected a whole number from {least} to 2**53")
    return value


def _head_entry(content: Mapping[str, Any], head: str) -> str | None:
    names = [name + suffix for name in _HEAD_ENTRIES[head] for suffix in ("_state_dict", "")]
    found = [name for name in names if name in content]
    if len(found) > 1:
        raise CheckpointError(f"it has the {head} twice, as {' and '.join(found)}")
    return found[0] if found else None


def _head(name: str, entry: str, state: Any, jepa: Mapping[str, Any]) -> nn.Module:
    """The head with these tensors, which must fit a JEPA of those sizes; in train mode on the CPU."""
    if not _is_state_dict(state):
        raise CheckpointError(f"{entry} is not a dict of tensors")
    tensors = {_plain_key(key): value for key, value in state.items()}
    if any(key.startswith("jepa.") for key in tensors):  # of a JEPAProbe, which has the JEPA as well
        tensors = _below(tensors, "head.")
    with _prefixed(entry):
        if name == "image_decoder":
            decoder = partial(ImageDecoder, jepa["dstc"], jepa["dobs"], decoder_sizes(tensors)["hidden"])
            return build_filled("it", decoder, tensors)
        return build_filled("it", partial(DetHead, jepa["dstc"], detection_head_sizes(tensors)["h_d"], 1), tensors)


def _load_adam(
    optimizer: torch.optim.Adam, saved: Any, modules: Mapping[str, nn.Module], new_heads: tuple[str, ...], step: int
) -> None:
    """Put the file's Adam state into an optimizer over `modules`, except that of new heads."""
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        raise CheckpointError(
            "it has no optimizer_state_dict with Adam's state; fastjepa.load_eb_jepa_checkpoint reads the JEPA alone"
        )
    names = [(module, name) for module in modules for name in _parameter_names(modules[module])]
    dropped = {index for index, (module, _) in enumerate(names) if module in new_heads}
    state = {index: value for index, value in saved["state"].items() if index not in dropped}
    with _prefixed("optimizer_state_dict does not fit"):
        load = plan_adam_load(optimizer, {**saved, "state": state})
        for group in saved["param_groups"]:
            if group["weight_decay"] != 0 and "decoupled_weight_decay" not in group:
                raise CheckpointError(
                    "it has a weight decay, and torch before 2.8 wrote Adam's and AdamW's alike: add "
                    "decoupled_weight_decay to its param_groups, False for Adam and True for AdamW"
                )
    for index, (module, name) in enumerate(names):
        if index not in state:
            # Only what was never stepped has none: all of a head that began anew, or everything before the first step.
            others = any(names[other][0] == module for other in state)
            if others or (module == "jepa" and step > 0):
                raise CheckpointError(f"optimizer_state_dict has no state of {module}.{name}, after {step} steps")
            continue
        _check_finite(f"optimizer_state_dict, {module}.{name}", state[index])
        if (state[index]["exp_avg_sq"] < 0).any():
            raise CheckpointError(f"optimizer_state_dict, {module}.{name}: exp_avg_sq is negative")
    load()


def _state_of_adam(optimizer: torch.optim.Adam, modules: Mapping[str, nn.Module | None]) -> dict[str, Any]:
    """Raises ValueError unless the optimizer's groups have the parameters of the modules, in their order."""
    if not isinstance(optimizer, torch.optim.Adam) or len(optimizer.param_groups) != len(modules):
        raise ValueError("optimizer must be Adam with three groups: the JEPA, the image decoder, the detection head")
    for group, (name, module) in zip(optimizer.param_groups, modules.items(), strict=True):
        if module is not None and list(map(id, group["params"])) != list(map(id, module.parameters())):
            raise ValueError(f"the optimizer's group for {name} has other parameters than the {name} given")
    return optimizer.state_dict()
