#!/usr/bin/env bash
# Everything that only a GPU can show, on any machine with one: nvcc, a CUDA build of torch, numpy,
# scipy, rich, safetensors, ninja, pybind11, setuptools and pytest in the environment of `python`
# (the models need timm).
#
#   bench/gpu.sh                 # all parts, one after the other: within 25 minutes
#   bench/gpu.sh build           # the package with its CUDA kernels, for the GPU that is there
#   bench/gpu.sh test            # all tests on the device
#   bench/gpu.sh sanitize        # compute-sanitizer: memcheck and racecheck of every kernel
#   bench/gpu.sh layers          # the suites of layers, batch 1 and 32
#   bench/gpu.sh models          # whole networks
#   RESULTS=DIR bench/gpu.sh layers   # somewhere else than bench/results
#
# A part that takes more than nine minutes is stopped; what it has written so far stays. Results are
# files ready to commit, <gpu>_<suite>_<dtype>_batch<N>.json, written from a clean clone only: their
# stamp names the commit.
set -euo pipefail
cd "$(dirname "$0")/.."
results=$(realpath "${RESULTS:-bench/results}")
part_seconds=540

build() {
  local capability
  capability=$(python -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  [[ $capability == 90 ]] && capability=90a
  SPARSECNN_CUDA=1 SPARSECNN_CUDA_ARCH=$capability pip install -q --no-build-isolation --no-deps .
  (cd / && python -c 'import sparsecnn; info = sparsecnn.build_info(); print(info); assert info["cuda_kernels"]')
}

tests() {
  python -m pytest -p no:cacheprovider -k cuda --ignore=tests/cuda_emu \
    tests/ops tests/nn tests/accelerate tests/measure
}

sanitize() {
  local tool
  for tool in memcheck racecheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 \
      python -m pytest -p no:cacheprovider tests/ops/test_cuda_kernels.py
  done
}

gpu_name() {
  python -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()))'
}

suite() {  # suite, dtype, batch, options
  local name file
  name=$(gpu_name)
  file="$results/${name}_$1_$2_batch$3${4:+_${4#--}}.json"
  echo "== $file"
  # shellcheck disable=SC2086
  python bench/run.py "$1" --device cuda --dtype "$2" --batch "$3" ${4:-} --json "$file" "${@:5}"
}

layers() {
  local batch
  for batch in 1 32; do
    suite depthwise float16 $batch --cold
    suite chain float16 $batch --cold
    suite pointwise float16 $batch --cold
    suite csr float32 $batch "" --density 0.2 0.1 0.05
    suite winograd float32 $batch "" --density 1.0 0.2
    suite pattern float16 $batch "" --density 0.5 0.25 0.1
  done
  suite csr float32 32 --tf32 --density 0.1 0.05
}

models() {
  suite models float32 1 "" --layers mobilenetv2_100 resnet50 --density 1.0 0.1
  suite models float16 32 "" --layers mobilenetv2_100 resnet50 --density 1.0 0.1
}

parts=("$@")
((${#parts[@]})) || parts=(build test sanitize layers models)
if ((${#parts[@]} == 1)) && [[ ${GPU_PART:-} == "${parts[0]}" ]]; then
  case ${parts[0]} in
    build) build ;;
    test) tests ;;
    sanitize) sanitize ;;
    layers) layers ;;
    models) models ;;
  esac
  exit
fi
status=0
for part in "${parts[@]}"; do
  case $part in
    build | test | sanitize | layers | models) ;;
    *) echo "bench/gpu.sh: expected build, test, sanitize, layers or models, got $part" >&2; exit 2 ;;
  esac
done
for part in "${parts[@]}"; do
  echo "=== $part"
  GPU_PART=$part timeout "$part_seconds" bash bench/gpu.sh "$part" || { echo "=== $part failed ($?)"; status=1; }
done
exit $status
