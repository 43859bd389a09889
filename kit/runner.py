"""Runs commands in parallel and forwards signals to them, so that they save before they end."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from kit.command_line import Stopped, handle_signals
from kit.runs import is_locked


@dataclass
class Job:
    """Arguments for Python; a training run also has a name, a folder and a log."""

    command: list
    name: str = ""
    folder: Path | None = None
    log: Path | None = None  # used if jobs run in parallel
    needed: bool = False  # if it fails, nothing more is run

    def __str__(self) -> str:
        return shlex.join([os.environ.get("PYTHON") or sys.executable, *map(str, self.command)])

    @property
    def state(self) -> str:
        """For a plan. A job is skipped if it begins with "done"."""
        return "skips what is there" * ("--keep" in self.command)


class Runner:
    """Up to `jobs` commands at a time. gpus: indices or UUIDs; parallel jobs get one each."""

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

    def run(self, stage: list[Job]) -> None:
        """Runs the jobs that are not done. A signal starts no more, and waits for the rest."""
        waiting = []
        for i, job in enumerate(stage, 1):
            state = job.state
            if not state.startswith("done"):
                waiting.append((i, job))
            elif state != "done":
                print(f"[{i}/{len(stage)}] {job.name}: {state}", flush=True)
        slots = list(range(min(self.jobs, len(stage))))
        shared = len(slots) > 1
        try:
            while self.running or (waiting and not self.over):
                while waiting and slots and not self.over:
                    # Prefer a run that no other process is training.
                    free = (w for w in waiting if not (w[1].folder and is_locked(w[1].folder)))
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
                        self.failed += [] if job.needed else [job]  # that one reports itself
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
        """Starts a job. If shared: with a log, and a GPU or part of the CPU's threads."""
        env = os.environ | {"WAIT_FOR_RUNS": "1"}  # of another run_all.sh, instead of failing
        if shared and self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        elif shared:
            threads = max(1, len(os.sched_getaffinity(0)) // self.jobs)
            env.setdefault("OMP_NUM_THREADS", str(threads))
        if shared:
            job.log.parent.mkdir(parents=True, exist_ok=True)
        with open(job.log, "a") if shared else contextlib.nullcontext() as out:
            process = subprocess.Popen(
                [sys.executable, *map(str, job.command)],
                env=env, stdout=out, stderr=out,
                # Ctrl-C reaches it only through the runner, once.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
            )  # fmt: skip
        self.running[process] = job, slot
        if self.signal:  # it arrived meanwhile
            process.terminate()

    def end(self) -> int:
        """The exit code, after a line for each failed command. After a signal: raises Stopped."""
        if self.signal:
            raise Stopped(self.signal)
        for job in self.failed:
            print(f"failed: {job}", file=sys.stderr)
        return self.code
