"""How steps are put into launches: none of them crosses what must lie between two, and they are as few as may be."""

from __future__ import annotations

import pytest

from fastjepa.training.launches import MOST_STEPS, next_launch, steps_per_launch


@pytest.mark.parametrize(
    ("log_every", "checkpoint_every", "expected"),
    [
        (20, 200, 10),
        (1, 200, 1),
        (7, 200, 7),
        (12, 200, 6),
        (11, 5, 5),
        (11, 100, 10),
        (13, 100, 6),
        (200, 4, 4),
        (21, 100, 10),  # three launches with 7, too
    ],
)
def test_as_many_steps_as_make_the_fewest_launches(log_every: int, checkpoint_every: int, expected: int) -> None:
    assert steps_per_launch(log_every, checkpoint_every) == expected
    assert steps_per_launch(log_every, checkpoint_every, most=1) == 1


def test_there_is_always_a_size() -> None:
    for interval in range(1, 100):
        size = steps_per_launch(interval, interval)
        assert 1 <= size <= min(interval, MOST_STEPS)
        launches = interval // size + interval % size
        assert all(launches <= interval // k + interval % k for k in range(1, min(interval, MOST_STEPS) + 1))


def test_a_launch_ends_before_anything_is_due() -> None:
    assert next_launch(10, 10, 33) == 10
    assert next_launch(10, 9, 33) == 1
    assert next_launch(10, 33, 33, 0) == 1  # the ragged batch: no full one is left


@pytest.mark.parametrize(("log_every", "checkpoint_every", "epoch"), [(20, 200, 281), (7, 5, 23), (12, 9, 31)])
def test_no_launch_crosses_a_due_step(log_every: int, checkpoint_every: int, epoch: int) -> None:
    size, step = steps_per_launch(log_every, checkpoint_every), 0
    due = {s for s in range(4000) if s % log_every == 0 or s % checkpoint_every == 0 or s % epoch == 0}
    while step < 3000:
        count = next_launch(size, *(every - step % every for every in (log_every, checkpoint_every, epoch)))
        assert not due & set(range(step + 1, step + count))
        step += count
