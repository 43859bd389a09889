"""A training run: resuming, checkpoints, signals, logging, and the final result.

    with Run(settings, digest of the data) as run:      # its folder (kit/runs.py) is locked
        run.result                                      # not None if the run is complete
        progress = run.restore(loader, model, optimizer, scheduler, ema)
        step = run.speed_up(step, forward)              # compiled, or one CUDA graph
        run.leave_if_stopped()                          # between two steps: Ctrl-C, SIGTERM
        run.log_and_save()                              # after each epoch
        run.save_predictions(predictions)               # once
        run.complete(accuracies)                        # writes result.json

Step, loop and data are in train.py. last.pt is saved after an epoch unless saving would take more
than 1% of the time, and always when a signal stops the run.
"""

import hashlib
import io
import json
import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from pathlib import Path

from kit import checkpoint, environment, runs
from kit.attribution import check_shapes
from kit.command_line import Stopped, UserError, handle_signals, noted
from kit.environment import device_name, source_hashes
from kit.fast import choose_mode, fast
from kit.files import read_json, remove, write_atomically, write_json
from kit.runs import changes_since, completed, in_brackets, refuse_another_run
from kit.settings import as_config
from kit.tensorboard_log import INCOMPLETE, log_epoch, log_test, open_writer

import numpy as np
import torch

STATES = ("last.pt", "prev.pt", "*.pt.corrupt")  # only unfinished runs need them
OF_CONFIG = ("model", "recipe", "seed", "width", "precision", "quick", "overrides")


class Run:
    def __init__(self, settings, digest: str):
        self.settings, self.device = settings, settings.device
        self.config = as_config(settings) | {"data": digest}
        self.result: dict | None = None
        self.stopped_by: int | None = None  # a signal
        self.in_loop = False  # whether there is something to save when a signal arrives
        self.save_seconds = self.last_save_took = 0.0

    def __enter__(self):
        s, parent = self.settings, self.settings.runs
        with ExitStack() as self.stack:
            handle_signals(self.on_signal, self.stack)
            if s.dry_run:
                parent = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="runs-")))
            self.folder = parent / s.dataset_name / s.recipe / s.model / f"seed{s.seed}"
            runs.lock(self.folder, self.stack)
            self.lock = runs.lock_of(self.folder)
            if not s.overwrite and (there := completed(self.folder, self.config)):
                remove(self.folder, *STATES)  # a killed process may have left them
                changes = changes_since(there.env, {"sha256": source_hashes()})
                print(f"already complete: {self.folder}{in_brackets(changes)}")
                self.result = there.result
            self.stack = self.stack.pop_all()  # nothing failed: stays open until __exit__
        return self

    def __exit__(self, kind, error, trace):
        with self.stack:
            if kind is Stopped and not self.settings.dry_run:
                self.save()
                print(
                    f"stopped by {error.signal.name}: checkpoint saved in {self.folder}; the same "
                    "command (without --overwrite) resumes the run",
                    file=sys.stderr,
                )

    # --- Signals ----------------------------------------------------------------------------------

    def on_signal(self, signum: int, frame) -> None:
        """Remembers a signal until the step is done: an exception here could surface on any line,
        and some code swallows it. Before the first step, with nothing to save, it exits (but a
        notebook survives Ctrl-C)."""
        self.stopped_by = signum
        if not self.in_loop:
            main = getattr(sys.modules["__main__"], "__file__", None) or ""
            if signum == signal.SIGINT and environment.HERE not in Path(main).resolve().parents:
                raise KeyboardInterrupt
            self.stack.close()
            os._exit(128 + signum)

    def leave_if_stopped(self) -> None:
        if self.stopped_by:
            raise Stopped(self.stopped_by)

    # --- Before the first step --------------------------------------------------------------------

    def restore(self, loader, model, optimizer, scheduler, ema) -> checkpoint.Progress:
        """Restores these objects from the run's folder and returns its progress."""
        s, folder, self.loader = self.settings, self.folder, loader
        self.parts = dict(model=model, optimizer=optimizer, scheduler=scheduler, ema=ema)
        check_shapes(model, loader.normalize(loader.images[:2]))
        self.n_parameters = sum(parameter.numel() for parameter in model.parameters())
        # `auto` depends on the whole run's length, so a resumed run gets the same mode.
        steps = s.epochs * loader.steps
        full_batches = loader.n_train >= s.batch_size  # the other modes need them
        self.mode = choose_mode(s.mode, s.device, steps) if full_batches else "eager"
        self.config |= {"mode": self.mode, "optimizer_class": type(optimizer).__name__}
        self.env = environment.describe_environment(s.device)
        if s.overwrite:  # not before data and model are ready; the mark of completion first
            remove(folder, "result.json", "[!.]*")
        elif (folder / "config.json").exists():
            advice = "delete it to resume from last.pt, or use --overwrite to start from scratch"
            try:
                there = read_json(folder / "config.json", dict(model=str, overrides=dict))
            except ValueError as error:
                raise UserError(f"{folder} is damaged ({error}): {advice}") from error
            refuse_another_run(folder, there, self.config)
        self.progress = checkpoint.resume(folder, self.parts, self.device, self.config)
        # A killed process's temporary files, and its curves, which may lack the last epochs.
        remove(folder, ".*.tmp*", "events.out.tfevents.*")
        write_json(folder / "config.json", self.config)
        if diff := environment.code_diff():
            self.write("code.diff", diff)
        self.write_best()
        self.write_metrics()
        self.numbers = checkpoint.attributes(model)
        return self.progress

    def speed_up(self, step, forward):
        """The step in the fastest mode that works, compiled or captured before the clock starts."""
        s, loader, progress, model = self.settings, self.loader, self.progress, self.parts["model"]
        start, mode, failures = time.perf_counter(), self.mode, []
        if "compile" in mode:
            print("compiling the training step, the first time up to a minute", flush=True)
        if "graph" in mode and (reason := checkpoint.why_no_graph(self.parts["optimizer"])):
            failures.append(reason)
            mode = "compile" if "compile" in mode else "eager"
        state = deepcopy(checkpoint.get_state(self.parts, self.device))
        restore = partial(checkpoint.load_state, state, self.parts, self.device)
        model.train()
        step, self.mode, others, self.error = fast(
            step, forward, mode, s.precision, loader.epoch(1)[0], model, restore
        )
        self.failures = failures + others
        self.set_up_seconds = time.perf_counter() - start
        for failure in self.failures:
            print(f"note: {failure}; training in mode {self.mode}", file=sys.stderr)
        self.env["mode"] = self.mode
        if progress.epochs or progress.step:
            try:
                before = read_json(self.folder / "env.json", runs.ENV)
            except ValueError as error:
                before = {"changes": [f"damaged ({error})"]}
            self.env["changes"] = changes_since(before, self.env)
            self.env["shared_gpu"] = self.env["shared_gpu"] or before.get("shared_gpu")
            where = f"epoch {progress.epochs + 1}, after {progress.step:,} steps"
            print(f"resuming in {where}{in_brackets(self.env['changes'])}")
        write_json(self.folder / "env.json", self.env)
        self.writer = open_writer(self.folder, self.stack)
        self.saved_at, self.in_loop = time.perf_counter(), True
        for row in progress.history:  # the curves were removed
            log_epoch(self.writer, row)
        print(  # only now: from here on signals save the run
            f"{s.model}, {s.dataset}, recipe {s.recipe}, seed {s.seed} -> {self.folder}\n"
            f"{self.n_parameters:,} parameters; {loader}; {device_name(self.device)}; "
            f"{s.precision}, {self.mode}",
            flush=True,
        )
        return step

    # --- Saving -----------------------------------------------------------------------------------

    def log_and_save(self) -> None:
        """After an epoch: last.pt, metrics.jsonl, TensorBoard, a line on the terminal."""
        row, best = self.progress.history[-1], self.progress.best_epoch == self.progress.epochs
        if time.perf_counter() - self.saved_at >= 100 * self.last_save_took:
            self.save()
        self.write_metrics()
        log_epoch(self.writer, row)
        self.note_counters()
        print(
            f"epoch {row['epoch']:2d}/{self.settings.epochs}  lr {row['lr']:.2e}  "
            f"train {row['train_loss']:.4f} {row['train_acc']:6.2f}%  "
            f"val {row['val_loss']:.4f} {row['val_acc']:6.2f}%{' *' if best else '  '}  "
            f"{row['images_per_second']:,.0f} images/s  {row['seconds']:.1f} s",
            flush=True,
        )

    def note_counters(self) -> None:
        """Once: numbers that a module changes while it trains are in last.pt, not in best.pt."""
        now = checkpoint.attributes(self.parts["model"])
        changed = sorted(f"{name}.{key}" for name, before in self.numbers.items()
                         for key, _ in before.items() - now.get(name, {}).items())  # fmt: skip
        if changed:
            advice = "make it a buffer (register_buffer)"
            print(f"note: {changed[0]} changes, but best.pt lacks it: {advice}", file=sys.stderr)
        self.numbers = {}

    def save(self) -> None:
        """Saves last.pt together with best.pt, so that the two match."""
        start = time.perf_counter()
        state = checkpoint.get_state(self.parts, self.device)
        state |= {"progress": vars(self.progress), "config": self.config}
        self.write("last.pt", checkpoint.serialized(state), previous=self.folder / "prev.pt")
        self.write_best()
        self.saved_at = time.perf_counter()
        self.last_save_took = self.saved_at - start
        self.save_seconds += self.last_save_took

    def write_best(self) -> None:
        if self.progress.best:
            self.write("best.pt", checkpoint.serialized(self.progress.best))
        else:
            (self.folder / "best.pt").unlink(missing_ok=True)  # its state was lost

    def write_metrics(self) -> None:
        rows = "".join(json.dumps(row) + "\n" for row in self.progress.history)
        self.write("metrics.jsonl", rows)

    def write(self, name: str, body: bytes | str, previous: Path | None = None) -> None:
        """Raises UserError if the folder is gone or belongs to another run by now."""
        if runs.lock_of(self.folder) != self.lock:
            raise UserError(f"{self.folder} was moved or deleted during its run: start it again")
        write_atomically(self.folder / name, body, previous)

    # --- At the end -------------------------------------------------------------------------------

    def save_predictions(self, predictions: torch.Tensor) -> None:
        """Writes predictions and labels, and logs them to TensorBoard."""
        kind = np.uint8 if len(self.loader.classes) <= 256 else np.uint16
        for name, classes in (("predictions", predictions), ("labels", self.loader.test[1])):
            buffer = io.BytesIO()
            np.save(buffer, classes.cpu().numpy().astype(kind))
            self.write(f"test_{name}.npy", buffer.getvalue())
        with noted(INCOMPLETE):
            log_test(self.writer, self.config, self.progress.epochs, self.loader, predictions)

    def complete(self, accuracies: dict) -> dict:
        """Writes and returns result.json."""
        self.write_best()
        s, loader, history = self.settings, self.loader, self.progress.history
        seconds = sum(row["seconds"] for row in history)
        best_epoch = len(history) if s.tested == "last" else self.progress.best_epoch
        result = {
            "dataset": s.dataset_name,
            **{key: self.config[key] for key in OF_CONFIG},
            **accuracies,  # test_acc, test_acc_last
            "val_acc": history[best_epoch - 1]["val_acc"],
            "best_epoch": best_epoch,  # whose weights are tested: best.pt
            "epochs_run": len(history),
            "stopped_early": len(history) < s.epochs,
            "test_images": len(loader.test[1]),
            "classes": loader.classes,
            "image": list(loader.images.shape[1:]),
            "mean": loader.mean.flatten().tolist(),  # of pixels in [0, 1]
            "std": loader.std.flatten().tolist(),
            "params": self.n_parameters,
            "train_seconds": seconds,
            "images_per_second": len(history) * loader.n_train / seconds,
            "peak_memory_mb": environment.peak_memory_mb(self.device),
            "mode": self.mode,
            "set_up_seconds": self.set_up_seconds,  # compiling or capturing, not in train_seconds
            "save_seconds": self.save_seconds,  # likewise
            "fallback": "; ".join(self.failures) or None,  # why it ran in no faster mode
            "gradient_error": self.error,  # of the first step, compared with eager mode
            "device": device_name(self.device),
            "weights": hashlib.sha256((self.folder / "best.pt").read_bytes()).hexdigest(),
        }
        if environment.shared_gpu(self.device):  # others may have started since
            write_json(self.folder / "env.json", self.env | {"shared_gpu": True})
        write_json(self.folder / "result.json", result)  # last: it marks a complete run
        remove(self.folder, *STATES)
        return result

    def finish(self, result: dict) -> int:
        """Prints the result; the exit code, 1 if --target-acc is missed."""
        if self.settings.dry_run:
            print("dry run: one batch each was trained, validated and tested; no run is kept")
            return 0
        s, smoke_test = self.settings, "; a smoke test, not a result" * result["quick"]
        last = f", {result['test_acc_last']:.2f}% with the last" if s.tested == "best" else ""
        print(
            f"test accuracy {result['test_acc']:.2f}% with the {s.tested} weights (epoch "
            f"{result['best_epoch']}, validation {result['val_acc']:.2f}%){last}; epochs: "
            f"{result['epochs_run']}, training: {result['train_seconds']:.0f} s{smoke_test}"
        )
        accuracy, target = result["test_acc"], s.target_acc
        if target is not None and accuracy < target:
            raise UserError(f"test accuracy {accuracy:.2f}% misses the target of {target:g}%")
        return 0
