#!/usr/bin/env bash
# One call on a machine with a GPU, inside 10 minutes: build, test, time. From the repository root:
#
#     OUT=results bash benchmarks/gpu_session.sh [seconds, default 570]
#
# Needs python3 with torch and triton, nvcc, cmake, ninja and pybind11; fetches nothing. Every step leaves what it has
# under $OUT, so a call that is cut short keeps it: session.json (exit status of every step), logs.tar.gz, bench.json,
# bench_cuda.json, and <device>.json with tuned launches. A step that fails stops no other. DRY_RUN=1 goes through all
# steps without a GPU, at small sizes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${OUT:?name a folder for the results}"
TOTAL=${1:-570}
PYTHON=${PYTHON:-python3}
DRY_RUN=${DRY_RUN:-0}
mkdir -p "$OUT"
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT
STEPS=()
# Both kinds of GPU kernels are off by default until a session like this one has passed.
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 LEVI_FAST_TRITON=1 LEVI_FAST_CUDA_KERNELS=1
MAX_JOBS=${MAX_JOBS:-$(nproc)}
export MAX_JOBS

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
    timeout --kill-after=5 "$limit" "$@" >"$LOGS/$name.log" 2>&1
    status=$?
    tail -n 15 "$LOGS/$name.log"
  fi
  STEPS+=("{\"step\": \"$name\", \"exit_status\": $status, \"seconds\": $((SECONDS - start))}")
  (IFS=,; echo "{\"steps\": [${STEPS[*]}]}") >"$OUT/session.json.part" && mv "$OUT/session.json.part" "$OUT/session.json"
  tar -C "$LOGS" -czf "$OUT/logs.tar.gz" .
}

# $1 seconds, or all that is left but $2 where that is less; at least 20.
budget() {
  local most=$(($(left) - $2))
  local given=$(($1 < most ? $1 : most))
  echo $((given > 20 ? given : 20))
}

device=(--device cuda)
marks="gpu and not slow"
architecture=90a
if ((DRY_RUN)); then
  device=(--device cpu --quick)
  marks="not slow"
else
  # The one architecture that is here: three would take three times as long to build.
  architecture=$("$PYTHON" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a == 9))')
fi

step machine 60 "$PYTHON" -c 'import torch, triton
print(torch.__version__, triton.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")'
if ((DRY_RUN)); then
  step build 10 echo "left as it is"
else
  step build 120 env LEVI_FAST_CUDA=on LEVI_FAST_CUDA_ARCHITECTURES="$architecture" "$PYTHON" -m pip install \
    --disable-pip-version-check --no-input --no-index --no-build-isolation --no-deps -e .
fi
step report 60 "$PYTHON" -c 'import levi_fast.kernels as k; print(*k.backend_report().items(), sep="\n")'
# The kernels against float64 first: a figure counts only where its kernel is right. Most of the time is compiling,
# on as many cores as pytest-xdist can be given.
PARALLEL=()
((DRY_RUN)) || { "$PYTHON" -c 'import xdist' 2>/dev/null && PARALLEL=(-n 12); }
tests=("$PYTHON" -m pytest -q -p no:cacheprovider "${PARALLEL[@]}")
# CUDA C++ first: it is compiled already. Then both backends through the public functions, graphs and large sizes.
step test_cuda 60 "${tests[@]}" -m "$marks" tests/kernels/test_cuda.py --junit-xml="$LOGS/test_cuda.xml"
if ((DRY_RUN)); then
  export TRITON_INTERPRET=1
fi
step test_triton 150 "${tests[@]}" -m "not slow" tests/kernels/triton_cases.py --junit-xml="$LOGS/test_triton.xml"
unset TRITON_INTERPRET
step test_devices 80 "${tests[@]}" -m "$marks" tests/kernels/test_devices.py --junit-xml="$LOGS/test_devices.xml"
# The training loop: taps on the device, steps replayed as graphs. Needs transformers and accelerate too.
step test_training 60 "${tests[@]}" -m "$marks" tests/training/test_graphed_step.py tests/training/test_device_bank.py \
  --junit-xml="$LOGS/test_training.xml"
step bench "$TOTAL" "$PYTHON" benchmarks/gpu/bench.py "${device[@]}" --output "$OUT/bench.json" --budget "$(budget 400 120)"
# CUDA C++ alone, as a machine without Triton has it: no Python between a call and its kernels.
LEVI_FAST_TRITON=0 step bench_cuda "$TOTAL" "$PYTHON" benchmarks/gpu/bench.py "${device[@]}" \
  --output "$OUT/bench_cuda.json" --budget "$(budget 50 60)"
# Launch configurations for this GPU, for kernels/configs; what is left of the time.
((DRY_RUN)) && export TRITON_INTERPRET=1
step tune "$TOTAL" "$PYTHON" benchmarks/gpu/tune.py "${device[@]}" --output "$OUT" --budget "$(budget 300 15)"
cat "$OUT/session.json"
