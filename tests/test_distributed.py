"""N processes compute what one does: losses, gradients, buffers and parameters, through each path."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import several_steps
from fastjepa.distributed.group import BatchGroup
from fastjepa.distributed.launch import Launch, device_of, read_launch
from fastjepa.distributed.meeting import meet
from fastjepa.distributed.ranks import Ranks
from fastjepa.kernels.shares import Shares
from fastjepa.model.step import TrainStep, build_optimizer
from fastjepa.policy import error_bound
from several import run
from several_steps import BATCHES, batch_indices, clips, model_of_the_cases, train
from tiny import tiny_batch, tiny_model

EXACT = ["eager float64 sync cpu", "closed_form float64 sync cpu", "graph float64 sync cpu"]


def of_processes(n: int, cases: list[str], folder: Path, **environment: str) -> list[list[dict[str, torch.Tensor]]]:
    """What each of `n` processes has after the steps of each case."""
    endings = run(n, [sys.executable, several_steps.__file__, str(folder), *cases], lambda rank: environment)
    assert [ending.status for ending in endings] == [0] * n, endings[0].error + endings[-1].error
    return [[torch.load(folder / f"{case}-{rank}.pt", weights_only=True) for rank in range(n)] for case in cases]


@pytest.mark.parametrize("n", [2, 3])
def test_several_processes_do_the_steps_of_one(n: int, tmp_path: Path) -> None:
    assert {0, 1} <= {min(Ranks(Launch(0, n)).counts(clips)) for clips in BATCHES}  # some have nothing of a batch
    for case, of_ranks in zip(EXACT, of_processes(n, EXACT, tmp_path), strict=True):
        expected = train(case, Ranks())
        assert torch.isfinite(expected["losses"]).all()
        assert expected["losses"].std(0).min() > 1e-6  # every loss moves
        for actual in of_ranks:
            assert actual.keys() == expected.keys()
            for name, value in expected.items():
                error = (actual[name] - value).abs().max() / value.abs().max().clamp_min(1e-3)
                assert error <= 1e-9, (case, name, float(error))
        first, *others = of_ranks
        for other in others:  # bit for bit
            assert [name for name in first if not torch.equal(first[name], other[name])] == [], case


def test_several_processes_do_a_fused_step_of_one(device: str, tmp_path: Path) -> None:
    """Losses, gradients and buffers of one step in fp32 against float64, by norm, as of one process."""
    case = f"fused float32 sync {device}"
    (of_ranks,) = of_processes(3, [case], tmp_path, TRITON_INTERPRET=os.environ["TRITON_INTERPRET"])
    truth, eager = (train(f"eager {dtype} sync cpu", Ranks(), steps=1) for dtype in ("float64", "float32"))
    for kind in ("losses", ".grad", "running_mean", "running_var"):
        actual, expected, by_eager = (
            torch.cat([value.double().flatten() for name, value in state.items() if name.endswith(kind)])
            for state in (of_ranks[0], truth, eager)
        )
        error, scale = float((actual - expected).norm()), float(expected.norm())
        # By norm, as of anything that goes through many layers, and so without the limit of a single op.
        bound = error_bound(float((by_eager - expected).norm()), scale, torch.float32, limit=None)
        assert error <= bound, (kind, error / scale, bound / scale)
    for other in of_ranks[1:]:
        assert [name for name in other if not torch.equal(of_ranks[0][name], other[name])] == []


def test_without_global_statistics_a_step_is_the_mean_of_those_of_each_process_own_clips(tmp_path: Path) -> None:
    (of_ranks,) = of_processes(3, ["closed_form float64 local cpu"], tmp_path)
    data, indices = clips(), batch_indices()[0]
    parts = [indices[:2], indices[2:3], indices[3:]]
    expected = torch.zeros(9, dtype=torch.float64)
    gradients: dict[str, torch.Tensor] = {}
    jepa, decoder, head = model_of_the_cases(torch.float64)
    optimizer = build_optimizer(jepa, decoder, head, 1e-3)
    modules = {"jepa": jepa, "decoder": decoder, "head": head}
    parameters = {f"{root}.{name}": p for root, module in modules.items() for name, p in module.named_parameters()}
    for part in parts:
        step = TrainStep(jepa, decoder, head, None, steps=2, projection="closed_form")
        share = len(part) / len(indices)
        expected += torch.stack(step(*data.batch(part, torch.float64))) * share
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            gradients[name] = gradients.get(name, torch.zeros_like(parameter)) + parameter.grad * share
    for name, parameter in parameters.items():
        parameter.grad = gradients[name]
    optimizer.step()
    second = TrainStep(jepa, decoder, head, None, steps=2, projection="closed_form")
    for rank, actual in enumerate(of_ranks):
        torch.testing.assert_close(actual["losses"][0], expected, rtol=1e-12, atol=0)
        # All go on with the same parameters, and each with statistics of its own.
        assert torch.equal(actual["jepa.encoder.conv1.weight"], of_ranks[0]["jepa.encoder.conv1.weight"])
        same = torch.equal(actual["jepa.encoder.bn1.running_mean"], of_ranks[0]["jepa.encoder.bn1.running_mean"])
        assert same == (rank == 0)
    losses = torch.zeros(9, dtype=torch.float64)
    batch = batch_indices()[1]  # of one clip each
    for part in batch.split(1):
        losses += torch.stack(second(*data.batch(part, torch.float64))) / 3
    torch.testing.assert_close(of_ranks[0]["losses"][1, 2:], losses[2:], rtol=1e-9, atol=0)


class OneOfOne(Ranks):
    """A process alone that exchanges everything with itself, over NCCL: what one GPU can show of several."""

    alone = False  # type: ignore[assignment]


@pytest.mark.gpu
def test_nccl_in_a_graph_gives_what_the_plain_step_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    case = "graph float32 sync cuda"
    expected = train(case, Ranks())
    with OneOfOne().joined() as ranks:
        ranks.open(torch.device("cuda", 0), timedelta(minutes=2))
        assert ranks.backend == "nccl"
        graphed = train(case, ranks)
        plain = train("closed_form float32 sync cuda", ranks)
    assert torch.isfinite(graphed["losses"]).all()
    torch.testing.assert_close(graphed["losses"], plain["losses"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(graphed["losses"], expected["losses"], rtol=1e-5, atol=1e-6)


# ---- how a process was started ----

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_what_torchrun_says_is_read() -> None:
    assert read_launch({"MASTER_ADDR": "somewhere"}) == Launch(0, 1)  # a cluster's own word
    assert read_launch(TORCHRUN) == Launch(rank=1, size=2, local_rank=1)
    again = read_launch(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "3"})
    assert again == Launch(1, 2, 1, restarts=1, max_restarts=3)
    assert again.restartable
    assert not read_launch(TORCHRUN).restartable
    assert read_launch(TORCHRUN).command == "torchrun --nproc_per_node 2"
    hosts = read_launch(TORCHRUN | {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"})
    assert hosts.command == "torchrun --nnodes 2 --nproc_per_node 8 ..."


@pytest.mark.parametrize("missing", TORCHRUN)
def test_what_is_missing_of_a_launch_is_named(missing: str) -> None:
    with pytest.raises(ValueError, match=rf"lacks {missing}; start with torchrun"):
        read_launch({name: value for name, value in TORCHRUN.items() if name != missing})


@pytest.mark.parametrize(("name", "value"), [("RANK", "2"), ("RANK", "-1"), ("WORLD_SIZE", "two"), ("LOCAL_RANK", "")])
def test_a_launch_that_cannot_be_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be .*{value}"):
        read_launch(TORCHRUN | {name: value})


def test_each_process_of_a_host_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cpu, cuda, second = torch.device("cpu"), torch.device("cuda"), torch.device("cuda:1")
    assert device_of(second, Launch()) == second
    assert device_of(cpu, Launch(3, 4, 3)) == cpu
    assert device_of(cuda, Launch(3, 4, 1)) == second
    with pytest.raises(ValueError, match="--device cuda:1 would be that of all 4 processes"):
        device_of(second, Launch(0, 4))
    with pytest.raises(ValueError, match=r"2 GPUs, and process 2 on it .* --nproc_per_node 2"):
        device_of(cuda, Launch(2, 4, 2))


# ---- parts of a batch ----


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch", [1, 2, 3, 7, 8])
def test_every_clip_is_trained_on_once(size: int, batch: int) -> None:
    indices = torch.arange(100, 100 + batch)
    all_ranks = [Ranks(Launch(rank, size)) for rank in range(size)]
    parts = []
    for rank, count in zip(all_ranks, all_ranks[0].counts(batch), strict=True):
        part = rank.part(indices)
        assert len(part) == max(1, count)  # where it has none, it computes on one that is not its own
        assert torch.equal(rank.part(torch.stack((indices, indices)))[1], part)  # of several batches in one launch
        if count:
            parts.append(part)
        shares = rank.shares(batch)
        assert (shares is None) == (size == 1)
        assert shares is None or shares.empty == (count == 0)
    assert torch.equal(torch.cat(parts), indices)
    assert max(all_ranks[0].counts(batch)) - min(all_ranks[0].counts(batch)) <= 1


def test_a_part_that_is_not_the_processes_own_is_refused() -> None:
    jepa, decoder, head = tiny_model()
    step = TrainStep(jepa, decoder, head, steps=1, group=BatchGroup(Ranks(Launch(1, 2))))
    with pytest.raises(ValueError, match="video has 2 clips, and of 3 clips on 2 processes 1 are those of process 1"):
        step(*tiny_batch(2), clips=3)


def test_global_statistics_of_losses_of_another_kind_are_refused() -> None:
    jepa, decoder, head = tiny_model()
    jepa.predcost = torch.nn.MSELoss()  # type: ignore[assignment]
    step = TrainStep(jepa, decoder, head, steps=1, group=BatchGroup(Ranks(Launch(1, 2))))
    with pytest.raises(ValueError, match=r"published model and losses: predcost: .*sync_stats=False"):
        step(*tiny_batch(2))


@pytest.mark.parametrize("counts", [(), (0, 0), (1, -1)])
def test_shares_of_nothing_are_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="counts must be 0 or more"):
        Shares(counts, 0, lambda tensor: tensor)


# ---- processes find each other ----


def test_processes_started_again_do_not_take_what_an_earlier_start_left() -> None:
    """In a store that lives on; the first may come last."""
    store = torch.distributed.HashStore()
    names = []
    for first_waits in (0.0, 0.0, 0.7):
        found: dict[int, str] = {}

        def process(rank: int, wait: float, found: dict[int, str] = found) -> None:
            time.sleep(wait)
            found[rank] = meet(store, rank, 3, timedelta(seconds=20))

        threads = [threading.Thread(target=process, args=(rank, 0.0 if rank else first_waits)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 3
        (name,) = set(found.values())
        names.append(name)
    assert len(set(names)) == 3


def test_processes_that_do_not_come_are_not_waited_for_for_ever() -> None:
    for rank in (0, 1):
        with pytest.raises(RuntimeError):
            meet(torch.distributed.HashStore(), rank, 2, timedelta(seconds=1))
