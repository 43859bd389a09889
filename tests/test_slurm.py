"""The documented sbatch command on a real Slurm, started here on this one machine that claims to
have four GPUs: an array of workers, one of them requeued.

apt-get install slurm-wlm munge
./run_all.sh test -m slow tests/test_slurm.py       # as root; 5 minutes
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time

import pytest
from conftest import REPO

DAEMONS = ("munged", "slurmctld", "slurmd")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(shutil.which, DAEMONS)) or os.geteuid() != 0,
        reason="needs root, slurm-wlm and munge",
    ),
]
CONFIGURATION = """
ClusterName=check
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={place}/munge.socket
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} Gres=gpu:4
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def slurm(tmp_path_factory):
    """A cluster of this machine alone: a function that calls its commands, for their output."""
    place = tmp_path_factory.mktemp("slurm")
    (place / "state").mkdir()
    (place / "spool").mkdir()
    (place / "munge.key").write_bytes(os.urandom(128))
    (place / "munge.key").chmod(0o400)
    host = socket.gethostname()
    configuration = CONFIGURATION.format(
        host=host, place=place, ports=(free_port(), free_port()), cpus=os.cpu_count()
    )
    (place / "slurm.conf").write_text(configuration)
    (place / "gres.conf").write_text(f"Name=gpu File={place}/gpu[0-3]\n")
    for gpu in range(4):
        (place / f"gpu{gpu}").touch()
    environment = os.environ | {"SLURM_CONF": str(place / "slurm.conf")}
    munge = [f"--{name}-file={place}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", "--force", f"--socket={place}/munge.socket", *munge],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", host],
    ]
    daemons = []
    with open(place / "daemons.log", "w") as log:
        for command in commands:
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(2)

    def call(*command, **more):
        done = subprocess.run(
            command, env=environment | more, capture_output=True, text=True, cwd=REPO
        )
        assert done.returncode == 0, done.stderr + (place / "daemons.log").read_text()[-2000:]
        return done.stdout

    yield call
    for daemon in reversed(daemons):
        daemon.terminate()
        daemon.wait(60)


def test_an_array_of_workers_trains_every_run_once(slurm, tmp_path):
    runs, logs = tmp_path / "runs", tmp_path / "logs"
    logs.mkdir()
    pages = "".join(page.read_text() for page in [*REPO.glob("*.md"), *REPO.glob("docs/*.md")])
    (command,) = re.findall(r"^sbatch .*\\\n.*$", pages, re.MULTILINE)
    small = {"\\\n": "", "--array=0-19": "--array=0-3", "ID/20": "ID/4", "verdict": "quick"}
    for written, here in small.items():
        command = command.replace(written, here)
    job = slurm(
        "sbatch", "--parsable", f"--output={logs}/%a", *shlex.split(command)[1:],
        PYTHON=sys.executable, RUNS=str(runs), OUT=str(tmp_path / "out"),
    ).strip()  # fmt: skip

    def log(worker):
        path = logs / str(worker)
        return path.read_text() if path.exists() else ""

    def wait_for(seconds, what):
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, slurm("squeue") + "".join(map(log, range(4)))
            time.sleep(0.5)

    wait_for(120, lambda: "parameters;" in log(0))  # worker 0 is at work
    slurm("scontrol", "requeue", f"{job}_0")
    wait_for(600, lambda: job not in slurm("squeue", "--noheader"))

    for worker, model in enumerate(("baseline", "se", "cbam_blocks", "cbam_classifier")):
        text = log(worker)
        assert (runs / f"fashion_mnist/quick/{model}/seed0/result.json").exists(), text
        assert len(re.findall("^test accuracy", text, re.MULTILINE)) == 1
        assert "already complete" not in text and f"{model}, seed 0" in text
        assert text.count("parameters;") == (2 if worker == 0 else 1)
    assert "stopped by SIGTERM" in log(0) and "resuming in epoch 1, after" in log(0)
