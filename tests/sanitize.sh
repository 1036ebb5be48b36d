#!/usr/bin/env bash
# The tests of the ops with AddressSanitizer and UndefinedBehaviorSanitizer in the native library:
# a read or write outside of a tensor or of the scratch, a misaligned or overflowing access stops
# the run. Uses the python of the environment, with torch, ninja, pybind11, setuptools and pytest.
#
#   tests/sanitize.sh                              # all instruction sets, 60 random cases per op
#   tests/sanitize.sh --fuzz-cases 400             # options go to pytest
#   tests/sanitize.sh tests/codec -k bitmask       # paths replace the default ones
#   SANITIZE_DIR=/tmp/sanitized tests/sanitize.sh  # keeps the build there for the next run
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cxx=${CXX:-g++}
if [[ -n ${SANITIZE_DIR:-} ]]; then
  mkdir -p "$SANITIZE_DIR"
  work=$(cd "$SANITIZE_DIR" && pwd)
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi

# Left out: torch's own machinery (opcheck, compilation, export), which adds no kernel and takes
# most of the time; and the memory a call takes, which the sanitizer's heap counts differently.
paths=() options=()
for argument in "$@"; do
  if [[ $argument != -* && -e ${argument%%::*} ]]; then
    paths+=("$(realpath "${argument%%::*}")${argument#"${argument%%::*}"}")
  else
    options+=("$argument")
  fi
done
if ((${#paths[@]} == 0)); then
  for path in "$root"/tests/{ops,formats,codec}/test_*.py; do
    [[ $path == *_torch.py || $path == *_memory.py || $path == */test_reference.py ]] ||
      paths+=("$path")
  done
fi

rm -rf "$work"/{csrc,_build,site} && mkdir -p "$work/site" "$work/sparsecnn"
# With their dates, for a build that is kept; not over its libraries.
cp -rp "$root"/{csrc,_build,setup.py,pyproject.toml,README.md} "$work/"
find "$work/sparsecnn" -name "*.py" -delete
(cd "$root" && find sparsecnn -type f ! -name "*.so" ! -path "*/__pycache__/*" -print0 |
  xargs -0 cp -p --parents -t "$work")
# Through a folder of its own: the tests take the repository's root off the path.
ln -s "$work/sparsecnn" "$work/site/sparsecnn"

flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1"
# The kernels pass undefined vector registers on purpose; vptr needs type information torch hides.
flags+=" -fno-sanitize=vptr"
(cd "$work" && SPARSECNN_CUDA=0 CXXFLAGS="$flags" python setup.py -q build_ext --inplace \
  --build-temp "$work/build" >"$work/log" 2>&1) || { cat "$work/log"; exit 1; }

# Python itself is not instrumented: the runtimes must be there before the library is loaded.
preload="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libubsan.so)"
cd "$root"
# A freed tensor's memory is kept from reuse here, on which one test is built.
options+=(--deselect tests/ops/test_csr_conv2d_program.py::test_memory_reused_by_another_weight)
# Torch and Python keep memory to the end of the process; their leaks are not ours to find. An
# allocation that is too large must fail as it does without the sanitizer. The report of a finding
# goes to the file descriptor itself, which pytest must not capture: nobody would print it. Threads
# wait asleep: the tests use more of them than there may be cores.
LD_PRELOAD="$preload" OMP_WAIT_POLICY=passive UBSAN_OPTIONS=print_stacktrace=1 \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1 \
  PYTHONPATH="$work/site" \
  python -m pytest -p no:cacheprovider --capture=sys --fuzz-cases 60 "${options[@]}" "${paths[@]}"
