"""How many steps of training go into one launch of a CUDA graph.

K steps in one launch spare the host K - 1 launches, and nothing of it shows: readings of the losses, checkpoints, the
end of a run and the ragged last batch of an epoch lie between two launches, and a stop signal waits for the end of one.
Full batches go K at a time where so many are left before the next of these, and else one at a time: two recordings, and
no more, because each has to be warmed up and captured.
"""

from __future__ import annotations

# With 10, a step has a tenth of a launch's cost for the host, and more would hardly gain anything. What grows with it:
# the time of a recording, whose warm-up runs and capture are of so many steps; the memory of its nodes (activations,
# gradients and inputs are shared by its steps); and the time until Ctrl-C is heard.
MOST_STEPS = 10


def steps_per_launch(log_every: int, checkpoint_every: int, most: int | None = None) -> int:
    """K, at most `most` (default: `MOST_STEPS`): of those for which the shorter of the two intervals takes the fewest
    launches, the largest.
    """
    interval = min(log_every, checkpoint_every)
    sizes = range(1, min(interval, MOST_STEPS if most is None else most) + 1)
    return min(reversed(sizes), key=lambda size: sum(divmod(interval, size)))


def next_launch(size: int, *steps_left: int) -> int:
    """How many steps the next launch makes: `size`, or 1 where something is due in fewer steps (`steps_left`, of each
    thing that must lie between two launches).
    """
    return size if size <= min(steps_left) else 1
