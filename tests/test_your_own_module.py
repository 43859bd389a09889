"""The README's example of a module of one's own, as a reader would copy it."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import REPO

README = (REPO / "README.md").read_text()


@pytest.mark.slow
def test_the_readme_s_module_trains_is_timed_reported_and_tested(tmp_path):
    place = tmp_path / "copy"
    place.mkdir()
    for path in (*REPO.glob("*.py"), REPO / "pyproject.toml", REPO / "README.md"):
        shutil.copy(path, place)
    shutil.copytree(REPO / "tests", place / "tests")
    (place / "data").symlink_to(REPO / "data")
    (code,) = re.findall(r"```python\n(class.*?)```", README, re.DOTALL)
    lines = re.findall(r"a line `(.*?)` in `(\w+)`", README)
    assert [table for _, table in lines] == ["ATTENTION", "MODELS"]
    for (line, table), name in zip(lines, ("attention.py", "models.py")):
        text = (place / name).read_text()
        text = text.replace(f"{table} = {{\n", f"{table} = {{\n    {line}\n", 1)
        if table == "MODELS":  # the baseline stays the first
            text = text.replace(f"    {line}\n", "", 1)
            text = text.replace("    # Controls: as", f"    {line}\n    # Controls: as", 1)
        else:
            text = text.replace("# Each name: channels", f"{code}\n\n# Each name: channels", 1)
        assert line in text
        (place / name).write_text(text)

    def run(*command):
        done = subprocess.run([sys.executable, *command], cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    small = ["--width", "16", "--limit-train", "640", "--limit-test", "100", "--epochs", "1"]
    for model in ("baseline", "spread"):
        run("train.py", "--model", model, *small)
    models = ["--models", "baseline", "spread", "--width", "16"]
    run("benchmark.py", *models, "--batch-sizes", "64", "--modes", "eager", "--repeats", "2")
    run("report.py")
    assert "| spread (quick) | 1 |" in (place / "results" / "report.md").read_text()
    tested = run(
        "-m", "pytest", "-q", "-k", "spread", "tests/test_attention.py", "tests/test_models.py"
    )
    assert int(re.search(r"(\d+) passed", tested)[1]) >= 12
