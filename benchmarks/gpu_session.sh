#!/usr/bin/env bash
# One call on a machine with a GPU, inside 10 minutes: build, test, time. From the repository root:
#
#     OUT=results bash benchmarks/gpu_session.sh [seconds, default 570]
#
# Needs python3 with torch and triton, cmake, ninja and pybind11; fetches nothing. Every step writes under $OUT as it
# goes, so a call that is cut short keeps what it had. Steps that fail are named in $OUT/session.json; none stops the rest.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${OUT:?name a folder for the results}"
TOTAL=${1:-570}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
STEPS=()
# LEVI_FAST_TRITON: the kernels are off by default until a session like this one has passed.
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 LEVI_FAST_TRITON=1

left() { echo $((TOTAL - SECONDS)); }

# step NAME LIMIT COMMAND...: runs a command for at most LIMIT seconds, keeps its output and its exit status.
step() {
  local name=$1 limit=$2 status start=$SECONDS
  shift 2
  ((limit > $(left) - 5)) && limit=$(($(left) - 5))
  if ((limit < 10)); then
    status=null
    echo "== $name: left out, no time"
  else
    echo "== $name (at most $limit s)"
    timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    tail -n 15 "$OUT/$name.log"
  fi
  STEPS+=("{\"step\": \"$name\", \"exit_status\": $status, \"seconds\": $((SECONDS - start))}")
  (IFS=,; echo "{\"steps\": [${STEPS[*]}]}") >"$OUT/session.json.part" && mv "$OUT/session.json.part" "$OUT/session.json"
}

step machine 30 "$PYTHON" -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())'
step build 180 "$PYTHON" -m pip install --disable-pip-version-check --no-input --no-index --no-build-isolation --no-deps -e .
step report 30 "$PYTHON" -c 'import levi_fast.kernels as k; print(*k.backend_report().items(), sep="\n")'
# The kernels against float64 first: a figure counts only where its kernel is right. Most of the time is compiling,
# on as many cores as pytest-xdist can be given.
PARALLEL=()
"$PYTHON" -c 'import xdist' 2>/dev/null && PARALLEL=(-n 12)
step test_kernels 200 "$PYTHON" -m pytest -q -p no:cacheprovider "${PARALLEL[@]}" -m "not slow" tests/kernels/triton_cases.py \
  --junit-xml="$OUT/test_kernels.xml"
# All other tests that need a GPU (exit status 5: there are none).
step test_gpu 60 "$PYTHON" -m pytest -q -p no:cacheprovider -m "gpu and not slow" tests/kernels tests/core \
  --deselect tests/kernels/test_triton.py --junit-xml="$OUT/test_gpu.xml"
step bench "$TOTAL" "$PYTHON" benchmarks/gpu/bench.py --output "$OUT/bench.json" --budget $(($(left) - 60 > 20 ? $(left) - 60 : 20))
cat "$OUT/session.json"
