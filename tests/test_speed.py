import json
import os
import shlex
import subprocess
import sys
import time

import pytest
from conftest import REPO, is_one_line

import speed
from settings import parse_settings


def test_the_plan_is_of_runnable_commands(tmp_path, capsys):
    (tmp_path / "plain_loop.py").write_text("")
    flags = ["--plan", "--rounds", "2", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert speed.main([*flags, "--peers", str(tmp_path)]) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    scripts = [command[1].rpartition("/")[2] for command in commands]
    once = ["train.py", "train.py", "plain_loop.py", "benchmark.py", "timm_inference.py"]
    assert scripts == 2 * once and not (tmp_path / "out").exists()
    for command in commands:
        if command[1] == "train.py":
            assert parse_settings(command[2:]).quick


def test_a_gpu_is_checked_first_and_timed_from_start_to_end(tmp_path):
    args = speed.argparse.Namespace(
        device="cuda", data_dir=tmp_path, peers=tmp_path, rounds=2, out=tmp_path, width=64,
        check=[], precision="bf16", short=False,
    )  # fmt: skip
    steps = speed.jobs_of(args, cuda=True)
    assert list(steps)[:4] == [f"check {model} bf16 0" for model in speed.PUBLISHED]
    check = steps["check baseline bf16 0"]
    assert check[1:3] == ["train.py", "--self-check"] and "compile+graph" in check
    assert list(steps)[-4:] == [f"50 epochs {model} 0" for model in speed.PUBLISHED]
    figures = {name for name in steps if name.startswith("train")}
    assert figures == {"train baseline graph 0", "train baseline graph 1"} | {
        f"train {model} {mode} {i}"
        for model in speed.PUBLISHED
        for mode in ("eager", "compile+graph")
        for i in (0, 1)
    }
    args.short = True
    assert steps.keys() - speed.jobs_of(args, cuda=True).keys() == set(list(steps)[-4:])
    args.check, args.precision = ["eca"], "fp32"
    assert list(speed.jobs_of(args, cuda=True)) == ["check eca fp32 0"]


def test_the_check_alone_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "choose_mode", lambda *_: "eager")  # nothing to compile
    flags = ["--check", "se", "--precision", "bf16", "--width", "8", "--device", "cpu"]
    assert speed.main([*flags, "--out", str(tmp_path)]) == 0
    assert "check se bf16 0 ..." in capsys.readouterr().out
    kept = json.loads((tmp_path / "speed/check_se_bf16_0.json").read_text())
    assert kept["command"][:2] == ["python", "train.py"] and " ok " in kept["raw"][0]
    assert [path.name for path in tmp_path.iterdir()] == ["speed"]  # no table
    assert speed.main([*flags, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""

    monkeypatch.setattr(speed, "choose_mode", lambda *_: "graph")  # which a CPU cannot
    assert speed.main([*flags, "--out", str(tmp_path)]) == 1
    assert "exit code 2: train.py: error: mode graph needs a CUDA GPU" in capsys.readouterr().out


def test_the_share_of_the_ceiling():
    medians = {"train se eager": 1000.0, "GFLOP/image se": 2.0, "ceiling bf16": 12.0}
    *_, row = speed.training_table(medians, "bf16")
    assert row == "| `se`, eager | 1,000 | 64 | 6 | 50 % |"  # 3 x 2 GFLOP x 1,000 of 12 TFLOP/s
    del medians["ceiling bf16"]
    assert speed.training_table(medians, "bf16")[-1] == "| `se`, eager | 1,000 | 64 | - | - |"
    assert speed.training_table({"train plain loop, 0 workers": 3.0}, "fp32") == []


def test_ratios_and_targets():
    targets = [
        ("as fast", "ours", "peer", 1.1, None),
        ("time", "ours {fast}", None, None, 70),
        ("unknown", "ours", "nobody", 1, None),
    ]
    medians = {"ours": 120.0, "peer": 100.0, "ours graph": 70.5}
    rows = speed.check_targets(medians, targets, "graph")
    assert [row["met"] for row in rows] == [True, False, None]
    assert rows[0]["figure"] == pytest.approx(1.2) and rows[1]["figure"] == 70.5
    assert not speed.check_targets(medians, [("", "ours", "peer", 1.3, None)], "")[0]["met"]


def test_medians_over_rounds_of_real_steps(tmp_path, monkeypatch, capsys):
    bench = ["benchmark.py", "--width", "4", "--modes", "eager", "--batch-sizes", "64"]
    bench = [sys.executable, *bench, "--repeats", "1", "--device", "cpu"]
    peer = [sys.executable, "-c", "print(123); print('{\"train_images_per_second\": 50.0}')"]
    steps = {"inference 0": bench, "plain loop, 0 workers 0": peer, "plain loop, 0 workers 1": peer}
    monkeypatch.setattr(speed, "jobs_of", lambda args, cuda: steps)
    flags = ["--device", "cpu", "--out", str(tmp_path)]
    assert speed.main(flags) == 0
    assert "inference 0 ..." in capsys.readouterr().out
    content = json.loads((tmp_path / "speed.json").read_text())
    assert content["medians"]["train plain loop, 0 workers"] == 50
    for model in speed.PUBLISHED:
        assert content["medians"][f"ms/image {model} fastest"] > 0
    assert "| not measured | at least 1.1 |" in (tmp_path / "speed.md").read_text()

    assert speed.main(flags) == 0  # nothing is measured twice
    assert " ..." not in capsys.readouterr().out
    assert json.loads((tmp_path / "speed.json").read_text())["medians"] == content["medians"]

    path = tmp_path / "speed" / "plain_loop,_0_workers_0.json"
    elsewhere = json.loads(path.read_text())
    elsewhere["made_with"]["device"] = "another"
    elsewhere["figures"]["train plain loop, 0 workers"] = 9000.0
    for other in (json.dumps(elsewhere), "{}", "[]", "null", "trunc{", '{"figures": []}'):
        path.write_text(other)
        assert speed.main(flags) == 0  # but what was measured elsewhere, or is damaged, is
        assert capsys.readouterr().out.count(" ...") == 1
        assert json.loads((tmp_path / "speed.json").read_text())["medians"] == content["medians"]

    steps["plain loop, 0 workers 2"] = [sys.executable, "-c", "raise SystemExit('no timm')"]
    assert speed.main(flags) == 1
    out = capsys.readouterr().out
    assert "plain loop, 0 workers 2 ... failed: exit code 1: no timm" in out


def test_a_signal_ends_the_job_too(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "speed.py", "--device", "cpu", "--out", str(tmp_path)],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.read(len("train baseline eager 0")) == "train baseline eager 0"
    time.sleep(1)  # the job has begun
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143 and error == ""
    with pytest.raises(ProcessLookupError):  # nobody left in its process group
        os.killpg(process.pid, 0)


@pytest.mark.parametrize(
    "flags",
    [
        ["--peers", "nowhere"],
        ["--rounds", "0"],
        ["--device", "tpu"],
        ["--check", "sse"],
        ["--precision", "fp32"],
        ["--check", "se", "--precision", "tf32", "--device", "cpu"],
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        speed.main(flags)
    assert stopped.value.code == 2 and is_one_line(capsys.readouterr().err)
