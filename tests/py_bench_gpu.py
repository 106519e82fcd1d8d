#!/usr/bin/env python3
"""py_bench_gpu.py: tools/bench_gpu.sh without a GPU: programs that print what the real ones would, known figures in,
the table out; parts that fail, hang or have no time left are named.
"""
import json
import os
import subprocess
import sys

from blackbox import ROOT, SCRATCH, case, finish

FAKE = '''#!%s
import json, os, sys, time
args = sys.argv[1:]
def value(option):
    return args[args.index(option) + 1].split(',')
if args[0] == '--small':
    print('77 passed, 0 failed')
    sys.exit(0)
if args[:2] == ['bench', 'attention']:
    shapes = [(32, 32, 32, 4096), (8, 32, 32, 32768), (32, 32, 8, 8192), (8, 32, 8, 32768), (1, 32, 8, 131072)]
    def row(what, kv='', shape=(0, 0, 0, 0), residual=0, us=100.0, share=0, gbs=0, tflops=0):
        keys = ('n_batch', 'n_heads', 'n_kv_heads', 'n_tokens')
        return dict(zip(keys, shape), what=what, device='cuda:0 none', kv=kv, residual=residual, us=us, bytes=1,
                    gbs=gbs, tflops=tflops, read_share=share)
    rows = [row('read', gbs=3000), row('copy', gbs=2800)]
    if 'decode' in value('--measure'):
        for s in shapes:
            rows += [row('decode', kv, s, us=us, share=sh) for kv, us, sh in
                     (('kivi2', 140, .95), ('kivi2+', 150, .85), ('f16', 700, .99))]
            rows += [row('constant', 'kivi2', s, us=141)]
            rows += [row('window', 'kivi2', s, r, us) for r, us in ((128, 160), (32, 145))]
        for kv in ('kivi2', 'kivi2+'):
            for b in (1, 32):
                rows += [row(what, kv, (b, 32, 32, 256), 128, us=us)
                         for what, us in (('append', 6), ('within', 4), ('close', 20))]
        rows += [row('prompt', '', (1, 32, 32, t), us=1000, tflops=250) for t in (4096, 32768)]
        rows += [row('prompt', 'cudnn', (1, 32, 32, t), us=500, tflops=500) for t in (4096, 32768)]
    else:
        rows += [row('length', 'kivi2', (1, 32, 8, 128 << i), 128, us=5 + i) for i in range(11)]
    print('[\\n' + ',\\n'.join('  ' + json.dumps(r) for r in rows) + '\\n]')
    sys.exit(0)
assert json.load(open(os.path.join(args[1], 'config.json')))['hidden_size'] == 4096
if os.environ.get('KIVI_DISABLE') == 'hangs':
    print('[\\n  {"n_gen": 64, "n_prompt": 0, "n_depth": 128, "n_batch": 1, "avg_ts": 111.0,', end='')
    print(' "median_step_ns": 1, "avg_ns": 1},', flush=True)
    time.sleep(60)
rows = []
for d in value('-d'):
    for b in value('-b'):
        for p in value('-p'):
            if p != '0':
                rows.append(dict(n_prompt=int(p), n_gen=0, n_depth=int(d), n_batch=int(b), avg_ts=20000.0,
                                 avg_ns=250000000, median_step_ns=0))
        for n in value('-n'):
            step = 5000000 if b == '1' else 7500000
            rows.append(dict(n_prompt=0, n_gen=int(n), n_depth=int(d), n_batch=int(b), avg_ts=int(b) * 1e9 / step,
                             avg_ns=int(n) * step, median_step_ns=step))
print('[\\n' + ',\\n'.join('  ' + json.dumps(r) for r in rows) + '\\n]')
''' % sys.executable

FOLDER = os.path.join(SCRATCH, 'programs')
os.makedirs(FOLDER, exist_ok=True)
for name in ('kivi', 'check-cuda'):
    with open(os.path.join(FOLDER, name), 'w') as f:
        f.write(FAKE)
    os.chmod(f.name, 0o755)


def bench(*args):
    r = subprocess.run(['bash', 'tools/bench_gpu.sh', FOLDER, *args], cwd=ROOT, capture_output=True, text=True,
                       timeout=120)
    rows = [[c.strip() for c in line.strip('|').split('|')] for line in r.stdout.split('\n') if line.startswith('| ')]
    left_out = [line[len('left out: '):] for line in r.stdout.split('\n') if line.startswith('left out: ')]
    return r, {row[0]: (row[1], row[2]) for row in rows}, left_out


with case('bench_gpu/figures'):
    r, table, left_out = bench('--only', 'right,attention,decode,whole,lengths')
    assert r.returncode == 0 and not left_out, (r.stdout[-600:], r.stderr)
    expected = {
        'read-only stream, GB/s': ('3000', ''), 'B32 32/32 T4096: kivi2, us': ('140.0', ''),
        'B32 32/32 T4096: kivi2, share of read': ('0.950', '>= 0.90'),
        'B1 32/8 T131072: kivi2, share of read': ('0.950', '>= 0.80'),
        'B32 32/32 T4096: kivi2, times cuDNN': ('-', '>= 5.0'),  # torch was not asked for
        'B32 32/32 T4096: kivi2+, us': ('150.0 *', '<= 140.0'),
        'B8 32/8 T32768: f16, share of read': ('0.990', '>= 0.90'),
        'B8 32/8 T32768: the window of 128 of that': ('0.125', ''),
        'append kivi2 B1 by a launch of its own, us a layer': ('6.00', ''),
        'append kivi2 B1 by attention, us a layer more': ('4.00', ''),
        'append kivi2 B1, share of a step': ('0.0256 *', '<= 0.02'),
        'append kivi2+ B32, share of a step': ('0.0171', '<= 0.02'),
        'page close kivi2+, us for 1,024 pages': ('20.0', ''),
        'page close kivi2+ B1, share of a step, once in 128': ('0.0000', '<= 0.02'),
        'prompt attention T4096, our own kernel, TFLOP/s': ('250', ''),
        "prompt attention T4096, cuDNN's, TFLOP/s": ('500', ''),
        'weights of a step alone, tokens/s at batch 1': ('227.0', ''),
        'decode kivi2 B1 at 128, tokens/s': ('200.0', ''),
        'decode kivi2 B1 at 128, share of that limit': ('0.881', '>= 0.85'),
        'whole run kivi2 B32, 160 in, 338 out, tokens/s': ('3884', ''), 'kivi2 R=128 B1 32/8 T131072, us': ('15.0', ''),
    }
    wrong = {k: table.get(k) for k, v in expected.items() if table.get(k) != v}
    assert not wrong, wrong

with case('bench_gpu/a-part-that-hangs'):
    r, table, left_out = bench('--only', 'decode,without', '--without', 'hangs', '--part-limit', '3')
    assert r.returncode == 1 and len(left_out) == 1 and left_out[0].startswith('without hangs: stopped'), left_out
    assert table['decode kivi2 without hangs B1 at 128, tokens/s'] == ('111.0', ''), table

with case('bench_gpu/command'):
    r, _, _ = bench('--command', 'echo "$KIVI_BUILD"; echo "$LD_LIBRARY_PATH"; exit 7')
    assert r.returncode == 7 and r.stdout.split('\n')[0] == FOLDER and FOLDER + '/lib' in r.stdout, r

with case('bench_gpu/no-time'):
    r, table, left_out = bench('--only', 'attention,torch', '--minutes', '0.1')
    assert r.returncode == 1 and [line.split(':')[0] for line in left_out] == ['attention', 'torch'], left_out
    assert 'takes about' in left_out[0] and table['read-only stream, GB/s'] == ('-', ''), (left_out, table)

with case('bench_gpu/a-part-that-fails'):
    os.remove(os.path.join(FOLDER, 'check-cuda'))
    with open(os.path.join(FOLDER, 'check-cuda'), 'w') as f:
        f.write('#!/bin/sh\necho cannot >&2\nexit 3\n')
    os.chmod(f.name, 0o755)
    r, table, left_out = bench('--only', 'right')
    assert r.returncode == 1 and left_out == ['right: exit status 3: cannot'], left_out

with case('bench_gpu/carry-says-what-is-missing'):
    out = os.path.join(SCRATCH, 'x.tar.xz')
    command = ['bash', 'tools/gpu_carry.sh', '--build', SCRATCH, out]
    r = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 2 and 'kivi is missing' in r.stderr and not os.path.exists(out), r

finish()
