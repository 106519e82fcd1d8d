#!/usr/bin/env bash
# test.sh [OPTION...]: everything there is to test; options go to tests/run.py. The last line is the count.
# KIVI_TEST_QUICK=1 leaves out the sanitizer, valgrind and aarch64 stages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=${BUILD:-build}

tools/deps.sh build test model
mkdir -p "$build"
make -j2 all tests emulated >"$build/build.log" 2>&1 || {
    tail -n 40 "$build/build.log" >&2
    echo "kivi: error: the build failed; the whole log is $build/build.log" >&2
    echo "0 passed, 1 failed, 0 skipped"
    exit 1
}

# Without a network the tests that need the model say that they were skipped. A file of wrong content is no such case.
code=0
model=$(tools/fetch_model.sh smollm2) || code=$?
[ "$code" -ne 3 ] || { echo "0 passed, 1 failed, 0 skipped"; exit 1; }
if [ -n "$model" ]; then export KIVI_TEST_MODEL=$model; else unset KIVI_TEST_MODEL; fi

# A python3 put before the system's may lack the numpy that deps.sh made sure of.
python=python3
"$python" -c 'import numpy' 2>/dev/null || python=/usr/bin/python3
KIVI_BUILD=$build exec "$python" tests/run.py "$@"
