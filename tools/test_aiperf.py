#!/usr/bin/env python3
"""test_aiperf.py: `aiperf` and `kivi bench serve` load one server; both must report what the server itself measured.

  test_aiperf.py MODEL.gguf PYTHON [--requests 24] [--at-once 4]

PYTHON is an interpreter with aiperf beside it (pip install aiperf). MODEL's tokenizer is written for it
as a folder.
The two cannot be set against each other directly: aiperf's processes take their share of a small machine. So each is
set against the server's own histograms of the same run. One line a figure; exit 1 where means differ by more than 5%
and 5 ms (the server does not see what passes before a request is whole and after its last byte is handed over).
Of p50 and p99 the server knows between which bounds of its histogram they are: exit 1 where one is further outside than
10% and 10 ms (a single token may find the client's process waiting for a core; its mean does not show that)."""
import argparse
import glob
import json
import math
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, 'tests'))
from serve_client import Server  # noqa: E402
import convert_files  # noqa: E402
import vocab_files  # noqa: E402

KIVI = os.path.join(ROOT, os.environ.get('KIVI_BIN') or 'build/kivi')
FIGURES = [('time_to_first_token', 'time_to_first_token_seconds', 'ttft'),
           ('inter_token_latency', 'inter_token_latency_seconds', 'tpot'),
           ('request_latency', 'e2e_request_latency_seconds', 'e2el')]
# The same for percentiles. One latency between tokens is each request's mean, the other is of each token.
SPREAD = [('time_to_first_token', 'time_to_first_token_seconds', 'ttft'),
          ('inter_token_latency', 'request_time_per_output_token_seconds', 'tpot'),
          ('inter_chunk_latency', 'inter_token_latency_seconds', 'itl')]
PERCENTILES = {50: 'median', 99: 'p99'}  # as bench serve calls them


def write_tokenizer(folder, model):
    keys = vocab_files.Gguf(model).keys

    def text(x):
        return x.decode() if isinstance(x, bytes) else x
    vocab = {text(t): i for i, t in enumerate(keys['tokenizer.ggml.tokens'])}
    tokenizer = {'version': '1.0', 'added_tokens': [], 'normalizer': None,
                 'pre_tokenizer': convert_files.CUTS['smollm'], 'post_processor': None,
                 'decoder': convert_files.byte_level(True),
                 'model': {'type': 'BPE', 'vocab': vocab,
                           'merges': [text(m).split(' ') for m in keys['tokenizer.ggml.merges']]}}
    for name, value in (('tokenizer.json', tokenizer), ('config.json', {'model_type': 'llama'}),
                        ('tokenizer_config.json', {'tokenizer_class': 'PreTrainedTokenizerFast',
                                                   'eos_token': '<|im_end|>'})):
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
            json.dump(value, f, ensure_ascii=False)


def aiperf(o, url, folder):
    out = os.path.join(folder, 'out')
    command = [os.path.join(os.path.dirname(o.python), 'aiperf'), 'profile', '-m', 'm', '--url', url, '--endpoint-type',
               'completions', '--streaming', '--tokenizer', folder, '--concurrency', str(o.at_once), '--request-count',
               str(o.requests), '--isl', '64', '--osl', '48', '--extra-inputs', 'ignore_eos:true', '--extra-inputs',
               'temperature:0', '--use-server-token-count', '--ui', 'none', '--artifact-dir', out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    found = glob.glob(os.path.join(out, '**', 'profile_export_aiperf.json'), recursive=True)
    assert done.returncode == 0 and found, done.stdout[-1500:] + done.stderr[-1500:]
    with open(found[0]) as f:
        figures = json.load(f)
    return ([figures[name]['avg'] for name, _, _ in FIGURES],
            [figures[name][f'p{p}'] for name, _, _ in SPREAD for p in PERCENTILES])


def bench(o, url, _):
    done = subprocess.run([KIVI, 'bench', 'serve', url, '-n', str(o.requests), '-c', str(o.at_once),
                           '--input-len', '64', '--output-len', '48', '-o', 'json'],
                          capture_output=True, text=True, timeout=280, check=True)
    figures = json.loads(done.stdout)
    return ([figures[f'mean_{name}_ms'] for _, _, name in FIGURES],
            [figures[f'{p}_{name}_ms'] for _, _, name in SPREAD for p in PERCENTILES.values()])


def bounds(before, after, name, percent):
    """Of a histogram, in ms: between which bounds a percentile is, which lies between two neighbours in rank."""
    start = name + '_bucket{le="'
    counts = sorted((float(key[len(start):-2]), after[key] - before.get(key, 0))
                    for key in after if key.startswith(start))
    at = percent / 100 * (counts[-1][1] - 1)
    low = max((bound for bound, count in counts if count <= int(at)), default=0)
    high = min(bound for bound, count in counts if count > math.ceil(at))
    return 1e3 * low, 1e3 * high


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('model')
    parser.add_argument('python')
    parser.add_argument('--requests', type=int, default=24)
    parser.add_argument('--at-once', type=int, default=4)
    o = parser.parse_args()
    n_wrong, n = 0, 0
    with tempfile.TemporaryDirectory() as folder, \
            Server(KIVI, o.model, '--threads', '1', '--ctx', '1024', '--max-num-seqs', '8', '--served-model-name', 'm',
                   '--no-prefix-cache') as server:
        write_tokenizer(folder, o.model)
        for client in (aiperf, bench):
            server.settle()
            before = server.metrics()
            theirs, spread = client(o, f'http://127.0.0.1:{server.port}', folder)
            server.settle()
            after = server.metrics()
            for (_, name, short), value in zip(FIGURES, theirs):
                count = after[name + '_count'] - before[name + '_count']
                own = 1e3 * (after[name + '_sum'] - before[name + '_sum']) / count
                ok = abs(value - own) <= max(0.05 * own, 5)
                n, n_wrong = n + 1, n_wrong + (not ok)
                print(f'{"ok" if ok else "not ok"} {client.__name__}: mean {short} {value:.2f} ms, '
                      f'the server {own:.2f} ms', flush=True)
            wanted = [(name, short, percent) for _, name, short in SPREAD for percent in PERCENTILES]
            for (name, short, percent), value in zip(wanted, spread):
                low, high = bounds(before, after, name, percent)
                ok = low - max(0.1 * low, 10) <= value <= high + max(0.1 * high, 10)
                n, n_wrong = n + 1, n_wrong + (not ok)
                print(f'{"ok" if ok else "not ok"} {client.__name__}: p{percent} {short} {value:.2f} ms, '
                      f'the server {low:g} to {high:g} ms', flush=True)
    print(f'{n - n_wrong} passed, {n_wrong} failed')
    return 1 if n_wrong else 0


if __name__ == '__main__':
    sys.exit(main())
