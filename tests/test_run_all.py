"""run_all.sh and kit/runner.py: what runs, what a signal stops; the commands of README and docs."""

import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import train
from kit import runs as folders
from kit import study
from kit.command_line import STOPPING, exit_code
from kit.runner import Job, Runner

import pytest
from conftest import REPO, SMALL, is_one_line, needs_pins, run_all, script, unaligned, variables
from test_image_folder import make

COMMANDS = [
    line.split("#")[0].strip()
    for page in [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.split("#")[0].strip()
]

# --- The runner, with small commands --------------------------------------------------------------

CHILD = """
import os, signal, sys, time
from pathlib import Path

def save(signum, frame):
    print("saved")
    sys.exit(128 + signum)

signal.signal(signal.SIGTERM, save)
number, wait_for, end = sys.argv[1:]
print(os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS"), flush=True)
Path(number + ".started").touch()
while len(list(Path().glob("*.started"))) < int(wait_for):
    time.sleep(0.01)
if end.startswith("SIG"):
    os.kill(os.getppid(), getattr(signal, end))
    time.sleep(60)
sys.exit(int(end))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the jobs run; afterwards the signals are handled as before."""
    before = [signal.signal(signum, signal.SIG_DFL) for signum in STOPPING]
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "all")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield tmp_path
    for signum, handler in zip(STOPPING, before):
        signal.signal(signum, handler)


def job(number, end=0, wait_for=0, **more):
    """Waits until so many have started, then ends with this code, or sends the runner a signal."""
    log = Path(f"{number}.log")
    return Job(["child.py", number, wait_for, end], f"job {number}", Path("none"), log=log, **more)


def started(folder):
    return sorted(path.stem for path in folder.glob("*.started"))


def test_one_that_fails_is_noted_and_the_rest_is_tried(folder, capfd):
    runner = Runner(3, ["GPU-a", "1", "GPU-c"])
    runner.run([job(k, end=int(k == 1), wait_for=3) for k in range(5)])
    assert runner.end() == 1 and started(folder) == ["0", "1", "2", "3", "4"]
    logs = [(folder / f"{k}.log").read_text().split() for k in range(3)]
    assert [words[0] for words in logs] == ["GPU-a", "1", "GPU-c"]
    out, error = capfd.readouterr()
    assert is_one_line(error) and error.endswith("child.py 1 3 1\n")
    out = out.splitlines()
    assert out[0] == "[1/5] job 0, log: 0.log" and {"failed: job 1", "done: job 4"} < set(out)


def test_alone_it_has_the_terminal_and_every_gpu(folder, capfd):
    runner = Runner(1, ["0", "1"])
    runner.run([job(0), job(1)])
    shown = "[1/2] job 0\nall None\n[2/2] job 1\nall None\n"
    assert capfd.readouterr().out == shown
    Runner(2).run([job(0), job(1)])  # on a CPU
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (folder / "1.log").read_text() == f"all {threads}\n"


@pytest.mark.parametrize(
    ("more", "code", "failed"), [({"end": 2}, 2, 1), ({"end": 1, "needed": True}, 1, 0)]
)
def test_wrong_usage_and_what_is_needed_end_it(folder, more, code, failed):
    runner = Runner()
    runner.run([job(0, **more), job(1)])
    assert runner.over and (runner.end(), len(runner.failed)) == (code, failed)
    assert started(folder) == ["0"]


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_is_passed_on_to_just_what_is_running(folder, name, code):
    runner = Runner(3)
    stage = [job(0, wait_for=9), job(1, wait_for=9), job(2, end=name, wait_for=3), job(3), job(4)]
    assert exit_code(lambda argv: runner.run(stage) or runner.end())() == code
    assert started(folder) == ["0", "1", "2"] and runner.running == {} and runner.failed == []
    assert all((folder / f"{k}.log").read_text().endswith("saved\n") for k in range(3))


def test_below_nohup_a_closed_terminal_stops_nothing(folder):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    Runner().run([job(0)])
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_what_another_process_trains_comes_last(folder):
    """And is waited for by train.py itself."""
    stage = [replace(job(k), folder=folder / str(k)) for k in range(3)]
    with contextlib.ExitStack() as stack:
        folders.lock(stage[0].folder, stack)
        assert folders.is_locked(stage[0].folder) and not folders.is_locked(stage[1].folder)
        Runner(1).run([replace(each, log=None) for each in stage])
    assert not folders.is_locked(stage[0].folder)
    times = {path.stem: path.stat().st_mtime_ns for path in folder.glob("*.started")}
    assert sorted(times, key=times.get) == ["1", "2", "0"]


def test_a_run_that_another_process_trains_is_waited_for_under_run_all_alone(
    finished_run, tmp_path, monkeypatch, capfd
):
    shutil.copytree(finished_run, tmp_path / "fashion_mnist/published/cbam_blocks/seed0")
    flags = ["--model", "cbam_blocks", *SMALL, "--epochs", "2", "--runs", str(tmp_path)]
    with contextlib.ExitStack() as stack:
        folders.lock(tmp_path / "fashion_mnist/published/cbam_blocks/seed0", stack)
        done = script("train.py", *flags)
        assert "another process is training" in done.stderr
        assert done.returncode == 1 and is_one_line(done.stderr)
        monkeypatch.setenv("WAIT_FOR_RUNS", "1")
        process = subprocess.Popen([sys.executable, "train.py", *flags], cwd=REPO)
        while "waiting: another process" not in capfd.readouterr().out:
            time.sleep(0.1)
            assert process.poll() is None
    assert process.wait(60) == 0 and "already complete" in capfd.readouterr().out


@pytest.mark.slow
def test_two_at_a_time_share_the_work(tmp_path):
    """Neither fails; each run is trained once, each row of the benchmark measured once."""
    images = make(tmp_path / "noise", {"a": 60, "b": 60, "c": 60}, size=(12, 12), mode="L")
    environment = variables(
        MODELS="baseline se", DATASET=images, RUNS=tmp_path / "runs", OUT=tmp_path / "out"
    )
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPO)
    command = ["./run_all.sh", "quick"]
    both = [subprocess.Popen(command, env=environment, **options) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    text = "".join(outputs)
    assert "failed" not in text and text.count("epoch  1/1") == 2
    assert text.count("2 of 2 rows are new") == text.count("0 of 2 rows are new") == 1


# --- run_all.sh -----------------------------------------------------------------------------------


def test_sets_up_a_venv_where_a_requirement_is_missing(tmp_path):
    """With a stand-in for Python, without pip, that notes what it is asked for."""
    shutil.copy(REPO / "run_all.sh", tmp_path)
    (tmp_path / "requirements.txt").write_text("# a version that is not there\nnumpy==0.1\n")
    (tmp_path / "kit").mkdir()
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\n[[ $* != *metadata* ]] || exec {sys.executable} "$@"\n'
        'echo "$0 $*" >>log\n[[ $* != *venv* ]] || install -D "$0" .venv/bin/python\n'
    )
    python.chmod(0o755)

    def asked(*arguments, **environment):
        (tmp_path / "log").write_text("")
        environment = os.environ | {"PYTHON": str(python), "ANY_VERSION": ""} | environment
        command = [tmp_path / "run_all.sh", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        lines = (tmp_path / "log").read_text().replace(f"{tmp_path}/", "").splitlines()
        return lines[1:], done.stderr

    assert asked("full", ANY_VERSION="1") == (["python -m kit.study full"], "")
    commands, message = asked("plan", "study")
    assert [line.split(" -m ")[1].split()[0] for line in commands] == ["venv", "pip", "kit.study"]
    assert asked("plan", "study", PYTHONOPTIMIZE="1") == (commands, message)  # asserts count
    assert "--require-hashes -r requirements.lock" in commands[1]
    assert commands[2] == ".venv/bin/python -m kit.study plan study"
    assert is_one_line(message) and f"{python} lacks" in message and "5 GB" in message
    assert asked("--help")[0] == [] and asked("fast")[0] == []
    (tmp_path / "requirements.txt").write_text((REPO / "requirements.txt").read_text())
    needs_pins()
    assert asked("full") == (["python -m kit.study full"], "")
    spool = tmp_path / "spool"  # where Slurm runs a copy of what sbatch is given
    spool.mkdir()
    shutil.copy(tmp_path / "run_all.sh", spool / "slurm_script")
    for folder, code, said in ((tmp_path, 0, ""), (spool, 1, "not the folder of the project")):
        done = subprocess.run(
            ["bash", spool / "slurm_script", "plan"], capture_output=True, text=True,
            env=variables(PYTHON=python, SLURM_SUBMIT_DIR=folder),
        )  # fmt: skip
        assert done.returncode == code and said in done.stderr


def test_unknown_data_end_it_before_anything_is_written(tmp_path):
    done = run_all("quick", DATASET="mnits", RUNS=tmp_path / "runs", OUT=tmp_path / "out")
    assert done.returncode == 2 and is_one_line(done.stderr) and "mnits" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_goes_on_after_a_failed_run_and_skips_finished_ones(tmp_path):
    """All of run_all.sh quick, on a folder of a few small images."""
    runs, out = tmp_path / "runs", tmp_path / "out"
    images = make(tmp_path / "noise", {"a": 60, "b": 60, "c": 60}, size=(12, 12), mode="L")
    # In the way of the baseline: a run with other settings, which train.py refuses to touch.
    flags = ["--model", "baseline", "--recipe", "quick", "--width", "8", "--runs", str(runs)]
    assert train.main([*flags, "--dataset", str(images), "--device", "cpu"]) == 0
    other = runs / "noise/quick/baseline/seed0/result.json"
    before = other.read_bytes()
    environment = {"MODELS": "baseline se", "DATASET": images, "RUNS": runs, "OUT": out}
    environment["FLAGS"] = "--width 4"

    first = run_all("quick", JOBS=2, **environment)
    assert first.returncode == 1 and other.read_bytes() == before
    assert "use --overwrite" in (runs / "logs/noise.quick.baseline.seed0.log").read_text()
    assert "test accuracy" in (runs / "logs/noise.quick.se.seed0.log").read_text()
    assert "\n[2/2] se, seed 0, log: " in first.stdout and "\ndone: se, seed 0\n" in first.stdout
    assert f"failed: {sys.executable} train.py --model baseline" in first.stderr
    result = json.loads((runs / "noise/quick/se/seed0/result.json").read_text())
    assert result["quick"] and result["test_images"] == 30 and result["width"] == 4
    assert "| `se` (smoke test, width 4) | 1 |" in unaligned((out / "report.md").read_text())
    rows = json.loads((out / "benchmark.json").read_text())
    assert {row["model"] for row in rows} == {"baseline", "se"}
    assert {(row["image"], row["width"]) for row in rows} == {("1x12x12", 4)}
    assert (runs / "noise/quick/se/seed0/explain.png").exists()
    (planned,) = json.loads((runs / "plan.json").read_text())
    assert (planned["models"], planned["seeds"]) == (["baseline", "se"], [0])
    plan = run_all("plan", "quick", **environment).stdout.splitlines()
    assert plan[2].endswith("  # done") and "--model se " in plan[2]
    assert "  # not done: " in plan[1] and "width 8 instead of 4" in plan[1]


def test_ctrl_c_stops_the_runs_too(tmp_path):
    with open(tmp_path / "log", "w") as out:
        process = subprocess.Popen(
            ["./run_all.sh", "quick"], cwd=REPO, stdout=out, stderr=out, start_new_session=True,
            env=variables(RUNS=tmp_path, OUT=tmp_path, JOBS=2),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as from a terminal
        )  # fmt: skip

    def logs():
        return "".join(path.read_text() for path in [tmp_path / "log", *tmp_path.glob("logs/*")])

    try:
        while logs().count("parameters;") < 2 and process.poll() is None:
            time.sleep(0.05)  # until two train.py are running
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) == 130 and logs().count("the same command") == 2
        with pytest.raises(ProcessLookupError):  # nobody left in its process group
            os.killpg(process.pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


# --- README and docs ------------------------------------------------------------------------------


def test_readme_and_docs_show_commands_of_every_script():
    shown = {word for command in COMMANDS for word in command.split() if "/" not in word[2:]}
    assert shown >= {"./run_all.sh", *(f"{name}.py" for name in ("train", "benchmark", "explain"))}
    assert shown >= {"report.py", "docker"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_readme_and_docs_exist(command, capsys, monkeypatch):
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # MODELS="..." in front
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    if words[0] == "./run_all.sh":
        if words[1:2] != ["test"]:
            assert study.main(["plan", *(word for word in words[1:] if word != "plan")]) == 0
    elif words[0] == "python" and words[1].endswith(".py"):
        script = importlib.import_module(Path(words[1]).stem)
        with pytest.raises(SystemExit) as ended:
            script.main([*words[2:], "--help"])  # every other flag is read first
        known = capsys.readouterr().out
        assert ended.value.code == 0
        flags = [word.split("=")[0] for word in words[2:] if word.startswith("--")]
        assert all(re.search(rf"{flag}\b", known) for flag in flags)
    elif words[0] == "docker":
        assert words[1] in ("build", "run") and (REPO / "Dockerfile").exists()
    else:
        assert words[0] in ("git", "cd", "mkdir", "sbatch", "source", "tensorboard", "python")


def test_requirements_and_dockerfile_are_pinned():
    lines = re.findall("^[^#].*$", (REPO / "requirements.txt").read_text(), re.MULTILINE)
    assert lines and all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
    dockerfile = (REPO / "Dockerfile").read_text()
    assert re.search(r"^ARG BASE_IMAGE=nvidia/cuda:\S+@sha256:[0-9a-f]{64}$", dockerfile, re.M)
    assert re.search(r"^USER [1-9][0-9]*:[1-9][0-9]*$", dockerfile, re.M)
    assert 'CMD ["./run_all.sh"]' in dockerfile


def test_the_image_gets_its_data_with_the_files_that_data_py_imports(tmp_path):
    copied = re.findall(r"^COPY (data.py|kit/.*) \S+$", (REPO / "Dockerfile").read_text(), re.M)
    for name in " ".join(copied).split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / name, tmp_path / name)
    command = [sys.executable, "data.py", "--data-dir", str(REPO / "data")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "60,000 training" in done.stdout
