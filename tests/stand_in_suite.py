"""A suite of variants that go wrong in every way that a GPU can, for the rehearsal of `bench prove` on any machine.

Run as a program with the options of a suite. Each variant that is built notes that in the file named by STAND_IN_LOG.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial

import torch

from bench.harness import suite
from bench.harness.case import Case
from bench.harness.variants import Computation, Tensors, Variant


def make_inputs(device: torch.device, dtype: torch.dtype) -> Tensors:
    return {"x": torch.arange(1.0, 9.0, dtype=torch.float64).to(device, dtype)}


def triple(inputs: Tensors) -> Tensors:
    return {"y": 3 * inputs["x"]}


def work(phase: str, dtype: torch.dtype) -> None:
    return None


def build(kind: str, device: torch.device) -> Computation:
    log = os.environ.get("STAND_IN_LOG")
    if log:
        with open(log, "a") as file:
            file.write(f"{kind}\n")

    def compute(inputs: Tensors) -> Tensors:
        if kind == "abort":
            print("about to abort", flush=True)
            os.abort()
        if kind == "hang":
            time.sleep(3600)
        if kind == "out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 TiB")
        if kind == "raise":
            raise RuntimeError("a launch failure")
        if kind == "exit":
            os._exit(7)
        if kind == "slow":
            time.sleep(0.02)
        if kind == "wrong":
            return {"y": 3.01 * inputs["x"]}
        return triple(inputs)

    return compute


KINDS = ("good", "abort", "wrong", "hang", "out of memory", "raise", "exit", "slow", "last")


def variants() -> list[Variant]:
    return [Variant(kind, partial(build, kind)) for kind in KINDS]


def case(name: str) -> Case:
    return Case("stand_in", name, make_inputs, triple, work, "good", {"fp32": "good"}, phase="step")


def main(argv: list[str]) -> int:
    parser = suite.make_parser("stand_in", __doc__ or "")
    options = suite.resolve("stand_in", parser, parser.parse_args(argv), argv)
    return suite.run(options, parser, [(case(name), variants()) for name in ("one", "two")])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
