"""The README's example of a module of one's own, as a reader would copy it."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import REPO

README = (REPO / "README.md").read_text()


@pytest.mark.slow
def test_the_readme_s_module_trains_is_timed_reported_and_tested(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (*REPO.glob("*.py"), REPO / "pyproject.toml", REPO / "README.md"):
        shutil.copy(path, copy)
    for folder in ("kit", "tests"):
        shutil.copytree(REPO / folder, copy / folder)
    (copy / "data").symlink_to(REPO / "data")
    (code,) = re.findall(r"```python\n(class Spread\(nn\.Module\).*?)```", README, re.DOTALL)
    ((line, table),) = re.findall(r"a line `(.*?)` in `(\w+)`", README)
    assert (line, table) == ('"spread": Spread,', "ATTENTION")
    text = (copy / "models.py").read_text()
    before, head, after = text.partition("# name: channels -> module")
    table_starts = "ATTENTION = {\n"
    assert head and after.count(table_starts) == 1
    after = after.replace(table_starts, f"{table_starts}    {line}\n")
    (copy / "models.py").write_text(f"{before}{code}\n\n{head}{after}")  # that one file

    def run(*command, **environment):
        environment = os.environ | environment
        done = subprocess.run(
            [sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    plan = run("-m", "kit.study", "plan", "verdict", MODELS="baseline spread")
    assert plan.count(" train.py --model ") == 40
    small = ["--width", "16", "--limit-train", "640", "--limit-test", "100", "--epochs", "1"]
    for model in ("baseline", "spread"):
        run("train.py", "--model", model, *small)
    models = ["--models", "baseline", "spread", "--width", "16"]
    run("benchmark.py", *models, "--batch-sizes", "64", "--modes", "eager", "--repeats", "2")
    run("report.py")
    assert "| `spread` (smoke test) | 1 |" in (copy / "results" / "report.md").read_text()
    tested = run(
        "-m", "pytest", "-q", "-k", "spread", "tests/test_attention.py", "tests/test_models.py"
    )
    assert int(re.search(r"(\d+) passed", tested)[1]) >= 12
