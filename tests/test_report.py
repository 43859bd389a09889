import csv
import json
import shutil
import statistics

import numpy as np
import pytest
from conftest import copy_run, is_one_line, script
from PIL import Image

import report
import verdicts
from figures import FIGURES

ROW = {
    "params": 177_890, "flops": 915_000_000, "flops_aten": 911_000_000, "batch_size": 64,
    "precision": "fp32", "mode": "eager", "ms_per_image": 0.25, "ms_per_image_p10": 0.2,
    "ms_per_image_p90": 0.3, "ms_per_image_p99": 0.4, "images_per_second": 4000.0,
    "peak_memory_mb": None, "tflops": 3.6, "share_of_ceiling": 0.6,
    "device": "a test", "torch": "2", "width": 64,
}  # fmt: skip
FULL = {"quick": False, "overrides": {}, "width": 64}


@pytest.fixture
def study(finished_run, tmp_path):
    """A study of two models with three seeds and one with two, and a benchmark of all four."""
    runs, out = tmp_path / "runs", tmp_path / "out"
    accuracies = {
        "baseline": [93.1, 93.3, 93.2],
        "se": [92.9, 93.4, 93.0],
        "cbam_blocks": [92.5, 92.7],
    }
    for model, values in accuracies.items():
        for seed, value in enumerate(values):
            copy_run(finished_run, runs, model, seed, test_acc=value, **FULL)
    out.mkdir()
    rows = [ROW | {"model": model} for model in report.PUBLISHED]
    (out / "benchmark.json").write_text(json.dumps(rows))
    return runs, out


def row_of(text, model):
    """The cells of the first table row of `model`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {model} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_published_table_with_our_figures_beside(study):
    runs, out = study
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    sd = statistics.stdev([93.1, 93.3, 93.2])
    assert row_of(text, "baseline") == [
        "baseline", "3", f"93.20 ± {sd:.2f}", "93.27", "0.18", "11.17", "0.92", "0.92", "0.250",
        "0.06",
    ]  # fmt: skip
    assert row_of(text, "cbam_blocks")[1:4] == ["2", "92.60 ± 0.14", "92.59"]
    assert row_of(text, "cbam_classifier")[1:4] == ["0", "missing", "93.18"]
    missing = next(line for line in text.splitlines() if "no run of" in line)
    assert missing.endswith(
        "cbam_blocks seed 2, cbam_classifier seed 0, cbam_classifier seed 1, cbam_classifier seed 2"
    )
    assert "quick" not in text.lower()
    assert "sample standard deviation (n - 1)" in text and "python train.py --model" in text
    for figure in FIGURES:
        assert f"({figure})" in text
        with Image.open(out / figure) as image:
            assert min(image.size) > 400
    order = [text.index(f"\n| {model} ") for model in report.PUBLISHED]
    assert order == sorted(order)


def test_verdicts_against_the_baseline(finished_run, tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    accuracies = {
        "baseline": [93.0, 93.1, 93.2, 93.3, 93.4],
        "se": [92.0, 92.1, 92.21, 92.3, 92.39],
        "cbam_blocks": [93.2, 93.0, 93.3, 93.1, 93.4],
        "cbam_classifier": [93.9],
    }
    for model, values in accuracies.items():
        for seed, value in enumerate(values):
            copy_run(finished_run, runs, model, seed, test_acc=value, **FULL)
    out.mkdir()
    rows = [ROW | {"model": "baseline"}, ROW | {"model": "se", "ms_per_image": 0.3}]
    (out / "benchmark.json").write_text(json.dumps(rows))
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    section = text[text.index("### Against the baseline") :]
    expected = verdicts.compare(
        dict(enumerate(accuracies["se"])), dict(enumerate(accuracies["baseline"]))
    )
    cells = row_of(section, "se")
    assert cells[1:4] == ["5", "-1.00", report.as_interval(expected.interval)]
    assert cells[8] == "+0.00 to +0.00"  # the copies share their predictions
    assert cells[-1] == "worse" and row_of(section, "cbam_blocks")[-1] == "not distinguishable"
    assert "- `se` is worse than the baseline: -1.00 points over 5 seeds" in section
    assert "at 1.20 times its inference time" in section
    assert "`cbam_blocks` is not distinguishable from the baseline" in section
    assert "- `cbam_classifier`: no verdict, it has fewer than two seeds" in section
    summary = json.loads((out / "summary.json").read_text())["studies"][0]
    assert summary["against_baseline"]["se"]["verdict"] == "worse"


def test_planning(capsys):
    assert report.main(["--power", "--sd", "0.15", "--difference", "0.2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    alone, corrected = (int(line.split()[0]) for line in lines[1:3])
    sd = 0.15 * 2**0.5
    for n, level in ((alone, 0.05), (corrected, 0.05 / 3)):
        assert verdicts.power(0.2, sd, n, level) >= 0.8 > verdicts.power(0.2, sd, n - 1, level)
    for flags in ([], ["--sd", "0.1"], ["--sd", "-1", "--difference", "1"],
                  ["--sd", "1", "--difference", "1e-9"]):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            report.main(["--power", *flags])
        assert stopped.value.code == 2 and is_one_line(capsys.readouterr().err)


def test_predictions_of_another_length_are_not_counted(finished_run, tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    copy_run(finished_run, runs, "baseline", 0, **FULL)
    short = copy_run(finished_run, runs, "se", 0, **FULL)
    np.save(short / "test_predictions.npy", np.zeros(99, np.uint8))
    empty = copy_run(finished_run, runs, "se", 1, **FULL)
    (empty / "test_labels.npy").write_bytes(b"")
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "se/seed0 left out" in text and "99 predictions, 100 labels" in text
    assert "se/seed1 left out" in text and "| se | 0 | missing |" in text
    assert "No verdict" in text


def test_inference_time_in_every_mode(study):
    runs, out = study
    rows = [ROW | {"model": model, "params": 1} for model in ("baseline", "se")]
    for model, ms in (("baseline", 0.1), ("se", 0.15)):
        times = {"ms_per_image": ms, "ms_per_image_p10": 0.09, "ms_per_image_p90": 0.2}
        rows.append(ROW | {"model": model, "mode": "compile"} | times)
    rows += [ROW | {"model": "se", "batch_size": 1}]
    (out / "benchmark.json").write_text(json.dumps(rows))
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert row_of(text, "baseline")[8] == "0.250"  # the published way: eager, fp32, batch 64
    lines = text[text.index("## Inference time in every mode") :].splitlines()[4:7]
    assert lines == [
        "| 64 | 64 | fp32 | eager | 0.250 | 0.250 (1.00x) | 3.60 (60 %) |",
        "| 64 | 64 | fp32 | compile | 0.100 | 0.150 (1.50x) | 3.60 (60 %) |",
        "| 64 | 1 | fp32 | eager | - | 0.250 / 0.300 / 0.400 | - |",
    ]
    fastest = report.fastest_costs_of(report.read_studies(runs)[0][0], rows)
    assert {model: row["mode"] for model, row in fastest.items()} == {
        "baseline": "compile",
        "se": "compile",
    }


@pytest.mark.parametrize(
    "change", [{"ms_per_image": None}, {"ms_per_image": 0}, {"tflops": "x"}, {"model": ["se"]}]
)
def test_a_damaged_benchmark_is_one_line(study, capsys, change):
    runs, out = study
    (out / "benchmark.json").write_text(json.dumps([ROW | {"model": "se"} | change]))
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and "benchmark.json" in error


def test_a_fallback_is_reported(finished_run, tmp_path):
    copy_run(finished_run, tmp_path / "runs", "se", 0, fallback="mode graph failed (X: no)", **FULL)
    assert report.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert "se/seed0: mode graph failed (X: no)" in (tmp_path / "out/report.md").read_text()


def test_csv_and_summary(study):
    runs, out = study
    report.main(["--runs", str(runs), "--out", str(out)])
    with open(out / "results.csv") as file:
        lines = list(csv.DictReader(file))
    assert [(line["model"], line["seed"]) for line in lines][:4] == [
        ("baseline", "0"), ("baseline", "1"), ("baseline", "2"), ("se", "0"),
    ]  # fmt: skip
    assert [float(line["test_acc"]) for line in lines[3:6]] == [92.9, 93.4, 93.0]
    (summary,) = json.loads((out / "summary.json").read_text())["studies"]
    se = summary["models"]["se"]
    assert (se["n"], se["seeds"]) == (3, [0, 1, 2])
    assert se["test_acc_mean"] == pytest.approx(93.1)
    assert se["test_acc_sd"] == pytest.approx(statistics.stdev([92.9, 93.4, 93.0]))
    assert (se["test_acc_min"], se["test_acc_max"]) == (92.9, 93.4)


def test_same_files_same_text(study, tmp_path):
    runs, out = study
    report.main(["--runs", str(runs), "--out", str(out)])
    first = (out / "report.md").read_text()
    shutil.copytree(runs, tmp_path / "elsewhere" / "runs")
    report.main(["--runs", str(tmp_path / "elsewhere" / "runs"), "--out", str(out)])
    assert (out / "report.md").read_text() == first


def test_quick_runs_are_marked_and_kept_apart(study, finished_run):
    runs, out = study
    copy_run(finished_run, runs, "cbam_blocks", 7)
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert row_of(text, "cbam_blocks")[1] == "2"  # the narrow run is not among the full ones
    assert row_of(text, "cbam_blocks (quick)")[1] == "1"
    section = text.split("## fashion_mnist, recipe published, epochs = 2")[1]
    assert "2 epochs, 160 training images, 100 test images, width 8 instead of 64" in section
    assert "One seed only of cbam_blocks" in section
    with open(out / "results.csv") as file:
        quick = {line["seed"]: line["quick"] for line in csv.DictReader(file)}
    assert quick["7"] == "True" and quick["0"] == "False"


def test_unfinished_and_damaged_runs_are_named(study):
    runs, out = study
    published = runs / "fashion_mnist" / "published"
    (published / "se" / "seed1" / "result.json").unlink()
    (published / "se" / "seed2" / "result.json").write_text('{"model": "se"')
    shutil.copytree(published / "se" / "seed0", published / "se" / "seed9")
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert row_of(text, "se")[1:3] == ["1", "92.90"]
    assert "se/seed9 left out" in text and "result.json is that of se seed 0" in text
    assert f"begun, not finished: {published / 'se' / 'seed1'}, 2 epochs done" in text
    assert "se/seed2 left out, its files are damaged" in text


@pytest.mark.parametrize("name", ["config.json", "env.json", "result.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"null", b"[]", b"{}", b"3", b"", b"\xff\xfe"])
def test_one_damaged_run_does_not_take_the_others_along(study, name, content):
    runs, out = study
    (runs / "fashion_mnist" / "published" / "se" / "seed1" / name).write_bytes(content)
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert row_of(text, "se")[1] == "2" and "se/seed1 left out" in text


@pytest.mark.parametrize("content", ["null", "3", "[{}]", "{", '[{"model": "se"}]'])
def test_damaged_benchmark_is_one_line(study, content, capsys):
    runs, out = study
    (out / "benchmark.json").write_text(content)
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and "benchmark.json" in error and not (out / "report.md").exists()


def test_without_benchmark_it_says_so(study):
    runs, out = study
    (out / "benchmark.json").unlink()
    (out / "inference_time.png").write_bytes(b"of an earlier report")
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "no FLOPs and no inference time" in text and "inference_time.png" not in text
    assert row_of(text, "se")[6] == "-" and not (out / "inference_time.png").exists()


def test_nothing_to_report_is_one_line(tmp_path, capsys):
    assert report.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and str(tmp_path) in error
    assert not (tmp_path / "out").exists()


def test_needs_no_torch(study, tmp_path):
    runs, out = study
    block = tmp_path / "torch.py"
    block.write_text("raise ImportError('report.py must not import torch')")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import report; sys.exit("
    done = script("-c", program + f"report.main(['--runs', {str(runs)!r}, '--out', {str(out)!r}]))")
    assert done.returncode == 0, done.stderr
