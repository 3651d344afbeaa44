"""Whether a training step of fused networks keeps its activations or computes them again: by counted bytes.

Recomputation saves memory and costs time, so it is for where memory is scarce. What is counted, and how, is
`fastjepa.fused.step_memory`; here is what follows from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastjepa.calibration.choice import Choice


@dataclass(frozen=True)
class Memory:
    """Bytes, counted before anything runs: what a step needs in all if it keeps activations, and if it computes them
    again; and what is free for it.

    A count is an estimate. Where it says that only one of the two fits, the other is not tried. Where it says that none
    does, both may be.
    """

    keeping: int
    recomputing: int
    free: int

    @property
    def recompute(self) -> bool:
        """Whether memory asks for recomputation: what is taken unmeasured, and tried first."""
        return self.keeping > self.free

    def allows(self, choice: Choice) -> bool:
        """Whether a calibration tries `choice`: all but fused networks that would keep more than fits."""
        only_recomputation_fits = self.recomputing <= self.free < self.keeping
        return choice.recompute or not choice.batch_norm or not only_recomputation_fits

    def __str__(self) -> str:
        verdict = "they are kept"
        if self.recompute:
            verdict = "recomputation" if self.recomputing <= self.free else "recomputation, and perhaps too little"
        return (
            f"by count a fused step that keeps its activations needs {self.keeping / 1e9:.1f} GB, one that computes "
            f"them again {self.recomputing / 1e9:.1f} GB, and {self.free / 1e9:.1f} GB are free: {verdict}"
        )


def recompute_first(memory: Memory | str) -> bool:
    """Whether fused networks are first tried with recomputation; also where nothing could be counted, for the reason
    that stands in place of the count: it fits more surely.
    """
    return memory.recompute if isinstance(memory, Memory) else True
