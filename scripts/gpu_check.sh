#!/usr/bin/env bash
# What a GPU is needed for, in one call that ends within 9 minutes: build, tests, sanitizer, benchmarks.
#   PY=python3 scripts/gpu_check.sh FOLDER
# FOLDER (build/gpu) gets a log of each step and the benchmark's JSON; the exit status is 0 if every step passed.
set -uo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-.venv/bin/python}
OUT=$(realpath -m "${1:-build/gpu}")
mkdir -p "$OUT"
failed=0

# step NAME SECONDS COMMAND...: a failure does not keep the next step from running.
step() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  printf '%s: status %d after %d s\n' "$name" "$status" "$((SECONDS - start))" | tee -a "$OUT/steps.log"
  tail -n 4 "$OUT/$name.log"
  [ "$status" = 0 ] || failed=1
}

{
  git rev-parse HEAD
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || rocm-smi --showproductname
  "$PY" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
} >"$OUT/machine.log" 2>&1
cat "$OUT/machine.log"

step build 120 "$PY" setup.py -q build_ext --inplace
step tests 180 "$PY" -m pytest -m gpu -q -p no:cacheprovider -n 8 tests
# Without the caching allocator, so that every tensor has bounds of its own.
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 50 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$PY" -m pytest -m gpu -q -p no:cacheprovider tests/test_every_loss.py -k 'value_and_gradients and small'
  done
fi
step bench 130 "$PY" -m pytest -q -p no:cacheprovider --benchmark-quiet bench/test_gpu.py
cp bench/results/*-gpu.json build/bench/*-gpu.json "$OUT" 2>/dev/null
exit "$failed"
