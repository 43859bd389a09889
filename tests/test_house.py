"""The rules of the house: what lies where, who imports whom, and how long it may be."""

import ast
import json
import shutil
import subprocess

from kit.environment import SOURCES

import pytest
from conftest import REPO, script

SCRIPTS = {"train", "models", "data", "benchmark", "report", "explain"}
TOP = {f"{name}.py" for name in SCRIPTS} | {
    "Dockerfile", "README.md", "pyproject.toml", "requirements.lock", "requirements.txt",
    "run_all.sh", "docs", "kit", "results", "runs", "tests",
}  # fmt: skip
# What train.py imports, but no figure depends on. All else is in SOURCES: two runs whose sources
# differ are not the same experiment.
NO_FIGURE_DEPENDS_ON = {
    "kit/__init__.py",
    "kit/attribution.py",
    "kit/command_line.py",
    "kit/environment.py",
    "kit/files.py",
    "kit/pictures.py",
    "kit/plots.py",
    "kit/preflight.py",
    "kit/runs.py",
    "kit/tensorboard_log.py",
}


def tree_of(path):
    return ast.parse(path.read_text())


def imports_of(path):
    """The first names of all modules that a file imports, wherever in it."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def lines_of(path):
    return len(path.read_text().splitlines())


def length(node):
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", sorted((REPO / "kit").glob("*.py")), ids=lambda path: path.name)
def test_kit_imports_no_script(path):
    """But for its two programs, which use train.py as it stands."""
    programs = {"study.py", "training_speed.py"}
    allowed = {"train", "models", "data"} if path.name in programs else set()
    assert SCRIPTS & set(imports_of(path)) <= allowed


def modules_after(statement):
    """The repository's files and the packages that are imported after one statement."""
    code = f"""
{statement}
import json, pathlib, sys
files = [m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)]
here = pathlib.Path().resolve()
own = [str(pathlib.Path(f).relative_to(here)) for f in files if here in pathlib.Path(f).parents]
print(json.dumps([own, list(sys.modules)]))
"""
    done = script("-c", code)
    assert done.returncode == 0, done.stderr
    own, names = json.loads(done.stdout.splitlines()[-1])
    return {name for name in own if not name.startswith(".")}, set(names)


def test_the_report_needs_no_torch():
    _, names = modules_after("import report")
    assert "numpy" in names and not {"torch", "torchvision"} & names


def test_whatever_a_figure_depends_on_is_hashed():
    own, _ = modules_after("import train")
    assert set(SOURCES) <= own
    assert not set(SOURCES) & NO_FIGURE_DEPENDS_ON
    # A new file: add it to SOURCES, or to the list above.
    assert own - set(SOURCES) == NO_FIGURE_DEPENDS_ON


def test_the_top_level_is_that_of_the_contract():
    if not (REPO / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs a git checkout")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = {name.split("/")[0] for name in listed}
    assert {name for name in names if not name.startswith(".")} == TOP
    assert [name for name in listed if name.startswith("runs/")] == ["runs/.gitkeep"]


def test_no_file_is_too_long():
    limits = {path: 360 for path in REPO.glob("*.py")}
    limits |= {REPO / "run_all.sh": 60, REPO / "README.md": 150}
    found = {path: lines_of(path) for path in limits}
    too_long = {path.name: n for path, n in found.items() if n > limits[path]}
    assert not too_long


def test_no_function_is_too_long():
    too_long = {
        f"{path.name}: {node.name}": length(node)
        for path in (*REPO.glob("*.py"), *(REPO / "kit").glob("*.py"))
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef) and length(node) > 60
    }
    assert not too_long


def test_the_loop_over_epochs_fits_a_screen():
    functions = {
        node.name: node
        for node in tree_of(REPO / "train.py").body
        if isinstance(node, ast.FunctionDef)
    }
    (loop,) = [
        node
        for node in ast.walk(functions["train"])
        if isinstance(node, ast.For) and ast.unparse(node.target) == "epoch"
    ]
    assert length(loop) <= 40
