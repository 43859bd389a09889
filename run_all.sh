#!/usr/bin/env bash
# Trains the models, measures what they cost, writes the report. Finished runs are skipped.
#
#   ./run_all.sh               full with a CUDA GPU, quick without
#   ./run_all.sh quick         the four published models, 1 epoch on 1,920 images each: minutes on a CPU
#   ./run_all.sh full          the published table: MODELS x SEEDS, 50 epochs each
#   ./run_all.sh study [miniature]   all that the README's figures rest on: see study.sh
#   ./run_all.sh plan [quick|full|study]   the commands that would run, what is done marked; runs nothing
#   ./run_all.sh test [PYTEST_ARGUMENT ...]
#
# Environment: MODELS, SEEDS, RECIPE, DATASET, RUNS (run folders), OUT (what is made of them), and
# PYTHON (python3). Where that Python lacks a pinned requirement, .venv is made and used instead.
#   ANY_VERSION=1  other versions than the pinned ones will do
# Paths are seen from the folder of this script.
#   JOBS=n      n runs at a time, each on a GPU of its own while there are enough; logs in RUNS/logs
#   SHARD=i/n   every n-th run from the i-th on, counted from 0, for an array of workers that share
#               RUNS; what is made of all runs is left to a last call without SHARD
# Exit code: 0 all done, 1 something failed (the rest was still tried), 2 wrong usage,
# 130 / 143 stopped by SIGINT / SIGTERM after the run at work has saved.
set -euo pipefail
this_script=$(readlink -f "${BASH_SOURCE[0]}")
cd -- "$(dirname "$this_script")" >/dev/null

die() {  # EXIT_CODE MESSAGE
  echo "error: $2" >&2
  exit "$1"
}

# --- Python: the current one, or .venv -----------------------------------------------------------

meets_requirements() {  # PYTHON: says which requirement it lacks, if any
  "$1" - <<'EOF'
import os, sys
from importlib.metadata import PackageNotFoundError, version

for line in open("requirements.txt"):
    name, _, pin = line.partition("#")[0].strip().partition("==")
    try:
        # thop names its version 0.1.1-N, which means 0.1.1.postN
        have = version(name).partition("+")[0].replace("-", ".post") if name else pin
        if have != pin and os.environ.get("ANY_VERSION") != "1":
            sys.exit(f"{sys.executable} has {name} {have}, not {pin}")
    except PackageNotFoundError:
        sys.exit(f"{sys.executable} lacks {name}")
EOF
}

choose_python() {
  PYTHON=${PYTHON:-python3}
  command -v "$PYTHON" >/dev/null || die 1 "$PYTHON is not there: install Python 3.11 or newer"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die 1 "$("$PYTHON" --version) is too old: set PYTHON to a Python 3.11 or newer"
  host_python=$PYTHON
  meets_requirements "$PYTHON" 2>/dev/null || PYTHON=.venv/bin/python
}

set_up() {
  local reason
  if [[ $PYTHON == .venv/bin/python ]] && ! meets_requirements "$PYTHON" >/dev/null 2>&1; then
    reason=$(meets_requirements "$host_python" 2>&1) || true
    echo "$reason: setting up .venv (5 GB, some minutes)" >&2
    run "$host_python" -m venv .venv || die 1 "no .venv could be made: see above"
    run "$PYTHON" -m pip install --quiet --disable-pip-version-check --require-hashes \
      -r requirements.lock ||
      die 1 "the requirements could not be installed: see above"
  fi
}

default_mode() {  # by what PyTorch says, or the driver where PyTorch is not installed yet
  local reason code=0
  reason=$("$PYTHON" environment.py 2>/dev/null) || code=$?
  if ((code != 0 && code != 3)) && nvidia-smi -L >/dev/null 2>&1; then code=0; fi
  if ((code == 0)); then
    echo full
  else
    echo "${reason:-no NVIDIA driver is seen}: a quick run on the CPU" >&2
    echo quick
  fi
}

# --- Children: a signal is passed on to those at work, which save before they leave --------------

declare -A children=()  # process id -> what it does
stopped=0
trap 'stopped=130; pass_on' INT
trap 'stopped=143; pass_on' TERM
trap 'stopped=129; pass_on' HUP
trap 'stopped=141; pass_on' PIPE
trap 'pass_on; wait' EXIT

pass_on() {
  ((${#children[@]} == 0)) || kill -TERM "${!children[@]}" 2>/dev/null || true
}

leave_if_stopped() {
  ((stopped == 0)) || exit "$stopped"
}

start() {  # COMMAND ...: in the background
  "$@" &
  children[$!]=$(print_command "$@")
}

reap() {  # waits until a child has ended: sets `ended`, its command, and `code`
  local pid
  while true; do
    for pid in "${!children[@]}"; do
      if ! kill -0 "$pid" 2>/dev/null; then
        code=0
        wait "$pid" || code=$?
        ended=${children[$pid]}
        unset "children[$pid]"
        return
      fi
    done
    wait -n || true  # until one ends, or a signal arrives
  done
}

run() {  # COMMAND ...: in the foreground; its exit code
  leave_if_stopped
  start "$@"
  reap
  leave_if_stopped
  return "$code"
}

print_command() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

# --- The work --------------------------------------------------------------------------------------

set_jobs() {
  JOBS=${JOBS:-1}
  [[ $JOBS =~ ^[1-9][0-9]{0,2}$ ]] || die 2 "JOBS: '$JOBS' is not a number from 1 to 999"
  SHARD=${SHARD:-0/1}
  if [[ ! $SHARD =~ ^[0-9]{1,4}/[0-9]{1,4}$ ]] || ((10#${SHARD%/*} >= 10#${SHARD#*/})); then
    die 2 "SHARD: '$SHARD' is not i/n with i from 0 to n-1"
  fi
  flags=()  # of train.py, beside those of set_command
}

set_defaults() {  # quick | full
  set_jobs
  MODELS=${MODELS:-baseline se cbam_blocks cbam_classifier}
  DATASET=${DATASET:-fashion_mnist}
  dataset=$DATASET # what its runs lie under: the name of a folder of images
  [[ ! -d $DATASET ]] || dataset=$(basename -- "$(realpath -- "$DATASET")")
  RUNS=${RUNS:-runs}
  OUT=${OUT:-results}
  if [[ $1 == quick ]]; then
    [[ ${RECIPE:-quick} == quick ]] || die 2 "quick is a recipe of its own: unset RECIPE"
    RECIPE=quick
    SEEDS=${SEEDS:-0}
  else
    RECIPE=${RECIPE:-published}
    SEEDS=${SEEDS:-0 1 2 3 4}
  fi
  mapfile -t models < <(tr -s ' \t' '\n' <<<"$MODELS" | awk 'NF && !seen[$0]++')
  mapfile -t seeds < <(tr -s ' \t' '\n' <<<"$SEEDS" | awk 'NF && !seen[$0]++')
  ((${#models[@]} && ${#seeds[@]})) || die 2 "MODELS and SEEDS must name at least one each"
  benchmark=("$PYTHON" benchmark.py --models "${models[@]}" --keep --out "$OUT")
  [[ $1 != quick ]] || benchmark+=(--modes eager --batch-sizes 64)  # nothing that compiles
  report=("$PYTHON" report.py --runs "$RUNS" --out "$OUT")
  explain=("$PYTHON" explain.py --keep --out "$OUT")
  if [[ $1 == quick ]]; then explain+=(--limit-cam 40); else explain+=(--limit-test 10000); fi
}

set_explained() {  # [done]: ends its command with the runs of the first seed, or those that are done
  local model
  explain+=(--compare)
  for model in "${models[@]}"; do
    if (($# == 0)) || is_done "$model" "${seeds[0]}"; then
      explain+=("$RUNS/$dataset/$RECIPE/$model/seed${seeds[0]}")
    fi
  done
}

set_command() {  # MODEL SEED: the command of one run, in the array `command`
  command=("$PYTHON" train.py --model "$1" --dataset "$DATASET" --recipe "$RECIPE" --seed "$2"
    --runs "$RUNS" "${flags[@]}")
}

is_done() {  # MODEL SEED: a result that keeps to its recipe, or of a command with these flags
  local folder=$RUNS/$dataset/$RECIPE/$1/seed$2
  if ((${#flags[@]})); then
    # In config.json they end the command, right after --runs FOLDER.
    grep -qs '"overrides": {' "$folder/result.json" &&
      grep -qsE -- "--seed $2 --runs ('[^']*'|[^ ]+) ${flags[*]}\"" "$folder/config.json"
    return
  fi
  grep -qs '"overrides": {}' "$folder/result.json" || return 1
  # Of folders of images there may be several of one name.
  [[ ! -d $DATASET ]] || grep -qsF "\"dataset\": \"$(realpath -- "$DATASET")\"" "$folder/config.json"
}

list_runs() {  # "MODEL SEED" of every run of this shard, a line each
  local model seed number=0
  for seed in "${seeds[@]}"; do
    for model in "${models[@]}"; do
      ((number++ % 10#${SHARD#*/} == 10#${SHARD%/*})) && echo "$model $seed"
    done
  done
}

add_shape() {  # of the images, to the benchmark's command
  local channels height width classes
  [[ $DATASET != fashion_mnist ]] || return 0
  read -r channels height width classes < <("$PYTHON" data.py --dataset "$DATASET" --shape) ||
    die 1 "there are no data to benchmark for: see above"
  benchmark+=(--image "${channels}x${height}x$width" --classes "$classes")
}

print_runs() {
  local model seed
  while read -r model seed; do
    set_command "$model" "$seed"
    echo "$(print_command "${command[@]}")$(is_done "$model" "$seed" && echo '  # done')"
  done < <(list_runs)
}

print_plan() {
  print_runs
  [[ $SHARD == 0/1 ]] || return 0
  print_command "${benchmark[@]}"
  (set_explained && print_command "${explain[@]}")
  print_command "${report[@]}"
}

check_names() {  # before hours of work, not after
  local model seed known code=0
  known=$("$PYTHON" models.py | cut -d' ' -f1) || code=1
  leave_if_stopped
  ((code == 0)) || die 1 "models.py does not run: see above"
  for model in "${models[@]}"; do
    grep -qxF -- "$model" <<<"$known" ||
      die 2 "MODELS: unknown model '$model': choose from ${known//$'\n'/ }"
  done
  for seed in "${seeds[@]}"; do
    [[ $seed =~ ^(0|[1-9][0-9]{0,8})$ ]] || die 2 "SEEDS: '$seed' is not a whole number below 10^9, without leading zeros"
  done
}

check_writable() {  # FOLDER
  { mkdir -p "$1" && [[ -w $1 ]]; } 2>/dev/null ||
    die 1 "$1 cannot be written: choose another RUNS or OUT (docker run: --user \"\$(id -u):\$(id -g)\")"
}

train_all() {  # every run of this shard that is not done, JOBS at a time; fills `failed`
  local model seed usage=0
  local -A slot_of=()  # command -> the slot it runs in
  local -a free gpus
  IFS=$', \n' read -rd '' -a gpus <<<"${CUDA_VISIBLE_DEVICES-$(list_gpus)}" || true
  mapfile -t free < <(seq 0 $((JOBS - 1)))
  while read -r model seed; do
    is_done "$model" "$seed" && continue
    ((${#free[@]})) || settle
    ((stopped || usage)) && break
    set_command "$model" "$seed"
    if ((JOBS == 1)); then
      start "${command[@]}"
    else
      start_in_slot "${free[0]}" "$RUNS/logs/$dataset.$RECIPE.$model.seed$seed.log"
    fi
    slot_of[$(print_command "${command[@]}")]=${free[0]}
    free=("${free[@]:1}")
  done < <(list_runs)
  while ((${#children[@]})); do settle; done
  ((!stopped || JOBS == 1)) || echo "stopped: all is kept, see the logs" >&2
  leave_if_stopped
  ((usage == 0)) || leave_with_failed 2
}

settle() {  # waits for a run to end and takes note of how
  reap
  free+=("${slot_of[$ended]}")
  if ((stopped)); then return; fi
  if ((code == 2)); then usage=1; fi
  if ((code)); then failed+=("$ended"); fi
  if ((JOBS > 1)); then
    if ((code)); then echo "failed: $ended"; else echo "done: $ended"; fi
  fi
}

list_gpus() {
  if nvidia-smi -L >/dev/null 2>&1; then seq 0 $(($(nvidia-smi -L | grep -c '^GPU') - 1)); fi
}

start_in_slot() {  # SLOT LOG: `command` on the slot's GPU, or on its share of the CPU's cores
  local threads=$(($(nproc) / JOBS))
  { mkdir -p "${2%/*}" && echo "--- $(date '+%F %T')" >>"$2"; } 2>/dev/null ||
    die 1 "$2 cannot be written: delete what is there, or choose another RUNS"
  echo "started: $(print_command "${command[@]}"), log: $2"
  if ((${#gpus[@]})); then
    CUDA_VISIBLE_DEVICES=${gpus[$1 % ${#gpus[@]}]} start "${command[@]}" >>"$2" 2>&1
  else
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads ? threads : 1))} \
      start "${command[@]}" >>"$2" 2>&1
  fi
}

attempt() {  # COMMAND ...: one that fails is taken note of in `failed`
  run "$@" || failed+=("$(print_command "$@")")
}

work() {
  local failed=()
  check_names
  run "$PYTHON" data.py --dataset "$DATASET" || exit $?
  check_writable "$RUNS"
  check_writable "$OUT"
  add_shape
  print_plan
  train_all
  if [[ $SHARD == 0/1 ]]; then
    set_explained "done"
    attempt "${benchmark[@]}"
    [[ ${explain[-1]} == --compare ]] || attempt "${explain[@]}"  # if any run is done
    attempt "${report[@]}"
  fi
  leave_with_failed
}

leave_with_failed() {  # [EXIT_CODE]; goes on if nothing has
  if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit "${1:-1}"
  fi
}

# shellcheck source=study.sh
source ./study.sh

# --- Command line ----------------------------------------------------------------------------------

case ${1:-} in
  "" | quick | full)
    (($# <= 1)) || die 2 "too many arguments: $*"
    choose_python
    set_up
    mode=${1:-$(default_mode)}
    set_defaults "$mode"
    work
    ;;
  study)
    [[ $# == 1 || $# == 2 && $2 == miniature ]] || die 2 "study, or study miniature, not '$*'"
    choose_python
    set_up
    set_study "${2:-}"
    work_on_study "${2:-}"
    ;;
  plan)
    (($# <= 2)) || [[ $2 == study ]] || die 2 "too many arguments: $*"
    trap - PIPE  # `| head` ends it quietly
    choose_python
    if [[ ${2:-} == study ]]; then
      [[ $# == 2 || $# == 3 && $3 == miniature ]] || die 2 "study, or study miniature, not '${*:2}'"
      reason=$(meets_requirements "$PYTHON" 2>&1) ||
        die 1 "$reason: run ./run_all.sh study miniature first, or set ANY_VERSION=1"
      set_study "${3:-}"
      plan_study
      exit
    fi
    mode=${2:-$(default_mode)}
    [[ $mode == quick || $mode == full ]] || die 2 "plan of what? quick, full or study, not '$mode'"
    set_defaults "$mode"
    if meets_requirements "$PYTHON" >/dev/null 2>&1; then
      check_names
      add_shape
    fi
    print_plan
    ;;
  test)
    choose_python
    set_up
    run "$PYTHON" data.py || exit $?
    shift
    if (($# == 0)); then  # the whole suite: two processes, a core each
      set -- --numprocesses 2 --dist worksteal
      export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    fi
    exec "$PYTHON" -m pytest "$@"  # takes over, so that Ctrl-C is pytest's own
    ;;
  -h | --help | help)
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$this_script"
    ;;
  *)
    die 2 "unknown command '$1': quick, full, study, plan, test, or none (see ./run_all.sh --help)"
    ;;
esac
