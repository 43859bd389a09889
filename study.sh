# shellcheck shell=bash disable=SC2034,SC2154  # a part of run_all.sh, with which it shares variables
# The reference study: all that the README's figures rest on, what matters most first.
#
#   ./run_all.sh study              on a CUDA GPU; stop it at any time, the same command goes on
#   ./run_all.sh study miniature    every step, narrow and on a few images: does it all work here?
#   ./run_all.sh plan study [miniature]    the commands; runs nothing
#
# Environment: OUT (default: results/<name of the GPU>, or results/miniature), JOBS and PYTHON as for
# run_all.sh, and PEERS: a folder of reference scripts that are timed beside (see speed.py).
#
# OUT/runs, OUT/fp32 and OUT/modules/runs have the run folders. Git ignores the weights among them: what
# is committed and cloned again is enough to write the reports anew and to go on with other runs.
# OUT/study.log says when it ran and for how long.

compared=(baseline cbam_classifier se cbam_blocks se_static)
candidates=(cbam_classifier se cbam_blocks)  # the two best of these are trained with `strong`

set_study() {  # [miniature]; sets `gpu` to the name of the GPU, or `no_gpu` to why there is none
  local known
  [[ -z ${MODELS:-}${SEEDS:-}${RECIPE:-}${DATASET:-}${RUNS:-}${SHARD:-} ]] ||
    die 2 "the study has MODELS, SEEDS, RECIPE, DATASET and RUNS of its own, and no SHARD: unset them"
  set_jobs
  DATASET=fashion_mnist
  dataset=$DATASET
  known=$("$PYTHON" models.py | cut -d' ' -f1) || known=
  leave_if_stopped
  [[ -n $known ]] || die 1 "models.py does not run: see above"
  mapfile -t further < <(grep -vxF "$(printf '%s\n' "${compared[@]}")" <<<"$known")
  no_gpu=
  gpu=$("$PYTHON" environment.py) || no_gpu=${gpu:-environment.py does not run}
  leave_if_stopped
  modes=(eager compile+graph)  # of inference: the published way, and the one that `auto` takes
  if [[ ${1:-} == miniature ]]; then
    OUT=${OUT:-results/miniature}
    width=(--width 16)
    small=(--epochs 4 --limit-train 256 --limit-test 500)
    seeds_after_0=1 few_seeds="0 1" module_seeds=0 more_seeds=2 rounds=1
    checked=(se) checked_fp32=(se) check_further=no  # each takes a minute
    looked_at=()
    [[ -z $no_gpu ]] || modes=(eager)
  else
    [[ -z $no_gpu ]] || gpu="a GPU"
    OUT=${OUT:-results/$(tr -cs '[:alnum:]\n' _ <<<"${gpu,,}")}
    width=() small=()
    seeds_after_0="1 2 3 4" few_seeds="0 1 2" module_seeds="0 1 2" more_seeds="5 6 7 8 9" rounds=3
    checked=("${compared[@]}") checked_fp32=(baseline cbam_blocks) check_further=yes
    looked_at=(--limit-test 10000)
  fi
  speed=("$PYTHON" speed.py "${width[@]}" --out "$OUT")
  planning=0
  peers=()
  if [[ -n ${PEERS:-} ]]; then
    [[ -f $PEERS/plain_loop.py ]] || die 2 "PEERS: there is no $PEERS/plain_loop.py"
    ((${#width[@]} == 0)) || die 2 "PEERS are of full width: unset it for the miniature"
    peers=(--peers "$PEERS")
  fi
  beside=()  # in the report
  [[ ! -d $OUT/fp32 ]] || beside=(--compare "$OUT/fp32")
}

study() {  # from top to bottom; what fails is taken note of in `failed`, and the rest is tried
  local model best right=() first_runs=()

  echo "# 1. Does the fast mode take the same step as eager float32?"
  check "${checked[@]}" ||
    die 1 "the self-check failed, see above: figures of a wrong step are worth nothing"

  echo "# 2. How fast is it, beside the usual ways? What do the models cost?"
  attempt "${speed[@]}" "${peers[@]}" --lenient --rounds 1 --short
  measure_costs "$OUT" "64" "${compared[@]}"
  measure_costs "$OUT" "1 16 256 1024" "${compared[@]}"

  echo "# 3. The published study, and what its first seed looks at while the weights are there"
  train "$OUT/runs" published "${compared[*]}" 0
  for model in "${compared[@]}"; do
    first_runs+=("$OUT/runs/$dataset/published/$model/seed0")
  done
  attempt "$PYTHON" explain.py "${looked_at[@]}" --keep --out "$OUT" --compare "${first_runs[@]}"
  write_report
  train "$OUT/runs" published "${compared[*]}" "$seeds_after_0"
  write_report

  echo "# 4. Is bfloat16 as good as float32?"
  if check "${checked_fp32[@]}" --precision fp32; then
    train "$OUT/fp32" published "baseline cbam_blocks" "$few_seeds" --precision fp32
    beside=(--compare "$OUT/fp32")
    write_report
  fi

  echo "# 5. The recipe strong: the baseline, and the two modules that are best in validation"
  if best=$(two_best); then
    train "$OUT/runs" strong "baseline $best" "$few_seeds"
    write_report
  else
    echo "# (which two are best shows when 3 is done)"
    ((planning)) || failed+=("step 5, for lack of results of step 3")
  fi

  echo "# 6. Every further module"
  for model in "${further[@]}"; do
    if [[ $check_further == no ]] || check "$model"; then right+=("$model"); fi
  done
  measure_costs "$OUT/modules" "64" baseline "${right[@]}"
  train "$OUT/modules/runs" published "baseline ${right[*]}" "$module_seeds"
  attempt "$PYTHON" report.py --runs "$OUT/modules/runs" --out "$OUT/modules"

  echo "# 7. More of 3 and of 2: seeds, and rounds of timing"
  train "$OUT/runs" published "${compared[*]}" "$more_seeds"
  attempt "${speed[@]}" "${peers[@]}" --lenient --rounds "$rounds"
  write_report
}

check() {  # MODEL ... [FLAG ...]: fails where a self-check does
  run "${speed[@]}" --check "$@" && return
  failed+=("$(print_command "${speed[@]}" --check "$@")")
  return 1
}

# What of these runs is not done. Sets what run_all.sh's train_all goes by: RUNS, RECIPE, models,
# seeds, flags.
train() {  # RUNS RECIPE "MODEL ..." "SEED ..." [FLAG ...]
  RUNS=$1 RECIPE=$2
  read -ra models <<<"$3"
  read -ra seeds <<<"$4"
  flags=("${@:5}" "${width[@]}" "${small[@]}")
  train_all
}

measure_costs() {  # OUT "BATCH_SIZE ..." MODEL ...
  local sizes
  read -ra sizes <<<"$2"
  attempt "$PYTHON" benchmark.py --models "${@:3}" --modes "${modes[@]}" "${width[@]}" \
    --batch-sizes "${sizes[@]}" --keep --out "$1"
}

write_report() {
  attempt "$PYTHON" report.py --runs "$OUT/runs" --out "$OUT" "${beside[@]}"
}

two_best() {  # of the candidates, by mean validation accuracy; exit code 3 where a result is missing
  "$PYTHON" - "$OUT/runs/$dataset/published" "0 $seeds_after_0" "${candidates[@]}" <<'EOF'
import json, sys
from statistics import mean

runs, seeds, *models = sys.argv[1:]


def accuracy(model):
    results = [json.load(open(f"{runs}/{model}/seed{k}/result.json")) for k in seeds.split()]
    return mean(result["val_acc"] for result in results)


try:
    print(*sorted(models, key=accuracy)[-2:])
except (OSError, ValueError, LookupError):  # not there yet, or damaged
    sys.exit(3)
EOF
}

plan_study() {  # the same steps, but from here on commands are printed
  planning=1
  run() { print_command "$@"; }
  train_all() { print_runs; }
  study
}

work_on_study() {  # [miniature]
  local failed=() code
  [[ -z $no_gpu || ${1:-} == miniature ]] ||
    die 1 "the study needs a GPU: $no_gpu. Without one, ./run_all.sh study miniature tries its steps"
  run "$PYTHON" data.py || exit $?
  check_writable "$OUT"
  exec 9>>"$OUT/study.log" || die 1 "$OUT/study.log cannot be written"
  flock -n 9 || die 1 "another study, or what is left of one, is at work in $OUT: wait for its end"
  log "started"
  SECONDS=0
  trap 'code=$?; pass_on; wait; log "ended after $SECONDS s, exit code $code"' EXIT
  study
  leave_with_failed
}

log() {
  echo "$(date -u '+%F %T') UTC: $1" >&9
}
