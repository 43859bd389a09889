"""Will this machine do? The line for each thing it may lack, by stand-ins at the edge. What the
image says of itself; the lock of all packages."""

import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import benchmark
import explain
import train
from kit import environment, fast, files, preflight
from kit.command_line import UserError
from kit.runs import edited

import pytest
import torch
from conftest import REPO, is_one_line, run_all, script, train_small

CPU = torch.device("cpu")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


def with_driver(tmp_path, monkeypatch, version):
    """Puts an nvidia-smi that knows one driver in front of whatever there is."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{version}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@NO_GPU
@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("535.183.01", "the NVIDIA driver 535.183.01 is too old"),
        ("999.1", "there is an NVIDIA driver 999.1"),
        ("NVIDIA-SMI has failed", "nor is there an NVIDIA driver"),
    ],
)
def test_why_there_is_no_gpu(tmp_path, monkeypatch, version, words):
    with_driver(tmp_path, monkeypatch, version)
    if torch.version.cuda is None:
        words = "a build for CPUs alone"
    why = preflight.why_no_gpu()
    assert words in why and is_one_line(why)
    if "too old" in words:
        assert "update it to 580 or newer" in why
    done = run_all("plan")
    assert done.returncode == 0 and f"{why}: a quick run on the CPU" in done.stderr


# --- A machine with GPUs that are not there -------------------------------------------------------

WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # of torch 2.11 with CUDA 13.0


def with_gpus(monkeypatch, *gpus, free=70e9, total=80e9, arch_list=WHEEL):
    """gpus: (name, compute capability) of each. The note of a line is printed once a process."""
    stand_ins = {
        "is_available": lambda: bool(gpus), "device_count": lambda: len(gpus),
        "get_arch_list": lambda: arch_list, "set_device": lambda i: None,
        "get_device_name": lambda d: gpus[index_of(d)][0],
        "get_device_capability": lambda d: gpus[index_of(d)][1],
        "mem_get_info": lambda d: (free, total),
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    preflight.note_once.cache_clear()


def index_of(device):
    return device if isinstance(device, int) else device.index or 0


V100, H100 = ("Tesla V100-SXM2-16GB", (7, 0)), ("NVIDIA H100 80GB HBM3", (9, 0))
T4, RTX = ("Tesla T4", (7, 5)), ("NVIDIA GeForce RTX 4070", (8, 9))


@pytest.mark.parametrize(
    ("arch_list", "capability", "fits"),
    [
        (WHEEL, (7, 0), False), (WHEEL, (7, 5), True), (WHEEL, (8, 0), True),
        (WHEEL, (8, 9), True),  # by the code for 8.6
        (WHEEL, (10, 3), True), (WHEEL, (12, 1), True), (WHEEL, (11, 0), False),
        (WHEEL, (6, 1), False), ([*WHEEL, "compute_120"], (13, 0), True),  # compiled by the driver
        (["sm_80"], (9, 0), False), (["sm_86"], (8, 0), False), (["sm_90a"], (9, 0), True),
        ([], (9, 0), True), (["gfx90a"], (9, 0), True),  # not known, or another make
    ],
)  # fmt: skip
def test_which_gpus_pytorch_has_code_for(monkeypatch, arch_list, capability, fits):
    with_gpus(monkeypatch, ("GPU", capability), arch_list=arch_list)
    assert (preflight.why_unusable(0) is None) == fits


def test_a_gpu_that_pytorch_has_no_code_for(monkeypatch, capsys):
    with_gpus(monkeypatch, V100)
    why = (
        f"PyTorch {torch.__version__} has no code for GPU 0, Tesla V100-SXM2-16GB (compute "
        "capability 7.0, it has sm_75 sm_80 sm_86 sm_90 sm_100 sm_120)"
    )
    for _ in range(2):
        assert preflight.choose_device("auto").type == "cpu"
    assert capsys.readouterr().err == f"note: {why}: running on the CPU\n"
    for main, flags in (
        (train.main, ["--model", "se"]), (benchmark.main, []), (explain.main, ["--run", "x"]),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            main([*flags, "--device", "cuda"])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and is_one_line(error)
        assert error.endswith(f"error: --device cuda: {why}; use --device cpu\n")
    assert preflight.visible_gpus() == ([], why)


def test_the_gpu_that_can_be_used_is_used(monkeypatch, capsys):
    with_gpus(monkeypatch, V100, H100, RTX)
    assert preflight.choose_device("auto") == torch.device("cuda", 1)
    assert preflight.choose_device("cuda:2") == torch.device("cuda", 2)
    assert preflight.visible_gpus() == (["1", "2"], "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b,MIG-c,GPU-none")
    assert preflight.visible_gpus() == (["GPU-b", "MIG-c"], "NVIDIA H100 80GB HBM3")
    assert capsys.readouterr().err == ""


@NO_GPU
@pytest.mark.parametrize("hidden", ["", "-1", "GPU-00000000"])
def test_gpus_that_are_hidden(tmp_path, monkeypatch, hidden):
    with_driver(tmp_path, monkeypatch, "999.1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    if torch.version.cuda is not None:
        assert f"CUDA_VISIBLE_DEVICES is '{hidden}': unset it" in preflight.why_no_gpu()


@pytest.mark.parametrize("gpu", [T4, RTX])
def test_precisions_that_a_gpu_has(monkeypatch, capsys, gpu):
    with_gpus(monkeypatch, gpu)
    device, new = torch.device("cuda", 0), gpu[1] >= (8, 0)
    assert fast.choose_precision("auto", device) == ("bf16" if new else "fp32")
    precisions = benchmark.parse(["--device", "cuda"]).precisions
    assert precisions == ["default", "fp32", "bf16"][: 2 + new]
    assert benchmark.parse(["--device", "cpu"]).precisions == ["fp32"]
    for precision in ("tf32", "bf16"):
        if new:
            assert fast.why_not("graph", precision, device) is None
            continue
        with pytest.raises(SystemExit):
            train.main(["--model", "se", "--device", "cuda", "--precision", precision])
        line = f"precision {precision} needs a GPU of compute capability 8.0 or more: use fp32"
        error = capsys.readouterr().err
        assert is_one_line(error) and line in error


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_compiling_needs(tmp_path, monkeypatch, capsys, kind):
    device = torch.device(kind)
    assert fast.why_no_compiler(CPU) is None
    variable, name = {"cpu": ("CXX", "g++"), "cuda": ("CC", "gcc or clang")}[kind]
    monkeypatch.delenv(variable, raising=False)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        line = f"torch.compile finds no {name}: apt-get install g++, or set {variable}"
        assert fast.why_no_compiler(device) == line
        if kind == "cpu":
            assert benchmark.parse(["--device", "cpu"]).modes == ["eager"]
            assert capsys.readouterr().err == f"note: {line}; compiled modes left out\n"
    monkeypatch.setenv(variable, "/no/such/compiler -O2")
    assert "finds no /no/such/compiler:" in fast.why_no_compiler(device)
    for value in (f"{sys.executable} -c", "", "  "):  # blank: the usual one
        monkeypatch.setenv(variable, value)
        assert fast.why_no_compiler(device) is None
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    line = f"torch.compile finds no {tmp_path}/Python.h: apt-get install python3-dev"
    assert fast.why_no_compiler(device) == line


def test_without_a_compiler_training_falls_back_at_once(tmp_path, monkeypatch, capsys):
    importlib.import_module("torch._inductor.config")  # reads CXX once, for the tests to come, too
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert train_small("baseline", tmp_path, "--epochs", "1", "--mode", "compile") == 0
    error = capsys.readouterr().err
    assert is_one_line(error) and "torch.compile finds no /no/such/compiler" in error
    assert "training in mode eager" in error


@pytest.mark.parametrize("name", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE",
                                  "TORCH_COMPILE_OVERRIDE_BACKENDS"])  # fmt: skip
def test_a_compiler_that_is_switched_off(tmp_path, monkeypatch, capsys, name):
    """torch.compile would be eager mode, and say nothing."""
    monkeypatch.setenv(name, "1")
    line = f"torch.compile is switched off by {name}=1: unset it"
    assert benchmark.parse(["--device", "cpu"]).modes == ["eager"]
    assert capsys.readouterr().err == f"note: {line}; compiled modes left out\n"
    assert train_small("baseline", tmp_path, "--epochs", "1", "--mode", "compile") == 0
    assert f"{line}); training in mode eager" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match=line):
        fast.compiled(print, CPU)
    monkeypatch.setenv(name, "0")
    assert fast.why_no_compiler(CPU) is None


def test_errors_of_the_compiler_are_errors():
    """TORCHDYNAMO_SUPPRESS_ERRORS would run what fails as it stands."""
    code = """
import kit.fast, torch
def backend(graph, inputs):
    raise RuntimeError("failed")
kit.fast.compiled(lambda x: x + 1, torch.device("cpu"), backend=backend)(torch.ones(1))
"""
    done = script("-c", code, env=os.environ | {"TORCHDYNAMO_SUPPRESS_ERRORS": "1"})
    assert done.returncode == 1 and "failed" in done.stderr


def test_no_variable_changes_the_precision():
    names = "NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"
    code = f"import os, kit.fast; print([name for name in {names} if name in os.environ])"
    done = script("-c", code, env=os.environ | dict.fromkeys(names, "1"))
    assert done.stdout == "[]\n" and done.stderr.count("=1 ignored: --precision decides\n") == 3


def test_the_code_is_known_whatever_lies_beside_it(tmp_path):
    """An editor's lock, a folder, a pipe; a repository of something else, around it or GIT_DIR."""
    copy, code = tmp_path / "outer/copy", "import kit.environment as e; print(e.git_commit())"
    shutil.copytree(REPO / "kit", copy / "kit")
    for name in ("train.py", "models.py", "data.py"):
        shutil.copy(REPO / name, copy)
    (copy / ".#train.py").symlink_to("user@host.4242:1700000000")
    (copy / "kit/old.py").mkdir()
    os.mkfifo(copy / "kit/pipe.py")

    def git(*command):
        done = subprocess.run(["git", "-C", copy.parent, "-c", "user.name=a", "-c", "user.email=a",
                               *command], check=True, capture_output=True, text=True)  # fmt: skip
        return done.stdout

    git("init")
    (copy.parent / "other").touch()
    git("add", "other")
    git("commit", "-m", "something else")
    for env in ({}, {"GIT_DIR": str(copy.parent / ".git")}):
        done = script("-c", code, cwd=copy, env=os.environ | env)
        assert (done.stdout, done.stderr) == ("None\n", "")
    git("add", "copy/train.py")
    git("commit", "-m", "it belongs to it")
    assert script("-c", code, cwd=copy).stdout == git("rev-parse", "HEAD")


def test_code_beside_the_project_s_and_its_diff_are_known(tmp_path):
    """A module in a file of its own; a diff that applies, whatever Git is told to show."""
    for name in ("train.py", "models.py", "data.py"):
        shutil.copy(REPO / name, tmp_path)
    shutil.copytree(REPO / "kit", tmp_path / "kit")
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a"]
    for command in (["init"], ["add", "."], ["commit", "-m", "all"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    code = "import kit.environment as e; print(e.code_diff(), end='')"
    assert script("-c", code, cwd=tmp_path).stdout == ""
    lines = (REPO / "train.py").read_text().splitlines(keepends=True)
    at = max(i for i, line in enumerate(lines) if line.startswith("    return"))
    lines.insert(at, "    pass\n")  # empty lines end the hunk
    (tmp_path / "train.py").write_text("".join(lines))
    (tmp_path / "mine.py").write_text("GATE = 1\n")
    for key, value in (("diff.external", "false"), ("color.ui", "always")):
        subprocess.run([*git, "config", key, value], check=True)
    code += "; print(e.source_hashes().get('mine.py'), file=sys.stderr)"
    done = script("-c", f"import mine, sys; {code}", cwd=tmp_path)
    assert done.stdout.startswith("untracked: mine.py\ndiff --git a/train.py")
    assert done.stderr.strip() == hashlib.sha256(b"GATE = 1\n").hexdigest()
    shutil.copy(REPO / "train.py", tmp_path)
    applied = subprocess.run([*git, "apply"], input=done.stdout, text=True, capture_output=True)
    assert applied.returncode == 0 and (tmp_path / "train.py").read_text() == "".join(lines)


@pytest.mark.parametrize(
    ("then", "now", "name"),
    [
        ("A: float = 30.0", "A: float = 1.0", "A"),
        ("T: dict = {'a': 1, 'b': 2}", "T: dict = {'a': 1, 'b': 3}", "T['b']"),
        ("if x:\n    A = 1", "if x:\n    A = 2", "if x:"),
        ("A = 1\nA = A + 1", "A = 2\nA = A + 1", "A"),
        ("D = {**B, 'a': 1}", "D = {**C, 'a': 1}", "D[**]"),
        ("M.update(a=1)", "M.update(a=2)", "calls"),
        ("def f():\n    return 1", "def f():\n    return 2", "f"),
        ("def f():\n    'One.'\n    return 1", "def f():\n    'Two.'\n    return 1", None),
        ("'One.'\nA = 1", "'Two.'\nimport os\nA = 1", None),
    ],
)
def test_an_edit_is_named_by_its_definition(monkeypatch, then, now, name):
    hashes = []
    for body in (then, now):
        monkeypatch.setitem(environment.AT_START, "x.py", f"{body}\nZ = 0\n".encode())
        hashes.append(environment.source_hashes(["x.py"]))
    assert edited(*hashes) == ([f"x.py: {name}"] if name else [])


def test_a_gpu_with_little_memory(monkeypatch, capsys):
    with_gpus(monkeypatch, H100)
    preflight.preflight(torch.device("cuda", 0))
    assert capsys.readouterr().err == ""
    with_gpus(monkeypatch, H100, free=0.4e9)
    preflight.preflight(torch.device("cuda", 0))
    assert capsys.readouterr().err == (
        "note: 0.4 of 80.0 GB are free on cuda:0: others use it (see nvidia-smi), a run may end "
        "out of memory\n"
    )


@pytest.mark.parametrize(
    ("listed", "shared"),
    [("GPU-a", False), ("GPU-a\nGPU-b\nGPU-a", True), ("GPU-b", None), ("", None)],
)
def test_whether_others_use_the_same_gpu(tmp_path, monkeypatch, listed, shared):
    with_driver(tmp_path, monkeypatch, listed)
    with_gpus(monkeypatch, H100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid="a"))
    assert environment.shared_gpu(torch.device("cuda", 0)) is shared
    assert environment.shared_gpu(CPU) is None


def test_a_gpu_in_exclusive_mode(monkeypatch):
    def busy(device):
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore")

    with_gpus(monkeypatch, H100)
    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    with pytest.raises(UserError, match=r"cuda:0 cannot be used .*busy or unavailable.* --device"):
        preflight.preflight(torch.device("cuda", 0))


def test_a_disk_that_is_almost_full(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0.25e9))
    preflight.note_once.cache_clear()
    assert train_small("se", tmp_path / "runs", "--epochs", "1", "--dry-run") == 0
    assert capsys.readouterr().err == ""
    assert train_small("se", tmp_path / "runs", "--epochs", "1") == 0
    expected = f"0.2 GB are free in {tmp_path}/runs: a run may need 0.6 GB while it trains"
    assert capsys.readouterr().err == f"note: {expected}\n"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may do anything
    assert train_small("se", tmp_path / "runs", "--epochs", "1") == 1
    error = capsys.readouterr().err
    assert error == f"error: {tmp_path}/runs cannot be written: choose another folder\n"
    with pytest.raises(PermissionError, match="choose another --out"):
        files.check_writable(tmp_path)


def test_an_image_names_its_commit_and_requirements(tmp_path, monkeypatch):
    monkeypatch.delenv("IMAGE_REVISION", raising=False)
    assert environment.image() is None
    monkeypatch.setenv("IMAGE_REVISION", "0123abc")
    monkeypatch.setattr(environment, "LOCK", tmp_path / "requirements.lock")
    assert environment.image() is None
    (tmp_path / "requirements.lock").write_bytes(b"torch")
    assert environment.image() == {
        "revision": "0123abc", "requirements_sha256": hashlib.sha256(b"torch").hexdigest(),
    }  # fmt: skip


def test_the_lock_has_every_requirement_and_a_sha256_of_every_package():
    lock = (REPO / "requirements.lock").read_text()
    packages = re.split(r"\n(?=\S)", lock.split("\n", 2)[2])
    locked = {}
    for package in packages:
        name, version = re.match(r"([a-z0-9-]+)==([^\s\\]+)", package).groups()
        assert re.findall(r"--hash=sha256:[0-9a-f]{64}", package), name
        locked.setdefault(name, set()).add(version)
    for line in (REPO / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            assert locked[name] == {version}
