"""The child process of a calibration: `python -m fastjepa.trials REQUEST RESULTS`.

REQUEST is a JSON file of `calibration.children`; a line is appended to RESULTS when a candidate begins, and one with
its trial. A user's script is never imported: the published network is built from its sizes.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fastjepa.calibration.search import next_choice
from fastjepa.calibration.setting import Setting
from fastjepa.calibration.trial import Trial
from fastjepa.trials.contest import Contest
from fastjepa.trials.work import Maker, make_work


def main(request: Path, results: Path) -> None:
    """Try candidates until none is left, or until an error has left the device unusable."""
    question: dict[str, Any] = json.loads(request.read_text(encoding="utf-8"))
    setting, device = Setting.from_json(question["setting"]), torch.device(question["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    trials = [Trial.from_json(trial) for trial in question["trials"]]
    contest = Contest(setting, device, _maker(question["makers"]))
    contest.prepare()
    with results.open("a", encoding="utf-8") as file:
        while (choice := next_choice(setting.purpose, trials, question["recompute"])) is not None:
            print(json.dumps({"begin": choice.to_json()}), file=file, flush=True)
            trials.append(contest.try_out(choice))
            print(json.dumps(trials[-1].to_json()), file=file, flush=True)
            if trials[-1].status in ("failed", "out of memory") and not _usable(device):
                return  # another process goes on


def _maker(name: str | None) -> Maker:
    if name is None:
        return make_work
    module, _, attribute = name.partition(":")
    maker: Maker = getattr(importlib.import_module(module), attribute)
    return maker


def _usable(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal access nothing does in this process."""
    if device.type != "cuda":
        return True
    try:
        return float(torch.ones(8, device=device).sum()) == 8.0
    except Exception:  # whatever a broken context raises
        return False


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
