#!/usr/bin/env python3
"""aarch64.py: the other architecture, without such a machine. All sources compile for it; build/aarch64/check-kernels
(by Debian's cross compiler) passes under qemu-aarch64; and the bytes of every kernel are those of this machine. qemu is
some twenty times slower, so the tests of the cache that do not depend on an instruction set are left out. Says `skip`
where the compiler or qemu is missing."""
import concurrent.futures
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.environ.get('KIVI_BUILD') or 'build'
CC, QEMU = 'aarch64-linux-gnu-gcc', 'qemu-aarch64'
OTHER = f'{BUILD}/aarch64/check-kernels'
SETS = ('scalar', 'neon', 'neondot')
# Longest first: two run at a time. Attention goes without scalar, whose cases spend their time in the oracle: scalar's
# bytes are compared all the same, with those of each set here and with this machine's in the digests.
PARTS = [['--test=attn/', '--isa=neon'], ['--test=attn/', '--isa=neondot'], ['--test=cache/isa/'], ['--test=quant/'],
         ['--test=save/'], ['--test=dense/'], ['--test=base/'], ['--test=memory/'], ['--test=workers/'],
         ['--test=pack/'], ['--test=plus/'], ['--test=kinds/'], ['--test=cpu/']]
LEFT_OUT = {'memory/poisoned'}  # this build has no KI_DEBUG; nothing else may be skipped
failures = 0


def ok(name):
    print(f'ok {name}', flush=True)


def fail(name, why):
    global failures
    failures += 1
    print(f'not ok {name}: {why}', flush=True)


def run(command):
    p = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return p.returncode, p.stdout


def sources():
    code, text = run(['make', 'aarch64-syntax'])
    if code:
        print(text)
        fail('sources', f'{CC} refuses some')
    else:
        ok('sources')


def digests(command):
    code, text = run([*command, '--digest'])
    found = {}
    for line in text.split('\n'):
        words = line.split()
        if len(words) == 4 and words[0] == 'digest':
            found.setdefault(words[1], {})[words[2]] = words[3]
        elif words:
            fail('digest', f'{command[-1]} says: {line}')
    if code or not found:
        fail('digest', f'{command[-1]}: exit status {code}, {len(found)} numbers')
    return found


def compare(here, there):
    for name in sorted(here.keys() | there.keys()):
        a, b = here.get(name, {}), there.get(name, {})
        missing = [s for s in SETS if s not in b] + ([] if 'scalar' in a else ['scalar here'])
        want = a.get('scalar')
        wrong = [f'{s} here' for s in a if a[s] != want] + [s for s in b if b[s] != want]
        if missing or wrong:
            fail(f'digest/{name}', f'no number from {missing}' if missing else f'other bytes from {", ".join(wrong)}')
        else:
            ok(f'digest/{name}')


def part(options):
    return options, *run([QEMU, OTHER, *options])


def main():
    os.chdir(ROOT)
    for tool in (CC, QEMU):
        if not shutil.which(tool):
            print(f'skip aarch64: {tool} is not installed')
            return 0
    code, text = run(['make', '-j2', f'BUILD={BUILD}', f'{BUILD}/check-kernels', OTHER])
    if code:
        print(text)
        fail('build', OTHER)
        return 1
    ok('build')
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        there = pool.submit(digests, [QEMU, OTHER])
        parts = [pool.submit(part, p) for p in PARTS]
        sources()
        here = digests([f'{BUILD}/check-kernels'])
        for future in parts:
            options, code, text = future.result()
            lines = text.rstrip().split('\n')
            print('\n'.join(lines[:-1]))
            skipped = {line.split()[1].rstrip(':') for line in lines if line.startswith('skip ')}
            end = f' 0 failed, {len(skipped)} skipped'
            if code or not lines[-1].endswith(end) or lines[-1].startswith('0 ') or not skipped <= LEFT_OUT:
                fail(' '.join(options), f'exit status {code}, last line: {lines[-1]}')
        compare(here, there.result())
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(main())
