import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPO, copy_run, is_one_line, needs_pins, run_all
from test_image_folder import make

import benchmark
import data
import explain
import report
import speed
import train
from kit.settings import parse_settings

README = (REPO / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.split("#")[0].strip()
]


def test_plan_prints_runnable_commands_and_runs_nothing(finished_run, tmp_path):
    runs = tmp_path / "my runs"
    copy_run(finished_run, runs, "se", 1, overrides={})
    copy_run(finished_run, runs, "se", 2)  # has overrides: not what the plan asks for
    done = run_all(
        "plan", "full", MODELS="baseline se", SEEDS="1 2", RUNS=runs, OUT=tmp_path / "out"
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 7
    expected = [("baseline", 1), ("se", 1), ("baseline", 2), ("se", 2)]
    for line, (model, seed) in zip(lines, expected):
        assert line.endswith("# done") == ((model, seed) == ("se", 1))
        command = shlex.split(line, comments=True)
        settings = parse_settings(command[2:])
        assert command[1] == "train.py" and (settings.model, settings.seed) == (model, seed)
        assert settings.recipe == "published" and settings.runs == runs
    scripts = [shlex.split(line)[1] for line in lines[4:]]
    assert scripts == ["benchmark.py", "explain.py", "report.py"]
    assert lines[5].count("/seed1") == 2 and shlex.split(lines[5])[-1].startswith(f"{runs}/")
    assert not (tmp_path / "out").exists() and len(list(runs.rglob("seed*"))) == 2


def test_full_is_the_published_table_by_default():
    lines = run_all("plan", "full").stdout.splitlines()
    assert len(lines) == 4 * 5 + 3
    found = [parse_settings(shlex.split(line, comments=True)[2:]) for line in lines[:-3]]
    models = ["baseline", "se", "cbam_blocks", "cbam_classifier"]
    assert [(s.seed, s.model) for s in found] == [(k, model) for k in range(5) for model in models]


def test_a_shard_is_every_nth_run_of_the_plan():
    whole = run_all("plan", "full", SEEDS="0 1").stdout.splitlines()[:-3]
    shard = run_all("plan", "full", SEEDS="0 1", SHARD="1/3").stdout.splitlines()
    assert len(whole) == 8 and shard == whole[1::3]  # no benchmark, no report at the end


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        (["fast"], {}, "fast"),
        (["plan", "all"], {}, "all"),
        (["quick", "full"], {}, "quick full"),
        (["quick"], {"MODELS": "se resnet"}, "resnet"),
        (["quick"], {"SEEDS": "0 one"}, "one"),
        (["quick"], {"DATASET": "mnits"}, "mnits"),
        (["quick"], {"RECIPE": "published"}, "RECIPE"),
        (["plan", "full"], {"MODELS": "resnet"}, "resnet"),
        (["plan", "full", "quick"], {}, "too many"),
        (["quick"], {"JOBS": "many"}, "JOBS"),
        (["plan", "full"], {"SHARD": "4/4"}, "SHARD"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, environment, named, tmp_path):
    done = run_all(*arguments, RUNS=tmp_path / "runs", OUT=tmp_path / "out", **environment)
    assert done.returncode == 2 and is_one_line(done.stderr) and named in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_goes_on_after_a_failed_run_and_skips_finished_ones(tmp_path):
    """All of run_all.sh quick, on a folder of a few small images."""
    runs, out = tmp_path / "runs", tmp_path / "out"
    images = make(tmp_path / "noise", {"a": 60, "b": 60, "c": 60}, size=(12, 12), mode="L")
    other = runs / "noise/quick/baseline/seed0"
    flags = ["--model", "baseline", "--recipe", "quick", "--width", "8", "--runs", str(runs)]
    # In the way of the baseline: a run with other settings, which train.py refuses to touch.
    assert train.main([*flags, "--dataset", str(images), "--device", "cpu"]) == 0
    before = (other / "result.json").read_bytes()
    environment = {"MODELS": "baseline se", "DATASET": images, "RUNS": runs, "OUT": out}

    first = run_all("quick", JOBS=2, **environment)
    assert first.returncode == 1
    logs = {path.name: path.read_text() for path in (runs / "logs").iterdir()}
    assert "use --overwrite" in logs["noise.quick.baseline.seed0.log"]
    assert "test accuracy" in logs["noise.quick.se.seed0.log"]
    assert first.stdout.count("\nstarted: ") == 2 and "\ndone: " in first.stdout
    assert f"failed: {sys.executable} train.py --model baseline" in first.stderr
    assert (other / "result.json").read_bytes() == before
    result = json.loads((runs / "noise/quick/se/seed0/result.json").read_text())
    assert result["quick"] and result["test_images"] == 30 and result["width"] == 64
    text = (out / "report.md").read_text()
    assert "| se (quick) | 1 |" in text and "What attention attends to" in text
    rows = json.loads((out / "benchmark.json").read_text())
    assert {(row["model"], row["image"]) for row in rows} == {
        ("baseline", "1x12x12"), ("se", "1x12x12"),
    }  # fmt: skip
    assert [row["model"] for row in json.loads((out / "explain.json").read_text())] == ["se"]

    for path in other.iterdir():
        path.unlink()
    second = run_all("quick", **(environment | {"MODELS": "se"}))
    assert second.returncode == 0 and "epoch  1/1" not in second.stdout
    assert "# done" in second.stdout and "kept: " in second.stdout


@pytest.mark.slow
def test_the_quick_study(tmp_path):
    """As a new user runs it: the published four at full width, minutes on a CPU."""
    done = run_all("quick", RUNS=tmp_path / "runs", OUT=tmp_path / "out")
    assert done.returncode == 0 and done.stderr == ""
    text = (tmp_path / "out/report.md").read_text()
    for model in ("baseline", "se", "cbam_blocks", "cbam_classifier"):
        assert f"| {model} (quick) | 1 |" in text and f"| `{model}` (quick) | 0 | 1,000 |" in text
    assert "![explain compare](explain_compare.png)" in text
    for page in ("report.html", "explain_compare.png", "explain_se_seed0.png"):
        assert (tmp_path / "out" / page).stat().st_size > 100_000


@pytest.mark.parametrize(
    ("signum", "code", "jobs"),
    [
        pytest.param(signal.SIGTERM, 143, 1, marks=pytest.mark.slow),
        (signal.SIGINT, 130, 2),
        pytest.param(signal.SIGHUP, 129, 2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_the_children_too(tmp_path, signum, code, jobs):
    needs_pins()
    environment = {"PYTHON": sys.executable, "RUNS": str(tmp_path), "OUT": str(tmp_path)}
    log = tmp_path / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            ["./run_all.sh", "quick"],
            cwd=REPO,
            env=os.environ | environment | {"JOBS": str(jobs)},
            stdout=out,
            stderr=out,
            start_new_session=True,
            # As from a terminal: a shell cannot trap a signal that was ignored when it started.
            preexec_fn=lambda: signal.signal(signum, signal.SIG_DFL),
        )

    def logs():
        return "".join(path.read_text() for path in [log, *tmp_path.glob("logs/*")])

    try:
        while logs().count("parameters;") < jobs and process.poll() is None:
            time.sleep(0.05)  # until that many train.py are at work
        os.kill(process.pid, signum)
        process.wait(120)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code and logs().count("the same command goes on") == jobs
    with pytest.raises(ProcessLookupError):  # nobody left in its process group
        os.killpg(process.pid, 0)


def test_readme_shows_commands_of_every_script():
    text = "\n".join(COMMANDS)
    for script in (
        "train.py",
        "benchmark.py",
        "speed.py",
        "report.py",
        "run_all.sh",
        "docker build",
    ):
        assert script in text


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_exist(command, capsys):
    words = shlex.split(command)
    words = [
        word for word in words if not re.fullmatch(r"[A-Z]+=.*", word)
    ]  # MODELS="..." in front
    if words[0] == "./run_all.sh":
        assert words[1:2] in ([], ["quick"], ["full"], ["study"], ["plan"], ["test"])
    elif words[0] == "python":
        script = {
            "train.py": train,
            "benchmark.py": benchmark,
            "report.py": report,
            "data.py": data,
            "explain.py": explain,
            "speed.py": speed,
        }
        with pytest.raises(SystemExit):
            script[words[1]].main(["--help"])
        known = capsys.readouterr().out
        flags = [word for word in words[2:] if word.startswith("--")]
        assert all(re.search(rf"{flag}\b", known) for flag in flags)
        if words[1] == "train.py":
            parse_settings(words[2:])
    elif words[0] == "docker":
        assert words[1] in ("build", "run") and (REPO / "Dockerfile").exists()
    else:
        assert words[0] in ("git", "cd", "mkdir", "sbatch", "source", "tensorboard")


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if re.search(r"--power|plan$|--dry-run$|models.py|--help", c)]
)
def test_cheap_commands_of_the_readme_run(command):
    needs_pins()
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    done = subprocess.run(
        words, cwd=REPO, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout and "Traceback" not in done.stderr


def test_requirements_and_dockerfile_are_pinned():
    lines = [
        line for line in (REPO / "requirements.txt").read_text().splitlines() if line[0] != "#"
    ]
    assert lines and all(re.fullmatch(r"[a-z-]+==[0-9][0-9a-z.]*", line) for line in lines)
    dockerfile = (REPO / "Dockerfile").read_text()
    assert re.search(
        r"^ARG BASE_IMAGE=nvidia/cuda:\S+@sha256:[0-9a-f]{64}$", dockerfile, re.MULTILINE
    )
    assert re.search(r"^USER [1-9][0-9]*:[1-9][0-9]*$", dockerfile, re.MULTILINE)
    assert 'CMD ["./run_all.sh"]' in dockerfile
