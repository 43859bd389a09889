"""Files that are whole or not there, whose, and what a killed process leaves of them."""

import errno
import multiprocessing
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import benchmark
import report
from kit import files, runs
from kit.files import read_small, write_atomically

import pytest
from conftest import REPO, SMALL, script


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002, 0o077])
def test_the_umask_is_kept(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "folder/a.json", "{}")
        write_atomically(tmp_path / "folder/a.json", "[]")
    finally:
        os.umask(before)
    assert (tmp_path / "folder/a.json").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


def test_many_may_write_the_same_file(tmp_path):
    """Each time it is whole, one of theirs."""
    path, bodies = tmp_path / "a", [bytes([i]) * 100_000 for i in range(4)]

    def write(body):
        for _ in range(20):
            write_atomically(path, body)
            assert path.read_bytes() in bodies

    processes = [multiprocessing.Process(target=write, args=(body,)) for body in bodies]
    [process.start() for process in processes]
    [process.join(60) for process in processes]
    assert [process.exitcode for process in processes] == [0] * 4
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_may_lack_fsync_and_locks(tmp_path, monkeypatch, capsys, number):
    """Network and shared folders: of folders, modes, or a folder that cannot even be opened."""

    def missing(*_):
        raise OSError(number, "no such call")

    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda f: missing() if stat.S_ISDIR(os.fstat(f).st_mode) else fsync(f)
    )
    monkeypatch.setattr("fcntl.flock", missing)
    monkeypatch.setattr(os, "fchmod", missing)
    write_atomically(tmp_path / "a", "1")
    with files.locked(tmp_path):
        write_atomically(tmp_path / "a", "2")
    with ExitStack() as stack:
        runs.lock(tmp_path / "run", stack)
    assert capsys.readouterr().err.count("note: ") == 1 + (number != errno.ENOSYS)
    opened = os.open

    def open_file(path, *more, **options):
        return missing() if Path(path).is_dir() else opened(path, *more, **options)

    monkeypatch.setattr(os, "open", open_file)
    write_atomically(tmp_path / "a", "3")
    assert (tmp_path / "a").read_text() == "3" and os.listdir(tmp_path) == ["a"]


def test_a_disk_that_fails_is_an_error(tmp_path, monkeypatch):
    def failing(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output"):
        write_atomically(tmp_path / "a", "1")
    assert os.listdir(tmp_path) == []


def test_small_files_only(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**32)
    assert read_small(tmp_path / "a") == b"abc"
    for name, words in {"pipe": "pipe is no file", "sparse": "sparse has 4,294,967,296 bytes",
                        ".": "is no file", "none": "No such file"}.items():  # fmt: skip
        with pytest.raises(OSError, match=words):
            read_small(tmp_path / name)


def test_the_next_run_removes_what_a_killed_one_has_left(finished_run, tmp_path):
    left = {
        "benchmark": [".benchmark.json.tmp", ".benchmark.md.tmp"],
        "report": [".report.html.tmp", ".results.csv.tmp", ".test_accuracy.png.tmp"],
        "nobody": [".mine.tmp", "report.tmp"],
    }
    for name in chain(*left.values()):
        (tmp_path / name).touch()
    out = ["--out", str(tmp_path)]
    small = ["--models", "se", "--width", "4", "--batch-sizes", "1", "--repeats", "1"]
    for who, code in (
        ("benchmark", lambda: benchmark.main([*small, *out, "--modes", "eager"])),
        ("report", lambda: report.main(["--runs", str(finished_run), *out])),
    ):
        assert code() == 0
        left.pop(who)
        there = {path.name for path in tmp_path.glob("*.tmp")}
        assert there == set(chain(*left.values()))


@pytest.mark.parametrize("name", ["train", "report"])
def test_ctrl_c_while_a_script_imports_its_packages(name):
    """Python ends it by SIGINT, which a shell calls 130. Of the packages numpy is the first."""
    imports = f"import sys, {name}; order = list(sys.modules)"
    done = script("-c", f"{imports}; assert order.index('kit') < order.index('numpy'); 1 / 0")
    assert "ZeroDivisionError" in done.stderr  # other errors are shown as ever
    done = script("-c", "import kit; raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_a_full_pipe_does_not_hold_up_a_signal():
    """Nobody reads what is printed, nor, afterwards, what is said of the end."""
    code = """
import contextlib, sys
from kit.command_line import handle_signals
stopped = []
with contextlib.ExitStack() as stack:
    handle_signals(lambda *signal: stopped.append(signal), stack)
    print("begins", flush=True)
    while not stopped:
        print(99 * "x", file=sys.stdout)
for stream in (sys.stdout, sys.stderr):
    print(100_000 * "y", file=stream)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)  # fmt: skip
    process.stdout.read(7)
    time.sleep(0.5)  # until it is full
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_a_closed_standard_output():
    command = [sys.executable, "report.py", "--power", "--sd", "0.1", "--difference", "0.1"]
    done = subprocess.run(["sh", "-c", f"{shlex.join(command)} >&-"], cwd=REPO, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_closed_standard_error(tmp_path):
    flags = ["--width", "4", "--device", "cpu", "--dry-run", "--runs", str(tmp_path)]
    command = shlex.join([sys.executable, "train.py", "--model", "se", *flags])
    done = subprocess.run(["sh", "-c", f"{command} 2>&-"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and "dry run: one batch each" in done.stdout


def test_a_terminal_that_knows_ascii_alone(tmp_path):
    runs, small = str(tmp_path / "é"), [*SMALL, "--data-dir", str(REPO / "data"), "--epochs", "1"]
    code = f"""
import train, report, benchmark
from kit import study
runs = {runs!r}
cheap = ["--models", "se", "--width", "4", "--batch-sizes", "1", "--repeats", "1"]
print(train.main(["--model", "se", *{small}, "--runs", runs]),
      train.main(["--model", "se", *{small}, "--runs", runs, "--lr", "3"]),
      report.main(["--runs", runs, "--out", runs]),
      benchmark.main([*cheap, "--modes", "eager", "--out", runs]),
      study.main(["plan", "quick"]))
"""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "RUNS": runs, "OUT": runs}
    done = script("-c", code, env=environment)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "0 1 0 0 0", done.stderr
    assert "Traceback" not in done.stderr and (done.stdout + done.stderr).isascii()
    assert f"{tmp_path}/?" in done.stdout and "\\xe9" in done.stderr
