"""What can be swapped, and why not: modules are matched with the published ones by structure and by what they compute.

Modules are known by the names and types of their children, never by their class, so that those of other code are found
too. Structure does not tell a stopped gradient, noise in train mode or another resizing of odd sizes: so a module is
then tried against the published one, in float64, on copies: values, gradients and buffers. No Triton is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from fastjepa.model.batch_norm import has_hooks
from fastjepa.model.jepa import JEPA, eval_mode
from fastjepa.model.losses import SquareLossSeq, VCLoss
from fastjepa.model.networks import ResidualBlock, ResNet5, ResUNet, StateOnlyPredictor
from fastjepa.model.probes import JEPAProbe

BLOCKS_OF_ENCODER = ("layer1", "layer2", "layer3")
BLOCKS_OF_UNET = ("enc1", "enc2", "enc3", "bott", "dec3", "dec2", "dec1")
CONVS_OF_UNET = ("up3", "up2", "up1", "head")
PUBLISHED_MARGIN = 1.0  # of the hinge on standard deviations
TOLERANCE = 1e-4  # the room is for a module that computes in fp32 whatever it is given
Outcomes = tuple[dict[str, Tensor], ...]  # of a module and of the published one
SIZES = ((8, 8), (9, 10))  # pixels; of the second, upsampled maps are resized


# ---- structure ----


def encoder_problem(network: nn.Module) -> str | None:
    """Why `network` has not the structure of a `ResNet5`, or None if it has."""
    return _network_problem(network, BLOCKS_OF_ENCODER, ())


def unet_problem(network: nn.Module) -> str | None:
    """Why `network` has not the structure of a `ResUNet`, or None if it has."""
    return _network_problem(network, BLOCKS_OF_UNET, CONVS_OF_UNET)


def predictor_problem(predictor: nn.Module) -> str | None:
    """Why `predictor` has not the structure of a `StateOnlyPredictor` of a `ResUNet`, or None if it has."""
    names = [name for name, _ in predictor.named_children()]
    if names != ["predictor"] or not isinstance(getattr(predictor, "context_length", None), int):
        return f"{type(predictor).__name__} is not one network `predictor` over `context_length` frames"
    return _children_problem(predictor, {"predictor": nn.Module}) or unet_problem(predictor.predictor)  # type: ignore[arg-type]


def block_problem(block: nn.Module) -> str | None:
    """Why `block` has not the structure of a `ResidualBlock`, or None if it has."""
    wanted = {"conv1": nn.Conv2d, "bn1": nn.BatchNorm2d, "conv2": nn.Conv2d, "bn2": nn.BatchNorm2d}
    if problem := _children_problem(block, {**wanted, "shortcut": nn.Module}):
        return problem
    shortcut = block.get_submodule("shortcut")
    kinds = [type(layer) for layer in shortcut] if isinstance(shortcut, nn.Sequential) else []
    published = is_identity(shortcut) or kinds == [nn.Conv2d, nn.BatchNorm2d]
    return None if published else "its shortcut is not (Conv2d, BatchNorm2d)"


def hooks_problem(module: nn.Module) -> str | None:
    """Which module in `module` has hooks, which what replaces it would not call; None if there are none."""
    hooked = next((type(m).__name__ for m in module.modules() if has_hooks(m)), None)
    return None if hooked is None else f"{hooked} has hooks, which a fused pass would not call"


def is_identity(module: nn.Module) -> bool:
    """Whether a module does nothing, as this or the original's code spells it."""
    return type(module) is nn.Identity or (type(module) is nn.Sequential and len(module) == 0)


def require(problem: str | None) -> None:
    """Raise ValueError if there is a problem."""
    if problem:
        raise ValueError(f"not a network of the published form: {problem}")


def _network_problem(network: nn.Module, blocks: tuple[str, ...], convs: tuple[str, ...]) -> str | None:
    wanted = {**dict.fromkeys(("conv1", *blocks, *convs), nn.Module), "bn1": nn.BatchNorm2d}
    if problem := _children_problem(network, wanted):
        return problem
    problems = ((name, block_problem(network.get_submodule(name))) for name in blocks)
    return next((f"{name}: {problem}" for name, problem in problems if problem), None)


def _children_problem(module: nn.Module, required: Mapping[str, type[nn.Module]]) -> str | None:
    """What a fused module, which takes over only the required children (nn.Module: of any type), would lack or lose."""
    children = dict(module.named_children())
    if missing := sorted(required.keys() - children.keys()):
        return f"{type(module).__name__} has no {', '.join(missing)}"
    if further := [name for name in children if name not in required and not _may_be_beside(children[name])]:
        return f"{type(module).__name__} has further layers: {', '.join(further)}"
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    if own:
        return f"{type(module).__name__} has tensors of its own: {', '.join(name for name, _ in own)}"
    for name, kind in required.items():
        if kind not in (nn.Module, type(children[name])):
            return f"{name} is a {type(children[name]).__name__}, not a {kind.__name__}"
    return hooks_problem(module)


def _may_be_beside(child: nn.Module) -> bool:
    """Whether a published network may have such a layer: an activation, what does nothing, the pool of `avg_pool`.
    A trial finds out where it is not called as there.
    """
    pools = type(child) is nn.AdaptiveAvgPool2d and child.output_size in (1, (1, 1))
    return type(child) is nn.ReLU or is_identity(child) or pools


# ---- trials ----


def network_trial_problem(module: nn.Module, name: str) -> str | None:
    """Why a module of the published structure does not compute what the published network does; None if it does.

    Args:
        module: on any device, in any dtype and mode; it stays as it is.
        name: its path in the JEPA: "encoder", "predictor" or "predictor.predictor".
    """

    def outcomes() -> Iterator[Outcomes]:
        theirs = _trial_copy(module).requires_grad_()
        _draw_weights(theirs)
        published = _published(_trial_copy(theirs), name)
        for training, size in product((True, False), SIZES):
            inputs = example(theirs, name, batch=2, size=size)
            yield tuple(_network_outcome(n.train(training), inputs) for n in (theirs, published))

    return _trial_problem("it has the published names", "one", outcomes)


def regularizer_problem(module: nn.Module) -> str | None:
    """Why a regularizer is not the published loss of its `proj`, `std_coeff` and `cov_coeff`; None if it is."""
    if (margin := std_margin(module)) != PUBLISHED_MARGIN:
        return f"its std_margin is {margin}, and the published one is {PUBLISHED_MARGIN:g}"
    return _loss_problem(module, lambda loss: VCLoss(loss.std_coeff, loss.cov_coeff, loss.proj), predictions=0)


def predcost_problem(module: nn.Module) -> str | None:
    """Why a prediction cost is not the published loss of its `proj`; None if it is."""
    return _loss_problem(module, lambda loss: SquareLossSeq(loss.proj), predictions=1)


def std_margin(regularizer: nn.Module) -> Any:
    """The margin of the regularizer's hinge where it tells one, as the original's does; otherwise the published one."""
    return getattr(getattr(regularizer, "std_loss_fn", None), "std_margin", PUBLISHED_MARGIN)


def composition_problem(jepa: nn.Module) -> str | None:
    """Why a JEPA of other code does not put its parts together as the published one; None if it does.

    Its `unroll` and `encode` are tried against those of `fastjepa.model.jepa.JEPA` around the same parts.
    """

    def outcomes() -> Iterator[Outcomes]:
        theirs: Any = _trial_copy(jepa)
        source: Any = copy.deepcopy(theirs)
        parts = (source.encoder, source.action_encoder, source.predictor, source.regularizer, source.predcost)
        yield tuple(_composition_outcome(one) for one in (theirs, JEPA(*parts)))

    return _trial_problem("it has the parts of a JEPA", "a JEPA", outcomes)


def probe_problem(probe: Any) -> str | None:
    """Why a probe of other code does not compute the loss of its head on the states; None if it does."""

    def outcomes() -> Iterator[Outcomes]:
        generator = torch.Generator().manual_seed(0)
        channels = next(probe.head.parameters()).shape[1]
        state = torch.rand(2, channels, 3, 8, 8, generator=generator, dtype=torch.float64)
        wanted = _trial_copy(probe.head)(state)
        targets = torch.rand(wanted.shape, generator=generator, dtype=wanted.dtype)
        theirs = copy.copy(probe)  # whose JEPA, which may be large, is not copied
        theirs._modules = dict(probe._modules)
        theirs.jepa, theirs.head = _Encoded(), _trial_copy(probe.head)
        published = JEPAProbe(_Encoded(), _trial_copy(probe.head), copy.deepcopy(probe.hcost))
        losses = {one: one(state, targets) for one in (theirs, published)}
        yield tuple(_outcome(one, {}, {"loss": loss}, loss) for one, loss in losses.items())

    return _trial_problem("it has the parts of a probe", "one", outcomes)


class _Encoded(nn.Module):
    """A JEPA whose video is encoded already."""

    def encode(self, state: Tensor) -> Tensor:
        return state


def difference(fused: nn.Module, eager: nn.Module, *inputs: Tensor | None) -> float:
    """Largest difference of the two on these inputs, relative to the largest output, in eval mode."""
    with eval_mode(fused, eager):
        a, b = fused(*inputs), eager(*inputs)
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) if a.shape == b.shape else float("inf")


def example(module: nn.Module, name: str, *, batch: int, size: tuple[int, int]) -> tuple[Tensor | None, ...]:
    """Inputs for the network called `name`: frames or a video (B, C, T, H, W), the same in each call."""
    weight = module.get_parameter("predictor.conv1.weight" if name == "predictor" else "conv1.weight")
    shape: tuple[int, ...] = (batch, weight.shape[1], 1, *size)
    if name == "predictor":  # which puts some frames into the channels
        context_length: Any = module.context_length
        shape = (batch, weight.shape[1] // context_length, context_length + 1, *size)
    elif getattr(module, "avg_pool", False):  # which makes no states of a video
        shape = (2 * batch, weight.shape[1], *size)
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    # A predictor is called with actions, here none.
    return (drawn, None) if name == "predictor" else (drawn,)


def _trial_problem(has: str, published: str, outcomes: Callable[[], Iterator[Outcomes]]) -> str | None:
    """What a trial finds, with gradients, no autocast, and random numbers of its own, whatever the caller has."""
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            found = next((name for pair in outcomes() if (name := _first_difference(*pair))), None)
    except Exception as error:  # whatever code of the user's raises on an input that the published module takes
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"{has} but cannot be called like {published}: {line}"
    return f"{has} but computes something else ({found} differs)" if found else None


def _trial_copy(module: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU, in train mode."""
    return copy.deepcopy(module).cpu().double().train()


def _outcome(
    module: nn.Module, inputs: Mapping[str, Tensor], values: Mapping[str, Tensor], loss: Tensor
) -> dict[str, Tensor]:
    """Everything that is to be the same after a call of `module`: by name, detached, in float64. `loss` is a scalar of
    the values, whose gradients are taken with respect to inputs and parameters.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    wanted = {**inputs, **parameters}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    found = {name: value.detach().double() for name, value in values.items()}
    found |= {f"gradient of the {name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}
    return found | {f"buffer {name}": buffer.double() for name, buffer in module.named_buffers()}


def _first_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The first of two outcomes' entries that is not the same; "" if all are."""
    if different := sorted(found.keys() ^ expected.keys()):
        return different[0]
    # Gradients that are analytically 0 (a bias in front of a BatchNorm) are rounding of the others'.
    largest = max((_norm(value) for name, value in expected.items() if name.startswith("gradient")), default=0.0)
    for name, value in expected.items():
        scale = max(_norm(value), largest if name.startswith("gradient") else 0.0)
        same = found[name].shape == value.shape and bool((found[name].isnan() == value.isnan()).all())
        if not same or _norm(found[name] - value) > TOLERANCE * scale:
            return name
    return ""


def _norm(x: Tensor) -> float:
    return float(x.nan_to_num(nan=0.0).norm())  # the covariance loss of a single feature is NaN


def _composition_outcome(jepa: Any) -> dict[str, Tensor]:
    first = next(parameter for parameter in jepa.encoder.parameters())
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(2, first.shape[1], 4, 8, 8, generator=generator, dtype=first.dtype)
    state, losses = jepa.unroll(video, None, nsteps=2)
    values = {"state": state, "loss": losses[0], "vc loss": losses[1], "prediction loss": losses[4]}
    values["encoding"] = encoding = jepa.encode(video)
    if encoding.requires_grad:  # probes would train the encoder
        values["gradient through encode"] = torch.ones(())
    return _outcome(jepa, {}, values, losses[0])


def _loss_problem(module: nn.Module, published: Callable[[Any], nn.Module], *, predictions: int) -> str | None:
    """Both losses on the same numbers: with their own projector, and with none, because behind a projector all standard
    deviations may lie on one side of the hinge. A stopped gradient or another order of calls shows.
    """
    if (hooks := hooks_problem(module)) is not None:
        return hooks
    needed = ("proj",) if predictions else ("proj", "std_coeff", "cov_coeff")
    if missing := [name for name in needed if not hasattr(module, name)]:
        return f"{type(module).__name__} has no {', '.join(missing)}"
    if type(module) is type(published(module)):
        return None

    def outcomes() -> Iterator[Outcomes]:
        losses: list[Any] = [_trial_copy(module), _trial_copy(published(module))]
        linear = next((layer for layer in losses[0].proj.modules() if isinstance(layer, nn.Linear)), None)
        channels = 4 if linear is None else linear.in_features
        yield tuple(_loss_outcome(loss, channels, predictions) for loss in losses)
        for loss in losses:
            loss.proj = nn.Identity()
        yield tuple(_loss_outcome(loss, 4, predictions) for loss in losses)

    return _trial_problem("it has the published attributes", "the published loss", outcomes)


def _loss_outcome(loss: nn.Module, channels: int, predictions: int) -> dict[str, Tensor]:
    shape = (1 + predictions, 2, channels, 3, 4, 4)
    spread = torch.linspace(0.3, 2.0, channels).view(-1, 1, 1, 1)
    states = (spread * torch.randn(shape, generator=torch.Generator().manual_seed(0))).double()
    inputs = [state.clone().requires_grad_() for state in states]
    values = [loss(*inputs)] if predictions else list(loss(inputs[0], None)[:2])
    named = dict(zip(("loss", "unweighted loss"), values, strict=False))
    return _outcome(loss, dict(zip(("state", "prediction"), inputs, strict=False)), named, values[0])


@torch.no_grad()
def _draw_weights(module: nn.Module) -> None:
    """Weights and buffers at which every part of a network shows, and activations are large."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1 / 9
        parameter.normal_(generator=generator).div_(fan_in**0.5)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.normal_(generator=generator)
            layer.running_var.normal_(generator=generator).abs_().add_(0.5)


def _network_outcome(network: nn.Module, inputs: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    x, *rest = inputs
    assert x is not None
    x = x.clone().requires_grad_()
    out = network(x, *rest)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    return _outcome(network, {"input": x}, {"result": out}, (out * weights).sum())


def _published(module: Any, name: str) -> nn.Module:
    """The published network around the convolutions and BatchNorms of `module`."""
    if name == "encoder":
        return _refilled(ResNet5(1, 1, 1, avg_pool=getattr(module, "avg_pool", False)), module)
    if name == "predictor":
        return StateOnlyPredictor(_refilled(ResUNet(1, 1, 1), module.predictor), module.context_length)
    return _refilled(ResUNet(1, 1, 1), module)


def _refilled(made: nn.Module, source: nn.Module) -> nn.Module:
    for name, child in list(made.named_children()):
        theirs = source.get_submodule(name)
        setattr(made, name, _refilled(ResidualBlock(1, 1), theirs) if isinstance(child, ResidualBlock) else theirs)
    return made


# ---- what changes afterwards ----


class Unchanged:
    """Whether `swapped`, and `replaced`, the published module in whose place and around whose children it is, still are
    what they were: the same modules of the same classes, with no hooks and no `forward` set on an object. Asking takes
    microseconds.
    """

    def __init__(self, swapped: nn.Module, replaced: nn.Module) -> None:
        self._swapped, self._replaced = swapped, replaced
        inside = list(swapped.modules())[1:]  # a hook of the swapped module itself is called around its forward
        self._shared = _Snapshot(inside, (swapped, *inside))
        apart = [module for module in replaced.modules() if module not in set(inside)]
        self._apart = _Snapshot(apart, apart)

    def eager(self, forward: Callable[..., Any]) -> Callable[..., Any] | None:
        """None while nothing has changed; otherwise what calls all modules that there are now: `forward`, the published
        one, on the children of the swapped module, or the replaced module where that has changed apart from these.
        Always None under torch.compile, which compiles what it sees.
        """
        if torch.compiler.is_compiling():
            return None
        if self._apart.changed():
            return self._replaced
        if self._shared.changed() or torch_modules._has_any_global_hook():
            return partial(forward, self._swapped)
        return None


class _Snapshot:
    """Classes and children of modules; hooks are looked for in the dicts that hold them."""

    def __init__(self, modules: Sequence[nn.Module], parents: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        self._types = [type(module) for module in modules]
        self._hooks = [
            hooks
            for m in modules
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        self._children = [(module._modules, tuple(module._modules.values())) for module in parents]

    def changed(self) -> bool:
        return (
            any(self._hooks)
            or any("forward" in module.__dict__ for module in self._modules)
            or [type(module) for module in self._modules] != self._types
            or any(tuple(now.values()) != then for now, then in self._children)
        )
