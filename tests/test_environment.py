"""Why there is no GPU, what the image says of itself, and the lock of all packages."""

import hashlib
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import REPO, is_one_line, needs_pins

from kit import environment

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
    why = environment.why_no_gpu()
    assert words in why and is_one_line(why)
    if "too old" in words:
        assert "update it to 580 or newer" in why
    needs_pins()
    done = subprocess.run(
        ["./run_all.sh", "plan"], cwd=REPO, env=os.environ | {"PYTHON": sys.executable},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and f"{why}: a quick run on the CPU" in done.stderr


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
