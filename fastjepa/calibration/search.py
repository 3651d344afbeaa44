"""Which candidate is tried next: a function of what came of those before, so that a search can go on anywhere.

Everything at once comes first, because that is what usually wins, and a time limit then costs least. If it works, each
part is left out (or put in) in turn, which is also the verdict on that part. If it does not, each part is tried alone,
those that are exact and faster are put together, and their neighbours are tried as before. Where flags allow some
choices only, no other is tried. Fused networks first keep activations where memory was counted to be enough for that
(`calibration.memory`), and else make them again.

Inference has two ways to do everything at once: own convolutions, into which BatchNorm is folded, and fused blocks
between torch's convolutions. The first is tried first. Where it is exact, the child that found so has timed each of its
layers against torch's convolution of the same weights, and if some are faster and some are not, the choice with just
those is the next candidate: checked and timed as a whole, as any other. Then come the second way, and the neighbours.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import get_args

from fastjepa.calibration.choice import EAGER, Choice, Losses
from fastjepa.calibration.layers import LAYERS, join_layers
from fastjepa.calibration.setting import Purpose
from fastjepa.calibration.trial import Status, Trial, scores

BROKEN = ("wrong", "failed", "unavailable", "crashed", "hung")


def next_choice(purpose: Purpose, trials: Sequence[Trial], recompute: bool = True) -> Choice | None:
    """The candidate to try after `trials`, None if there is nothing left that could help.

    `recompute`: whether fused networks are first tried with recomputation, which is surer to fit in memory.
    """
    tried = {trial.choice for trial in trials}
    broken = broken_parts(purpose, trials)
    for choice in _wanted(purpose, trials, recompute):
        if choice not in tried and choice != EAGER and not any(contains(choice, part) for part in broken):
            return choice
    return None


def among(allowed: Callable[[Choice], bool], trials: Sequence[Trial]) -> list[Trial]:
    """The trials as a search sees them that is to try allowed choices only: all others count as tried.

    A choice that is not allowed leads nowhere, however fast, but a part that does not work stays broken. It is plain
    data, which a child process can be given.
    """
    seen = [trial for trial in trials if allowed(trial.choice) or trial.status in BROKEN]
    known = {trial.choice for trial in seen}
    others = [choice for choice in every_choice(trials) if choice not in known and not allowed(choice)]
    return [*seen, *(Trial(choice, "not measured", "it is not asked for") for choice in others)]


def every_choice(trials: Sequence[Trial] = ()) -> Iterator[Choice]:
    """All there are; of own convolutions in some layers, those that `trials` propose."""
    booleans = (False, True)
    own = ("", "all", *dict.fromkeys(_some_layers(trials)))
    for losses, convolutions in itertools.product(get_args(Losses), own):
        for batch_norm, graph, recompute, channels_last in itertools.product(booleans, repeat=4):
            if (batch_norm or not recompute) and not (batch_norm and convolutions):
                yield Choice(batch_norm, losses, graph, recompute, channels_last, convolutions)


def everything(purpose: Purpose, recompute: bool = True) -> Choice:
    """All parts at once. Inference keeps nothing that could be computed again, and own convolutions have a memory
    layout of their own.
    """
    if purpose == "train":
        return Choice(batch_norm=True, losses="fused", cuda_graph=True, recompute=recompute, channels_last=True)
    return Choice(cuda_graph=True, convolutions="all")


def rival() -> Choice:
    """All parts of inference but own convolutions, in whose place are fused blocks."""
    return Choice(batch_norm=True, cuda_graph=True, channels_last=True)


def single_parts(purpose: Purpose, recompute: bool = True) -> tuple[Choice, ...]:
    """Each part alone, by expected value."""
    blocks = Choice(batch_norm=True, recompute=recompute and purpose == "train")
    rest = (Choice(cuda_graph=True), Choice(channels_last=True))
    if purpose == "train":
        return (Choice(losses="fused"), blocks, Choice(losses="closed_form"), *rest)
    return (Choice(convolutions="all"), blocks, *rest)


def broken_parts(purpose: Purpose, trials: Sequence[Trial]) -> list[Choice]:
    """The parts that did not work alone: nothing that contains one is worth trying."""
    alone = {*single_parts(purpose, recompute=True), *single_parts(purpose, recompute=False)}
    return [trial.choice for trial in trials if trial.choice in alone and trial.status in BROKEN]


def contains(choice: Choice, part: Choice) -> bool:
    """Whether all that `part` has beyond eager is in `choice`, recomputation aside."""
    names = ("batch_norm", "losses", "cuda_graph", "channels_last")
    own = bool(choice.convolutions) or not part.convolutions  # in some layers or in all
    return own and all(getattr(part, n) in (getattr(EAGER, n), getattr(choice, n)) for n in names)


def neighbours(purpose: Purpose, choice: Choice, recompute: bool = True) -> Iterator[Choice]:
    """The choices that differ in one thing, by expected value."""
    yield dataclasses.replace(choice, cuda_graph=not choice.cuda_graph)
    if choice.convolutions:  # without them: in the memory layout that they have, and in the usual one
        yield dataclasses.replace(choice, convolutions="", channels_last=True)
        yield dataclasses.replace(choice, convolutions="")
        return
    if choice.batch_norm and purpose == "train":
        yield dataclasses.replace(choice, recompute=not choice.recompute)
    with_blocks = not choice.batch_norm
    again = with_blocks and recompute and purpose == "train"
    yield dataclasses.replace(choice, batch_norm=with_blocks, recompute=again)
    if purpose == "train":
        for losses in ("fused", "closed_form", "eager"):
            if losses != choice.losses:
                yield dataclasses.replace(choice, losses=losses)
    yield dataclasses.replace(choice, channels_last=not choice.channels_last)


def _wanted(purpose: Purpose, trials: Sequence[Trial], recompute: bool) -> Iterator[Choice]:
    status = {trial.choice: trial.status for trial in trials}
    yield from _at_once(purpose, recompute, status)
    if not recompute and "out of memory" in map(status.get, _with_and_without_graph(purpose, recompute)):
        recompute = True  # memory was not enough for activations, whatever was counted
        yield from _at_once(purpose, recompute, status)
    at_once = {*_with_and_without_graph(purpose, True), *_with_and_without_graph(purpose, recompute)}
    if purpose == "inference":
        yield from _some(trials)
        yield from _at_once_or_plain(rival(), status)
        at_once |= {rival(), dataclasses.replace(rival(), cuda_graph=False)}
    times = scores(trials)
    if not times.keys() & at_once:
        parts = single_parts(purpose, recompute)
        yield from parts
        helpful = _put_together([part for part in parts if _helps(part, trials)])
        yield helpful
        yield dataclasses.replace(helpful, cuda_graph=False)
    by_time = sorted(times, key=lambda choice: times[choice])
    for ranking in (by_time, [choice for choice in by_time if not choice.cuda_graph]):
        if ranking:  # the best, and the best for those who cannot use a graph
            yield from neighbours(purpose, ranking[0], recompute)


def _at_once(purpose: Purpose, recompute: bool, status: Mapping[Choice, Status]) -> Iterator[Choice]:
    yield from _at_once_or_plain(everything(purpose, recompute), status)


def _at_once_or_plain(top: Choice, status: Mapping[Choice, Status]) -> Iterator[Choice]:
    yield top
    if status.get(top) not in ("hung", "unavailable"):  # the same without a graph would end as that did
        yield dataclasses.replace(top, cuda_graph=False)


def _some(trials: Sequence[Trial]) -> Iterator[Choice]:
    """Own convolutions in those layers alone that were faster by them, as the first trial that knows says."""
    for layers in _some_layers(trials):
        exact = any(t.status == "exact" and t.choice == everything("inference") for t in trials)
        yield Choice(cuda_graph=exact, convolutions=layers)
        return


def _some_layers(trials: Sequence[Trial]) -> Iterator[str]:
    """The layers that are faster by own convolutions, where that is neither all of them nor none."""
    for trial in trials:
        if trial.faster_layers is not None and 0 < len(trial.faster_layers) < len(LAYERS):
            yield join_layers(trial.faster_layers)


def _with_and_without_graph(purpose: Purpose, recompute: bool) -> tuple[Choice, Choice]:
    top = everything(purpose, recompute)
    return top, dataclasses.replace(top, cuda_graph=False)


def _helps(part: Choice, trials: Sequence[Trial]) -> bool:
    trial = next((trial for trial in trials if trial.choice == part), None)
    return trial is not None and trial.status == "exact" and (trial.speedup is None or trial.speedup > 1)


def _put_together(parts: Sequence[Choice]) -> Choice:
    """One choice with all of them; of two ways to compute the losses, the one that comes first."""
    values: dict[str, object] = {}
    for part in parts:
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if value != getattr(EAGER, field.name):
                values.setdefault(field.name, value)
    return Choice(**values)  # type: ignore[arg-type]
