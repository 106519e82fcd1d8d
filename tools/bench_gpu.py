#!/usr/bin/env python3
"""bench_gpu.py FOLDER [options]: the figures of the CUDA path in one call, and one table of them beside the goals.

What runs, in this order, each with a limit of time of its own; what does not fit into --minutes is left out and named:
  right          check-cuda --small: the kernels against the CPU's
  attention      kivi bench attention: streams, decode attention, windows, append, page close, prompts
  torch          tools/bench_torch_attention.py: cuDNN and flash in float16 at the same shapes
  decode KIND    kivi bench at the shapes of Llama-2-7B, random float16 weights: batch 1 and 32 behind 128 tokens, and
                 prompts of 160, by kind of cache
  whole KIND     batch 32, 338 tokens behind 160
  transformers   tools/bench_transformers.py: the same batch, 160 in and 338 out
  without X      batch 1 and 32 behind 128 tokens again with KIVI_DISABLE=X, for each X of --without (close: kivi2+,
                 else kivi2): what a part of the engine is worth
  lengths        kivi bench attention --measure length
A figure without a goal has an empty cell; * marks a goal that is missed. FOLDER has kivi, libkivi-cuda.so and
check-cuda, and in lib/ what they need.
"""
import argparse
import ctypes
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LLAMA = dict(architectures=['LlamaForCausalLM'], model_type='llama', hidden_size=4096, intermediate_size=11008,
             num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, vocab_size=32000, hidden_act='silu',
             max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0, bos_token_id=1, eos_token_id=2,
             tie_word_embeddings=False, torch_dtype='float16')
LAYERS = LLAMA['num_hidden_layers']
# What a step of decoding reads of the weights: all matrices but the embedding, two bytes each.
WEIGHT_BYTES = 2 * (LAYERS * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 32000 * 4096)
# (batch, heads, KV heads, tokens), goals: share of the read-only stream of kivi2 and kivi2+, times torch's cuDNN
SHAPES = [((32, 32, 32, 4096), .90, .80, 5.0), ((8, 32, 32, 32768), .90, .80, 5.0), ((32, 32, 8, 8192), .87, .80, 4.8),
          ((8, 32, 8, 32768), .87, .80, 4.8), ((1, 32, 8, 131072), .80, None, 4.5)]
KINDS = ('kivi2', 'kivi2+', 'f16')
TOKENS_IN, TOKENS_OUT, BATCH = 160, 338, 32
WITHOUT = {'close': 'kivi2+'}  # the kind that a part matters most to, where that is not kivi2


# ---- running the parts ----

def cublas_folder():
    """Where libcublasLt.so.13 is if the system does not find it by itself: CUDA's own folder, or torch's."""
    try:
        ctypes.CDLL('libcublasLt.so.13')
        return None
    except OSError:
        places = ['/usr/local/cuda*/lib64', '/usr/local/cuda*/targets/*/lib']
        places += [os.path.join(p, 'nvidia', '*', 'lib') for p in sys.path if p]
        found = [p for place in places for p in sorted(glob.glob(os.path.join(place, 'libcublasLt.so.13')))]
        return os.path.dirname(found[0]) if found else None


class Bench:
    def __init__(self, folder, minutes, part_limit_s):
        self.folder = os.path.abspath(folder)
        self.part_limit_s = part_limit_s
        self.ends = time.monotonic() + 60 * minutes
        self.left_out = []
        paths = [os.path.join(self.folder, 'lib'), cublas_folder(), os.environ.get('LD_LIBRARY_PATH')]
        self.env = {'LD_LIBRARY_PATH': ':'.join(p for p in paths if p)}  # of the folder's programs, not of torch

    def run(self, name, expected_s, limit_s, *command, **env):
        """Standard output of a part, as far as it came; '' where nothing did. What went wrong is noted."""
        left = self.ends - time.monotonic()
        expected_s, limit_s = min(expected_s, self.part_limit_s), min(limit_s, self.part_limit_s)
        if left < expected_s:
            self.left_out.append(f'{name}: it takes about {expected_s} s and {left:.0f} were left')
            return ''
        began = time.monotonic()
        print(f'# {name}: {" ".join(command)}', flush=True)
        with tempfile.TemporaryFile('w+') as out:  # a file: what was printed before a limit is kept
            own = self.env if command[0].startswith(self.folder) else {}
            child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **own, **env}, stdout=out,
                                     stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
            errors = ''
            try:
                errors = child.communicate(timeout=min(limit_s, left))[1]
                if child.returncode:
                    last = (errors.strip() or 'no message').split('\n')[-1]
                    self.left_out.append(f'{name}: exit status {child.returncode}: {last}')
            except subprocess.TimeoutExpired:
                child.kill()
                errors = child.communicate()[1]
                self.left_out.append(f'{name}: stopped after {time.monotonic() - began:.0f} s; what it printed counts')
            for line in errors.strip().split('\n')[-60:] if errors.strip() else ():
                print(f'# {line}')
            out.seek(0)
            text = out.read()
        print(text.rstrip() + f'\n# {name} took {time.monotonic() - began:.1f} s', flush=True)
        return text

    def kivi(self, name, expected_s, limit_s, *args, **env):
        program = os.path.join(self.folder, 'kivi')
        return objects(self.run(name, expected_s, limit_s, program, *args, '-o', 'json', **env))


def objects(text):
    """The JSON objects of a list or of lines, also of a list that ends too early."""
    decoder, rows = json.JSONDecoder(), []
    for start in (m.start() for m in re.finditer(r'\{', text)):
        if rows and start < rows[-1][1]:
            continue
        try:
            row, end = decoder.raw_decode(text, start)
        except ValueError:
            break
        rows.append((row, end))
    return [row for row, _ in rows]


# ---- the table ----

class Table:
    def __init__(self):
        self.rows = []

    def put(self, name, value, form='%.1f', goal=None, least=True, goal_form=None):
        """value None: it was not measured. least: the goal is a minimum, else what it must stay below."""
        missed = value is not None and goal is not None and (value < goal if least else value > goal)
        shown = '-' if value is None else form % value
        wanted = '' if goal is None else ('>= ' if least else '<= ') + (goal_form or form) % goal
        self.rows.append((name, shown + (' *' if missed else ''), wanted))

    def text(self):
        widths = [max(len(row[i]) for row in self.rows + [('figure', 'measured', 'goal')]) for i in range(3)]
        def line(row):
            return '| ' + ' | '.join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in
                                     enumerate(zip(row, widths))) + ' |'
        rule = '| ' + ' | '.join('-' * (w - 1) + (':' if i else '-') for i, w in enumerate(widths)) + ' |'
        return '\n'.join([line(('figure', 'measured', 'goal')), rule] + [line(r) for r in self.rows])


def ratio(a, b):
    return a / b if a and b else None


def shape_name(shape):
    return 'B%d %d/%d T%d' % shape


class Figures:
    """Look-ups over what the parts printed; None where a part was left out."""
    def __init__(self, attention, torch):
        self.attention, self.torch = attention, torch

    def ours(self, what, kind='', shape=None, residual=None, field='us'):
        for r in self.attention:
            here = (r['n_batch'], r['n_heads'], r['n_kv_heads'], r['n_tokens'])
            if r['what'] == what and r['kv'] == kind and (shape is None or here[:len(shape)] == shape) and (
                    residual is None or r['residual'] == residual):
                return r[field]
        return None

    def theirs(self, what, shape, backends=('cuDNN', 'flash')):
        times = [r['us'] for r in self.torch
                 if r['what'] == what and tuple(r['shape']) == shape and r['backend'] in backends and r['us'] > 0]
        return min(times) if times else None


def put_attention(t, f):
    t.put('read-only stream, GB/s', f.ours('read', field='gbs'), '%.0f')
    t.put('copy, GB/s read and written', f.ours('copy', field='gbs'), '%.0f')
    for shape, share, plus_share, times in SHAPES:
        name = shape_name(shape)
        us = {kind: f.ours('decode', kind, shape) for kind in KINDS}
        shares = {kind: f.ours('decode', kind, shape, field='read_share') for kind in KINDS}
        cudnn = f.theirs('decode', shape, ('cuDNN',))
        t.put(f'{name}: kivi2, us', us['kivi2'])
        t.put(f'{name}: kivi2, share of read', shares['kivi2'], '%.3f', share, goal_form='%.2f')
        t.put(f"{name}: torch's cuDNN f16, us", cudnn)
        t.put(f'{name}: kivi2, times cuDNN', ratio(cudnn, us['kivi2']), '%.2f', times, goal_form='%.1f')
        t.put(f'{name}: kivi2, constant splits, us', f.ours('constant', 'kivi2', shape))
        t.put(f'{name}: kivi2+, us', us['kivi2+'], '%.1f', us['kivi2'], least=False)
        t.put(f'{name}: kivi2+, share of read', shares['kivi2+'], '%.3f', plus_share, goal_form='%.2f')
        faster = us['f16'] and cudnn and us['f16'] < cudnn
        t.put(f'{name}: f16, share of read', shares['f16'], '%.3f', None if faster else .90, goal_form='%.2f')
        for residual in 128, 32:
            window = f.ours('window', 'kivi2', shape, residual)
            t.put(f'{name}: kivi2 with R={residual}, us', window)
            part = 1 - us['kivi2'] / window if window and us['kivi2'] else None
            t.put(f'{name}: the window of {residual} of that', part, '%.3f')


def put_append(t, f, step_ns):
    for kind in 'kivi2', 'kivi2+':
        close = f.ours('close', kind, (32, 32, 32))
        t.put(f'page close {kind}, us for 1,024 pages', close, '%.1f')
        for batch in 1, 32:
            step_us = step_ns.get((kind, batch), 0) * 1e-3
            t.put(f'append {kind} B{batch} by a launch of its own, us a layer',
                  f.ours('append', kind, (batch, 32, 32)), '%.2f')
            us = f.ours('within', kind, (batch, 32, 32))
            t.put(f'append {kind} B{batch} by attention, us a layer more', us, '%.2f')
            t.put(f'append {kind} B{batch}, share of a step', ratio(us and us * LAYERS, step_us), '%.4f', .02, False,
                  '%.2f')
            # A sequence closes 32 heads in each of 32 layers once in 128 steps: the pages of 32 sequences in one layer.
            share = ratio(close and close * batch / 128, step_us)
            t.put(f'page close {kind} B{batch}, share of a step, once in 128', share, '%.4f',
                  .02 if kind == 'kivi2+' else None, False, '%.2f')


def put_prompts(t, f):
    for tokens in 4096, 32768:
        shape = (1, 32, 32, tokens)
        best = f.theirs('prompt', shape)
        for name, kind, goal in ('our own kernel', '', None), ("cuDNN's", 'cudnn', .9), ("cuDNN's of one length",
                                                                                        'cudnn-exact', None):
            us, what = f.ours('prompt', kind, shape), f'prompt attention T{tokens}, {name}'
            t.put(f'{what}, TFLOP/s', f.ours('prompt', kind, shape, field='tflops'), '%.0f')
            t.put(f"{what}, times torch's fastest", ratio(best, us), '%.2f', goal, goal_form='%.1f')


def put_engine(t, f, speeds, whole, theirs):
    gbs = f.ours('read', field='gbs')
    limit = gbs * 1e9 / WEIGHT_BYTES if gbs else None
    t.put('weights of a step alone, tokens/s at batch 1', limit)
    for kind in KINDS:
        speed = speeds.get((kind, 1))
        t.put(f'decode {kind} B1 at 128, tokens/s', speed)
        t.put(f'decode {kind} B1 at 128, share of that limit', ratio(speed, limit), '%.3f', .85, goal_form='%.2f')
        t.put(f'decode {kind} B32 at 128, tokens/s', speeds.get((kind, 32)), '%.0f')
    t.put('transformers B32, 160 in, 338 out, tokens/s', theirs, '%.0f')
    for kind in KINDS:
        t.put(f'whole run {kind} B32, 160 in, 338 out, tokens/s', whole.get(kind), '%.0f')
        t.put(f'whole run {kind} B32, times transformers', ratio(whole.get(kind), theirs), '%.1f',
              None if kind == 'f16' else 10)


# ---- the parts ----

ENGINE = ('--dummy-weights', '1', '--dummy-type', 'f16', '--device', 'cuda')


def decode_part(b, name, model, kind, *more, **env):
    """{(batch): row} of 64 tokens behind 128, and the other rows."""
    rows = b.kivi(name, 20, 90, 'bench', model, *ENGINE, '--kv', kind, '-n', '64', '-b', f'1,{BATCH}', '-r', '3', *more,
                  **env)
    decode = {r['n_batch']: r for r in rows if r['n_gen'] and r['n_depth'] == 128}
    return decode, [r for r in rows if not (r['n_gen'] and r['n_depth'] == 128)]


def whole_part(b, model, kind, prompt):
    """Tokens a second of prompts and 338 tokens for each of a batch."""
    rows = b.kivi(f'whole {kind}', 20, 90, 'bench', model, *ENGINE, '--kv', kind, '-p', '0', '-n', str(TOKENS_OUT),
                  '-d', str(TOKENS_IN), '-b', str(BATCH), '-r', '1')
    if not rows or not prompt:
        return None
    return BATCH * TOKENS_OUT / ((rows[0]['avg_ns'] + prompt['avg_ns']) * 1e-9)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', help='of kivi, libkivi-cuda.so and check-cuda')
    parser.add_argument('--minutes', type=float, default=9.5, help='most time in all (9.5)')
    parser.add_argument('--part-limit', type=float, default=180, help='most seconds of any part (180)')
    parser.add_argument('--without', default='', metavar='X,..', help='parts of the engine to measure by leaving out')
    parser.add_argument('--command', metavar='TEXT', help='run this in the shell with the libraries of FOLDER and '
                        'KIVI_BUILD=FOLDER, and measure nothing')
    parser.add_argument('--only', default='', metavar='PART,..', help='these parts: right attention torch decode whole '
                        'transformers without lengths')
    return parser.parse_args()


def main():
    o = parse_args()
    b = Bench(o.folder, o.minutes, o.part_limit)
    if o.command:
        env = {**os.environ, **b.env, 'KIVI_BUILD': b.folder, 'KIVI_BIN': os.path.join(b.folder, 'kivi')}
        return subprocess.call(['bash', '-c', o.command], cwd=ROOT, env=env)
    parts = set(o.only.split(',')) if o.only else None

    def wanted(part):
        return parts is None or part in parts
    t, lengths, speeds, step_ns, whole, theirs = Table(), [], {}, {}, {}, None
    if wanted('right'):
        b.run('right', 30, 120, os.path.join(b.folder, 'check-cuda'), '--small')
    attention = b.kivi('attention', 60, 180, 'bench', 'attention', '--device', 'cuda', '--kv', ','.join(KINDS), '-r',
                       '11', '--measure',
                       'decode,constant,window,append,within,close,prompt') if wanted('attention') else []
    torch = objects(b.run('torch', 45, 120, sys.executable, 'tools/bench_torch_attention.py',
                          '--json')) if wanted('torch') else []
    with tempfile.TemporaryDirectory() as model:
        with open(os.path.join(model, 'config.json'), 'w') as f:
            json.dump(LLAMA, f)
        for kind in KINDS if wanted('decode') or wanted('whole') else ():
            decode, rest = decode_part(b, f'decode {kind}', model, kind, '-p', str(TOKENS_IN), '-d', '0,128')
            prompts = [r for r in rest if r['n_prompt'] and r['n_depth'] == 0 and r['n_batch'] == BATCH]
            speeds.update({(kind, batch): r['avg_ts'] for batch, r in decode.items()})
            step_ns.update({(kind, batch): r['median_step_ns'] for batch, r in decode.items()})
            if wanted('whole'):
                whole[kind] = whole_part(b, model, kind, prompts[0] if prompts else None)
        if wanted('transformers'):
            rows = objects(b.run('transformers', 75, 150, sys.executable, 'tools/bench_transformers.py', '--json'))
            theirs = rows[-1]['tokens_per_s'] if rows else None
        for part in [p for p in o.without.split(',') if p] if wanted('without') else ():
            decode, _ = decode_part(b, f'without {part}', model, WITHOUT.get(part, 'kivi2'), '-p', '0', '-d', '128',
                                    KIVI_DISABLE=part)
            kind = WITHOUT.get(part, 'kivi2')
            speeds.update({(f'{kind} without {part}', batch): r['avg_ts'] for batch, r in decode.items()})
    if wanted('lengths'):
        lengths = b.kivi('lengths', 20, 90, 'bench', 'attention', '--device', 'cuda', '--kv', 'kivi2', '-r', '5',
                         '--measure', 'length')
    figures = Figures(attention, torch)
    put_attention(t, figures)
    put_append(t, figures, step_ns)
    put_prompts(t, figures)
    put_engine(t, figures, speeds, whole, theirs)
    for name, batch in speeds:
        if ' without ' in name:
            t.put(f'decode {name} B{batch} at 128, tokens/s', speeds[name, batch])
    for r in lengths:
        if r['what'] == 'length':
            t.put('kivi2 R=128 B%d 32/8 T%d, us' % (r['n_batch'], r['n_tokens']), r['us'])
    print('\n' + t.text())
    print('\n* misses the goal; - was not measured')
    for line in b.left_out:
        print(f'left out: {line}')
    return 1 if b.left_out else 0


if __name__ == '__main__':
    sys.exit(main())
