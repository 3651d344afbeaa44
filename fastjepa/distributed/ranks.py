"""The processes that train together: what they tell each other, and how they end together.

    setup      `together`, `from_first`, `gather`: an error on one of them ends all, and is told once
    each step  `agree` on stopping and saving; statistics through `shares`; `sum_gradients`

Words go over gloo, between hosts' memories; statistics and gradients over NCCL where they are on a GPU. A process
alone is a `Ranks` too, which tells nobody.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastjepa.distributed.launch import HOW, Launch
from fastjepa.distributed.meeting import meet
from fastjepa.kernels.shares import Shares

T = TypeVar("T")

RENDEZVOUS = timedelta(minutes=10)
PARTING = timedelta(seconds=30)
PATIENCE = timedelta(minutes=90)  # while the first one checks kernels, generates or downloads for the others


class RankError(ValueError):
    """An error of another process, which ends this one too."""


class LostRanksError(RuntimeError):
    """Another process has ended, or has not answered for as long as it may take."""


class Ranks:
    """This process among those that train together; without a `launch`, alone.

    Whatever waits for another process raises LostRanksError where that has ended, or does not answer in time.

    Attributes:
        launch: how this process was started.
        rank, size: its number, from 0, and how many there are.
        refusals: errors that are a user's to mend. On all but the first process they end it without a word, where the
            first tells them.
    """

    def __init__(self, launch: Launch | None = None, refusals: tuple[type[Exception], ...] = (ValueError, OSError)):
        self.launch = launch or Launch()
        self.rank, self.size = self.launch.rank, self.launch.size
        self.refusals = refusals
        self.step = 0  # for messages
        self._timeout = PATIENCE
        self._store: Any = None
        self._patient: Any = None
        self._control: Any = None
        self._words: Any = None  # one of these two
        self._work: Any = None
        self._work_backend = "gloo"

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.size == 1

    # ---- beginning and end -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def joined(self) -> Iterator[Ranks]:
        """Inside, the processes know each other.

        Raises:
            LostRanksError: the others do not come within ten minutes, or cannot be reached.
        """
        if self.alone:
            yield self
            return
        try:
            # Here, because a torch without these is enough for a process alone.
            from torch.distributed.distributed_c10d import PrefixStore
            from torch.distributed.rendezvous import rendezvous

            store, *_ = next(iter(rendezvous("env://", self.rank, self.size, timeout=RENDEZVOUS)))
            self._store = PrefixStore(meet(store, self.rank, self.size, RENDEZVOUS), store)
            dist.init_process_group("gloo", store=self._store, rank=self.rank, world_size=self.size, timeout=RENDEZVOUS)
            self._patient = self._words = dist.new_group(backend="gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise LostRanksError(
                f"process {self.rank} of {self.size} could not meet the others: {_first_line(error)}; {HOW}"
            ) from error
        yield self
        # Not where an error has passed: another process may be waiting, and this would wait for it.
        self.wait_for_all()
        gc.collect()  # recorded graphs are in cycles, and NCCL waits for the end of those that use it
        dist.destroy_process_group()

    def wait_for_all(self) -> None:
        """Before all end at one point: wait until each has come there, so that none cuts off another that still reads
        what it was told.
        """
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # the store has ended, and so has everyone
                self._store.set(f"ends {self.rank}", "")
                self._store.wait([f"ends {rank}" for rank in range(self.size)], PARTING)
                # The store may be the first one's: it stays until the others have had this answer.
                if self.is_first:
                    self._store.wait([f"knows {rank}" for rank in range(1, self.size)], PARTING)
                else:
                    self._store.set(f"knows {self.rank}", "")

    def open(self, device: torch.device, timeout: timedelta) -> None:
        """Make the ways of training: for words, and for tensors on `device`. `timeout` is how long one waits for
        another, for each of these.
        """
        if self.alone:
            return
        self._timeout = timeout
        self._work_backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with self._contact("meeting"):
            self._control = dist.new_group(backend="gloo", timeout=timeout)
            # NCCL ends a process by a dump of its state: words, which say what happened, go first.
            later = timeout if self._work_backend == "gloo" else timeout + timedelta(minutes=1)
            self._work = dist.new_group(backend=self._work_backend, timeout=later)

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Inside, nobody has long work of his own: each waits for the others as long as `open` was told, not more."""
        if self.alone:
            yield
            return
        self._words = self._control
        try:
            yield
        finally:
            self._words = self._patient

    @property
    def backend(self) -> str:
        """What carries tensors: "nccl" or "gloo"."""
        return self._work_backend

    @property
    def can_be_recorded(self) -> bool:
        """Whether what is sent during a step can be part of a CUDA graph: NCCL's collectives can (2.9 and later)."""
        return self.alone or self._work_backend == "nccl"

    # ---- words -------------------------------------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        """What each process gives, in their order, on all of them. Any object that can be pickled."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        with self._contact("waiting for the others"):
            dist.all_gather_object(values, value, group=self._words)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """What `work()` returns here, once it has ended on every process.

        Raises:
            Exception: what `work()` raised here, where this is the first process, or it is nothing that a user can
                mend.
            RankError: on the first process: it failed on another; the message says which.
            SystemExit: on the others, whose error is told by the first.
        """
        if self.alone:
            return work()
        own: BaseException | None = None
        value: Any = None
        try:
            value = work()
        except LostRanksError:
            raise
        except (Exception, SystemExit) as error:
            own = error
        messages = self.gather(None if own is None else str(own) or type(own).__name__)
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if not failed:
            return value
        self.wait_for_all()
        if own is not None and (self.is_first or not isinstance(own, self.refusals)):
            raise own
        if not self.is_first:
            raise SystemExit(2)
        raise RankError(f"process {failed[0]} of {self.size}: {messages[failed[0]]}")

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work()` returns on the first process, which alone calls it. Raises as `together`."""
        if self.alone:
            return work()
        made = self.together(work if self.is_first else _nothing)
        box: list[Any] = [made]
        with self._contact("waiting for the first"):
            dist.broadcast_object_list(box, src=0, group=self._words)
        return box[0]

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Raises RankError, naming what differs, unless all processes have the same of each; SystemExit on all but the
        first, which tells.
        """
        of_all = self.gather(dict(values))
        differing = []
        for name in dict.fromkeys(name for of_one in of_all for name in of_one):
            found = [of_one.get(name) for of_one in of_all]
            other = next((rank for rank, value in enumerate(found) if value != found[0]), None)
            if other is not None:
                differing.append(f"{name} ({found[0]} on process 0, {found[other]} on process {other})")
        if differing:
            with self.told_once():
                raise RankError(f"the {self.size} processes differ in {', '.join(differing)}; start all of them alike")

    def on_first(self, work: Callable[[], object]) -> None:
        """`work()` on the first process alone; the others wait for its end. Raises as `together`."""
        self.together(work if self.is_first else _nothing)

    def first_of_each_host(self, work: Callable[[], T]) -> T:
        """`work()` on each process, after it has ended on the first of its host: what that leaves is there then."""
        if self.alone:
            return work()
        leads = self.launch.local_rank == 0
        made = self.together(work if leads else _nothing)
        rest = self.together(_nothing if leads else work)
        return made if leads else rest

    @contextlib.contextmanager
    def told_once(self) -> Iterator[None]:
        """Around what fails alike on every process: only the first tells."""
        try:
            yield
        except self.refusals:
            self.wait_for_all()
            if self.is_first:
                raise
            raise SystemExit(2) from None

    def agree(self, *values: int) -> tuple[int, ...]:
        """The largest of each of these numbers over all processes; each calls it between the same two steps."""
        if self.alone:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        with self._contact("waiting for the others between two steps"):
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._control)
        return tuple(tensor.tolist())

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def counts(self, clips: int) -> tuple[int, ...]:
        """How many of a batch's clips each process has: as equal as can be, the first ones with one more."""
        return tuple(clips // self.size + (rank < clips % self.size) for rank in range(self.size))

    def shares(self, clips: int) -> Shares | None:
        """The parts of a batch of so many clips; None for a process alone, to which all of it belongs."""
        return None if self.alone else Shares(self.counts(clips), self.rank, self.collect)

    def part(self, indices: Tensor) -> Tensor:
        """This process's part of a batch's indices (..., B); where it has none, the first of them (see `Shares`)."""
        if self.alone:
            return indices
        counts = self.counts(indices.shape[-1])
        start, count = sum(counts[: self.rank]), counts[self.rank]
        return indices[..., start : start + count] if count else indices[..., :1]

    def collect(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, of one shape and dtype, (ranks, ...)."""
        out = torch.empty((self.size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        with self._contact("gathering statistics"):
            # Not the call into one tensor, which is renamed between the versions of torch that this runs on.
            dist.all_gather(list(out.unbind()), tensor.contiguous(), group=self._work)
        return out

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[Tensor], *, drop_own: bool = False) -> None:
        """Replace every gradient by its sum over all processes, in one collective for each dtype.

        After the backward pass, and not during it: gradients are some megabytes, a small part of a step
        (docs/scaling.md), and one sum in one order gives the same bits in a run that was interrupted.

        Args:
            parameters: the same ones on each process, with gradients or without alike.
            drop_own: this process's count as zeros, whatever they are.
        """
        if self.alone:
            return
        of_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                of_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in of_dtype.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            if drop_own:
                flat.zero_()
            with self._contact("summing gradients"):
                dist.all_reduce(flat, group=self._work)
            parts = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [p.view(g.shape) for p, g in zip(parts, gradients, strict=True)])

    @torch.no_grad()
    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite every tensor with the first process's."""
        if self.alone:
            return
        for tensor in tensors:
            value = tensor.contiguous()
            with self._contact("copying from the first"):
                dist.broadcast(value, src=0, group=self._work)
            tensor.copy_(value)

    @contextlib.contextmanager
    def _contact(self, doing: str) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            minutes = (PATIENCE if self._words is self._patient else self._timeout).total_seconds() / 60
            flag = "" if self._words is self._patient else " (--timeout_minutes)"
            raise LostRanksError(
                f"process {self.rank} of {self.size} lost the others at step {self.step}, {doing}: one of them has "
                f"ended, or has not answered for {minutes:g} minutes{flag}: {_first_line(error)}"
            ) from error


def _nothing() -> Any:
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
