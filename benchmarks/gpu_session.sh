#!/usr/bin/env bash
# Everything that needs a GPU, in one run of under eight minutes: build for this GPU, GPU tests, GPU benchmarks.
# Needs a Python with torch (CUDA), triton, pytest, pybind11, typer, rich, safetensors and numpy; nvcc; a C++ compiler.
# Leaves under $OUT (default: ./gpu_session): log, junit.xml, results/*.csv with tests.csv, and both documents.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-$PWD/gpu_session}
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-460}
mkdir -p "$OUT/results"
exec > >(tee "$OUT/log") 2>&1
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
status=0

step() { printf '\n=== %s (%s s of %s)\n' "$1" "$SECONDS" "$BUDGET"; }
# What is left of the budget, at most $1 seconds.
left() { local rest=$((BUDGET - SECONDS)); echo $((rest < $1 ? (rest > 1 ? rest : 1) : $1)); }
run() {
  local limit=$1
  shift
  timeout "$(left "$limit")" "$@"
  local code=$?
  if [ $code -ne 0 ]; then
    echo "FAILED with exit code $code: $*"
    status=1
  fi
  return $code
}

step "machine"
if ! command -v nvidia-smi >/dev/null || ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "no GPU here, or this torch has no CUDA: nothing to do"
  exit 1
fi
nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv || status=1
"$PYTHON" -c "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())" || exit 1
nvcc --version | tail -n 1

step "build for the GPU here"
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
run 200 cmake -S . -B "$build" -DREPKERN_CUDA=on -DCMAKE_BUILD_TYPE=Release -DPYBIND11_FINDPYTHON=ON \
  -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" \
  -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/repkern" || exit 1
run 200 cmake --build "$build" --target _C -j "$(nproc)" || exit 1

step "tests on the GPU"
run 150 "$PYTHON" -m pytest -q --maxfail=20 -k "cuda" python_tests/test_all_ops.py python_tests/ops \
  python_tests/benchmarks \
  --junitxml="$OUT/junit.xml"
[ -f "$OUT/junit.xml" ] && run 30 "$PYTHON" benchmarks/record_tests.py "$OUT/junit.xml" --output "$OUT/results/tests.csv"

bench() { run "$1" "$PYTHON" -m repkern.cli.main bench "${@:2}" --device cuda --output "$OUT/results"; }
step "ops, cuda and triton, eager launches"
bench 150 ops --baseline eager --baseline conv2d --pairs 9
step "ops in CUDA graphs"
bench 90 ops --baseline eager --backend cuda --cuda-graph --pairs 9
step "training step"
bench 60 train --grouped --pairs 5
step "3x3 convolutions, against cuDNN in both memory formats"
for precision in fp32 tf32 fp16; do
  bench 40 conv --precision $precision --pairs 7
done
step "deployed networks, against cuDNN in both memory formats"
for precision in fp32 tf32 fp16; do
  bench 40 infer repvgg_a0 repvgg_b1 --precision $precision --rivals eager --rivals eager-last --pairs 7
done
step "ops under torch.compile"
bench 120 ops --baseline compile --backend cuda --filter c --pairs 5

step "documents"
run 20 "$PYTHON" benchmarks/make_docs.py --results "$OUT/results" --output "$OUT"
step "done, status $status"
exit $status
