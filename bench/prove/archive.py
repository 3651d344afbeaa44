"""One archive of a proof, small enough to travel: rows, logs, tables and pictures; no weights, clips or caches."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from fastjepa.files.safe_files import write_atomic

MOST_BYTES = 16_000_000
_LEFT_OUT = {".pt", ".tar", ".safetensors", ".npz", ".npy", ".ncu-rep", ".nsys-rep", ".gz"}
_LEFT_OUT_FOLDERS = {"kept", "tensorboard", "cache"}
_LOG_BYTES = 200_000  # of each log: its begin and its end, where the reasons are


def pack(folder: Path, path: Path, most_bytes: int = MOST_BYTES) -> list[str]:
    """Write the files below `folder` to the .tar.gz `path`, below `most_bytes`; returns what was too large for it.

    Weights, clips, truths and other archives are never in it. Of the rest, files are taken smallest first, so that rows
    and tables are in it whatever pictures and logs come to. Long logs are cut in their middle.
    """
    found = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()]
    contents = {p: _content(p) for p in found if not _is_left_out(p.relative_to(folder))}
    left_out: list[Path] = []
    wanted = sorted(contents, key=lambda p: (p.suffix != ".jsonl", len(contents[p])))
    while True:
        packed = _pack(folder, {p: contents[p] for p in wanted})
        if len(packed) < most_bytes or not wanted:
            break
        # The largest go first. A compressed size is not known before; what is too much now is a good first guess.
        excess, freed = len(packed) - most_bytes, 0
        while wanted and freed <= excess:
            last = wanted.pop()
            freed += len(contents[last])
            left_out.append(last)
    write_atomic(path, lambda file: file.write(packed))
    return sorted(str(p.relative_to(folder)) for p in left_out)


def _is_left_out(path: Path) -> bool:
    return path.suffix in _LEFT_OUT or not _LEFT_OUT_FOLDERS.isdisjoint(path.parts)


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix != ".log" or len(data) <= _LOG_BYTES:
        return data
    half = _LOG_BYTES // 2
    return data[:half] + f"\n... {len(data) - 2 * half} bytes left out ...\n".encode() + data[-half:]


def _pack(folder: Path, contents: dict[Path, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path in sorted(contents):
            entry = tarfile.TarInfo(f"{folder.name}/{path.relative_to(folder).as_posix()}")
            entry.size, entry.mtime = len(contents[path]), int(path.stat().st_mtime)
            archive.addfile(entry, io.BytesIO(contents[path]))
    return buffer.getvalue()
