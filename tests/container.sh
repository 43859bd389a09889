#!/usr/bin/env bash
# Tries the container with a real engine: builds it, and does in it what the README says it can.
#
#   tests/container.sh            about 15 minutes on two cores, half of it the build and a quick run
#
# BASE_IMAGE=...   another base than NVIDIA's; `debian` makes a plain Debian one here (debootstrap,
#                  as root), where NVIDIA's cannot be pulled. It shows all but CUDA itself.
# Exit code: 0 all held or there is no engine, 1 something did not hold.
set -euo pipefail
cd -- "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
image=attention-benchmark-check
work=$(mktemp -d)
name=check-$$
trap 'docker rm -f "$name" >/dev/null 2>&1 || true; rm -rf "$work"' EXIT
# Offline, read-only, without capabilities, as a user that has no name.
locked=(--network none --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges
  --user 4242:4242)
mkdir "$work/runs" "$work/results"
chmod 777 "$work" "$work/runs" "$work/results"
mounts=(-v "$work/runs:/app/runs" -v "$work/results:/app/results")

if ! docker info >/dev/null 2>&1; then
  echo "SKIPPED: there is no Docker engine"
  exit 0
fi

holds() {  # WHAT COMMAND ...
  if "${@:2}"; then echo "holds: $1"; else
    echo "DOES NOT HOLD: $1"
    exit 1
  fi
}

small_run() {  # DOCKER_OPTION ... -- [TRAIN_FLAG ...]: a narrow run of 640 images
  local options=()
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  docker run --name "$name" --user 4242:4242 "${options[@]}" "${mounts[@]}" "$image" \
    python train.py --model se --width 16 --limit-train 640 --limit-test 200 --mode eager "${@:2}"
}

wait_for() {  # TEXT: in the container's log
  for _ in $(seq 600); do
    docker logs "$name" 2>&1 | grep -q "$1" && return
    sleep 0.1
  done
  return 1
}

# --- Build ---------------------------------------------------------------------------------------

if [[ ${BASE_IMAGE:-} == debian ]]; then
  BASE_IMAGE=plain-debian
  if ! docker image inspect "$BASE_IMAGE" >/dev/null 2>&1; then
    debootstrap --variant=minbase bookworm "$work/rootfs" >/dev/null
    # With the authorities that this machine trusts, for pip behind a proxy.
    install -D -m 644 "$(readlink -f /etc/ssl/certs/ca-certificates.crt)" \
      "$work/rootfs/etc/ssl/certs/host-ca.crt"
    tar -C "$work/rootfs" -c . | docker import --change "ENV PIP_CERT=/etc/ssl/certs/host-ca.crt \
      SSL_CERT_FILE=/etc/ssl/certs/host-ca.crt" - "$BASE_IMAGE" >/dev/null
    rm -rf "$work/rootfs"
  fi
fi
revision=$(git rev-parse HEAD)
SECONDS=0
docker build -q ${BASE_IMAGE:+--build-arg BASE_IMAGE="$BASE_IMAGE"} \
  --build-arg REVISION="$revision" -t "$image" . >/dev/null
size=$(docker image inspect --format '{{.Size}}' "$image")
echo "built in $SECONDS s, $((size / 1000000)) MB; where they go:"
docker run --rm "$image" du -sm /opt/venv /opt/data /app /usr 2>/dev/null | sort -rn
label() { docker image inspect --format "{{index .Config.Labels \"org.opencontainers.image.$1\"}}" "$image"; }
holds "the label has the commit" [ "$(label revision)" = "$revision" ]
docker run --rm "$image" pip freeze --all >"$work/freeze"
python3 - "$work/freeze" <<'EOF'
import re, sys
def packages(path):  # PyTorch adds a local version, thop writes .postN as -N
    lines = re.findall(r"^([\w.-]+)==([^\s+]+)", open(path).read(), re.M)
    return {(re.sub("[-_.]+", "-", name).lower(), v.replace("-", ".post")) for name, v in lines}
strange = {p for p in packages(sys.argv[1]) - packages("requirements.lock") if p[0] != "pip"}
sys.exit(f"not as in requirements.lock: {strange}" if strange else 0)
EOF
echo "holds: every installed package is one of requirements.lock"

# --- Offline and locked down -----------------------------------------------------------------------

SECONDS=0
docker run --rm "${locked[@]}" "${mounts[@]}" "$image" >"$work/log" 2>&1 ||
  { tail -5 "$work/log"; holds "the quick run, offline and locked down" false; }
echo "holds: the quick run, offline and locked down, in $SECONDS s"
docker run --rm "${locked[@]}" "$image" ./run_all.sh plan study >"$work/plan"
holds "the plan of the study" grep -q -- "--recipe short --seed 19" "$work/plan"
holds "without --gpus it says so" grep -q "docker run --gpus all): a quick run on the CPU" "$work/log"
holds "report and pictures are there" test -s "$work/results/report.html" -a -s "$work/results/explain_compare.png"
owners=$(find "$work/runs" "$work/results" -mindepth 1 -printf '%U\n' | sort -u)
holds "the results belong to the caller" [ "$owners" = 4242 ]
env=$work/runs/fashion_mnist/quick/se/seed0/env.json
holds "env.json has commit and requirements" python3 - "$env" "$revision" <<'EOF'
import hashlib, json, sys
image = json.load(open(sys.argv[1]))["image"]
digest = hashlib.sha256(open("requirements.lock", "rb").read()).hexdigest()
sys.exit(image != {"revision": sys.argv[2], "requirements_sha256": digest})
EOF
small_run --rm "${locked[@]}" --tmpfs /tmp:exec -- --dry-run --mode compile >"$work/log" 2>&1 || tail -5 "$work/log"
holds "what compiles needs --tmpfs /tmp:exec, and then works" grep -q "dry run: one batch" "$work/log"

# --- Stopping --------------------------------------------------------------------------------------

run=$work/runs/fashion_mnist/published/se/seed0
small_run -d -- --epochs 30 >/dev/null
holds "it trains" wait_for "epoch  2/30"
SECONDS=0
docker stop "$name" >/dev/null
holds "docker stop: 143, within 5 s" [ "$(docker inspect --format '{{.State.ExitCode}}' "$name")" = 143 -a "$SECONDS" -le 5 ]
holds "and it has saved" test -s "$run/last.pt"
docker rm "$name" >/dev/null
small_run -d -- --epochs 30 >/dev/null
holds "the next docker run resumes from there" wait_for "resuming in epoch"
docker rm -f "$name" >/dev/null

# --- As in the README ------------------------------------------------------------------------------

docker run -d --name "$name" "${mounts[@]}" "$image" tensorboard --logdir runs --host 0.0.0.0 >/dev/null
holds "TensorBoard serves the runs" docker exec "$name" python -c '
import json, time, urllib.request
for _ in range(60):
    try:
        runs = json.load(urllib.request.urlopen("http://localhost:6006/data/runs"))
        if "fashion_mnist/quick/se/seed0" in runs:
            break
    except OSError:
        pass
    time.sleep(1)
else:
    raise SystemExit(1)'
docker rm -f "$name" >/dev/null
git clone -q . "$work/edited"
echo 'print("edited")' >>"$work/edited/kit/__init__.py"
docker run --rm -v "$work/edited:/app" "$image" python train.py --model se --dry-run --width 16 \
  >"$work/log" 2>&1 || tail -5 "$work/log"
holds "a mounted checkout is used without a build" grep -q "^edited" "$work/log"

# --- The same figures outside ----------------------------------------------------------------------

if python3 -c 'import torch' 2>/dev/null || [[ -x .venv/bin/python ]]; then
  python=$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)
  flags=(train.py --model se --width 16 --limit-train 640 --limit-test 200 --mode eager --epochs 2)
  docker run --rm --user 4242:4242 "${mounts[@]}" "$image" python "${flags[@]}" --runs runs/inside >/dev/null
  "$python" "${flags[@]}" --runs "$work/runs/outside" >/dev/null
  holds "the same run outside gives the same metrics" "$python" - "$work/runs" <<'EOF'
import json, pathlib, sys
def metrics(where):
    path = pathlib.Path(sys.argv[1], where, "fashion_mnist/published/se/seed0/metrics.jsonl")
    rows = map(json.loads, path.read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]
sys.exit(metrics("inside") != metrics("outside"))
EOF
fi
echo "all held"
