"""Runs commands, so many at a time, and passes signals on to them: they save before they end."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kit.command_line import Stopped, handle_signals
from kit.runs import is_locked


@dataclass
class Job:
    """Arguments of Python; of a training run also its name and its folder."""

    command: list
    name: str = ""
    folder: Path | None = None
    log: Path | None = None  # likewise: for when others run at the same time
    needed: bool = False  # if it fails, nothing more is run
    settings: Namespace | None = None  # of a training run, as train.py parses them
    plan: dict | None = None  # likewise: what it is a part of, as in RUNS/plan.json
    # Of a training run: "done", perhaps with a remark, or why what is there is not it. What begins
    # otherwise is run.
    state: Callable[["Job"], str] = lambda job: "skips what is there" * ("--keep" in job.command)

    def __str__(self) -> str:
        return shlex.join([os.environ.get("PYTHON") or sys.executable, *map(str, self.command)])

    @property
    def is_done(self) -> bool:
        return self.state(self).startswith("done")

    @property
    def is_at_work(self) -> bool:
        """Whether another process trains it."""
        return self.folder is not None and is_locked(self.folder)


class Runner:
    """`jobs` commands at a time. gpus: their numbers or UUIDs; if several run, each has one."""

    def __init__(self, jobs: int = 1, gpus: list[str] = ()):
        self.jobs, self.gpus = jobs, gpus
        self.running, self.failed = {}, []  # process -> (job, slot); jobs
        self.code = self.signal = 0
        self.over = False  # nothing more is started
        handle_signals(self.pass_on, contextlib.ExitStack())

    def pass_on(self, signum: int, frame) -> None:
        self.signal, self.over = signum, True
        for process in list(self.running):
            process.terminate()

    def run(self, stage: list[Job] | str) -> None:
        """What is not done of it. After a signal: until everything that was running has ended."""
        if isinstance(stage, str):
            return print(f"# {stage}", flush=True)
        waiting = []
        for i, job in enumerate(stage, 1):
            state = job.state(job)
            if not state.startswith("done"):
                waiting.append((i, job))
            elif state != "done":
                print(f"[{i}/{len(stage)}] {job.name}: {state}", flush=True)
        slots = list(range(min(self.jobs, len(stage))))
        shared = len(slots) > 1
        try:
            while self.running or (waiting and not self.over):
                while waiting and slots and not self.over:
                    # Another process may be at work on the first: then another one, if there is.
                    free = (each for each in waiting if not each[1].is_at_work)
                    i, job = chosen = next(free, waiting[0])
                    waiting.remove(chosen)
                    title = f"[{i}/{len(stage)}] {job.name}" if job.name else f"+ {job}"
                    print(title + f", log: {job.log}" * shared, flush=True)
                    self.start(job, slots.pop(0), shared)
                time.sleep(0.05)
                for process in [p for p in self.running if p.poll() is not None]:
                    job, slot = self.running.pop(process)
                    slots.append(slot)
                    if self.signal:
                        continue
                    if code := process.returncode:
                        self.failed += [] if job.needed else [job]  # that one has said so itself
                        self.code = 2 if code == 2 else self.code or 1
                        self.over = self.over or job.needed or code == 2
                    if shared:
                        print(f"{'failed' if code else 'done'}: {job.name}", flush=True)
        finally:  # also when the terminal or the disk is gone
            for process in self.running:
                process.terminate()
            for process in self.running:
                process.wait()

    def start(self, job: Job, slot: int, shared: bool) -> None:
        """On the terminal; if shared with a log, and on a GPU or a part of the CPU's threads."""
        env = os.environ | {"WAIT_FOR_RUNS": "1"}  # of another run_all.sh, rather than to fail
        log = job.log if shared else None
        if shared and self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        elif shared:
            threads = max(1, len(os.sched_getaffinity(0)) // self.jobs)
            env.setdefault("OMP_NUM_THREADS", str(threads))
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") if log else contextlib.nullcontext() as out:
            process = subprocess.Popen(
                [sys.executable, *map(str, job.command)],
                env=env, stdout=out, stderr=out if shared else None,
                # Ctrl-C reaches it by way of the runner alone, and once.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
            )  # fmt: skip
        self.running[process] = job, slot
        if self.signal:  # it arrived in between
            process.terminate()

    def end(self) -> int:
        """The exit code, after a line for each failed command. After a signal: raises Stopped."""
        if self.signal:
            raise Stopped(self.signal)
        for job in self.failed:
            print(f"failed: {job}", file=sys.stderr)
        return self.code
