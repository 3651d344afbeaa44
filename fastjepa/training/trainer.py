"""The training run: epochs of steps, evaluation, checkpoints, and a folder that holds all that came of it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastjepa import autotune
from fastjepa.config import Config, resolve_device, resolve_precision
from fastjepa.distributed.group import BatchGroup
from fastjepa.distributed.launch import device_of
from fastjepa.distributed.ranks import Ranks
from fastjepa.eb_jepa import EbJepaRun, begin_with, run_to_begin_with
from fastjepa.environment import run_environment
from fastjepa.files.safe_files import CheckpointError, write_atomic, write_text_atomic
from fastjepa.fused.swap import accelerate
from fastjepa.graphs import GraphCaptureError, GraphedRollout, GraphedTrainStep
from fastjepa.model.jepa import build_jepa
from fastjepa.model.probes import build_probes
from fastjepa.model.step import StepLosses, TrainStep, build_optimizer
from fastjepa.moving_mnist import ClipSet, epoch_indices, prefetched
from fastjepa.optional_packages import require_packages
from fastjepa.profiling import span
from fastjepa.storage.checkpoint import load_checkpoint, load_snapshot, save_checkpoint, snapshot
from fastjepa.storage.export import export_pretrained
from fastjepa.storage.run_folder import CHECKPOINT_NAME, RunFolder
from fastjepa.training.board import BOARD_NAME, Board, open_board
from fastjepa.training.evaluation import Evaluation, evaluate
from fastjepa.training.execution import begun_execution, first_decides, resumed_execution
from fastjepa.training.launches import next_launch, steps_per_launch
from fastjepa.training.left_out import PICTURES, WEIGHTS, left_out, say_what_is_left_out
from fastjepa.training.picture_arrays import rollout_arrays
from fastjepa.training.progress import Bar, progress_bar, say
from fastjepa.training.run_clips import load_run_clips
from fastjepa.training.step_trace import TRACE_NAME, trace_steps
from fastjepa.training.stop_signals import Interrupted, stop_signals

PICTURED_CLIPS = 4
LOSS_NAMES = tuple(f"{name}_loss" if name not in ("total", "vc_unweighted") else name for name in StepLosses._fields)


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the last checkpoint is from before that."""


class Trainer:
    """One run, from a `Config` to a folder. `run()` trains to the end; progress is in the folder at any moment.

    The folder is locked against other processes until `run()` has ended.

    Several processes that train together (`ranks`) have a trainer each, with the same configuration. All of them train,
    each on its part of every batch, and evaluate; the first alone has the folder and speaks.

    Attributes:
        rows: the rows of metrics.csv, one for each epoch that is done.
        cut_short: the row that metrics.csv shows below them while `max_steps` ends the run within an epoch; a resumed
            run completes the epoch, and this row goes.

    Raises:
        ValueError: options that contradict each other, the data or the machine.
        OSError, CheckpointError: files that cannot be read or written; the message names them.
        MissingPackageError: evaluation or the data needs a package that is not installed. What a run can do without is
            left out, with a warning at the start.
        RankError, LostRanksError: another process failed, has ended or does not answer.
        SystemExit: on other processes than the first, which tells the reason.
    """

    def __init__(self, config: Config, ranks: Ranks | None = None) -> None:
        self.ranks = ranks = ranks or Ranks()
        before, self.device = ranks.together(lambda: self._prepare(config))
        ranks.open(self.device, timedelta(minutes=config.timeout_minutes))
        self._run_folder: RunFolder | None = None
        self.folder = ranks.from_first(lambda: self._take_folder(config))
        try:
            self._build(config, before)
        except BaseException:
            self._release()
            raise

    def _prepare(self, config: Config) -> tuple[EbJepaRun | None, torch.device]:
        """What can be refused before there is a folder: what the run begins with, and its device."""
        require_packages("evaluation", "torchmetrics")  # asked now, not after the first epochs
        if self.ranks.is_first:
            say_what_is_left_out()
        if config.batch_size < self.ranks.size:
            raise ValueError(
                f"--batch_size {config.batch_size} is less than the {self.ranks.size} processes, which share it; every "
                "one needs a clip"
            )
        before = run_to_begin_with(config)
        device = resolve_device(config.device)
        return before, device_of(device, self.ranks.launch)

    def _take_folder(self, config: Config) -> Path:
        self._run_folder = RunFolder(config)
        return self._run_folder.path

    def _release(self) -> None:
        autotune.decide_by(None)
        if self._run_folder is not None:
            self._run_folder.release()

    def _build(self, config: Config, before: EbJepaRun | None) -> None:
        """What to train, on what: from the checkpoint where the run is resumed, and else on disk as its first one.

        `before` is the run of the original that a new one goes on from.
        """
        ranks = self.ranks
        precision = resolve_precision(config.precision, self.device)
        self.config = config = dataclasses.replace(config, out=self.folder, precision=precision)
        set_precision(precision)
        path = self.folder / CHECKPOINT_NAME
        saved = ranks.from_first(lambda: None if config.resume is None else load_checkpoint(path))
        # The first process alone checks and times: all must compute alike.
        autotune.decide_by(None if ranks.alone else ranks.from_first)
        self.execution, self.execution_notes = first_decides(
            ranks,
            lambda: (
                begun_execution(config, self.device, ranks)
                if saved is None
                else resumed_execution(saved, config, self.device, path)
            ),
        )
        train, validation = ranks.first_of_each_host(lambda: load_run_clips(config))
        self.data_fingerprint = f"{train.fingerprint()} {validation.fingerprint()}"
        ranks.require_same({"their clips": self.data_fingerprint})
        self.train_clips, self.val_clips = train.to(self.device), validation.to(self.device)

        torch.manual_seed(config.seed)
        self.jepa = build_jepa(
            dobs=config.dobs, henc=config.henc, hpre=config.hpre, dstc=config.dstc,
            projector=config.projector,
            std_coeff=config.std_coeff, cov_coeff=config.cov_coeff,
        ).to(self.device)  # fmt: skip
        self._accelerate(strict=config.backend == "fused")
        decoder, head = build_probes(dobs=config.dobs, dstc=config.dstc, hdet=config.hdet)
        self.image_decoder, self.detection_head = decoder.to(self.device), head.to(self.device)
        self.modules = {
            "jepa": self.jepa, "image_decoder": self.image_decoder, "detection_head": self.detection_head
        }  # fmt: skip
        self.optimizer = build_optimizer(self.jepa, self.image_decoder, self.detection_head, config.lr)
        self.autocast_dtype = torch.bfloat16 if config.precision == "bf16" else None
        self.step = TrainStep(
            self.jepa,
            self.image_decoder,
            self.detection_head,
            self.optimizer,
            steps=config.steps,
            autocast_dtype=self.autocast_dtype,
            group=BatchGroup.of(ranks, sync_stats=config.sync_stats),
        )
        # Position: `epoch` epochs are done, and `batch` batches of the next one.
        self.epoch = self.batch = self.global_step = 0
        self.seconds = 0.0
        # Sums of the losses over the steps of this epoch, and since they were last read; on the device until read.
        self.epoch_losses = torch.zeros(len(LOSS_NAMES), dtype=torch.float64, device=self.device)
        self.interval_losses = torch.zeros_like(self.epoch_losses)
        self.graphed_step: GraphedTrainStep | None = None
        if self.execution.cuda_graph:
            assert isinstance(self.train_clips, ClipSet), "graphs are for resident clips"
            sums = (self.epoch_losses, self.interval_losses)
            self.graphed_step = GraphedTrainStep(self.step, self.train_clips, accumulators=sums)
        # Of evaluations: recorded at the first, and replayed in those after it.
        self.graphed_rollout = GraphedRollout(self.jepa, fold_batch_norm=True) if self.execution.cuda_graph else None
        # A trace is of single steps.
        several = self.graphed_step is not None and not config.profile
        self.steps_per_launch = steps_per_launch(config.log_every, config.checkpoint_every) if several else 1
        self.rows: list[dict[str, float]] = []
        self.cut_short: dict[str, float] | None = None
        self._saved_at = time.monotonic()
        if saved is not None:
            ranks.together(lambda: self._resume(saved))
            if self.last_row is not None:
                ranks.on_first(self._write_metrics)  # what was written after the checkpoint is about to be done again
        else:
            if before is not None:
                for line in ranks.together(lambda: begin_with(before, config, self.modules, self.optimizer)):
                    say(line)
                self.epoch, self.global_step = before.epoch, before.step
            ranks.on_first(self._describe_in_folder)
            ranks.copy_from_first(self._trained)
            self.save()

    def _accelerate(self, *, strict: bool) -> None:
        """Swap in what the execution config says, and note what could not be. Raises ValueError if `strict` and there
        is such a part.
        """
        try:
            accelerate(self.jepa, execution=self.execution, strict=strict, verbose=False)
        except ValueError as error:
            if not strict:
                raise
            raise ValueError(f"--backend fused is not supported for this model: {error}") from error
        report: Any = self.jepa.acceleration
        left = [f"{s.part} eager: {s.reason}" for s in report.swaps if self.execution.fused and not s.by]
        self.execution_notes = "\n".join(filter(None, (self.execution_notes, *left)))

    def _go_on_without_graphs(self, error: GraphCaptureError) -> None:
        """Of "auto": train and evaluate as before, step by step. Raises the error where graphs were asked for."""
        if self.config.cuda_graph == "on":
            raise error
        say(f"no CUDA graphs: {error}")
        self.graphed_step = self.graphed_rollout = None
        self.steps_per_launch = 1
        self.execution = dataclasses.replace(self.execution, cuda_graph=False)
        self.ranks.on_first(self._describe_in_folder)

    @property
    def _trained(self) -> list[Tensor]:
        return [t for module in self.modules.values() for t in (*module.parameters(), *module.buffers())]

    def _describe_in_folder(self) -> None:
        write_text_atomic(self.folder / "config.json", json.dumps(self.config.to_json(), indent=2) + "\n")
        decided = {"execution": self.execution.to_json(), "autotuned": autotune.chosen()}
        environment = {**run_environment(self.device), **decided}
        if not self.ranks.alone:
            environment["processes"] = self.ranks.size
        write_text_atomic(self.folder / "environment.json", json.dumps(environment, indent=2) + "\n")

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> Evaluation | None:
        """Train to the last epoch or `max_steps`; the last evaluation, None if there was nothing left to do.

        A run whose training had ended, and which was stopped before it was evaluated, is evaluated.

        Raises:
            Interrupted: SIGINT or SIGTERM; the state is saved.
            NonFiniteLossError: a loss is NaN or infinite; the last checkpoint is from before that.
        """
        evaluation = None
        try:
            first = self.ranks.is_first
            with (
                self.ranks.in_step(),
                open_board(self.folder if first else None, self.global_step) as board,
                stop_signals(once=not self.ranks.launch.by_torchrun) as received,
                trace_steps(self.folder / TRACE_NAME if self.config.profile and first else None, say) as step_done,
            ):
                while not (self.finished and self.evaluated):
                    complete, row = self._train_to_a_row(board, received, step_done)
                    if self.finished or self.epoch % self.config.eval_every == 0:
                        evaluation = self._evaluate(board)
                        row |= evaluation.as_row()
                    if complete:
                        self.rows.append(row)
                    self.cut_short = None if complete else row
                    self.ranks.on_first(self._write_metrics)
                    self.save()
                    stopped_by, _ = self._agree(received)
                    if stopped_by and not self.finished:
                        raise Interrupted(stopped_by)
        finally:
            self._release()
        return evaluation

    @property
    def finished(self) -> bool:
        """Whether the last epoch is done or `max_steps` reached."""
        limit = self.config.max_steps
        return self.epoch >= self.config.epochs or (limit is not None and self.global_step >= limit)

    @property
    def last_row(self) -> dict[str, float] | None:
        """The last row of metrics.csv; None before there is one."""
        return self.cut_short or (self.rows[-1] if self.rows else None)

    @property
    def evaluated(self) -> bool:
        """Whether the model as it is now was evaluated."""
        return self.last_row is not None and self.last_row["step"] == self.global_step and "map" in self.last_row

    def _train_to_a_row(
        self, board: Board, received: list[int], step_done: Callable[[], None]
    ) -> tuple[bool, dict[str, float]]:
        """Train to the end of the epoch, or of the run; (whether the epoch is complete, its row without evaluation)."""
        if self.finished and self.batch == 0:
            # A run that once went further was resumed with fewer epochs, at the end of one that was not evaluated.
            row = {"epoch": self.epoch, "step": self.global_step, "seconds": round(self.seconds, 3)}
            return True, self.rows.pop() if self.rows else row
        self.cut_short = None  # its epoch goes on
        try:
            complete = self._train_epoch(board, received, step_done)
        except GraphCaptureError as error:
            self._go_on_without_graphs(error)
            complete = self._train_epoch(board, received, step_done)
        except torch.OutOfMemoryError as error:
            if self.execution.fused and not self.execution.recompute:
                raise torch.OutOfMemoryError(f"{_first_line(error)}; --recompute on needs less memory") from error
            raise
        row = self._training_row()
        if complete:
            self.epoch, self.batch = self.epoch + 1, 0
            self.epoch_losses.zero_()
        return complete, row

    def _train_epoch(self, board: Board, received: list[int], step_done: Callable[[], None]) -> bool:
        """Train on the batches left in this epoch; False if `max_steps` ended it early."""
        config = self.config
        batches = epoch_indices(len(self.train_clips), config.batch_size, config.seed, self.epoch, self.device)
        started = time.perf_counter()
        title = f"epoch {self.epoch + 1}/{config.epochs}"
        left = [self.ranks.part(indices) for indices in batches[self.batch :]]
        with (
            progress_bar(title, len(batches), self.batch, shown=self.ranks.is_first) as bar,
            closing(prefetched(self.train_clips, left)) as own_parts,
        ):
            while self.batch < len(batches) and not self.finished:
                count = self._steps_of_next_launch(batches)
                indices = batches[self.batch] if count == 1 else torch.stack(batches[self.batch : self.batch + count])
                self._step(indices, own_parts)
                step_done()
                self.batch += count
                self.global_step += count
                bar.update(count)
                # Before anything that waits for the device, where a process may wait for one that hangs.
                stopped_by, time_is_up = self._agree(received)
                if self.global_step % config.log_every == 0:
                    self._log(board, bar, config.log_every)
                if stopped_by or time_is_up or self.global_step % config.checkpoint_every == 0:
                    now = time.perf_counter()
                    self.seconds, started = self.seconds + now - started, now
                    self.save()
                    if stopped_by:
                        raise Interrupted(stopped_by)
        self.seconds += time.perf_counter() - started
        return self.batch == len(batches)

    def _agree(self, received: Sequence[int]) -> tuple[int, bool]:
        """(the signal by which the run is stopped here, 0 if it is not; whether the clock asks for a checkpoint)."""
        self.ranks.step = self.global_step
        minutes = self.config.checkpoint_minutes
        due = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes and self.ranks.is_first
        stopped_by, time_is_up = self.ranks.agree(received[0] if received else 0, int(due))
        return stopped_by, bool(time_is_up)

    def _steps_of_next_launch(self, batches: Sequence[Tensor]) -> int:
        if self.steps_per_launch == 1:
            return 1
        config, done = self.config, self.global_step
        full = len(batches) - (len(batches[-1]) < config.batch_size)
        steps_left = [full - self.batch, *(n - done % n for n in (config.log_every, config.checkpoint_every))]
        if config.max_steps is not None:
            steps_left.append(config.max_steps - done)
        return next_launch(self.steps_per_launch, *steps_left)

    def _step(self, indices: Tensor, own_parts: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One step on these clips (B,), or several in one launch (K, B), their losses added to the sums; nothing here
        waits for the device. Of several processes, each trains on its part of them, the next of `own_parts`, unless a
        graph gathers it.
        """
        if self.graphed_step is not None:
            self.graphed_step(indices, copy=False)
        else:
            with span("data"):
                batch = next(own_parts)
            losses = torch.stack(self.step(*batch, clips=len(indices))).double()
            self.epoch_losses += losses
            self.interval_losses += losses

    def _log(self, board: Board, bar: Bar, count: int) -> None:
        means = self._read(self.interval_losses / count)
        self.interval_losses.zero_()
        for name, value in means.items():
            board.add_scalar(f"train/{name}", value, self.global_step)
        bar.set_postfix({"loss": f"{means['total']:.3f}", "pred": f"{means['pred_loss']:.4f}"})

    def _read(self, losses: Tensor) -> dict[str, float]:
        """Losses as numbers (the one wait for the device); raises NonFiniteLossError if one is not finite."""
        values = dict(zip(LOSS_NAMES, losses.tolist(), strict=True))
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        if bad:
            with self.ranks.told_once():  # every process has the same losses
                raise NonFiniteLossError(
                    f"{', '.join(bad)} became NaN or infinite at or before step {self.global_step}. The checkpoint in "
                    f"{self.folder} is from before that; try a smaller --lr, or --precision fp32"
                )
        return values

    def _evaluate(self, board: Board) -> Evaluation:
        self._share_buffers()
        try:
            evaluation = self._evaluation()
        except GraphCaptureError as error:
            self._go_on_without_graphs(error)
            evaluation = self._evaluation()
        self.ranks.on_first(lambda: self._show_evaluation(evaluation, board))
        return evaluation

    def _evaluation(self) -> Evaluation:
        return evaluate(
            self.jepa, self.image_decoder, self.detection_head, self.val_clips, self.config.batch_size,
            autocast_dtype=self.autocast_dtype, rollout=self.graphed_rollout, ranks=self.ranks,
        )  # fmt: skip

    def _share_buffers(self) -> None:
        """Where each process has its own statistics, all go on with the first's, as in plain data parallel training."""
        if not self.config.sync_stats:
            self.ranks.copy_from_first(b for module in self.modules.values() for b in module.buffers())

    def _show_evaluation(self, evaluation: Evaluation, board: Board) -> None:
        for name, value in evaluation.as_row().items():
            board.add_scalar(f"val/{name}", value, self.global_step)
        clips = self.val_clips.subset(min(PICTURED_CLIPS, len(self.val_clips)))
        arrays = rollout_arrays(self.jepa, self.image_decoder, self.detection_head, clips)
        write_atomic(self.folder / "rollout.npz", lambda file: np.savez(file, **dataclasses.asdict(arrays)))
        for name in ("rollout", "one_step"):
            strip = np.concatenate(list(getattr(arrays, name)[0]), axis=1)
            board.add_image(f"val/{name}", strip[None], self.global_step)
        say(
            f"step {self.global_step}: mAP {evaluation.map:.3f}, AP_0 {evaluation.ap[0]:.3f} "
            f"(chance {evaluation.positive_share:.3f}), reconstruction {evaluation.recon_loss:.4f}"
        )

    def _training_row(self) -> dict[str, float]:
        row = {"epoch": self.epoch + 1, "step": self.global_step, "seconds": round(self.seconds, 3)}
        return row | self._read(self.epoch_losses / self.batch)

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint, after making sure that it is worth keeping; of several processes, the first does."""
        self._read(self.epoch_losses)
        self._share_buffers()
        self.ranks.on_first(self._write_checkpoint)
        self._saved_at = time.monotonic()

    def _write_checkpoint(self) -> None:
        progress = {
            "epoch": self.epoch, "batch": self.batch, "global_step": self.global_step, "seconds": self.seconds
        }  # fmt: skip
        state = snapshot(self.modules, self.optimizer, progress, self.config.to_json())
        for name, tensor in state["modules"]["jepa"].items():
            if not torch.isfinite(tensor).all():
                raise NonFiniteLossError(
                    f"{name} became NaN or infinite at step {self.global_step}; the checkpoint in {self.folder} is "
                    "from before that"
                )
        state["losses"] = {"epoch": self.epoch_losses.cpu(), "interval": self.interval_losses.cpu()}
        state["rows"], state["cut_short"] = self.rows, self.cut_short
        state["data"] = self.data_fingerprint
        state["execution"], state["autotuned"] = self.execution.to_json(), autotune.chosen()
        save_checkpoint(self.folder / CHECKPOINT_NAME, state)

    def _resume(self, state: dict[str, Any]) -> None:
        path = self.folder / CHECKPOINT_NAME
        if state.get("data") != self.data_fingerprint:
            raise CheckpointError(f"{path} was trained on other clips: the data options or the data files have changed")
        losses = _checked_losses(state, path)
        rows, cut_short = _checked_rows(state, path)
        progress = load_snapshot(state, self.modules, self.optimizer)
        if missing := {"epoch", "batch", "global_step", "seconds"} - progress.keys():
            raise CheckpointError(f"{path} does not say how far the run was: it lacks {', '.join(sorted(missing))}")
        self.rows, self.cut_short = rows, cut_short
        self.epoch, self.batch = int(progress["epoch"]), int(progress["batch"])
        self.global_step, self.seconds = int(progress["global_step"]), float(progress["seconds"])
        self.epoch_losses.copy_(losses["epoch"])
        self.interval_losses.copy_(losses["interval"])

    def _write_metrics(self) -> None:
        rows = [*self.rows, *([self.cut_short] if self.cut_short else [])]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text_atomic(self.folder / "metrics.csv", text.getvalue())

    def finish(self) -> list[Path]:
        """Draw the pictures and export the weights; the files and folders that the run leaves."""
        return self.ranks.from_first(self._finish)

    def _finish(self) -> list[Path]:
        missing = left_out()
        pretrained, written = self.folder / "pretrained", []
        if WEIGHTS not in missing:
            config = dataclasses.replace(self.config, resume=None)  # the same weights, resumed or not: the same files
            export_pretrained(
                self.jepa, config.to_json(), pretrained,
                decoder=self.image_decoder, detection_head=self.detection_head,
            )  # fmt: skip
        if PICTURES not in missing:
            from fastjepa.figures.runs import draw_run  # which needs matplotlib

            written = draw_run(self.folder)
        names = (
            "config.json", "environment.json", "metrics.csv", CHECKPOINT_NAME, BOARD_NAME, pretrained.name, TRACE_NAME
        )  # fmt: skip
        return [path for name in names if (path := self.folder / name).exists()] + written


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _checked_losses(state: dict[str, Any], path: Path) -> dict[str, Tensor]:
    losses = state.get("losses")
    for name in ("epoch", "interval"):
        value = losses.get(name) if isinstance(losses, dict) else None
        if not isinstance(value, Tensor) or value.shape != (len(LOSS_NAMES),):
            raise CheckpointError(f"{path} is damaged: it has no sums of the losses")
    assert isinstance(losses, dict)
    return losses


def _checked_rows(state: dict[str, Any], path: Path) -> tuple[list[dict[str, float]], dict[str, float] | None]:
    """The rows of the epochs that are done, and the one of an epoch cut short, which older checkpoints do not have."""
    rows, cut_short = state.get("rows"), state.get("cut_short")
    if isinstance(rows, list) and all(_is_row(row) for row in (*rows, *(() if cut_short is None else (cut_short,)))):
        return rows, cut_short
    raise CheckpointError(f"{path} is damaged: it has no rows of metrics")


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and "step" in row and all(type(value) in (int, float) for value in row.values())


def set_precision(precision: str) -> None:
    """fp32 everywhere, or tf32 for matrix products and convolutions; deterministic convolutions in any case."""
    allow = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow
    torch.backends.cudnn.deterministic = True  # two runs with one seed are equal
