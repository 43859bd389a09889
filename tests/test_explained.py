"""explain.json in the report: only what is of its runs, in words that hold."""

import json
import shutil

import numpy as np
import pytest
from conftest import REPO, copy_run

import explain
import report
from kit.explained import ablation


@pytest.fixture(scope="module")
def explained(finished_run, tmp_path_factory):
    """A folder with runs/ of two seeds and out/ with explain.json of the first."""
    folder = tmp_path_factory.mktemp("explained")
    for seed in (0, 1):
        copy_run(finished_run, folder / "runs", "cbam_blocks", seed)
    run = folder / "runs/fashion_mnist/published/cbam_blocks/seed0"
    flags = ["--limit-cam", "4", "--data-dir", str(REPO / "data"), "--out", str(folder / "out")]
    assert explain.main(["--run", str(run), *flags]) == 0
    return folder


def report_of(explained, tmp_path, change=None):
    """report.md with explain.json changed."""
    out = tmp_path / "out"
    shutil.copytree(explained / "out", out)
    if change:
        rows = json.loads((out / "explain.json").read_text())
        change(rows)
        (out / "explain.json").write_text(json.dumps(rows))
    assert report.main(["--runs", str(explained / "runs"), "--out", str(out)]) == 0
    return (out / "report.md").read_text()


def test_the_report_has_figures_and_picture(explained, tmp_path):
    text = report_of(explained, tmp_path)
    (row,) = json.loads((explained / "out/explain.json").read_text())
    section = text.partition("### What attention attends to")[2].partition("\n## ")[0]
    fixed, of_100 = row["test_acc_gates_fixed"], row["won"] - row["lost"]
    assert f"| 0 | 100 | {row['test_acc']:.2f} | {fixed:.2f} | {of_100:+.2f} (" in section
    stage = row["gates"]["layer4"]
    assert f"| layer4 | {stage['mean']:.3f} |" in section and "(quick)" in section
    assert f"{row['deletion']:.3f} ({row['deletion_random']:.3f})" in section
    assert "![explain cbam blocks seed0](explain_cbam_blocks_seed0.png)" in section
    assert (tmp_path / "out/report.html").read_text().count("<img ") == text.count("![")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["studies"][0]["explained"] == [row]


def test_what_is_of_other_runs_is_left_out(explained, tmp_path):
    def of_other_weights(rows):
        rows[0]["test_acc"] += 7
        rows[0]["test_acc_gates_fixed"] += 7

    text = report_of(explained, tmp_path / "a", of_other_weights)
    assert "What attention attends to" not in text
    assert "explain.json: cbam_blocks seed 0 left out" in text

    def of_another_study(rows):
        rows[0]["overrides"] = {"epochs": 7}

    text = report_of(explained, tmp_path / "b", of_another_study)
    assert "What attention attends to" not in text
    assert "explain.json: 1 of its 1 entries are of no run here" in text


@pytest.mark.parametrize("key", ["gates", "lost", "test_acc", "deletion"])
@pytest.mark.parametrize("value", [float("nan"), "x", None])
def test_a_damaged_file_is_named(explained, tmp_path, key, value):
    def damage(rows):
        rows[0][key] = value

    text = report_of(explained, tmp_path, damage)
    assert "What attention attends to" not in text
    assert "explain.json left out, it is damaged" in text


def test_the_interval_is_that_of_paired_proportions():
    """With 1/2 an image more of each of the four kinds: right or wrong, before and after."""
    both, lost, won, neither = 5, 3, 1, 2
    row = {"test_acc_gates_fixed": 6 / 11, "test_images": 11, "won": won, "lost": lost}
    values = np.repeat([0, -1, 1, 0], np.array([both, lost, won, neither]) * 2 + 1)  # doubled
    middle, error = values.mean(), 1.96 * values.std() / (11 + 2) ** 0.5
    difference, bounds = ablation(row)
    assert difference == pytest.approx(100 * (won - lost) / 11)
    assert bounds == pytest.approx((100 * (middle - error), 100 * (middle + error)))
    assert ablation(row | {"test_acc_gates_fixed": None}) is None
    _, (low, high) = ablation(row | {"won": 0, "lost": 0})
    assert low == -high < -10  # of 11 images none changed: that says little
