#!/usr/bin/env python3
"""eval_rules.py: what each visibility rule costs a served request, in quality and in prompt time, as markdown tables.

  tools/eval_rules.py [--texts FOLDER] [--threads N] [--kv KIND] [--rules LIST] [--no-speed]

Quality: of the texts of tools/eval_quality.py the first 12; of each the first 640 tokens: 512 as a prompt under the
rule, then 128 one by one as if they were generated (teacher forced). The divergence KL(f16 || kind) of each position's
distribution from the same engine's with a 16-bit cache, in nats, over the 12 x 129 positions that generate, which is
what a client sees, and over every 8th position of the prompt from 128 on, which is what scoring a prompt (echo) sees.
The standard error is that of the 12 texts' means. Prompt time: `kivi bench -p`, one thread.
KIVI_BIN is the kivi to use (build/kivi). Needs numpy.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile

import numpy as np

from compare_llama import KIVI, cpu_name, find_model
from eval_quality import fetch, texts_in

CTX, N_PROMPT, SKIP, STRIDE = 640, 512, 128, 8
RULES = 'paper,span:256,stream,stream+4'  # +4: with four sinks
PROMPTS = '512,1024'


def run(command):
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def spelled(rule):
    name, _, sinks = rule.partition('+')
    return ['--rule', name] + (['--sinks', sinks] if sinks else [])


def logits(model, tokens, options, folder, threads):
    out = os.path.join(folder, 'logits.npy')
    run([KIVI, 'logits', model, '--tokens', tokens, '--prompt', str(N_PROMPT), '--ctx', str(CTX), '-t', str(threads),
         '-o', out, *options])
    x = np.load(out, mmap_mode='r')
    os.remove(out)
    # the prompt's last row speaks about the first generated token
    return np.concatenate([x[SKIP:N_PROMPT - 1:STRIDE], x[N_PROMPT - 1:]])


def log_softmax(x):
    x = x.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def divergence(base, test):
    """KL of each row, and whether both agree on the most likely token; in pieces, a row has 49,152 entries."""
    kl, same = [], base.argmax(axis=1) == test.argmax(axis=1)
    for i in range(0, len(base), 64):
        p, q = log_softmax(base[i:i + 64]), log_softmax(test[i:i + 64])
        kl.append((np.exp(p) * (p - q)).sum(axis=1))
    return np.concatenate(kl), same


def quality(model, files, kind, rules, threads):
    found = {rule: ([], [], []) for rule in rules}
    with tempfile.TemporaryDirectory(prefix='kivi-rules-') as folder:
        for file in files:
            ids = run([KIVI, 'tokenize', model, '-f', file, '--ids']).split()[:CTX]
            tokens = os.path.join(folder, 'tokens.json')
            with open(tokens, 'w') as f:
                json.dump([int(i) for i in ids], f)
            base = logits(model, tokens, ['--kv', 'f16'], folder, threads)
            for rule in rules:
                kl, same = divergence(base, logits(model, tokens, ['--kv', kind, *spelled(rule)], folder, threads))
                border = len(kl) - (CTX - N_PROMPT + 1)
                found[rule][0].append(kl[border:].mean())
                found[rule][1].append(same[border:].mean())
                found[rule][2].append(kl[:border].mean())
            row = (f'{r} {x[0][-1]:.6f} {x[1][-1]:.4f} {x[2][-1]:.6f}' for r, x in found.items())
            print(os.path.basename(file), *row, sep=', ', file=sys.stderr, flush=True)
    print(f'| rule | KLD of generated tokens +- standard error | top-1 agrees | KLD of the prompt |\n|---|---|---|---|')
    for rule in rules:
        kl, same, prompt = (np.array(x) for x in found[rule])
        print(f'| {rule} | {kl.mean():.4f} +- {kl.std(ddof=1) / len(kl) ** .5:.4f} | {same.mean():.3f} | '
              f'{prompt.mean():.4f} |')
    print(f'\n{kind}, {len(files)} texts, {len(files) * (CTX - N_PROMPT + 1)} generated positions.', flush=True)


def cpu_seconds(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def speed(model, kind, rules):
    """One repetition more is what a prompt costs; processor time, because other programs take wall time."""
    lengths = PROMPTS.split(',')
    print('\n| rule | ' + ' | '.join(f'{n} tokens, ms of processor a token' for n in lengths) + ' |\n|'
          + '---|' * (len(lengths) + 1), flush=True)
    for rule in rules:
        cells = []
        for n in lengths:
            once, twice = (cpu_seconds([KIVI, 'bench', model, '-p', n, '-n', '0', '-r', r, '-t', '1', '--kv', kind,
                                        *spelled(rule)]) for r in '12')
            cells.append(f'{1000 * (twice - once) / int(n):.2f}')
        print(f'| {rule} | ' + ' | '.join(cells) + ' |', flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--model', default='smollm2', help='smollm2, or its GGUF file')
    p.add_argument('--texts', help='a folder with the texts, instead of fetching them')
    p.add_argument('--threads', type=int, default=os.cpu_count())
    p.add_argument('--kv', default='kivi2')
    p.add_argument('--rules', default=RULES)
    p.add_argument('--first', type=int, default=0, help='leave out so many texts')
    p.add_argument('--n-texts', type=int, default=12)
    p.add_argument('--no-speed', action='store_true')
    p.add_argument('--no-quality', action='store_true')
    o = p.parse_args()
    model, rules = find_model(o.model), o.rules.split(',')
    with tempfile.TemporaryDirectory(prefix='kivi-texts-') as folder:
        if not o.no_quality:
            if not o.texts:
                fetch(folder)
            quality(model, texts_in(o.texts or folder)[o.first:o.first + o.n_texts], o.kv, rules, o.threads)
    if not o.no_speed:
        speed(model, o.kv, rules)
    print(f'\n{cpu_name()}, {o.threads} threads.')


if __name__ == '__main__':
    main()
