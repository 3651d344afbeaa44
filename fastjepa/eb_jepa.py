"""Training steps for the JEPAs, losses and probes of `eb_jepa`, and its step as it is written."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.fused.match import composition_problem, hooks_problem, predcost_problem, regularizer_problem, std_margin
from fastjepa.model.batch_norm import has_hooks
from fastjepa.model.step import COMPOSITION, StepLosses
from fastjepa.model.step import TrainStep as PlainTrainStep


class TrainStep(PlainTrainStep):
    """`fastjepa.model.step.TrainStep` that also does each thing once for classes of other code which compute what the
    published ones do. Each is tried once on a copy; hooks and what is set on the objects are looked at in every call.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._tried: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str | None]] = weakref.WeakKeyDictionary()
        super().__init__(*arguments, **options)

    def _problem_of(self, jepa: nn.Module) -> str | None:
        problem = super()._problem_of(jepa)
        if problem is None or has_hooks(jepa) or any(name in jepa.__dict__ for name in COMPOSITION):
            return problem
        return self._once(jepa, type(jepa), composition_problem)

    def _problem_of_loss(self, name: str, loss: nn.Module) -> str | None:
        if super()._problem_of_loss(name, loss) is None:
            return None
        if (hooks := hooks_problem(loss)) is not None:
            return hooks
        trial = regularizer_problem if name == "regularizer" else predcost_problem
        return self._once(loss, std_margin(loss), trial)

    def _problem_of_probe(self, probe: nn.Module) -> str | None:
        problem = super()._problem_of_probe(probe)
        return problem if problem is None or has_hooks(probe) else self._once(probe, None, _probe_problem)

    def _once(self, module: nn.Module, state: Any, trial: Any) -> str | None:
        if module not in self._tried or self._tried[module][0] != state:
            self._tried[module] = (state, trial(module))
        return self._tried[module][1]


class OriginalStep(PlainTrainStep):
    """The training step as the original writes it: three encodings and 1 + 2·steps projections, through the JEPA's own
    `unroll` and `encode`.
    """

    def _problem_of(self, jepa: nn.Module) -> str | None:
        return "the original's step is asked for"


class _Encoded(nn.Module):
    """A JEPA that has encoded already."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state

    def encode(self, _: Tensor) -> Tensor:
        return self.state


def _probe_problem(probe: Any) -> str | None:
    """Why a probe's forward is not hcost(head(state), targets); None if it is."""
    weight = next(probe.head.parameters(), torch.zeros(1, 1))
    generator = torch.Generator().manual_seed(0)
    state = torch.rand(2, weight.shape[1], 3, 8, 8, generator=generator).to(weight)
    stub, head = copy.copy(probe), copy.deepcopy(probe.head)
    stub._modules = {**probe._modules, "jepa": _Encoded(state), "head": copy.deepcopy(probe.head)}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            expected = head(state)
            targets = torch.rand(expected.shape, generator=generator).to(expected)
            same = torch.equal(stub(state, targets), probe.hcost(expected, targets))
    except Exception as error:  # whatever code of the user's raises
        return f"{type(probe).__name__} cannot be called like a probe: {error}"
    return None if same else f"{type(probe).__name__} computes something else than its head's loss"


__all__ = ["OriginalStep", "StepLosses", "TrainStep"]
