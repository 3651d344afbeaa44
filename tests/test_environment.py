from __future__ import annotations

import importlib
import importlib.util
import subprocess
from pathlib import Path

import pytest
import torch

from fastjepa import environment
from fastjepa.environment import collect, run_environment

CPU = torch.device("cpu")


def test_environment_names_the_code_and_the_device() -> None:
    found = collect(["python", "-m", "bench", "losses", "--out", "a dir"], CPU)
    assert found.command == "python -m bench losses --out 'a dir'"
    assert found.device == run_environment(CPU)["device"] != ""
    assert found.versions["torch"] == torch.__version__
    if importlib.util.find_spec("triton"):
        assert found.versions["triton"] == importlib.import_module("triton").__version__
    assert found.commit == "unknown" or len(found.commit) == 40
    assert found.date.endswith("+00:00")


def test_commit_is_that_of_this_checkout_and_says_whether_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-m", "first")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    commit = collect([], CPU).commit
    assert (len(commit), collect([], CPU).dirty, run_environment(CPU)["commit"]) == (40, False, commit)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "rows.jsonl").write_text("{}")
    assert collect([], CPU).dirty is False
    (tmp_path / "b.py").write_text("2")
    assert (collect([], CPU).dirty, run_environment(CPU)["commit"]) == (True, commit)  # data may lie there
    (tmp_path / "a.py").write_text("2")
    assert (collect([], CPU).dirty, run_environment(CPU)["commit"]) == (True, f"{commit}+changes")
    # An installed package may lie inside somebody else's repository.
    monkeypatch.setattr(environment, "ROOT", tmp_path / "bench")
    found = collect([], CPU)
    assert (found.commit, found.dirty, run_environment(CPU)["commit"]) == ("unknown", None, None)
