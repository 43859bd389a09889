"""The committed studies: results/ and the README hold what report.py makes of their runs."""

import json
import re
import shutil

import pytest
from conftest import REPO

import benchmark
import report
from kit.explained import ablation_table, explained_of, read_explained
from models import MODELS
from kit.results import read_studies

README = (REPO / "README.md").read_text()
FOLDERS = re.findall("<!-- report.py: (.*) -->", README)


def test_the_readme_has_results():
    assert FOLDERS


def block(script):
    """(the folder it is of, the table) that the README has of a script."""
    marks = rf"<!-- {script}: (\S*) -->\n(.*)<!-- end of {script} -->"
    place, table = re.search(marks, README, re.DOTALL).groups()
    if not (REPO / place).exists():
        pytest.skip("the container does not hold the results")
    return REPO / place, table


def test_the_table_of_modules_is_what_benchmark_py_writes():
    place, table = block("benchmark.py")
    rows = json.loads((place / "benchmark.json").read_text())
    assert table == benchmark.markdown(rows) == (place / "benchmark.md").read_text()
    assert [row["model"] for row in rows if row["mode"] == "eager"] == list(MODELS)


def test_the_table_of_gates_is_that_of_explain_json():
    place, table = block("explain.py")
    (study,), _ = read_studies(place / "runs")
    rows, problems = explained_of(study, *read_explained([place / "explain.json"])[:1])
    assert not problems and len(rows) == 5
    assert table == "\n".join(ablation_table(study, rows)) + "\n"


def ablation_of(place):
    """A line for each run: its flags and accuracies; `published` and the first guess lead."""
    runs = {path.parent.name: json.loads(path.read_text()) for path in place.glob("*/result.json")}
    first = ["published", "strong"]
    rest = sorted(runs.keys() - set(first), key=lambda name: -runs[name]["val_acc"])
    lines = ["| flags | validation % (quick) | test % (quick) |", "| --- | --- | --- |"]
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
    place, table = block("ablation")
    assert table == ablation_of(place) and table.count("\n") > 8


@pytest.mark.parametrize("folder", FOLDERS)
def test_results_and_readme_are_what_report_py_writes(folder, tmp_path, monkeypatch):
    if not (REPO / folder).exists():
        pytest.skip("the container does not hold the results")
    out, readme = tmp_path / folder, tmp_path / "README.md"
    out.mkdir(parents=True)
    for kept in ["benchmark.json", *(REPO / folder).glob("explain*")]:
        shutil.copy(REPO / folder / kept, out)
    shutil.copy(REPO / "README.md", readme)
    monkeypatch.chdir(REPO)  # folders are named in the report as they are on the command line
    args = ["--runs", f"{folder}/runs", "--out", str(out), "--readme", str(readme)]
    if (REPO / folder / "fp32").exists():
        args += ["--compare", f"{folder}/fp32"]
    assert report.main(args) == 0
    assert readme.read_text() == README
    for name in ("report.md", "results.csv"):
        assert (out / name).read_text() == (REPO / folder / name).read_text()
