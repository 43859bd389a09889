"""The committed studies: results/, the README and docs/ hold what report.py makes of their runs."""

import json
import re
import shutil

import benchmark
import report
from models import MODELS

import pytest
from conftest import REPO, metrics_of

PAGES = [REPO / "README.md", *REPO.glob("docs/*.md")]
# Each page and each folder that it has a block of, written by report.py --readme.
BLOCKS = sorted({
    (page, (page.parent / folder).resolve().relative_to(REPO))
    for page in PAGES
    for folder in re.findall("<!-- (?:report|explain).py: (.*) -->", page.read_text())
})  # fmt: skip


def test_the_pages_have_results():
    scripts = re.findall("<!-- (report|explain).py: ", "".join(p.read_text() for p in PAGES))
    assert set(scripts) == {"report", "explain"}


def blocks(script):
    """(the folder it is of, the table) of each that the pages have of a script."""
    marks = rf"<!-- {script}: (\S*) -->\n(.*)<!-- end of {script} -->"
    found = [(page, re.search(marks, page.read_text(), re.DOTALL)) for page in PAGES]
    places = [((page.parent / match[1]).resolve(), match[2]) for page, match in found if match]
    if not all(place.exists() for place, _ in places):
        pytest.skip("the container does not hold the results")
    return places


def test_the_tables_of_costs_are_what_benchmark_py_writes():
    models = []
    for place, table in blocks("benchmark.py"):
        rows = json.loads((place / "benchmark.json").read_text())
        assert table == benchmark.markdown(rows) == (place / "benchmark.md").read_text()
        models.append([row["model"] for row in rows if row["mode"] == "eager"])
    assert list(MODELS) in models


def ablation_of(place):
    """A line for each run: its flags and accuracies; `published` and the first guess lead."""
    runs = {path.parent.name: json.loads(path.read_text()) for path in place.glob("*/result.json")}
    first = ["published", "strong"]
    rest = sorted(runs.keys() - set(first), key=lambda name: -runs[name]["val_acc"])
    lines = ["| flags | validation % (smoke test) | test % (smoke test) |", "| --- | --- | --- |"]
    for name in first + rest:
        config = json.loads((place / name / "config.json").read_text())
        common = "--width 16 --limit-train 27000 --epochs 16 --mode eager --runs"
        flags = config["command"].partition(f"{common} runs/{name}")[2].strip()
        if name != "published" and "--cutmix" not in flags:
            flags += " --cutmix 1"  # which was in the recipe then
            assert config["cutmix"] == 1.0
        assert (config["model"], config["seed"], runs[name]["quick"]) == ("baseline", 0, True)
        shown = f"`{flags}`" if flags else "(recipe `published`)"
        lines.append(f"| {shown} | {runs[name]['val_acc']:.2f} | {runs[name]['test_acc']:.2f} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_the_ablation_is_that_of_its_runs():
    place, table = blocks("ablation")[0]
    assert table == ablation_of(place) and table.count("\n") > 8


@pytest.mark.parametrize(("page", "folder"), BLOCKS, ids=str)
def test_results_and_pages_are_what_report_py_writes(page, folder, tmp_path, monkeypatch):
    if not (REPO / folder).exists():
        pytest.skip("the container does not hold the results")
    monkeypatch.chdir(tmp_path)  # folders are named in the report as they are on the command line
    folder.mkdir(parents=True)
    for path in [*(REPO / folder).glob("benchmark.json"), *(REPO / folder).glob("explain*")]:
        shutil.copy(path, folder)
    for name in ("runs", "fp32", "patience_50"):
        if (REPO / folder / name).exists():
            (folder / name).symlink_to(REPO / folder / name)
    copy = tmp_path / page.relative_to(REPO)
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(page, copy)
    args = ["--runs", f"{folder}/runs", "--out", str(folder), "--readme", str(copy)]
    for other in ("fp32", "patience_50"):
        args += ["--compare", f"{folder}/{other}"] if (folder / other).exists() else []
    assert report.main(args) == 0
    assert copy.read_text() == page.read_text()
    for name in ("report.md", "results.csv"):
        assert (folder / name).read_text() == (REPO / folder / name).read_text()


def test_a_run_repeated_on_another_gpu_is_the_same():
    """As docs/reference-study.md says: the same metrics, weights and predictions, bit for bit."""
    study = REPO / "results/nvidia_h100_h200"
    if not study.exists():
        pytest.skip("the container does not hold the results")
    repeats = list(study.glob("repeats/*/*/*/*/seed*"))
    for repeat in repeats:
        run = study.joinpath("runs", *repeat.parts[-4:])
        assert metrics_of(run) == metrics_of(repeat)
        result, there = (json.loads((f / "result.json").read_text()) for f in (run, repeat))
        assert result["weights"] == there["weights"] and result["device"] != there["device"]
        name = "test_predictions.npy"
        assert (run / name).read_bytes() == (repeat / name).read_bytes()
    assert len(repeats) == 3
