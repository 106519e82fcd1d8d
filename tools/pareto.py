#!/usr/bin/env python3
"""pareto.py: what a cache kind takes against what it costs: allocated bits an element and KL divergence, as a picture.

  tools/pareto.py [--texts FOLDER] [--n-texts 6] [--threads N] [--out docs/pareto] [--from docs/pareto.json]

Every kind of kivi is measured by `kivi eval kld`, llama.cpp's q4_0, q5_0 and q8_0 caches through llama-cpp-python on
the same ids and positions (the windows of tools/eval_quality.py: 1,024 tokens of each text, scored from position 128
on), each against the 16-bit cache of its own engine, which is what the cache costs and not the engine. llama.cpp turns
keys and values by default; LLAMA_ATTN_ROT_DISABLE=1 gives the points without. A window is one observation of the
standard error.

Writes OUT.json (the figures), OUT.svg and OUT.png. --from draws figures that were measured before. llama-cpp-python is
found or built as by tools/compare_llama.py; --python names an interpreter that has it. KIVI_BIN is the kivi to use.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

from compare_llama import KIVI, LLAMA_TYPES, cpu_name, find_model, find_python
from compare_perplexity import windows_of
from eval_quality import CTX, SKIP, fail, fetch, measure, texts_in

OURS = ['kivi2', 'kivi2+', 'k4v2+', 'k4v2', 'k4v3+', 'kivi4', 'kivi8']
THEIRS = {'q4_0': 4.5, 'q5_0': 5.5, 'q8_0': 8.5}  # a scale of 16 bit for 32 values


# ---- measuring ----

def llama_job(job):
    """In the interpreter that has llama_cpp: mean divergence of each window."""
    import llama_cpp
    import numpy as np

    def engine(kind):
        kind = getattr(llama_cpp, LLAMA_TYPES[kind])
        return llama_cpp.Llama(job['model'], n_ctx=job['ctx'], n_batch=512, logits_all=True, verbose=False,
                               type_k=kind, type_v=kind, flash_attn=True, n_threads=job['threads'],
                               n_threads_batch=job['threads'])

    def log_softmax(llama, ids):
        llama.reset()
        llama.eval(ids)
        rows = llama.scores[job['skip']:len(ids)].astype(np.float64)
        rows -= rows.max(-1, keepdims=True)
        return rows - np.log(np.exp(rows).sum(-1, keepdims=True))

    base, other = engine('f16'), engine(job['kind'])
    means = []
    for ids in job['windows']:
        p, q = log_softmax(base, ids), log_softmax(other, ids)
        means.append(float((np.exp(p) * (p - q)).sum(-1).mean()))
    print(json.dumps(means))


def llama_points(o, windows):
    points = []
    python = o.python or find_python()
    for kind, bits in THEIRS.items():
        for turned in (True, False):
            env = {k: v for k, v in os.environ.items() if k != 'LLAMA_ATTN_ROT_DISABLE'}
            if not turned:
                env['LLAMA_ATTN_ROT_DISABLE'] = '1'
            job = {'model': o.model, 'kind': kind, 'ctx': CTX, 'skip': SKIP, 'threads': o.threads, 'windows': windows}
            done = subprocess.run([python, os.path.abspath(__file__), '--llama'], input=json.dumps(job), env=env,
                                  stdout=subprocess.PIPE, text=True)
            if done.returncode:
                fail(f'llama.cpp {kind}: exit status {done.returncode}', 4)
            means = json.loads(done.stdout)
            points.append({'engine': 'llama.cpp', 'kind': kind + ('' if turned else ' not turned'), 'bits': bits,
                           'kld': statistics.mean(means), 'se': statistics.stdev(means) / len(means) ** 0.5})
            say(points[-1])
    return points


def kivi_points(o, files):
    points = []
    for kind in OURS:
        m = measure(o.model, files, ['--kv', kind], o.threads)
        points.append({'engine': 'kivi', 'kind': kind, 'bits': m['bits'], 'kld': m['kld']['mean'],
                       'se': m['kld']['se']})
        say(points[-1])
    return points


def say(p):
    print(f'{p["engine"]:10} {p["kind"]:16} {p["bits"]:6.3f} bits  {p["kld"]:.5f} +- {p["se"]:.5f}', file=sys.stderr,
          flush=True)


def measure_all(o):
    o.model = find_model(o.model)
    with tempfile.TemporaryDirectory(prefix='kivi-texts-') as folder:
        if not o.texts:
            fetch(folder)
        files = texts_in(o.texts or folder)[:o.n_texts]
        windows = windows_of(o.model, files, CTX, 1)
        points = kivi_points(o, files) + llama_points(o, windows)
    return {'model': 'SmolLM2-135M-Instruct Q4_1' if 'SmolLM2' in o.model else os.path.basename(o.model),
            'windows': len(windows), 'ctx': CTX, 'skip': SKIP, 'cpu': cpu_name(), 'points': points}


# ---- drawing ----

def draw(found, out):
    import matplotlib
    matplotlib.use('Agg')
    matplotlib.rcParams['svg.hashsalt'] = 'kivi'  # the same figures give the same file
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 5.2), layout='constrained')
    styles = {('kivi', True): ('kivi, + kinds', 'o', '#0b6e4f'), ('kivi', False): ('kivi, plain kinds', 's', '#7a7a7a'),
              ('llama.cpp', True): ('llama.cpp, turned (its default)', '^', '#c0392b'),
              ('llama.cpp', False): ('llama.cpp, not turned', 'v', '#e59a90')}
    for (engine, special), (label, marker, colour) in styles.items():
        def is_special(p):
            return p['kind'].endswith('+') if p['engine'] == 'kivi' else 'not' not in p['kind']
        points = sorted((p for p in found['points'] if p['engine'] == engine and is_special(p) == special),
                        key=lambda p: p['bits'])
        axes.errorbar([p['bits'] for p in points], [p['kld'] for p in points], yerr=[p['se'] for p in points],
                      label=label, marker=marker, color=colour, linestyle='-' if special else ':', capsize=3,
                      linewidth=1, markersize=6)
        for p in points:
            axes.annotate(p['kind'].removesuffix(' not turned'), (p['bits'], p['kld']), textcoords='offset points',
                          xytext=(7, -12 if marker == '^' else 5), fontsize=9, color=colour)
    axes.set_yscale('log')
    axes.set_xlim(2, 10)
    axes.set_xlabel('allocated bits a cached element, scales and zeros counted')
    axes.set_ylabel('KL divergence from the 16-bit cache, nats a token')
    axes.set_title(f'{found["model"]}, {found["windows"]} texts of {found["ctx"]:,} tokens, scored from position '
                   f'{found["skip"]}', fontsize=10)
    axes.grid(True, which='both', linewidth=0.3, alpha=0.6)
    axes.legend(fontsize=9)
    figure.savefig(out + '.svg', metadata={'Date': None})
    figure.savefig(out + '.png', dpi=144)


def main():
    if sys.argv[1:] == ['--llama']:
        return llama_job(json.load(sys.stdin))
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--model', default='smollm2', help='smollm2, or its GGUF file')
    p.add_argument('--texts', help='a folder with the texts, instead of fetching them')
    p.add_argument('--n-texts', type=int, default=6, help='2 to 12')
    p.add_argument('--threads', type=int, default=os.cpu_count())
    p.add_argument('--out', default=os.path.join('docs', 'pareto'), help='name of the files without .json, .svg, .png')
    p.add_argument('--from', dest='measured', help='a .json of an earlier run: only draw')
    p.add_argument('--python', help='an interpreter with llama-cpp-python')
    o = p.parse_args()
    if not 2 <= o.n_texts <= 12:
        fail('--n-texts: 2 to 12')
    if o.measured:
        with open(o.measured, encoding='utf-8') as f:
            found = json.load(f)
    else:
        if not os.access(KIVI, os.X_OK):
            fail(f'{KIVI} is not there: run make first, or set KIVI_BIN')
        found = measure_all(o)
        with open(o.out + '.json', 'w', encoding='utf-8') as f:
            json.dump(found, f, indent=1)
            f.write('\n')
    draw(found, o.out)


if __name__ == '__main__':
    main()
