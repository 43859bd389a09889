#!/usr/bin/env bash
# Trains the models, measures what they cost, writes the report. Finished runs are skipped.
#
#   ./run_all.sh               full with a CUDA GPU, quick without
#   ./run_all.sh quick         the four published models, 1 epoch on 1,920 images: minutes on a CPU
#   ./run_all.sh full          the published table: MODELS x SEEDS, up to 50 epochs; then verdict
#   ./run_all.sh verdict       MODELS x 20 SEEDS of 10 epochs each: meant to detect 0.2 points
#   ./run_all.sh study         everything a claim needs; without a GPU small, by FLAGS
#   ./run_all.sh plan WORD     prints the commands of one of these, trains nothing
#   ./run_all.sh test [PYTEST_ARGUMENT ...]
#
# Environment: MODELS, SEEDS, RECIPE (of full), DATASET, FLAGS (of train.py, for every run), RUNS
# (run folders), OUT (what is made of them), PYTHON (python3; if it lacks a pinned requirement, .venv
# is made and used). ANY_VERSION=1: other versions will do. Paths are relative to this folder.
#   JOBS=n      runs at a time, logs in RUNS/logs; default: the visible GPUs, 1 on a CPU
#   SHARD=i/n   every n-th run from the i-th on, i from 0; the last call, without it, reports
# Exit code: 0 done, 1 something failed (the rest was tried), 2 wrong usage, 130 / 143 stopped by
# SIGINT / SIGTERM after the active runs have saved; of `test`, pytest's.
set -euo pipefail
unset PYTHONOPTIMIZE PYTHONSAFEPATH  # asserts count, and scripts import each other
die() { echo "error: $2" >&2 && exit "$1"; }  # EXIT_CODE MESSAGE
cd -- "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
[[ -d kit ]] || { cd -- "${SLURM_SUBMIT_DIR:-.}" && [[ -d kit ]]; } ||  # sbatch runs a copy
  die 1 "$PWD is not the folder of the project: go there first"

ready() {  # PYTHON: whether it has the requirements; not every environment has pip to ask
  "$1" -c 'import os, re
from importlib.metadata import version
for name, pin in re.findall("^([a-z0-9-]+)==(.+)$", open("requirements.txt").read(), re.MULTILINE):
    found = version(name).partition("+")[0].replace("-", ".post")
    assert found == pin or os.environ.get("ANY_VERSION") == "1"' 2>/dev/null
}

case ${1:-} in
  "" | quick | full | verdict | study | plan | test) ;;
  -h | --help | help) exec sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' run_all.sh ;;
  *) die 2 "unknown command '$1': quick, full, verdict, study, plan, test or none (see --help)" ;;
esac
host=${PYTHON:-python3} python=.venv/bin/python
"$host" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  die 1 "$host does not run or is older than 3.11: set PYTHON to a Python 3.11 or newer"
if ready "$host"; then
  python=$host
elif ! ready "$python"; then
  (flock 9 || true; ready "$python" && exit  # of workers that start together one sets up
    echo "$host lacks a pinned requirement: setting up .venv (5 GB, some minutes)" >&2
    "$host" -m venv .venv || die 1 "no .venv could be made: see above"
    "$python" -m pip install --quiet --disable-pip-version-check --require-hashes \
      -r requirements.lock || die 1 "the requirements could not be installed: see above") 9<.
fi
export PYTHON=$python  # the commands of a plan begin with it
[[ ${1:-} == test ]] || exec "$python" -m kit.study "$@"

"$python" data.py
shift
if (($# == 0)); then  # the whole suite: two processes, one core each
  set -- --numprocesses 2 --dist worksteal
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
exec "$python" -m pytest "$@"
