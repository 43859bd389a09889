"""The committed studies: results/ and the README hold what report.py makes of their runs."""

import json
import re
import shutil

import pytest
from conftest import REPO

import benchmark
import report
from models import MODELS

README = (REPO / "README.md").read_text()
FOLDERS = re.findall("<!-- report.py: (.*) -->", README)


def test_the_readme_has_results():
    assert FOLDERS


def test_the_table_of_modules_is_what_benchmark_py_writes():
    place, table = re.search("<!-- benchmark.py: (.*) -->\n(.*)<!-- end of", README, re.S).groups()
    path = REPO / place / "benchmark.json"
    if not path.exists():
        pytest.skip("the container does not hold the results")
    rows = json.loads(path.read_text())
    assert table == benchmark.markdown(rows) == path.with_suffix(".md").read_text()
    assert [row["model"] for row in rows if row["mode"] == "eager"] == list(MODELS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_results_and_readme_are_what_report_py_writes(folder, tmp_path):
    if not (REPO / folder).exists():
        pytest.skip("the container does not hold the results")
    out, readme = tmp_path / folder, tmp_path / "README.md"
    out.mkdir(parents=True)
    shutil.copy(REPO / folder / "benchmark.json", out)
    shutil.copy(REPO / "README.md", readme)
    runs = REPO / folder / "runs"
    args = ["--runs", str(runs), "--out", str(out), "--readme", str(readme)]
    assert report.main(args) == 0
    assert readme.read_text() == README
    for name in ("report.md", "results.csv"):
        assert (out / name).read_text() == (REPO / folder / name).read_text()
