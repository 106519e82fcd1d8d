#!/usr/bin/env bash
# run.sh [OPTION...]: from a bare machine to text. Installs, builds, fetches the small model, answers tools/prompt.txt
# with the 2-bit cache. Options go to `kivi run`, behind ours.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=${BUILD:-build}

tools/deps.sh build model
mkdir -p "$build"
# A working build has nothing to say to someone who wants to see a model speak.
make -j"$(nproc)" all >"$build/build.log" 2>&1 || {
    tail -n 40 "$build/build.log" >&2
    echo "kivi: error: the build failed; the whole log is $build/build.log" >&2
    exit 1
}
model=$(tools/fetch_model.sh smollm2)
exec "$build/kivi" run "$model" --kv kivi2 -f tools/prompt.txt -n 128 --temp 0 "$@"
