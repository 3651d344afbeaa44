from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastjepa import profiling
from fastjepa.model.step import TrainStep, build_optimizer
from fastjepa.moving_mnist import ClipSet
from fastjepa.profiling import span
from fastjepa.training.evaluation import evaluate
from fastjepa.training.step_trace import StepTrace
from tiny import tiny_batch, tiny_model


def ranges(path: Path) -> list[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]


def test_a_range_does_nothing_without_cuda_and_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_cuda_is_there", lambda: False)
    monkeypatch.setattr(profiling, "_nvtx_range", lambda name: pytest.fail("NVTX was used"))
    assert span("encode") is span("losses")  # nothing is even allocated


def test_with_cuda_a_range_is_one_of_nvtx_in_our_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvtx")
    pushed: list[tuple[str, str]] = []

    class Range:
        def __init__(self, message: str, domain: str) -> None:
            self.name = (domain, message)

        def __enter__(self) -> None:
            pushed.append(self.name)

        def __exit__(self, *_: object) -> None:
            pushed.append(("", "end"))

    monkeypatch.setattr(profiling, "_cuda_is_there", lambda: True)
    monkeypatch.setattr("nvtx.annotate", Range)
    profiling._nvtx_range.cache_clear()
    try:
        with span("encode"), span("encode"):
            pass
        assert pushed == [("fastjepa", "encode")] * 2 + [("", "end")] * 2
    finally:
        profiling._nvtx_range.cache_clear()


def test_without_the_package_nvtx_a_range_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(profiling, "_cuda_is_there", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: seen.append(f"push {name}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append("pop"))
    profiling._nvtx_range.cache_clear()
    try:
        assert span("encode") is span("encode")  # made once: nothing is imported or allocated in a step
        with span("encode"), span("data"), span("encode"):
            pass
        assert seen == ["push encode", "push data", "push encode", "pop", "pop", "pop"]
        with pytest.raises(KeyError), span("losses"):
            raise KeyError
        assert seen[-2:] == ["push losses", "pop"]
    finally:
        profiling._nvtx_range.cache_clear()


def test_real_nvtx_ranges_nest() -> None:
    pytest.importorskip("nvtx")
    with profiling._nvtx_range("a"), profiling._nvtx_range("b"), profiling._nvtx_range("a"):
        pass  # without a profiler attached this is all that can be seen: they accept it


def test_the_trace_names_the_parts_of_a_step(tmp_path: Path) -> None:
    model = tiny_model()
    step = TrainStep(*model, build_optimizer(*model, lr=1e-3), steps=2)
    said: list[Path] = []
    with StepTrace(tmp_path / "trace.json", skip=1, steps=2, on_written=said.append) as trace:
        for i in range(6):
            step(*tiny_batch(frames=4, size=(8, 8)))
            trace.step()
            assert (trace.written is not None) == (i >= 3)  # 1 skipped, 1 of warm-up, 2 recorded
    assert said == [tmp_path / "trace.json"]
    assert list(tmp_path.iterdir()) == said
    found = ranges(tmp_path / "trace.json")
    expected = {"encode": 2, "prediction step 1": 2, "prediction step 2": 2, "losses": 2, "backward": 2, "optimizer": 2}
    assert {name: found.count(name) for name in expected} == expected
    assert span("after") is not None
    assert not profiling._traces_running


def test_a_run_that_ends_early_writes_what_it_has(tmp_path: Path) -> None:
    with StepTrace(tmp_path / "trace.json", skip=0, steps=5) as trace:
        for _ in range(3):
            with span("work"):
                torch.zeros(2) + 1
            trace.step()
    assert trace.written == tmp_path / "trace.json"
    assert ranges(tmp_path / "trace.json").count("work") == 2
    with StepTrace(tmp_path / "none.json", skip=5) as trace:
        trace.step()
    assert trace.written is None
    assert not (tmp_path / "none.json").exists()


def test_an_error_leaves_no_trace_running(tmp_path: Path) -> None:
    with pytest.raises(KeyError), StepTrace(tmp_path / "trace.json", skip=0):
        raise KeyError
    assert not profiling._traces_running


def test_evaluation_is_marked(tmp_path: Path) -> None:
    video = (torch.rand(2, 5, 8, 8, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    maps = torch.ones(2, 5, 8, 8, dtype=torch.uint8)
    with StepTrace(tmp_path / "trace.json", skip=0, steps=1) as trace:
        trace.step()
        evaluate(*tiny_model(), ClipSet(video, maps), 2)
        trace.step()
    found = ranges(tmp_path / "trace.json")
    for name in ("evaluation", "data", "encode", "rollout step 1", "rollout step 2"):
        assert found.count(name) == 1, name


@pytest.mark.parametrize(("arguments", "message"), [({"skip": -1}, "skip must be"), ({"steps": 0}, "steps must be")])
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepTrace(Path("trace.json"), **arguments)


def test_a_compiled_function_may_hold_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU too, where ranges are NVTX's, which dynamo cannot trace."""
    monkeypatch.setattr(profiling, "_cuda_is_there", lambda: True)
    monkeypatch.setattr(profiling, "_nvtx_range", lambda name: pytest.fail("NVTX was used"))

    @torch.compile(fullgraph=True, backend="eager")
    def marked(x: torch.Tensor) -> torch.Tensor:
        with span("encode"):
            return x + 1

    assert torch.equal(marked(torch.zeros(3)), torch.ones(3))
