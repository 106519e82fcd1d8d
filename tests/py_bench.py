#!/usr/bin/env python3
"""py_bench.py: what `kivi bench` prints: fields, formats, refusals. No timing decides."""
import csv
import io
import json
import math
import os
import re
import subprocess
import sys

from blackbox import GOLDEN, ROOT, SCRATCH, bad, case, finish, good, kivi

SMALL = os.path.join(GOLDEN, 'llama-gqa')
# name, the kinds of keys and values that its rows tell
TYPES = {'f16': ('f16', 'f16'), 'kivi2': ('kivi2', 'kivi2'), 'kivi2+': ('kivi2+', 'kivi2+'),
         'k4v2+': ('kivi4+', 'kivi2+'), 'k4v3+': ('kivi4+', 'kivi3+')}
KINDS = tuple(TYPES)
COMMON = ('--kv', ','.join(KINDS), '-p', '40,0', '-n', '3', '-d', '0,130', '-b', '1,3', '-r', '2',
          '--threads', '2')
TEXT = 'build_commit cpu_info isa model_filename model_type kv type_k type_v test_time'.split()
WHOLE = '''model_size model_n_params n_ubatch n_threads n_batch n_prompt n_gen n_depth kv_bytes
           avg_ns stddev_ns median_step_ns'''.split()
REAL = ['avg_ts', 'stddev_ts']
SAMPLES = ['samples_ns', 'samples_ts']
# (kv, n_depth, n_batch, n_prompt, n_gen) in the order of the rows; a prompt of 0 tokens is no test
TESTS = [(kv, d, b, p, n) for kv in KINDS for d in (0, 130) for b in (1, 3)
         for p, n in ((40, 0), (0, 3))]
KEYS = ('kv', 'n_depth', 'n_batch', 'n_prompt', 'n_gen')


def bench(form, *more):
    return good('bench', SMALL, *COMMON, '-o', form, *more).text


def close(a, b, share=1e-3):
    return math.isclose(a, b, rel_tol=share, abs_tol=2)


def check_row(row):
    """A test against itself: averages are those of the samples, speeds those of the times."""
    tokens = row['n_batch'] * (row['n_prompt'] + row['n_gen'])
    times, speeds = row['samples_ns'], row['samples_ts']
    assert len(times) == len(speeds) == 2 and min(times) > 0, row
    for time, speed in zip(times, speeds):
        expected = tokens * 1e9 / time
        assert math.isclose(speed, expected, rel_tol=1e-3), f'{speed}, expected {expected}'
    assert close(row['avg_ns'], sum(times) / 2), row
    assert close(row['avg_ts'], sum(speeds) / 2), row
    assert close(row['stddev_ns'], abs(times[0] - times[1]) / math.sqrt(2)), row
    assert close(row['stddev_ts'], abs(speeds[0] - speeds[1]) / math.sqrt(2)), row
    steps = row['median_step_ns'] * row['n_gen']
    assert steps == 0 if row['n_prompt'] else 0 < steps <= 2 * 3 * max(times), row


def kv_bytes(kv, n_tokens):
    info = json.loads(good('info', SMALL, '--ctx', n_tokens, '--kv', kv, '--json').text)
    plan = info['memory_plan'][0]['bytes']
    return plan['kv_codes'] + plan['kv_scales'] + plan['kv_residual']


rows = []
with case('bench/json'):
    rows = json.loads(bench('json'))
    assert [tuple(r[k] for k in KEYS) for r in rows] == TESTS, [[r[k] for k in KEYS] for r in rows]
    for r in rows:
        assert sorted(r) == sorted(TEXT + WHOLE + REAL + SAMPLES), sorted(r)
        assert all(isinstance(r[k], str) and r[k] for k in TEXT), r
        assert all(isinstance(r[k], int) and r[k] >= 0 for k in WHOLE), r
        assert all(isinstance(r[k], (int, float)) for k in REAL), r
        check_row(r)

with case('bench/model'):
    for r in rows:
        assert r['model_filename'] == SMALL and r['n_threads'] == 2 and r['n_ubatch'] == 512, r
        assert re.fullmatch(r'llama 0\.5M BF16', r['model_type']), r['model_type']
        assert (r['type_k'], r['type_v']) == TYPES[r['kv']], r
        assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ', r['test_time']), r['test_time']

with case('bench/kv-bytes'):
    assert rows
    for r in rows:
        one = kv_bytes(r['kv'], r['n_depth'] + r['n_prompt'] + r['n_gen'])
        assert r['kv_bytes'] == r['n_batch'] * one, f"{r['kv_bytes']}, one sequence takes {one}"

with case('bench/bits-apart'):
    r, = json.loads(good('bench', SMALL, '-p', '0', '-n', '1', '-r', '1', '--kv', 'k4v2',
                         '-o', 'json').text)
    assert (r['type_k'], r['type_v'], r['stddev_ns']) == ('kivi4', 'kivi2', 0), r

with case('bench/threads'):
    # each number an engine of its own; of several the cache is filled once and saved, which leaves no file
    left = os.path.join(SCRATCH, 'bench-left')
    os.mkdir(left)
    args = ('bench', SMALL, '-p', '0', '-n', '2', '-r', '1', '-b', '1,2', '-d', '0,130', '-o', 'json')
    found = json.loads(good(*args, '-t', '1,3,2', env={'TMPDIR': left}).text)
    assert [(r['n_depth'], r['n_threads'], r['n_batch']) for r in found] == \
        [(d, t, b) for d in (0, 130) for t in (1, 3, 2) for b in (1, 2)], found
    assert not os.listdir(left), os.listdir(left)
    r = kivi(*args, '-t', '1,2', env={'TMPDIR': os.path.join(left, 'nowhere')})
    assert r.code == 5 and 'nowhere' in r.errors, str(r)  # after the rows at depth 0

with case('bench/jsonl'):
    lines = [json.loads(line) for line in bench('jsonl').splitlines()]
    assert [tuple(r[k] for k in KEYS) for r in lines] == TESTS
    assert sorted(lines[0]) == sorted(TEXT + WHOLE + REAL + SAMPLES)

with case('bench/csv'):
    lines = list(csv.DictReader(io.StringIO(bench('csv'))))
    assert sorted(lines[0]) == sorted(TEXT + WHOLE + REAL), sorted(lines[0])
    assert [tuple([r['kv'], *(int(r[k]) for k in KEYS[1:])]) for r in lines] == TESTS
    assert all(None not in r and None not in r.values() for r in lines), 'fields are missing'
    assert all(float(r['avg_ts']) > 0 for r in lines)

with case('bench/md'):
    lines = bench('md').splitlines()
    table = [[cell.strip() for cell in line.strip('|').split('|')]
             for line in lines if line.startswith('|')]
    assert table[0] == ['model', 'size', 'params', 'threads', 'kv', 'test', 't/s'], table[0]
    assert all(re.fullmatch(':?-+:?', cell) for cell in table[1]), table[1]
    names = [(row[4], row[5]) for row in table[2:]]
    assert names == [(kv, ('pp40' if p else 'tg3') + (f' @ d{d}' if d else '')
                      + (f', b{b}' if b > 1 else '')) for kv, d, b, p, n in TESTS], names
    for row in table[2:]:
        assert re.fullmatch(r'[\d.]+ \u00b1 [\d.]+', row[6]), row
        assert row[:4] == ['llama 0.5M BF16', '0.96 MiB', '0.50 M', '2'], row
    assert lines[-1].startswith('kivi '), lines[-1]

with case('bench/quiet'):
    r = good('bench', SMALL, '-p', '8', '-n', '0', '-r', '1', '-o', 'csv')
    assert r.errors == '', f'progress without a terminal: {r.errors!r}'

with case('bench/refusals'):
    bad(2, 'bench', SMALL, '-o', 'xml', says="'xml', expected md, csv, json or jsonl")
    bad(2, 'bench', SMALL, '-p', '0', '-n', '0', '-o', 'json', says='nothing to time')
    bad(2, 'bench', SMALL, '--kv', 'f16,nope', '-o', 'json', says="'nope'")
    bad(2, 'bench', SMALL, '--ctx', '100', says='--ctx: 100, these tests take 640')
    bad(2, 'bench', SMALL, '-b', '0', says='-b')
    bad(2, 'bench', SMALL, '-b', '1000', says='-b')
    bad(2, 'bench', SMALL, '-r', '0', says='-r')
    bad(2, 'bench', SMALL, '-t', '2,0', says='-t')
    bad(2, 'bench', SMALL, '--group', '48', '-o', 'json', says='group 48')
    bad(5, 'bench', os.path.join(GOLDEN, 'nothing-here'), says='nothing-here')

with case('bench/full-disk'), open('/dev/full', 'wb') as full:
    r = kivi('bench', SMALL, '-p', '8', '-n', '0', '-r', '1', '-o', 'jsonl', stdout=full)
    assert r.code == 5 and 'standard output' in r.errors, str(r)


def compare(*args):
    tool = os.path.join(ROOT, 'tools', 'compare_llama.py')
    return subprocess.run([sys.executable, tool, *args], capture_output=True, text=True, timeout=60)


with case('compare/help'):
    r = compare('--help')
    assert r.returncode == 0 and '--quick' in r.stdout, r
    r = compare('--kinds', 'llama:q9')
    assert r.returncode == 2 and 'q9' in r.stderr, r

with case('bench/attention-refusals'):
    def refused(*args, says):
        bad(2, 'bench', 'attention', *args, says=says)
    refused('--device', 'cpu', says="device 'cpu', expected cuda or cuda:N, a GPU's")
    refused('--device', 'gpu', says="device 'gpu', expected auto, cpu, cuda or cuda:N")
    refused(SMALL, says='bench attention has no model')
    refused('-o', 'csv', says="'csv', expected md or json")
    refused('-H', '32/5', says="'32/5', expected query heads over KV heads")
    refused('-H', '32', says="'32', expected query heads over KV heads")
    refused('-d', '200', says='200 tokens, expected a multiple of 128')
    refused('--measure', 'decode,speed',
            says="'speed', expected decode, constant, window, length, append, within, close, prompt or all")
    refused('--kv', 'kivi2,kivi3', says="'kivi3', expected f16, kivi8")
    refused('--kv', ','.join(['kivi2'] * 17), says='at most 16 kinds')
    bad(2, 'bench-attention', '--group', '32', says="unknown option '--group'")

finish()
