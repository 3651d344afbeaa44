"""Recognising the published networks by structure: None, or why a module is something else. No Triton is needed.

Modules are known by the names and types of their children, never by their class, so that those of other code are found
too. What they compute is tried afterwards (`fused.network_trial`), and `difference` compares numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fastjepa.model.loss_recognition import hooks_problem
from fastjepa.model.modes import eval_mode

BLOCKS_OF_ENCODER = ("layer1", "layer2", "layer3")
BLOCKS_OF_UNET = ("enc1", "enc2", "enc3", "bott", "dec3", "dec2", "dec1")
CONVS_OF_UNET = ("up3", "up2", "up1", "head")

# Children that a module may have beside those it must: name → whether it is one that is understood.
OptionalChildren = Mapping[str, Callable[[nn.Module], bool]]


def block_problem(block: nn.Module) -> str | None:
    """Why `block` cannot be replaced by a `FusedResidualBlock`, or None if it can."""
    problem = _children_problem(block, {"conv1", "bn1", "conv2", "bn2"}, optional={"shortcut": _any_module})
    if problem:
        return problem
    source: Any = block
    for name in ("bn1", "bn2"):
        if (problem := _norm_problem(source, name)) is not None:
            return problem
    for name in ("conv1", "conv2"):
        if type(getattr(source, name)) is not nn.Conv2d:
            return f"{name} is a {type(getattr(source, name)).__name__}, not a Conv2d"
    shortcut = getattr(source, "shortcut", None)
    if shortcut is None or is_identity(shortcut):
        return None if shortcut is not None else "it has no `shortcut`"
    kinds = [type(layer) for layer in shortcut] if isinstance(shortcut, nn.Sequential) else []
    return None if kinds == [nn.Conv2d, nn.BatchNorm2d] else "its shortcut is not (Conv2d, BatchNorm2d)"


def _norm_problem(source: Any, name: str) -> str | None:
    norm = getattr(source, name)
    return None if type(norm) is nn.BatchNorm2d else f"{name} is a {type(norm).__name__}, not a BatchNorm2d"


def encoder_problem(network: nn.Module) -> str | None:
    """Why `network` cannot be replaced by a `FusedResNet5`, or None if it can."""
    # An average pool that is not followed by what `avg_pool` says is found by comparing numbers.
    optional = {"avgpool": _is_global_pool} if getattr(network, "avg_pool", False) else {}
    return _network_problem(network, BLOCKS_OF_ENCODER, (), optional)


def unet_problem(network: nn.Module) -> str | None:
    """Why `network` cannot be replaced by a `FusedResUNet`, or None if it can."""
    return _network_problem(network, BLOCKS_OF_UNET, CONVS_OF_UNET, {})


def predictor_problem(predictor: nn.Module) -> str | None:
    """Why `predictor` cannot be replaced by a `FusedStateOnlyPredictor`, or None if it can, for all that its structure
    says: one that reads actions has the same, and differs in numbers.
    """
    names = [name for name, _ in predictor.named_children()]
    if names != ["predictor"] or not isinstance(getattr(predictor, "context_length", None), int):
        return f"{type(predictor).__name__} is not one network `predictor` over `context_length` frames"
    return _own_problem(predictor) or hooks_problem(predictor) or unet_problem(predictor.predictor)  # type: ignore[arg-type]


def _network_problem(
    network: nn.Module, blocks: tuple[str, ...], convs: tuple[str, ...], optional: OptionalChildren
) -> str | None:
    problem = _children_problem(network, {"conv1", "bn1", *blocks, *convs}, optional) or _norm_problem(network, "bn1")
    if problem:
        return problem
    for name in blocks:
        problem = block_problem(getattr(network, name))
        if problem:
            return f"{name}: {problem}"
    return None


def _children_problem(module: nn.Module, required: set[str], optional: OptionalChildren) -> str | None:
    children = dict(module.named_children())
    if missing := sorted(required - children.keys()):
        return f"{type(module).__name__} has no {', '.join(missing)}"
    unknown = [
        name
        for name, child in children.items()
        if name not in required
        and not (name in optional and optional[name](child))
        # An activation may be a module, and what does nothing is in nobody's way.
        and not (type(child) is nn.ReLU or is_identity(child))
    ]
    if unknown:
        return f"{type(module).__name__} has further layers: {', '.join(unknown)}"
    return _own_problem(module) or hooks_problem(module)


def _own_problem(module: nn.Module) -> str | None:
    """What a fused module, which takes only children over, would lose."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return f"{type(module).__name__} has tensors of its own: {', '.join(name for name, _ in own)}" if own else None


def is_identity(module: nn.Module) -> bool:
    """Whether a module does nothing, as this or the original's code spells it."""
    return type(module) is nn.Identity or (type(module) is nn.Sequential and len(module) == 0)


def _is_global_pool(module: nn.Module) -> bool:
    return type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1))


def _any_module(module: nn.Module) -> bool:
    return True  # looked at more closely afterwards


def require(problem: str | None) -> None:
    """Raise ValueError if there is a problem."""
    if problem:
        raise ValueError(f"not a network of the published form: {problem}")


def difference(fused: nn.Module, eager: nn.Module, *inputs: Tensor | None) -> float:
    """Largest difference of the two on these inputs, relative to the largest output, in eval mode.

    The check behind structural recognition: a module may have the names of a published one and compute something else.
    """
    with eval_mode(fused, eager):
        a, b = fused(*inputs), eager(*inputs)
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) if a.shape == b.shape else float("inf")
