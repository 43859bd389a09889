"""./run_all.sh study: its plan, and all of it in miniature."""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPO, is_one_line, needs_pins, run_all

import benchmark
import explain
import report
import speed
from models import MODELS
from kit.settings import parse_settings

COMPARED = ["baseline", "cbam_classifier", "se", "cbam_blocks", "se_static"]
FURTHER = [model for model in MODELS if model not in COMPARED]


def planned(*arguments, **environment):
    """The commands of the plan, split into words, without the Python that leads them."""
    done = run_all("plan", "study", *arguments, **environment)
    assert done.returncode == 0 and done.stderr == ""
    return [shlex.split(line, comments=True)[1:] for line in done.stdout.splitlines()
            if not line.startswith("#")]  # fmt: skip


def test_the_plan_is_every_run_once_and_what_matters_most_first(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "plain_loop.py").write_text("")
    commands = planned(OUT=out, PEERS=tmp_path)
    assert not out.exists()
    runs = [parse_settings(words[1:]) for words in commands if words[0] == "train.py"]
    place = {"published": out / "runs", "fp32": out / "fp32", "further": out / "modules/runs"}
    names = [(s.runs, s.recipe, s.model, s.seed) for s in runs]
    expected = [(place["published"], m, k) for k in range(5) for m in COMPARED]
    expected += [(place["fp32"], m, k) for k in range(3) for m in ("baseline", "cbam_blocks")]
    expected += [(place["further"], m, k) for k in range(3) for m in ["baseline", *FURTHER]]
    expected += [(place["published"], m, k) for k in range(5, 10) for m in COMPARED]
    assert names == [(folder, "published", model, seed) for folder, model, seed in expected]
    assert not any(s.quick for s in runs)
    assert {s.runs for s in runs if "--precision fp32" in s.command} == {place["fp32"]}

    scripts = [words[0] for words in commands]
    assert scripts[:4] == ["speed.py", "speed.py", "benchmark.py", "benchmark.py"]
    assert commands[0][-6:] == ["--check", *COMPARED]
    assert commands[1][3:5] == ["--peers", str(tmp_path)]
    explained = commands[scripts.index("explain.py")]
    assert explained[-5:] == [f"{out}/runs/fashion_mnist/published/{m}/seed0" for m in COMPARED]
    assert scripts.index("explain.py") == 4 + len(COMPARED)  # while the weights are there
    known = {"speed.py": speed, "benchmark.py": benchmark, "explain.py": explain}
    for script, *words in commands:
        if module := (known | {"report.py": report}).get(script):
            with pytest.raises(SystemExit) as stopped:
                module.main([*words, "--help"])  # every other flag is read first
            assert stopped.value.code == 0


def test_strong_takes_the_two_that_are_best_in_validation(tmp_path):
    val_acc = dict(baseline=99, cbam_classifier=91.5, se=93, cbam_blocks=92, se_static=98)
    test_acc = dict.fromkeys(val_acc, 90) | {"cbam_classifier": 99}
    for model in COMPARED:
        for seed in range(5):
            folder = tmp_path / f"runs/fashion_mnist/published/{model}/seed{seed}"
            folder.mkdir(parents=True)
            result = {"val_acc": val_acc[model] + seed / 10, "test_acc": test_acc[model]}
            (folder / "result.json").write_text(json.dumps(result | {"overrides": {}}))
    strong = [words for words in planned(OUT=tmp_path) if "strong" in words]
    models = [words[words.index("--model") + 1] for words in strong]
    assert models == 3 * ["baseline", "cbam_blocks", "se"]


def test_done_is_a_whole_result_of_just_these_flags(tmp_path):
    """Of runs with flags: those of float32."""

    def done():
        lines = run_all("plan", "study", OUT=tmp_path).stdout.splitlines()
        return [line for line in lines if line.endswith("# done")]

    folder = tmp_path / "fp32/fashion_mnist/published/baseline/seed1"
    folder.mkdir(parents=True)
    flags = f"--seed 1 --runs {tmp_path}/fp32 --precision fp32"
    config = '{"command": "python train.py --model baseline FLAGS"}'
    (folder / "config.json").write_text(config.replace("FLAGS", flags))
    (folder / "result.json").write_text('{"overrides": {"precision": "fp32"}}')
    assert len(done()) == 1
    (folder / "result.json").write_text("")  # damaged: train.py says so
    assert done() == []
    (folder / "result.json").write_text('{"overrides": {"lr": 0.5, "precision": "fp32"}}')
    other = config.replace("FLAGS", flags.replace("--precision", "--lr 0.5 --precision"))
    (folder / "config.json").write_text(other)
    assert done() == []


def test_one_study_at_a_time_in_a_folder(tmp_path):
    with open(tmp_path / "study.log", "w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        done = run_all("study", "miniature", OUT=tmp_path)
    assert done.returncode == 1 and is_one_line(done.stderr) and "at work in" in done.stderr
    assert "# 1." not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        (["study", "small"], {}, "small"),
        (["study", "miniature", "fast"], {}, "fast"),
        (["plan", "study", "small"], {}, "small"),
        (["study"], {"MODELS": "se"}, "MODELS"),
        (["study", "miniature"], {"SHARD": "0/2"}, "SHARD"),
        (["study", "miniature"], {"JOBS": "0"}, "JOBS"),
        (["plan", "study"], {"PEERS": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, environment, named, tmp_path):
    done = run_all(*arguments, OUT=tmp_path / "out", **environment)
    assert done.returncode == 2 and is_one_line(done.stderr) and named in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_names_the_miniature(tmp_path):
    done = run_all("study", OUT=tmp_path / "out")
    assert done.returncode == 1 and is_one_line(done.stderr)
    assert "needs a GPU" in done.stderr and "study miniature" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_failed_self_check_stops_it(tmp_path):
    """With a compiler that does not work."""
    environment = {"CXX": "/bin/false", "CC": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": tmp_path}
    done = run_all("study", "miniature", OUT=tmp_path / "out", **environment)
    assert done.returncode == 1 and "FAILED" in done.stdout
    assert "error: the self-check" in done.stderr and "# 2." not in done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["study.log"]


@pytest.mark.slow
def test_the_miniature(tmp_path):
    """Stopped in its first training run, taken up again to its end, and called once more."""
    out, log = tmp_path / "out", tmp_path / "log"
    needs_pins()
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(out)}
    command = ["./run_all.sh", "study", "miniature"]
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=REPO, env=environment, stdout=file, stderr=file)
        while "epoch  1/4" not in log.read_text() and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert "ended after" in (out / "study.log").read_text()

    done = run_all("study", "miniature", OUT=out)
    assert done.returncode == 0, done.stderr
    assert "check se" not in done.stdout  # what was done is not done again
    text = (out / "report.md").read_text()
    for model in COMPARED:
        assert f"| {model} (quick) | 3 |" in text
    assert "## fashion_mnist, recipe strong, epochs = 4" in text
    assert f"## Beside {out}/fp32" in text and "![explain compare](explain_compare.png)" in text
    modules = (out / "modules/report.md").read_text()
    for model in ["baseline", *FURTHER]:
        assert f"| {model} (quick) | 1 |" in modules
    assert "| `baseline`, compile |" in (out / "speed.md").read_text()

    # The small files alone, as from a clone: nothing is run again, the reports come out the same.
    for path in [*out.rglob("*.pt"), *out.rglob("events.out.tfevents.*"), out / "report.md"]:
        path.unlink()
    again = run_all("study", "miniature", OUT=out)
    assert again.returncode == 0 and "kept: " in again.stdout
    assert "epoch  1/4" not in again.stdout and " ... " not in again.stdout
    assert (out / "report.md").read_text() == text
    assert (out / "study.log").read_text().count("exit code 0") == 2
