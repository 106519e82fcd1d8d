#!/usr/bin/env bash
# gpu_carry.sh [--build DIR] [--model FILE] FILE.tar.xz [PROGRAM...]: one archive of what tests and measurements need on
# a machine that has a GPU, its driver, cuBLASLt and python3, but neither make nor the other libraries: the programs of
# `tests/run.py --stage gpu` and tools/bench_gpu.sh (and PROGRAMs of DIR, such as tune-cuda) without their symbols for
# debuggers, and in lib/ the shared libraries they ask for, less the C and C++ runtimes and cuBLASLt. There, in a copy
# of the tree:
#
#     tools/bench_gpu.sh FILE.tar.xz                                                  every figure
#     tools/bench_gpu.sh FILE.tar.xz --command 'python3 tests/run.py --stage gpu'     every test
#
# --model  cuts a model into FILE.tar.xz.model.0, .1, ... of 40 MiB, for several journeys: cat them together there
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=build model=
while [ $# -gt 0 ]; do
    case $1 in
    --build) build=$2; shift 2 ;;
    --model) model=$2; shift 2 ;;
    -*) echo "gpu_carry.sh: error: $1 is not an option" >&2; exit 2 ;;
    *) break ;;
    esac
done
[ $# -gt 0 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }
file=$1
shift
programs=(kivi libkivi-cuda.so gpu_engine check-dense check-cuda "$@")
for name in "${programs[@]}"; do
    [ -f "$build/$name" ] && continue
    echo "gpu_carry.sh: error: $build/$name is missing: make all $build/gpu_engine" >&2
    exit 2
done
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
mkdir "$stage/lib"
for name in "${programs[@]}"; do strip --strip-debug -o "$stage/$name" "$build/$name"; done

# What the loader finds for them (ldd fails at a program that is static, such as check-kernels). A C or C++ runtime
# beside another system's loader would not start, and cuBLASLt is larger than everything else.
{ ldd "${programs[@]/#/$stage/}" || true; } | awk '$2 == "=>" && $3 ~ /^\// { print $3 }' | sort -u |
    grep -Ev '/(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|libcublasLt|ld-linux[^/]*)\.so' |
    while read -r path; do cp -L "$path" "$stage/lib/"; done
tar -C "$stage" -cf - . | xz -6 -T2 >"$file"
du -m "$file" | awk '{ print $2 " " $1 " MiB" }'
if [ -n "$model" ]; then
    rm -f "$file".model.*
    split -b 40M -d -a 1 "$model" "$file.model."
    du -m "$file".model.* | awk '{ print $2 " " $1 " MiB" }'
fi
