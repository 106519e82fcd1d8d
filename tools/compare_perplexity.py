#!/usr/bin/env python3
"""compare_perplexity.py: perplexity of kivi and of llama.cpp, both with a 16-bit cache, on the same windows.

  tools/compare_perplexity.py -f TEXT [-f TEXT ...] [--ctx 1024] [--skip 128] [--chunks 1] [--model smollm2]

kivi's side is `kivi eval ppl --kv f16 -o json`. llama.cpp's side gets the ids of `kivi tokenize`, cut into windows in
the same way: the first --chunks windows of --ctx tokens of each text. Each window is evaluated from an empty cache, and
the logits of positions --skip to --ctx - 2 are scored against the token that follows; perplexity is e to the mean over
all of them. The exit status is 1 when the two are more than --within apart (0.5%).

llama-cpp-python is found or built as by tools/compare_llama.py; --python names an interpreter that has it. KIVI_BIN is
the kivi to use (build/kivi).
"""
import argparse
import json
import math
import subprocess
import sys

from compare_llama import KIVI, find_model, find_python


def llama_nll(job):
    """In the interpreter that has llama_cpp: sum and number of the negative log-likelihoods."""
    import llama_cpp
    import numpy as np
    llama = llama_cpp.Llama(job['model'], n_ctx=job['ctx'], n_batch=512, logits_all=True, verbose=False,
                            n_threads=job['threads'], n_threads_batch=job['threads'])
    total, n = 0.0, 0
    for ids in job['windows']:
        llama.reset()
        llama.eval(ids)
        rows = llama.scores[job['skip']:len(ids) - 1].astype(np.float64)
        top = rows.max(-1)
        lse = top + np.log(np.exp(rows - top[:, None]).sum(-1))
        total += float((lse - rows[np.arange(len(rows)), ids[job['skip'] + 1:]]).sum())
        n += len(rows)
    print(json.dumps({'sum': total, 'n': n}))


def output(command, stdin=None):
    result = subprocess.run(command, input=stdin, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(f'compare_perplexity: error: {" ".join(command)[:200]}: exit status {result.returncode}')
    return result.stdout


def windows_of(model, files, ctx, chunks):
    windows = []
    for file in files:
        ids = [int(i) for i in output([KIVI, 'tokenize', model, '-f', file, '--ids']).split()]
        n = min(len(ids) // ctx, chunks or len(ids))
        windows += [ids[i * ctx:(i + 1) * ctx] for i in range(n)]
    return windows


def compare(model, files, ctx=1024, skip=128, chunks=1, threads=2, python=None):
    """Perplexities of kivi and llama.cpp, the positions scored, the windows."""
    windows = windows_of(model, files, ctx, chunks)
    command = [KIVI, 'eval', 'ppl', model, '--kv', 'f16', '--ctx', str(ctx), '--skip', str(skip), '--threads',
               str(threads), '-o', 'json'] + (['--chunks', str(chunks)] if chunks else [])
    for file in files:
        command += ['-f', file]
    ours = json.loads(output(command))[0]
    job = {'model': model, 'ctx': ctx, 'skip': skip, 'threads': threads, 'windows': windows}
    theirs = json.loads(output([python or find_python(), __file__, '--llama'], json.dumps(job)))
    if ours['windows'] != len(windows):
        sys.exit(f'compare_perplexity: error: kivi took {ours["windows"]} windows, expected {len(windows)}')
    return ours['ppl'], math.exp(theirs['sum'] / theirs['n']), theirs['n'], len(windows)


def main():
    if sys.argv[1:] == ['--llama']:
        return llama_nll(json.load(sys.stdin))
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('-f', dest='files', action='append', required=True, help='a text; may be given again')
    p.add_argument('--model', default='smollm2', help='a GGUF file, or smollm2')
    p.add_argument('--ctx', type=int, default=1024)
    p.add_argument('--skip', type=int, default=128)
    p.add_argument('--chunks', type=int, default=1, help='windows of each text, 0 for all')
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--within', type=float, default=0.5, help='percent')
    p.add_argument('--python', help='an interpreter with llama-cpp-python')
    o = p.parse_args()
    ours, theirs, n, n_windows = compare(find_model(o.model), o.files, o.ctx, o.skip, o.chunks, o.threads, o.python)
    apart = 100 * (ours / theirs - 1)
    print('| 16-bit cache | perplexity | windows | positions |\n|---|---|---|---|')
    print(f'| kivi | {ours:.4f} | {n_windows} | {n} |\n| llama.cpp | {theirs:.4f} | {n_windows} | {n} |')
    print(f'\nkivi is {apart:+.3f}% from llama.cpp; within {o.within}% is asked for.')
    sys.exit(abs(apart) > o.within)


if __name__ == '__main__':
    main()
