"""When graphs are used, what they cannot hold, and what only a GPU shows."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastjepa.eb_jepa import OriginalStep
from fastjepa.graphs import GraphCaptureError, GraphedRollout, GraphedTrainStep, use_cuda_graph
from fastjepa.graphs import capture as graph_capture
from fastjepa.graphs.capture import Recording
from fastjepa.model.step import StepLosses
from graph_cases import batches, some_clips, some_states, some_step, trained_jepa
from tiny import tiny_jepa


def test_a_step_never_waits_for_the_device() -> None:
    """What a graph cannot hold, found without a GPU: reading a value on the host, and results of unknown size."""

    class NoWait(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func.overloadpacket)
            if name in ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.masked_select"):
                raise GraphCaptureError(f"{name} waits")
            return func(*args, **(kwargs or {}))

    clips = some_clips()
    plain = some_step()
    model = (plain.jepa, plain.image_decoder, plain.detection_head)
    for step in (
        plain,
        some_step(projection="eager"),
        some_step(autocast_dtype=torch.bfloat16),
        OriginalStep(*model, steps=plain.steps),
    ):
        step.optimizer = None  # on a CPU, Adam does read its learning rate; on CUDA its kernel does
        with NoWait():
            step(*clips.batch(torch.tensor([0, 1])))
    rollout = GraphedRollout(tiny_jepa(), 2)
    with NoWait():
        rollout(torch.rand(1, 4, 2, 8, 8))
        rollout.tails(torch.rand(1, 4, 4, 8, 8), 2)
        with pytest.raises(GraphCaptureError):
            torch.ones(1).item()  # the check itself works


def test_when_a_graph_is_used() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")

    def used(device: torch.device, auto: bool, *choices: Any) -> list[bool]:
        return [use_cuda_graph(choice, device, auto=auto) for choice in choices]

    assert used(cuda, True, "auto", "on", "off") == [True, True, False]
    assert used(cuda, False, "auto", "on", "off") == [False, True, False]
    assert used(cpu, True, "auto", "off") == [False, False]
    with pytest.raises(ValueError, match="--cuda_graph on needs a CUDA device, and this runs on cpu"):
        use_cuda_graph("on", cpu)
    with pytest.raises(ValueError, match="must be auto, on or off; got 'yes'"):
        use_cuda_graph("yes", cpu)  # type: ignore[arg-type]


class FakeCuda:
    """Stands in for torch.cuda, to see without a GPU what a recording asks of it, and in which order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.ends_badly = False
        log, nothing = self.log, contextlib.nullcontext
        stream = SimpleNamespace(wait_stream=lambda _: log.append("wait for stream"))

        @contextlib.contextmanager
        def graph(*_: Any, pool: object, stream: object) -> Iterator[None]:
            log.append(f"begin capture in {pool}")
            yield
            log.append("end capture")
            if self.ends_badly:
                raise RuntimeError("operation not permitted when stream is capturing")

        fakes = {
            "device": lambda _: nothing(), "current_stream": lambda _: stream, "stream": lambda _: nothing(),
            "graph": graph, "CUDAGraph": lambda: SimpleNamespace(replay=lambda: log.append("replay")),
            "get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": lambda mode: log.append(f"waiting: {mode}"),
            "set_stream": lambda _: log.append("back to the stream"),
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nothing())
        monkeypatch.setattr(torch, "clear_autocast_cache", lambda: log.append("clear casts"))
        monkeypatch.setattr(graph_capture, "_side_stream", lambda _: stream)
        monkeypatch.setattr(graph_capture, "_shared_pool", lambda _: SimpleNamespace(pool=lambda: "the shared pool"))

    @contextlib.contextmanager
    def no_trace(self) -> Iterator[None]:
        self.log.append("keep")
        try:
            yield
        finally:
            self.log.append("put back")


def test_the_order_of_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, device = FakeCuda(monkeypatch), torch.device("cuda:0")
    recording = Recording(
        lambda: cuda.log.append("run"), device, name="the work", no_trace=cuda.no_trace, warmup_runs=2
    )
    warm_up = ["keep", "wait for stream", "run", "waiting: error", "run", "waiting: 0", "wait for stream", "put back"]
    capture = ["keep", "begin capture in the shared pool", "run", "end capture", "put back"]
    assert cuda.log == [*warm_up, "clear casts", *capture, "clear casts"]
    recording.replay()
    assert cuda.log[-1] == "replay"
    with pytest.raises(ValueError, match="warmup_runs must be at least 1 on cuda, got 0"):
        Recording(lambda: None, device, name="the work", warmup_runs=0)


def test_a_recording_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, device = FakeCuda(monkeypatch), torch.device("cuda:0")

    def waits() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    def is_wrong() -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(GraphCaptureError, match=r"the work cannot be recorded .* waits for the device"):
        Recording(waits, device, name="the work", no_trace=cuda.no_trace, warmup_runs=1)
    assert cuda.log[-3:] == ["waiting: 0", "wait for stream", "put back"]
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        Recording(is_wrong, device, name="the work", no_trace=cuda.no_trace)
    cuda.ends_badly = True
    with pytest.raises(GraphCaptureError, match=r"the work cannot be recorded .*: operation not permitted"):
        Recording(lambda: None, device, name="the work", no_trace=cuda.no_trace)
    assert cuda.log[-3:] == ["end capture", "back to the stream", "put back"]


@pytest.mark.gpu
def test_work_that_waits_is_named() -> None:
    x = torch.ones(3, device="cuda")

    def waits() -> None:
        x.mul_(x.sum().item())

    with pytest.raises(GraphCaptureError, match=r"the work cannot be recorded .* waits for the device") as raised:
        Recording(waits, x.device, name="the work")
    assert "synchronizing" in str(raised.value.__cause__)

    def doubles() -> None:
        x.mul_(2)

    recording = Recording(doubles, x.device, name="the work")  # nothing is broken by the failure
    x.fill_(1)
    recording.replay()
    assert x.tolist() == [2, 2, 2]


@pytest.mark.gpu
def test_memory_does_not_grow_over_a_thousand_replays() -> None:
    graphed = GraphedTrainStep(some_step("cuda"), some_clips("cuda"))
    rollout, states = GraphedRollout(trained_jepa("cuda"), 8), some_states("cuda")
    indices = batches(3, "cuda")
    for warm in indices:
        graphed(warm), rollout(states), rollout.tails(states, 1)
    gc.collect()
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for i in range(1000):
        graphed(indices[i % 3]), rollout(states), rollout.tails(states, 1)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == allocated
    assert torch.cuda.memory_reserved() == reserved


@pytest.mark.gpu
def test_recordings_that_share_a_pool_do_not_disturb_each_other() -> None:
    """The train step's intermediates and a rollout's may share memory; what both keep must not."""
    jepa, states = trained_jepa("cuda"), some_states("cuda")
    rollout = GraphedRollout(jepa, 8)
    before = rollout(states, copy=False)
    kept = before.clone()
    graphed = GraphedTrainStep(some_step("cuda"), some_clips("cuda"))
    losses = graphed(batches(1, "cuda")[0], copy=False)
    kept_losses = StepLosses(*(loss.clone() for loss in losses))
    assert torch.equal(before, kept)
    rollout(states)
    assert all(torch.equal(x, y) for x, y in zip(losses, kept_losses, strict=True))
