#!/usr/bin/env bash
# gpu_carry.sh [--build DIR] [--pack] [--model FILE] FOLDER [PROGRAM...]: fills FOLDER with what the tests on a GPU need
# on a machine that has the driver, cuBLASLt and python3 with numpy, but neither make nor the libraries: the programs of
# `tests/run.py --stage gpu` (and PROGRAMs of DIR, such as bench-cuda) without their symbols for debuggers, and in
# FOLDER/lib the shared libraries they ask for, less the C and C++ runtimes and cuBLASLt. There, in a copy of the tree:
#
#     KIVI_BUILD=FOLDER LD_LIBRARY_PATH=FOLDER/lib:/usr/local/cuda/lib64 python3 tests/run.py --stage gpu
#
# --pack   leaves one archive, FOLDER/carry.tar.gz (device code packs to a third): tar -xzf it in FOLDER first
# --model  cuts FILE into FOLDER.model.0, .1, ... of 40 MiB, for several journeys: cat FOLDER.model.* > there
# The folder should be one that git does not see.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=build pack= model=
while [ $# -gt 0 ]; do
    case $1 in
        --build) build=$2; shift 2 ;;
        --pack) pack=1; shift ;;
        --model) model=$2; shift 2 ;;
        -*) echo "gpu_carry.sh: error: $1 is not an option" >&2; exit 2 ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }
folder=$1
shift
programs=(kivi libkivi-cuda.so gpu_engine check-dense check-cuda "$@")

for name in "${programs[@]}"; do
    [ -f "$build/$name" ] && continue
    echo "gpu_carry.sh: error: $build/$name is missing: make all $build/gpu_engine" >&2
    exit 2
done
[ ! -e "$folder" ] || [ -e "$folder/.carried" ] ||
    { echo "gpu_carry.sh: error: $folder exists and was not made by this script" >&2; exit 2; }
rm -rf "$folder"
mkdir -p "$folder/lib"
: >"$folder/.carried"
for name in "${programs[@]}"; do strip --strip-debug -o "$folder/$name" "$build/$name"; done

# What the loader finds for them. A C or C++ runtime beside another system's loader would not start, and cuBLASLt is
# larger than everything else.
ldd "${programs[@]/#/$folder/}" | awk '$2 == "=>" && $3 ~ /^\// { print $3 }' | sort -u |
    grep -Ev '/(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|libcublasLt|ld-linux[^/]*)\.so' |
    while read -r path; do cp -L "$path" "$folder/lib/"; done

if [ -n "$model" ]; then
    rm -f "$folder".model.*
    split -b 40M -d -a 1 "$model" "$folder.model."
    ls -l "$folder".model.* | awk '{ printf "%s %.1f MiB\n", $NF, $5 / 1048576 }'
fi
if [ -n "$pack" ]; then
    tar -C "$folder" -cf - --exclude .carried --exclude carry.tar.gz . | gzip -6 >"$folder.tar.gz"
    rm -rf "$folder"
    mkdir "$folder"
    : >"$folder/.carried"
    mv "$folder.tar.gz" "$folder/carry.tar.gz"
fi
du -sm "$folder" | awk '{ print $2 " " $1 " MiB" }'
