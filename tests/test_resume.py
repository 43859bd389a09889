"""Stopped, killed, damaged: a resumed run ends as one that was never stopped, bit for bit."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import data
import explain
import report
import train
from kit import checkpoint, run
from kit.command_line import UserError
from kit.environment import peak_memory_mb
from kit.runs import completed, lock
from kit.tensorboard_log import log_epoch
from models import build_model

import numpy as np
import pytest
import torch
from conftest import (
    REPO,
    SMALL,
    assert_same,
    is_one_line,
    metrics_of,
    script,
    state_at,
    stop_at,
    train_small,
)  # fmt: skip
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CPU = torch.device("cpu")
FOLDER = "fashion_mnist/published/se/seed0"
FLAGS = ["--limit-train", "640", "--limit-test", "100", "--width", "8", "--device", "cpu"]
FLAGS += ["--epochs", "3", "--data-dir", str(REPO / "data")]
# What two runs that are the same differ in.
OF_A_PROCESS = {"train_seconds", "images_per_second", "peak_memory_mb", "set_up_seconds",
                "save_seconds", "mode", "gradient_error"}  # fmt: skip
# Children that have imported everything, but run nothing yet: each is there in an instant.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["train", "tests.test_resume"])


def in_a_child(runs, before=None):
    """Starts `train.py --model se` in a process of its own; `before` is called in it first."""
    process = processes.Process(target=child, args=(runs, before))
    process.start()
    return process


def child(runs, before):
    os.chdir(REPO)
    with open(f"{runs}.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if before:
        before()
    sys.exit(train.main(["--model", "se", *FLAGS, "--runs", str(runs)]))


def run_to_the_end(runs):
    process = in_a_child(runs)
    process.join(120)
    assert process.exitcode == 0, (runs.parent / f"{runs.name}.log").read_text()


def slow(*values, **options):
    """A case that the suite has the like of."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was never stopped, and the seconds it took."""
    runs = tmp_path_factory.mktemp("whole") / "runs"
    start = time.perf_counter()
    run_to_the_end(runs)
    return runs / FOLDER, time.perf_counter() - start


def assert_same_end(folder, whole):
    assert metrics_of(folder) == metrics_of(whole)
    assert_same(*(checkpoint.load(path / "best.pt") for path in (folder, whole)))
    results = [json.loads((path / "result.json").read_text()) for path in (folder, whole)]
    assert_same(*({k: v for k, v in each.items() if k not in OF_A_PROCESS} for each in results))
    for name in ("test_predictions.npy", "test_labels.npy"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    scalars = [EventAccumulator(str(path)).Reload().Scalars("loss/val") for path in (folder, whole)]
    steps = [[(event.step, event.value) for event in events] for events in scalars]
    assert steps[0] == steps[1] and len(steps[0]) == 3
    strays = {path.name for path in folder.iterdir()} - {path.name for path in whole.iterdir()}
    assert all(name == ".lock" or name.startswith("events.out.tfevents") for name in strays)


# --- Stopped and killed ---------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [slow(signal.SIGTERM), slow(signal.SIGHUP), signal.SIGUSR1])
def test_stopped_between_two_steps_it_is_resumed_to_the_same_end(whole, signum, tmp_path):
    """The real script, as it is used: stopped in its second epoch, then the same command."""
    flags = [*FLAGS, "--runs", str(tmp_path / "runs")]
    command = [sys.executable, "-u", "train.py", "--model", "se", *flags]
    process = subprocess.Popen(
        command,
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As from a terminal, not as below nohup, which has SIGHUP ignored.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    for line in process.stdout:
        if line.startswith("epoch  1/3"):
            process.send_signal(signum)
            break
    _, error = process.communicate(timeout=60)
    folder = tmp_path / "runs" / FOLDER
    assert process.returncode == 128 + signum and is_one_line(error) and signum.name in error
    assert len(metrics_of(folder)) == 1 and not (folder / "result.json").exists()
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resuming in epoch 2, after" in done.stdout
    assert_same_end(folder, whole[0])


def test_stopped_before_the_first_step_it_leaves_nothing(tmp_path):
    """A dry run, while it compiles."""
    command = [sys.executable, "-u", "train.py", "--model", "se", "--mode", "compile", "--dry-run"]
    process = subprocess.Popen(
        command,
        cwd=REPO,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("compiling") and list(tmp_path.glob("runs-*"))
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 143
    assert not list(tmp_path.glob("runs-*"))


def test_a_notebook_lives_on(tmp_path):
    """Its "stop" button, while the run that it has called sets itself up; later it is a Stopped."""
    code = f"""
import os, signal, train
train.Run.speed_up = lambda *_: os.kill(os.getpid(), signal.SIGINT)
flags = {["--model", "se", *FLAGS, "--runs", str(tmp_path)]}
print("code", train.main(flags), os.listdir("{tmp_path}/{FOLDER}").count(".lock"))
"""
    done = script("-c", code)
    assert done.stdout == "code 130 0\n" and done.stderr == ""


@pytest.mark.parametrize("n", [5, slow(11), slow(23)])
def test_a_partial_epoch_is_saved(whole, tmp_path, monkeypatch, capsys, n):
    """An epoch of these runs has ten steps and one batch to validate."""
    flags = ["--model", "se", *FLAGS, "--runs", str(tmp_path)]
    with monkeypatch.context() as patch:
        stop_at(n, patch)
        assert train.main(flags) == 130
    assert is_one_line(capsys.readouterr().err)
    progress = checkpoint.load(tmp_path / FOLDER / "last.pt")["progress"]
    assert (len(progress["history"]), progress["step"]) == divmod(n - 1, 11)
    assert train.main(flags) == 0
    assert_same_end(tmp_path / FOLDER, whole[0])


# What a user may put into train.py.
EDITS = {
    "sgd": ("adam", lambda model, lr, weight_decay: torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, nesterov=True)),
    "rmsprop": ("adam", lambda model, lr, weight_decay: torch.optim.RMSprop(
        model.parameters(), lr)),
    "step_lr": ("cosine", lambda optimizer, epochs, warmup: torch.optim.lr_scheduler.StepLR(
        optimizer, step_size=1, gamma=0.3)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "mode"),
    [slow("sgd", "eager"), ("rmsprop", "compile"), slow("step_lr", "compile")],
)
def test_with_another_optimizer_or_schedule_it_is_resumed_too(edit, mode, tmp_path, monkeypatch):
    """Compiling, which is left out here, warms the step up: that is undone, too."""
    monkeypatch.setattr(train, *EDITS[edit])
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    command = ["--model", "se", *SMALL, "--data-dir", str(REPO / "data"), "--epochs", "3"]
    assert train.main([*command, "--runs", str(tmp_path / "whole")]) == 0
    at_the_end = state_at(12, tmp_path / "state", command)  # in the last validation
    command += ["--mode", mode]
    progress = state_at(7, tmp_path / "parts", command)["progress"]
    # An epoch has three steps and one batch to validate.
    assert (len(progress["history"]), progress["step"]) == (1, 2)
    state = state_at(6, tmp_path / "parts", command)
    for part in ("model", "optimizer", "scheduler"):
        assert_same(state[part], at_the_end[part])
    assert train.main([*command, "--runs", str(tmp_path / "parts")]) == 0
    assert_same_end(tmp_path / "parts" / FOLDER, tmp_path / "whole" / FOLDER)


def test_an_optimizer_changed_since_is_refused(tmp_path, monkeypatch, capsys):
    """Its state would mean nothing to the other one."""
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        assert train_small("se", tmp_path) == 130
    monkeypatch.setattr(train, *EDITS["sgd"])
    before = {path.name: path.read_bytes() for path in (tmp_path / FOLDER).iterdir()}
    capsys.readouterr()
    assert train_small("se", tmp_path) == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and "a run with optimizer_class Adam instead of SGD" in error
    assert {path.name: path.read_bytes() for path in (tmp_path / FOLDER).iterdir()} == before
    assert train_small("se", tmp_path, "--epochs", "1", "--overwrite") == 0


class Killed(BaseException):
    """In this process what SIGKILL would be: nothing is saved after it."""


@pytest.mark.parametrize("end", [slow("whole"), slow("stopped"), "killed"])
def test_where_saving_is_slow_it_is_rarer_and_nothing_is_lost(whole, end, tmp_path, monkeypatch):
    """No last.pt is due after the second epoch: writing one takes long."""
    flags = ["--model", "se", *FLAGS, "--runs", str(tmp_path)]
    folder, write, written = tmp_path / FOLDER, run.write_atomically, []

    def slow_write(path, *rest, **options):
        write(path, *rest, **options)
        written.append(path.name)
        time.sleep(0.2 * (path.name == "last.pt"))

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_atomically", slow_write)
        if end == "stopped":
            stop_at(28, patch)
            assert train.main(flags) == 130
        elif end == "killed":
            stop_at(28, patch, Killed)
            with pytest.raises(Killed):
                train.main(flags)
        else:
            assert train.main(flags) == 0
    assert written.count("last.pt") == (2 if end == "stopped" else 1)
    assert (folder / "last.pt").exists() == (end != "whole")
    if end != "whole":
        last = checkpoint.load(folder / "last.pt")["progress"]
        assert (len(last["history"]), last["step"]) == {"stopped": (2, 5), "killed": (1, 0)}[end]
        assert_same(dict(checkpoint.load(folder / "best.pt")), dict(last["best"]))
    assert len(metrics_of(folder)) == (3 if end == "whole" else 2)  # every epoch at once
    assert train.main(flags) == 0
    assert_same_end(folder, whole[0])


def kill_at_random(runs, whole, kills, seed):
    """SIGKILL at random moments of the time that a run takes, then to the end."""
    generator = random.Random(seed)
    for _ in range(kills):
        process = in_a_child(runs)
        process.join(generator.uniform(0, whole[1]))
        process.kill()
        process.join()
        for path in (runs / FOLDER).glob("*.json"):
            json.loads(path.read_text())  # whole, whatever there is
    run_to_the_end(runs)
    assert_same_end(runs / FOLDER, whole[0])
    assert ".corrupt" not in (runs.parent / f"{runs.name}.log").read_text()


def test_killed_at_random_moments(whole, tmp_path):
    kill_at_random(tmp_path / "runs", whole, kills=5, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_20_random_moments(whole, tmp_path, seed):
    kill_at_random(tmp_path / "runs", whole, kills=20, seed=seed)


class DieAt:
    """In a child: SIGKILL itself before or after its n-th os.replace."""

    def __init__(self, n, after):
        self.n, self.after = n, after

    def __call__(self):
        replace, calls = os.replace, 0

        def dying(*paths):
            nonlocal calls
            calls += 1
            if calls == self.n and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)
            if calls == self.n and self.after:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = dying


@pytest.mark.slow
def test_killed_at_every_rename(whole, tmp_path):
    """Every file that is written, before and after it gets its name."""
    for n in range(1, 100):
        for after in (False, True):
            runs = tmp_path / f"{n}{after}"
            process = in_a_child(runs, DieAt(n, after))
            process.join(120)
            if process.exitcode == 0:
                assert n > 12  # all of them were tried
                return
            assert process.exitcode == -signal.SIGKILL
            run_to_the_end(runs)
            assert_same_end(runs / FOLDER, whole[0])
            shutil.rmtree(runs)


# --- Damaged --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The runs folder of a run stopped after two epochs, which are in last.pt and in prev.pt."""
    runs = tmp_path_factory.mktemp("stopped") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        took = property(lambda run: 0.0, lambda run, took: None)  # so it is saved each epoch
        patch.setattr(run.Run, "last_save_took", took, raising=False)
        stop_at(23, patch)
        assert train.main(["--model", "se", *FLAGS, "--runs", str(runs)]) == 130
    return runs


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/a-checkpoint-ran-code",)


def damages(folder):
    """{what: the bytes of a last.pt that must not be used}."""
    body = (folder / "last.pt").read_bytes()
    state, saved = checkpoint.load(folder / "last.pt"), checkpoint.serialized
    cbam = build_model("cbam_blocks", width=8)
    flipped, unread = bytearray(body), bytearray(body)
    flipped[len(body) // 2] ^= 1
    # In the archive's directory: this file is a folder, PyTorch need not read it.
    unread[body.rindex(b"PK\x01\x02", 0, body.rindex(b"archive/data/4PK\x01\x02")) + 38] ^= 0x10
    return {
        "truncated": body[: len(body) // 2],
        "empty": b"",
        "text": b"text",
        "flipped": bytes(flipped),
        "unread": bytes(unread),
        "pickle": pickle.dumps(Evil()),
        "evil": saved({"model": Evil()}),
        "weights": saved(state["model"]),
        "model": saved(state | {"model": cbam.state_dict()}),
        "seed": saved(state | {"config": state["config"] | {"seed": 9}}),
        "optimizer": saved(state | {"config": state["config"] | {"optimizer_class": "SGD"}}),
        "parameters": saved(state | {"optimizer": train.adam(cbam, 1e-3).state_dict()}),
        "history": saved(state | {"progress": state["progress"] | {"history": [{"epoch": 7}]}}),
    }


def resumed(folder):
    """What Run.restore does with the checkpoints of `folder`: (progress, model, optimizer)."""
    config = json.loads((folder / "config.json").read_text())
    model = build_model("se", width=8, seed=0)
    optimizer = train.adam(model, 1e-3)
    scheduler = train.cosine(optimizer, steps=3)
    parts = dict(model=model, optimizer=optimizer, scheduler=scheduler, ema=None)
    progress = checkpoint.resume(folder, parts, torch.device("cpu"), config)
    return progress, model, optimizer


def same_weights(model, state):
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_bad_checkpoints_are_renamed_and_the_one_before_is_used(stopped, tmp_path, capsys):
    folder = tmp_path / "folder"
    shutil.copytree(stopped / FOLDER, folder)
    before = checkpoint.load(folder / "prev.pt")
    for what, bad in damages(folder).items():
        (folder / "last.pt").write_bytes(bad)
        progress, model, optimizer = resumed(folder)
        error = capsys.readouterr().err
        assert is_one_line(error) and "last.pt renamed to last.pt.corrupt" in error, what
        assert (folder / "last.pt.corrupt").read_bytes() == bad and (folder / "prev.pt").exists()
        assert progress.history == before["progress"]["history"] and progress.step == 0
        assert same_weights(model, before["model"]) and len(optimizer.state) > 0
        assert not os.path.exists("/tmp/a-checkpoint-ran-code")


def test_without_a_good_checkpoint_it_starts_from_scratch(stopped, tmp_path, capsys):
    folder = tmp_path / "folder"
    shutil.copytree(stopped / FOLDER, folder)
    fresh = build_model("se", width=8, seed=0).state_dict()
    for what, bad in damages(stopped / FOLDER).items():
        for name in ("last.pt", "prev.pt"):
            (folder / name).write_bytes(bad)
        if what in ("model", "parameters"):  # whole, but of other code: it may be restored
            with pytest.raises(UserError, match="does not fit the model or the optimizer"):
                resumed(folder)
            assert {(folder / name).read_bytes() for name in ("last.pt", "prev.pt")} == {bad}
            continue
        progress, model, optimizer = resumed(folder)
        assert len(capsys.readouterr().err.splitlines()) == 2, what
        assert progress == checkpoint.Progress() and not optimizer.state
        assert same_weights(model, fresh)
        assert not [*folder.glob("last.pt"), *folder.glob("prev.pt")]


def test_a_run_with_a_bad_checkpoint_ends_as_it_should(stopped, whole, tmp_path, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(stopped, runs)
    (runs / FOLDER / "last.pt").write_bytes(damages(stopped / FOLDER)["flipped"])
    assert train.main(["--model", "se", *FLAGS, "--runs", str(runs)]) == 0
    assert "resuming in epoch 3, after 0 steps" in capsys.readouterr().out
    assert_same_end(runs / FOLDER, whole[0])


def test_a_run_from_scratch_keeps_nothing_of_bad_checkpoints(stopped, whole, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    shutil.copytree(stopped, runs)
    for name in ("last.pt", "prev.pt"):
        (runs / FOLDER / name).write_bytes(b"")
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        assert train.main(["--model", "se", *FLAGS, "--runs", str(runs)]) == 130
    assert metrics_of(runs / FOLDER) == [] and not (runs / FOLDER / "best.pt").exists()
    assert train.main(["--model", "se", *FLAGS, "--runs", str(runs)]) == 0
    assert_same_end(runs / FOLDER, whole[0])


def test_a_checkpoint_of_another_pytorch_or_mode_is_used_and_said(stopped, tmp_path, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(stopped, runs)
    before = json.loads((runs / FOLDER / "env.json").read_text())
    before |= {"torch": "1.0", "mode": "compile", "shared_gpu": True, "changes": ["x"]}
    (runs / FOLDER / "env.json").write_text(json.dumps(before))
    assert train.main(["--model", "se", *FLAGS, "--runs", str(runs)]) == 0
    out, error = capsys.readouterr()
    assert error == "" and "resuming in epoch 3" in out and "torch 1.0 before" in out
    env = json.loads((runs / FOLDER / "env.json").read_text())
    torch_changed = f"torch 1.0 before, {torch.__version__} since"
    assert env["changes"] == ["x", torch_changed, "mode compile before, eager since"]
    assert env["mode"] == "eager" and env["shared_gpu"] is True  # at any time


def test_a_damaged_environment_is_said(stopped, tmp_path, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(stopped, runs)
    (runs / FOLDER / "env.json").write_text("{")
    assert train.main(["--model", "se", *FLAGS, "--runs", str(runs)]) == 0
    assert "resuming in epoch 3, after 0 steps (damaged (env.json: " in capsys.readouterr().out
    (change,) = json.loads((runs / FOLDER / "env.json").read_text())["changes"]
    assert change.startswith("damaged (env.json: ")


def test_other_threads_and_instructions_are_said(stopped, tmp_path, capsys, monkeypatch):
    runs, names = tmp_path / "runs", ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
    shutil.copytree(stopped, runs)
    env = json.loads((runs / FOLDER / "env.json").read_text())
    assert env["variables"]["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS")
    env["variables"] |= {"MKL_NUM_THREADS": "7", "ONEDNN_MAX_CPU_ISA": None}
    env["variables"].pop("ATEN_CPU_CAPABILITY")  # an older one did not record it
    (runs / FOLDER / "env.json").write_text(json.dumps(env))
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    for name in names:
        monkeypatch.setenv(name, "AVX2")
    assert train.main(["--model", "se", *FLAGS, "--runs", str(runs)]) == 0
    out, error = capsys.readouterr()
    assert error == "" and "MKL_NUM_THREADS 7 before, unset since" in out
    assert "ONEDNN_MAX_CPU_ISA unset before, AVX2 since" in out and "ATEN" not in out


@pytest.mark.parametrize(("name", "kind"), [
    ("config.json", "pipe"), ("env.json", "sparse"), ("metrics.jsonl", "pipe"),
    ("result.json", "pipe"), ("result.json", "sparse"), ("test_labels.npy", "sparse"),
    ("test_predictions.npy", "pipe"), ("best.pt", "sparse"), ("last.pt", "pipe"),
    ("benchmark.json", "sparse"),
])  # fmt: skip
def test_pipes_and_huge_files_neither_hang_nor_fill_the_memory(
    finished_run, tmp_path, capsys, monkeypatch, name, kind
):
    monkeypatch.setattr(report, "draw_figures", lambda *_: {})
    runs, out = tmp_path / "runs", tmp_path / "out"
    folder = runs / "fashion_mnist/published/cbam_blocks/seed0"
    shutil.copytree(finished_run, folder)
    path = (runs if name == "benchmark.json" else folder) / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        with open(path, "wb") as file:
            file.truncate(2**32)
    signal.alarm(60)  # ends the process if one waits for the pipe
    runs_and_out, before = ["--runs", str(runs), "--out", str(out)], peak_memory_mb(CPU)
    explaining = ["--run", str(folder), "--limit-test", "20", "--keep"]
    codes = [
        train_small("cbam_blocks", runs, "--epochs", "2"),
        report.main(runs_and_out),
        explain.main([*explaining, "--device", "cpu", *runs_and_out[2:]]),
    ]
    signal.alarm(0)
    assert peak_memory_mb(CPU) < before + 1000
    small = name in ("config.json", "env.json", "metrics.jsonl", "result.json") or "test" in name
    assert codes == [small, small, small or name == "best.pt"]
    error = capsys.readouterr().err
    if small:
        assert ("is no file" if kind == "pipe" else "4,294,967,296 bytes") in error


def test_other_settings_are_refused_and_nothing_is_touched(stopped, tmp_path, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(stopped, runs)
    before = {path.name: path.read_bytes() for path in (runs / FOLDER).iterdir()}
    assert train.main(["--model", "se", *FLAGS, "--lr", "0.5", "--runs", str(runs)]) == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and "lr 0.001 instead of 0.5" in error
    assert "--overwrite" in error and "--runs" in error
    assert {path.name: path.read_bytes() for path in (runs / FOLDER).iterdir()} == before


# --- Fuzzing --------------------------------------------------------------------------------------


def mutated(body, generator):
    """One to three random changes: bytes overwritten, deleted, inserted, or the end cut off."""
    body = bytearray(body)
    for _ in range(generator.randint(1, 3)):
        at = generator.randrange(len(body) + 1)
        some = generator.randbytes(generator.choice([1, 1, 2, 8, 100]))
        match generator.randrange(4):
            case 0:
                body[at : at + len(some)] = some
            case 1:
                del body[at : at + len(some)]
            case 2:
                body[at:at] = some
            case 3:
                del body[at:]
    return bytes(body)


def test_mutated_checkpoints_are_whole_or_renamed(stopped, tmp_path, capsys):
    """Whole: what was changed is padding, or a copy of something, that nobody reads."""
    folder = stopped / FOLDER
    body, good = (folder / "last.pt").read_bytes(), checkpoint.load(folder / "last.pt")
    fresh = build_model("se", width=8, seed=0).state_dict()
    generator = random.Random(0)
    n_renamed = 0
    for i in range(150):
        copy = tmp_path / str(i)
        copy.mkdir()
        (copy / "last.pt").write_bytes(mutated(body, generator))
        shutil.copy(folder / "config.json", copy)
        progress, model, optimizer = resumed(copy)
        error = capsys.readouterr().err
        if (copy / "last.pt.corrupt").exists():
            assert is_one_line(error) and not progress.history and not optimizer.state
            assert same_weights(model, fresh)
            n_renamed += 1
        else:
            assert error == "" and same_weights(model, good["model"])
            assert_same(optimizer.state_dict(), good["optimizer"])
            assert_same(vars(progress), good["progress"])
        shutil.rmtree(copy)
    assert n_renamed > 100


@pytest.mark.parametrize("name", ["config.json", "result.json", "env.json"])
def test_mutated_json_is_one_line_or_the_run_as_it_was(finished_run, tmp_path, capsys, name):
    folder = tmp_path / "fashion_mnist/published/cbam_blocks/seed0"
    shutil.copytree(finished_run, folder)
    body = (folder / name).read_bytes()
    generator = random.Random(name)
    for _ in range(20):
        (folder / name).write_bytes(mutated(body, generator))
        code = train_small("cbam_blocks", tmp_path, "--epochs", "2")
        out, error = capsys.readouterr()
        assert code in (0, 1) and (code == 0 or is_one_line(error))
        assert "already complete" in out or code == 1


def test_mutated_data_is_never_used(tmp_path):
    source = REPO / "data/FashionMNIST/raw"
    generator = random.Random(1)
    for path in source.glob("*ubyte"):
        shutil.copy(path, tmp_path)
    body = (source / "t10k-labels-idx1-ubyte").read_bytes()
    for _ in range(30):
        (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(mutated(body, generator))
        with pytest.raises(UserError) as raised:
            data.load_dataset("fashion_mnist", tmp_path)
        assert is_one_line(str(raised.value))


# --- Surroundings ---------------------------------------------------------------------------------


def test_two_processes_never_train_the_same_run(whole, tmp_path, capsys):
    runs = tmp_path / "runs"
    first = in_a_child(runs)
    while not (runs / FOLDER / "config.json").exists():  # it is locked by then
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)  # so that it cannot end before the second one asks
    code = train.main(["--model", "se", *FLAGS, "--runs", str(runs)])
    os.kill(first.pid, signal.SIGCONT)
    error = capsys.readouterr().err
    assert code == 1 and is_one_line(error) and "another process is training in" in error
    assert str(runs / FOLDER) in error and "another --runs" in error
    first.join(120)
    assert first.exitcode == 0
    assert_same_end(runs / FOLDER, whole[0])


def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


class DeleteAt:
    """In a child: deletes the folder of all runs when the run asks for a signal the n-th time."""

    def __init__(self, n, runs):
        self.n, self.runs = n, runs

    def __call__(self):
        calls = iter(range(1, self.n))
        run.Run.leave_if_stopped = lambda _: next(calls, None) or shutil.rmtree(self.runs, True)
        run.Run.last_save_took = property(lambda _: self.took, self.slow)

    def slow(self, _, took):
        """Only the first epoch is saved, and the end."""
        self.took = 60.0 if took else 0.0


def test_a_folder_that_is_another_run_s_by_now_is_left_alone(tmp_path, monkeypatch, capsys):
    """Suspended, deleted, trained again with another setting: the first one goes on at the end."""
    folder = tmp_path / "fashion_mnist/published/se/seed0"
    asked, calls = run.Run.leave_if_stopped, iter(range(1, 5))

    def meanwhile(self):
        if next(calls, None) is None and not (tmp_path / "done").exists():
            (tmp_path / "done").touch()
            shutil.rmtree(folder)
            assert train_small("se", tmp_path, "--epochs", "1", "--lr", "0.01") == 0
        asked(self)

    monkeypatch.setattr(run.Run, "leave_if_stopped", meanwhile)
    assert train_small("se", tmp_path, "--epochs", "2") == 1
    assert "was moved or deleted during its run" in capsys.readouterr().err
    assert json.loads((folder / "config.json").read_text())["lr"] == 0.01
    assert completed(folder, json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize(
    "n", [slow(5, id="before a save"), slow(16, id="after one"), pytest.param(34, id="in the test")]
)
def test_a_folder_deleted_in_mid_run_is_no_result(tmp_path, n):
    runs = tmp_path / "runs"
    process = in_a_child(runs, DeleteAt(n, runs))
    process.join(60)
    log = (tmp_path / "runs.log").read_text()
    assert process.exitcode == 1 and "was moved or deleted" in log.splitlines()[-1]
    assert not runs.exists()


def test_a_full_disk_is_one_line(tmp_path):
    """Writes beyond 20,000 bytes fail, as on a full disk: checkpoints are larger than that."""
    runs = tmp_path / "runs"
    process = in_a_child(runs, limit_files)
    process.join(120)
    log = (tmp_path / "runs.log").read_text()
    assert process.exitcode == 1 and "Traceback" not in log
    assert [line for line in log.splitlines() if line.startswith("error: ")] == log.splitlines()[
        -1:
    ]
    assert not list((runs / FOLDER).glob("*.pt")) and not list((runs / FOLDER).glob(".*.tmp*"))
    run_to_the_end(runs)


def test_a_disk_that_is_full_at_the_very_end_costs_no_epoch(whole, tmp_path, monkeypatch, capsys):
    write = run.write_json

    def full(path, content):
        if path.name == "result.json":
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    command = ["--model", "se", *FLAGS, "--runs", str(tmp_path)]
    took = property(lambda run: 0.0, lambda run, took: None)  # so it is saved each epoch
    monkeypatch.setattr(run.Run, "last_save_took", took, raising=False)
    monkeypatch.setattr(run, "write_json", full)
    assert train.main(command) == 1 and is_one_line(capsys.readouterr().err)
    monkeypatch.setattr(run, "write_json", write)
    assert train.main(command) == 0
    printed = capsys.readouterr().out
    assert "resuming in epoch 4, after 0 steps" in printed and "epoch  3/3" not in printed
    assert metrics_of(tmp_path / FOLDER) == metrics_of(whole[0])


def signal_while_writing():
    def signalled(writer, row):
        queue = writer.file_writer.event_writer._async_writer._byte_queue
        put = queue.put
        queue.put = lambda body: (os.kill(os.getpid(), signal.SIGTERM), put(body))
        log_epoch(writer, row)

    run.log_epoch = signalled


def test_a_signal_while_curves_are_drawn_again(stopped, tmp_path):
    """Closing a writer that is in the middle of writing would hang."""
    shutil.copytree(stopped, tmp_path / "runs")
    process = in_a_child(tmp_path / "runs", signal_while_writing)
    process.join(60)
    assert process.exitcode == 143 and "stopped by SIGTERM" in (tmp_path / "runs.log").read_text()


def test_a_precision_that_is_asked_for_is_another_run(finished_run, tmp_path, capsys):
    """Without one, a run that another machine has trained in its own is the same."""
    folder = tmp_path / "fashion_mnist/published/cbam_blocks/seed0"
    shutil.copytree(finished_run, folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("config.json", "result.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"precision": "bf16"}))
    assert completed(folder, config | {"auto_precision": True})
    with pytest.raises(UserError, match="precision bf16 instead of fp32"):
        completed(folder, config | {"auto_precision": False})


def test_the_code_of_a_run_is_that_which_was_imported(tmp_path):
    shutil.copytree(REPO / "kit", tmp_path / "kit")
    (tmp_path / "train.py").write_text("")
    edited = "import kit.environment as e; open('train.py', 'w').write('#')"
    command = [sys.executable, "-c", f"{edited}; print(e.source_hashes(['train.py'])['train.py'])"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == hashlib.sha256(b"").hexdigest()


def wait_for(folder):
    os.environ["WAIT_FOR_RUNS"] = "1"
    with contextlib.ExitStack() as stack:
        lock(folder, stack)


def test_a_run_that_waits_takes_over_from_one_that_wrote_nothing(tmp_path):
    folder = tmp_path / "runs/seed0"
    with contextlib.ExitStack() as stack:
        lock(folder, stack)
        process = processes.Process(target=wait_for, args=(folder,))
        process.start()
        time.sleep(3)
    assert not folder.exists() or process.is_alive()
    process.join(30)
    assert process.exitcode == 0


def test_predictions_are_those_of_the_best_weights(whole):
    folder, _ = whole
    dataset = data.load_dataset("fashion_mnist", REPO / "data")
    model = build_model("se", width=8)
    model.load_state_dict(checkpoint.load(folder / "best.pt"))
    tested = data.stratified(dataset.test_labels, 100)
    images = data.normalize(dataset.test_images[tested], *map(torch.tensor, (0.5, 0.5)))
    with torch.no_grad():
        predictions = model.eval()(images).argmax(1).numpy()
    assert np.array_equal(predictions, np.load(folder / "test_predictions.npy"))
