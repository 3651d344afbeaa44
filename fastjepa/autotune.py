"""What is found out once on a user's GPU: whether fused kernels are exact, and which of several exact ways is fastest.

Both are remembered in one small JSON file in the user's cache. A key names GPU, driver, versions, sources and sizes.

- `self_check` writes "begun" before the first kernel runs, and holds a lock while it runs. So another process waits for
  a live check, and recognises one that has killed its process: fused kernels then stay off until the check is redone.
- `fastest` times candidates that compute the same: interleaved, in this process, in milliseconds each.

The environment variable FASTJEPA_SELF_CHECK: "0" skips both, "redo" checks again. The file is not trusted: an entry
that is not as it was written here is ignored, and found out again.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from fastjepa.environment import machine_key
from fastjepa.files.safe_files import CheckpointError, write_text_atomic
from fastjepa.storage.cache_folder import default_cache_dir

VARIABLE = "FASTJEPA_SELF_CHECK"
FILE_NAME = "autotune.json"
PATIENCE = 600.0  # seconds for which a check of another process is waited for: its kernels may have to compile
ROUNDS = 7  # in which candidates take turns
_MOST_BYTES, _MOST_TEXT = 1_000_000, 300


def _call(work: Callable[[], Any]) -> Any:
    return work()


_decide: Callable[[Callable[[], Any]], Any] = _call
_chosen: dict[str, str] = {}  # what `fastest` said in this process
_redone: set[str] = set()  # keys of checks that "redo" has repeated in this process


def say_on_stderr(line: str) -> None:
    """Where progress goes, unless told otherwise."""
    print(f"fastjepa: {line}", file=sys.stderr, flush=True)


def mode() -> str:
    """FASTJEPA_SELF_CHECK: "1" (default), "0" or "redo". Raises ValueError for another value."""
    value = os.environ.get(VARIABLE, "1")
    if value not in ("0", "1", "redo"):
        raise ValueError(
            f"{VARIABLE} must be 1 (check once), 0 (do not check) or redo (check again); got {value!r:.40}"
        )
    return value


class _Cache:
    """The file: key → entry, each {"check": "begun" | "exact" | "inexact", "reason": text} or {"fastest": name}."""

    def __init__(self, folder: Path | None, say: Callable[[str], None]) -> None:
        self.path = (folder or default_cache_dir()) / FILE_NAME
        self.say = say

    def read(self) -> dict[str, dict[str, str]]:
        """Every entry that is as it was written here."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
            with os.fdopen(descriptor, "rb") as file:
                regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
                content = file.read(_MOST_BYTES + 1) if regular else b""
            values: Any = json.loads(content.decode()) if len(content) <= _MOST_BYTES else {}
        except (OSError, ValueError, RecursionError):
            return {}
        entries = values.items() if isinstance(values, dict) else ()
        return {key: entry for key, entry in entries if _is_entry(entry)}

    def write(self, key: str, entry: dict[str, str] | None) -> None:
        """Set one entry, or remove it; what cannot be written is said, and not remembered."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_symlink():
                raise OSError("it is a link")
            with FileLock(f"{self.path}.write.lock", timeout=10):
                entries = {**self.read(), key: entry}
                kept = {name: value for name, value in entries.items() if value is not None}
                write_text_atomic(self.path, json.dumps(kept, indent=1) + "\n")
        except (OSError, CheckpointError, NotImplementedError, Timeout) as error:
            self.say(f"what was found out on this GPU is not remembered: {self.path}: {error}")

    @contextlib.contextmanager
    def checking(self) -> Iterator[bool]:
        """Inside, no other process of this user checks. Whether that is so: False if one has for too long."""
        lock = FileLock(f"{self.path}.check.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            self.say(f"another process checks this GPU; waiting for it (at most {PATIENCE:.0f} s)")
            try:
                lock.acquire(timeout=PATIENCE)
            except Timeout:
                yield False
                return
        except (OSError, NotImplementedError) as error:
            self.say(f"{self.path.parent} holds no lock ({error}): two processes at once would check twice")
        try:
            yield True
        finally:
            lock.release()


def _is_entry(entry: Any) -> bool:
    """Whether an entry has the fields and values of one, in text that a terminal can show."""
    if not isinstance(entry, dict) or not all(type(v) is str and v == printable(v) for v in entry.values()):
        return False
    if entry.keys() == {"fastest"}:
        return True
    return entry.keys() == {"check", "reason"} and entry["check"] in ("begun", "exact", "inexact")


def printable(text: str) -> str:
    """At most 300 characters of it, with "?" for each that a terminal would obey or cannot show."""
    return "".join(character if character.isprintable() else "?" for character in text[:_MOST_TEXT])


def self_check(
    key: str,
    check: Callable[[], str | None],
    *,
    what: str,
    cache_dir: Path | None = None,
    say: Callable[[str], None] = say_on_stderr,
) -> str | None:
    """Why fused kernels are not to be used here, or None if they are exact; found out once for each key.

    Args:
        key: `machine_key(device, widths, precision)`.
        check: runs small fused work; None if it is exact, else one line. What it raises is a reason too.
        what: is checked, for the line that says so.
        cache_dir: folder of the file; default: the user's.
        say: gets a line at a time.

    Raises:
        ValueError: FASTJEPA_SELF_CHECK has another value than 0, 1 and redo.
    """
    if mode() == "0":
        return None
    cache = _Cache(cache_dir, say)
    with cache.checking() as alone:
        if not alone:
            return f"another process has checked this GPU for {PATIENCE:.0f} s; eager for now"
        known = None if mode() == "redo" and key not in _redone else cache.read().get(key)
        if known is not None and "check" in known:
            return _reason_of(known)
        say(f"checking {what}: fused kernels against eager, once for this GPU ({VARIABLE}=0 skips it)")
        return _checked(cache, key, check)


def _reason_of(known: Mapping[str, str]) -> str | None:
    if known["check"] == "exact":
        return None
    if known["check"] == "begun":
        return f"an earlier self-check ended with its process; {VARIABLE}=redo checks again"
    return f"{known['reason']} (found before; {VARIABLE}=redo checks again)"


def _checked(cache: _Cache, key: str, check: Callable[[], str | None]) -> str | None:
    started = time.monotonic()
    try:
        cache.write(key, {"check": "begun", "reason": ""})
        try:
            reason = check()
        except torch.OutOfMemoryError as error:  # perhaps of the moment: the next start checks again
            cache.write(key, None)
            return f"there was no memory for the self-check: {_first_line(error)}"
        except Exception as error:  # whatever a kernel or its compiler raises
            reason = f"{type(error).__name__}: {_first_line(error)}"
        reason = None if reason is None else printable(reason)
        cache.write(key, {"check": "exact" if reason is None else "inexact", "reason": reason or ""})
    except BaseException:  # Ctrl-C, also while the file is written, says nothing about the kernels
        cache.write(key, None)
        raise
    if mode() == "redo":
        _redone.add(key)
    cache.say(f"{'exact' if reason is None else 'not exact: ' + reason} ({time.monotonic() - started:.0f} s)")
    return reason


def fastest(
    key: str,
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    cache_dir: Path | None = None,
    say: Callable[[str], None] = say_on_stderr,
) -> str:
    """The name of the candidate that takes the least time on this GPU; each calls the same work, without waiting.

    Timed once for each key, GPU and version. The first candidate is the default: taken on a CPU, while torch traces or
    captures, with FASTJEPA_SELF_CHECK=0, and where there is no other. On a GPU it then stays the one of this process,
    so that a graph and plain calls, and a run that is resumed without the variable, compute the same.
    """
    names = list(candidates)
    if _chosen.get(key) in names:
        return _chosen[key]
    if len(names) == 1 or not _can_time(device):
        return names[0]
    if mode() == "0" or _captures():
        _chosen[key] = names[0]
        return names[0]
    _chosen[key] = _decide(lambda: _found_fastest(key, candidates, device, _Cache(cache_dir, say)))
    return _chosen[key]


def _found_fastest(
    key: str, candidates: Mapping[str, Callable[[], object]], device: torch.device, cache: _Cache
) -> str:
    where = machine_key(device, key)
    known = cache.read().get(where, {}).get("fastest", "")
    if known in candidates:
        return known
    times = milliseconds(candidates, device)
    name = min(times, key=lambda candidate: times[candidate])
    cache.write(where, {"fastest": name})
    return name


def _can_time(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.compiler.is_compiling()


def _captures() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def milliseconds(candidates: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """The median time of each candidate over rounds in which they take turns; every one is called once before."""
    for call in candidates.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    for turn in range(ROUNDS):
        order = list(candidates.items())
        for name, call in order if turn % 2 else reversed(order):
            times[name].append(_time(call, device))
    return {name: sorted(found)[len(found) // 2] for name, found in times.items()}


def _time(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def decide_by(decider: Callable[[Callable[[], Any]], Any] | None) -> None:
    """Of several processes: `decider(work)` gives what `work()` gives on the first. None: this one decides alone."""
    global _decide
    _decide = decider or _call


def chosen() -> dict[str, str]:
    """What `fastest` has said in this process, by key: for a checkpoint."""
    return dict(_chosen)


def use(choices: Any) -> None:
    """Take what `chosen` gave when a run began. Raises ValueError if it is not such a table."""
    if not isinstance(choices, Mapping) or not all(type(x) is str for pair in choices.items() for x in pair):
        raise ValueError("what autotune chose must be a table of names")
    _chosen.update(choices)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
