#!/usr/bin/env bash
# What a GPU is needed for, in one call that ends within 10 minutes: build, tests, sanitizer, cold start, benchmarks.
# Written where there was no GPU; what it shows is for its first run to say.
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

# The kernels for the card that is here alone; sm_90 and sm_100 have instructions of their own under a name with an a.
card=sm_$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')
case $card in sm_90 | sm_100) card=${card}a ;; esac
export TLKERNELS_CUDA=1 TLKERNELS_CUDA_ARCHS=$card
step build 120 "$PY" setup.py -q build_ext --inplace
step built 15 "$PY" -c 'import torch; from tlkernels import _C; print(_C.build_info()); assert _C.build_info()["cuda"]'
step tests 120 "$PY" -m pytest -q -p no:cacheprovider -n 8 -k 'triton or cuda' tests
# The native kernels on a small grid, without the caching allocator, so that every tensor has bounds of its own.
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$PY" -m pytest -q -p no:cacheprovider tests/test_cuda.py -k small
  done
else
  printf 'memcheck, racecheck, initcheck: no compute-sanitizer, NOT RUN\n' | tee -a "$OUT/steps.log"
  failed=1
fi
step cold_start 45 "$PY" -m bench.cold_start
step bench 120 "$PY" -m pytest -q -p no:cacheprovider --benchmark-quiet bench/test_gpu.py
cp bench/results/*-gpu.json build/bench/*-gpu.json "$OUT" 2>/dev/null
exit "$failed"
