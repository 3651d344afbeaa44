"""Whether a loss of a JEPA is the published one: what it computes is tried, whoever wrote it.

A loss that is can be computed from one projection of each state. One that is not must be called as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.model.losses import SquareLossSeq, VCLoss
from fastjepa.model.outcomes import first_difference, first_line, outcome, trial_conditions, trial_copy

PUBLISHED_MARGIN = 1.0  # of the hinge on standard deviations


def regularizer_problem(module: nn.Module) -> str | None:
    """Why a regularizer is not the published loss of its `proj`, `std_coeff` and `cov_coeff`; None if it is."""
    if (known := _known(module, VCLoss, ("proj", "std_coeff", "cov_coeff"))) is not None:
        return known or None
    if (margin := std_margin(module)) != PUBLISHED_MARGIN:
        return f"its std_margin is {margin}, and the published one is {PUBLISHED_MARGIN:g}"
    source: Any = module
    return _trial(module, VCLoss(source.std_coeff, source.cov_coeff, source.proj), predictions=0)


def predcost_problem(module: nn.Module) -> str | None:
    """Why a prediction cost is not the published loss of its `proj`; None if it is."""
    if (known := _known(module, SquareLossSeq, ("proj",))) is not None:
        return known or None
    source: Any = module
    return _trial(module, SquareLossSeq(source.proj), predictions=1)


def std_margin(regularizer: nn.Module) -> Any:
    """The margin of the regularizer's hinge where it tells one, as the original's does; otherwise the published one."""
    return getattr(getattr(regularizer, "std_loss_fn", None), "std_margin", PUBLISHED_MARGIN)


def hooks_problem(module: nn.Module) -> str | None:
    """Which module in `module` has hooks, which what replaces it would not call; None if there are none."""
    for child in module.modules():
        if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
            return f"{type(child).__name__} has hooks, which a fused pass would not call"
    return None


def _known(module: nn.Module, published: type[nn.Module], attributes: tuple[str, ...]) -> str | None:
    """What is known without a trial: "" for a published loss, or the problem; None if only a trial can tell."""
    if (hooks := hooks_problem(module)) is not None:
        return hooks
    # What `accelerate` swapped in says how it projects; the loss that it replaced was tried then.
    if type(module) is published or hasattr(module, "projection_path"):
        return ""
    missing = [name for name in attributes if not hasattr(module, name)]
    return f"{type(module).__name__} has no {', '.join(missing)}" if missing else None


def _trial(module: nn.Module, published: nn.Module, *, predictions: int) -> str | None:
    """Both on the same numbers, on copies: with their own projector, and with none. Leaves random numbers alone."""
    try:
        with trial_conditions():
            module, published = trial_copy(module), trial_copy(published)
            source: Any = module
            linear = next((layer for layer in source.proj.modules() if isinstance(layer, nn.Linear)), None)
            found = _first_difference(module, published, 4 if linear is None else linear.in_features, predictions)
            # Behind a projector all standard deviations may lie on one side of the hinge: so once more without.
            source.proj, published.proj = nn.Identity(), nn.Identity()
            found = found or _first_difference(module, published, 4, predictions)
    except Exception as error:  # whatever code of the user's raises on what the published loss takes
        return f"it has the published attributes but cannot be called like the published loss: {first_line(error)}"
    return f"it has the published attributes but computes something else ({found} differs)" if found else None


def _first_difference(module: nn.Module, published: nn.Module, channels: int, predictions: int) -> str:
    """What of values, gradients of everything, and buffers afterwards is not the same; "" if all is. A stopped gradient
    or another order of calls shows.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1 + predictions, 2, channels, 3, 4, 4)
    spread = torch.linspace(0.3, 2.0, channels).view(-1, 1, 1, 1)
    states = (spread * torch.randn(shape, generator=generator)).double()
    return first_difference(*(_outcome(loss, states, predictions) for loss in (module, published)))


def _outcome(loss: nn.Module, states: Tensor, predictions: int) -> dict[str, Tensor]:
    inputs = [state.clone().requires_grad_() for state in states]
    result = loss(*inputs) if predictions else loss(inputs[0], None)
    values = [result] if predictions else list(result[:2])
    return outcome(
        loss,
        dict(zip(("state", "prediction"), inputs, strict=False)),
        dict(zip(("loss", "unweighted loss"), values, strict=False)),
        values[0],
    )
