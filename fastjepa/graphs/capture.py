"""CUDA graphs behind one contract, for `GraphedRollout` and `GraphedTrainStep`.

A graph replays the kernels that were launched while it was captured, on the memory they used then. The contract:

- **Static memory.** A recording reads inputs from, and leaves results in, tensors that its owner allocated before.
  They are outside the graphs' memory pool, so no other replay overwrites them. Whether a caller gets a copy of the
  results or the static tensors themselves is the owner's `copy` argument.
- **Signature.** The owner checks shape, dtype and device of its inputs, and records once for each signature and
  ambient autocast; the least recently used recording goes when there are too many.
- **Weights** changed in place (an optimizer's step, `load_state_dict`, loading a checkpoint) are seen by the next
  replay. Weights that were *replaced* or moved, swapped modules, a changed mode, frozen parameters or another
  hyperparameter of the optimizer are noticed before a replay, and recorded anew. Other Python values of a module (the
  momentum of a BatchNorm, say) are those at the time of capture.
- **Warm-up.** Before capture the work runs a few times on a side stream (libraries choose algorithms, kernels compile),
  and what it changed is put back, random number generators included: recording leaves no trace.
- **Nothing waits.** Work that waits for the device cannot be captured; the last warm-up run finds it, and raises
  `GraphCaptureError` with the line at fault in its cause. Nothing is broken then. What only capture itself finds out
  (another stream, pinned memory) raises it too, but CUDA may not recover from that: end the process.
- **One pool.** All recordings on a device share one memory pool, which is safe because they replay one after another:
  replay recordings that share a pool on one stream at a time.
- **On a CPU** there is no graph: the same objects run the same code plainly on the same static memory.

PyTorch's arithmetic settings (TF32, deterministic algorithms, cuDNN benchmarking) are those at the time of capture.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

from fastjepa.profiling import span

WARMUP_RUNS = 3  # as PyTorch's own examples: lazy initialisation is over by then

CudaGraphChoice = Literal["auto", "on", "off"]


class GraphCaptureError(RuntimeError):
    """The work cannot be recorded as a CUDA graph; the message says why, and the cause has the place."""


def use_cuda_graph(choice: CudaGraphChoice, device: torch.device, *, auto: bool = True) -> bool:
    """Whether work runs as a graph; `auto` is what "auto" means on a CUDA device.

    Raises:
        ValueError: another choice, or "on" without a CUDA device.
    """
    if choice not in ("auto", "on", "off"):
        raise ValueError(f"--cuda_graph must be auto, on or off; got {choice!r}")
    if choice == "on" and device.type != "cuda":
        raise ValueError(f"--cuda_graph on needs a CUDA device, and this runs on {device}; use auto or off")
    return choice == "on" or (choice == "auto" and device.type == "cuda" and auto)


class Recording:
    """`body()`, recorded: `replay()` runs it again on the same memory. On a CPU `body` itself is called.

    Args:
        body: the work. It reads and writes static tensors only, and does not wait for the device.
        device: where it runs.
        name: of the work, for messages.
        no_trace: makes a context that puts back, at its end, what `body` changed inside; None if `body` changes only
            what it overwrites anyway.
        warmup_runs: default `WARMUP_RUNS` on CUDA, where there must be at least 1, and 0 on a CPU.
        pool: memory pool from `torch.cuda.graph_pool_handle()`; default: the one shared by all on this device.

    Raises:
        GraphCaptureError: `body` waits for the device, or does something else that a graph cannot hold.
        ValueError: too few warm-up runs.
    """

    def __init__(
        self,
        body: Callable[[], None],
        device: torch.device,
        *,
        name: str,
        no_trace: Callable[[], AbstractContextManager[None]] | None = None,
        warmup_runs: int | None = None,
        pool: Any = None,
    ) -> None:
        on_cuda = device.type == "cuda"
        runs = (WARMUP_RUNS if on_cuda else 0) if warmup_runs is None else warmup_runs
        if runs < int(on_cuda):
            raise ValueError(f"warmup_runs must be at least {int(on_cuda)} on {device.type}, got {runs}")
        self._body = body
        self._graph: torch.cuda.CUDAGraph | None = None
        no_trace = no_trace or contextlib.nullcontext
        if not on_cuda:
            with torch.random.fork_rng(devices=[]), no_trace():
                for _ in range(runs):
                    body()
            return
        with torch.cuda.device(device), torch.random.fork_rng(devices=[device]):
            gc.collect()  # autograd graphs that are still around tie parameters to the stream of their first use
            with no_trace():
                self._warm_up(body, runs, name, device)
            # Inside a caller's autocast, a cast cached before capture would be baked in as it is now, and one cached
            # during capture would live in the graph's memory.
            torch.clear_autocast_cache()
            with no_trace():  # capture runs nothing, but it does allocate gradients, which must not stay visible
                self._capture(body, name, _shared_pool(device).pool() if pool is None else pool, device)
            torch.clear_autocast_cache()

    def replay(self) -> None:
        """Run the work once more, on the current stream, without waiting for it."""
        if self._graph is None:
            self._body()
            return
        with span("graph replay"):
            self._graph.replay()

    def _warm_up(self, body: Callable[[], None], runs: int, name: str, device: torch.device) -> None:
        stream, current = _side_stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                for _ in range(runs - 1):
                    body()
                with _waiting_is_an_error():
                    body()
        except RuntimeError as error:
            if "synchronizing CUDA operation" not in str(error):
                raise
            raise GraphCaptureError(
                f"{name} cannot be recorded as a CUDA graph: something in it waits for the device (.item(), .cpu(), "
                "bool(tensor), a copy from ordinary host memory, ...); the cause has the line"
            ) from error
        finally:
            current.wait_stream(stream)

    def _capture(self, body: Callable[[], None], name: str, pool: Any, device: torch.device) -> None:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=_side_stream(device)):
                body()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a capture that ends in an error stays on its stream
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise GraphCaptureError(
                f"{name} cannot be recorded as a CUDA graph: {error}. A graph cannot hold work that waits for the "
                "device, allocates pinned memory, or uses another stream"
            ) from error
        self._graph = graph


@contextlib.contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype, and does not see every wait; capture does
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


@functools.cache
def _shared_pool(device: torch.device) -> torch.cuda.CUDAGraph:
    """A graph of next to nothing that is never let go of: a pool whose last graph is gone cannot be used again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_side_stream(device)):
        torch.zeros(1, device=device)
    return graph


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One for warm-up and capture: cuBLAS keeps a workspace for each stream, and it must be there before capture.
    return torch.cuda.Stream(device)
