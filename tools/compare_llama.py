#!/usr/bin/env python3
"""compare_llama.py: kivi and llama.cpp in turn on the same GGUF file, in one markdown table.

  tools/compare_llama.py                 all of it: about an hour and a half on two idle cores
  tools/compare_llama.py --quick         depths 0 and 2,048, batch 1, once: minutes
  tools/compare_llama.py -o json         every sample, for plots and for later
  tools/compare_llama.py --scaling 1,2,4,8,16 --depths 0,7680 --reps 1
                                         one token at a time by threads: a table a depth

The protocol is the same on both sides. A run is a process of its own, so that memory does not pile
up: it loads the model, fills each sequence to a depth with the same random ids in batches of 512
tokens, warms up, and times N single steps of a token for each sequence; the median counts. Prompt
speed is the time to fill one sequence. Runs alternate between the engines, in reverse order every
other repetition, and the table has the median over repetitions. llama.cpp runs with flash attention
and one stream of cache a sequence (its faster form), through llama-cpp-python's low-level calls;
its batch is filled once and copied, which is memory of its own for each sequence. kivi's side is
`kivi bench -o json`.

llama-cpp-python is built natively from its source package, once, into the folder `llama-venv` of
the cache folder (KIVI_CACHE_DIR, or kivi below XDG_CACHE_HOME or ~/.cache): ten minutes and more.
--python names an interpreter that has it already. KIVI_BIN is the kivi to use (build/kivi).
"""
import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KIVI = os.environ.get('KIVI_BIN') or os.path.join(ROOT, 'build', 'kivi')
os.environ['KIVI_DEVICE'] = 'cpu'  # also where there is a GPU, which kivi would take
PACKAGE, VERSION = 'llama-cpp-python', '0.3.36'
KINDS = 'llama:f16,llama:q8_0,llama:q4_0,kivi:f16,kivi:kivi4,kivi:kivi2,kivi:kivi2+'
LLAMA_TYPES = {'f16': 'GGML_TYPE_F16', 'q8_0': 'GGML_TYPE_Q8_0', 'q4_0': 'GGML_TYPE_Q4_0',
               'q4_1': 'GGML_TYPE_Q4_1', 'q5_0': 'GGML_TYPE_Q5_0'}
PROMPT_ROWS = 512          # tokens of a prompt batch, kivi's default too
MAX_FILLED = 16384         # batches above 1 are left out where batch * depth is more
RUN_TIMEOUT_S = 3600
IDLE_LOAD = 0.5            # a load average above it is not an idle machine
STEPS, QUICK_STEPS = 16, 8


def die(text, code=2):
    print(f'compare_llama: error: {text}', file=sys.stderr)
    sys.exit(code)


def say(text):
    print(f'compare_llama: {text}', file=sys.stderr, flush=True)


# ---- one run of llama.cpp, in the interpreter that has it ----

def draw_ids(n, n_vocab):
    """The ids of `kivi bench`: SplitMix64 from 0. Sequence i reads ids[i + position]."""
    mask, state, ids = (1 << 64) - 1, 0, []
    for _ in range(n):
        state = (state + 0x9e3779b97f4a7c15) & mask
        z = ((state ^ state >> 30) * 0xbf58476d1ce4e5b9) & mask
        z = ((z ^ z >> 27) * 0x94d049bb133111eb) & mask
        ids.append((z ^ z >> 31) % n_vocab)
    return ids


class Llama:
    """A model and a context of `batch` sequences, filled and stepped by hand."""

    def __init__(self, job):
        from llama_cpp import llama_cpp as api
        self.api, self.batch, self.depth = api, job['batch'], job['depth']
        self.quiet = api.llama_log_callback(lambda level, text, user: None)
        api.llama_log_set(self.quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        model_params = api.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = api.llama_model_load_from_file(job['model'].encode(), model_params)
        if not self.model:
            raise RuntimeError(f"{job['model']}: llama.cpp cannot load it")
        self.context = api.llama_init_from_model(self.model, self.context_params(job))
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context with a cache of {job['kind']}")
        self.memory = api.llama_get_memory(self.context)
        self.rows = api.llama_batch_init(max(PROMPT_ROWS, self.batch), 0, 1)
        n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.ids = draw_ids(self.depth + job['steps'] + self.batch + PROMPT_ROWS, n_vocab)

    def context_params(self, job):
        params = self.api.llama_context_default_params()
        tokens = (max(self.depth + job['steps'], PROMPT_ROWS) + 255) // 256 * 256
        params.n_ctx = tokens * self.batch
        params.n_seq_max = self.batch
        params.n_batch = params.n_ubatch = PROMPT_ROWS
        params.n_threads, params.n_threads_batch = job['threads'], job['prompt_threads']
        params.type_k = params.type_v = getattr(self.api, LLAMA_TYPES[job['kind']])
        params.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = False
        return params

    def decode(self, rows):
        """rows: (sequence, position, wants logits)"""
        for i, (seq, pos, logits) in enumerate(rows):
            self.rows.token[i] = self.ids[seq + pos]
            self.rows.pos[i] = pos
            self.rows.n_seq_id[i] = 1
            self.rows.seq_id[i][0] = seq
            self.rows.logits[i] = logits
        self.rows.n_tokens = len(rows)
        code = self.api.llama_decode(self.context, self.rows)
        if code:
            raise RuntimeError(f'llama_decode returned {code}')
        self.api.llama_synchronize(self.context)

    def prompt(self, n_tokens):
        for first in range(0, n_tokens, PROMPT_ROWS):
            end = min(first + PROMPT_ROWS, n_tokens)
            self.decode([(0, pos, pos == n_tokens - 1) for pos in range(first, end)])

    def fill(self):
        """All sequences to the depth; the tokens a second of the first one."""
        if not self.depth:
            return None
        self.prompt(min(self.depth, PROMPT_ROWS))
        self.api.llama_memory_clear(self.memory, False)
        before = time.perf_counter()
        self.prompt(self.depth)
        seconds = time.perf_counter() - before
        for seq in range(1, self.batch):
            self.api.llama_memory_seq_cp(self.memory, 0, seq, -1, -1)
        return self.depth / seconds

    def steps(self, n):
        times = []
        for pos in range(self.depth, self.depth + n):
            rows = [(seq, pos, True) for seq in range(self.batch)]
            before = time.perf_counter()
            self.decode(rows)
            times.append(time.perf_counter() - before)
        return times

    def set_threads(self, n):
        self.api.llama_set_n_threads(self.context, n, n)

    def drop_steps(self):
        for seq in range(self.batch):
            self.api.llama_memory_seq_rm(self.memory, seq, self.depth, -1)


def llama_job(job):
    llama = Llama(job)
    prompt = llama.fill()
    speeds = []
    for n in job['scaling'] or [job['threads']]:  # the cache is filled once, by the most of them
        if job['scaling']:
            llama.set_threads(n)
        llama.steps(job['steps'])
        llama.drop_steps()
        speeds.append(job['batch'] / statistics.median(llama.steps(job['steps'])))
        llama.drop_steps()
    features = llama.api.llama_print_system_info().decode()
    print(json.dumps({'prompt': prompt, 'decode': speeds if job['scaling'] else speeds[0], 'features': features}))


# ---- both engines from outside ----

def run(command, what):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        die(f'{what}: not done after {RUN_TIMEOUT_S} s', 4)
    except OSError as e:
        die(f'{what}: {e}', 5)
    if done.returncode:
        sys.stderr.write(done.stderr[-2000:])
        die(f'{what}: exit status {done.returncode}', 4)
    return json.loads(done.stdout)


def run_llama(o, kind, depth, batch):
    job = {'model': o.model, 'kind': kind, 'depth': depth, 'batch': batch, 'threads': o.threads,
           'prompt_threads': max(o.scaling or [o.threads]), 'scaling': o.scaling, 'steps': o.steps}
    command = [o.python, os.path.abspath(__file__), '--llama-job', json.dumps(job)]
    found = run(command, f'llama.cpp {kind}')
    o.features = found.pop('features')
    return {name: value for name, value in found.items() if value is not None}


def bench(o, kind, threads, *options):
    rows = run([KIVI, 'bench', o.model, '--kv', kind, '--threads', str(threads), '-r', '1',
                '-o', 'json', *options], f'kivi {kind}')
    o.kivi = f"kivi {rows[0]['build_commit']} ({rows[0]['isa']})"
    return rows


def run_kivi(o, kind, depth, batch):
    found, = bench(o, kind, o.threads, '-p', '0', '-n', str(o.steps), '-d', str(depth), '-b', str(batch))
    result = {'decode': batch * 1e9 / found['median_step_ns']}
    if depth and batch == 1:
        result['prompt'] = bench(o, kind, o.threads, '-p', str(depth), '-n', '0', '-d', '0')[0]['avg_ts']
    return result


def measure(o):
    """{(what, depth, batch): {kind: [tokens a second, one a repetition]}}"""
    places = [(d, b) for b in o.batches for d in o.depths if b == 1 or b * d <= MAX_FILLED]
    found = {}
    n_runs, n_done, begun = o.reps * len(places) * len(o.kinds), 0, time.time()
    for rep in range(o.reps):
        for depth, batch in places:
            for engine, kind in o.kinds if rep % 2 == 0 else o.kinds[::-1]:
                run_one = run_llama if engine == 'llama' else run_kivi
                result = run_one(o, kind, depth, batch)
                if batch > 1:
                    result.pop('prompt', None)
                for what, speed in result.items():
                    cell = found.setdefault((what, depth, batch), {})
                    cell.setdefault(f'{engine}:{kind}', []).append(speed)
                n_done += 1
                say(f'{n_done}/{n_runs} {engine} {kind} depth {depth} batch {batch}: '
                    + ', '.join(f'{what} {speed:.1f}/s' for what, speed in result.items())
                    + f', {time.time() - begun:.0f} s')
    return found


# ---- the table ----

def cpu_name():
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            for line in f:
                if line.startswith('model name'):
                    return line.split(':', 1)[1].strip()
    except OSError:
        pass
    return 'unknown'


def middle(cell):
    return {name: statistics.median(samples) for name, samples in cell.items()}


def ratios(o, speeds):
    """kivi2 (or the last of kivi's kinds) over the best of llama.cpp's, and over its f16."""
    own = o.main and speeds.get(o.main)
    others = [v for name, v in speeds.items() if name.startswith('llama:')]
    best = own / max(others) if own and others else None
    f16 = own / speeds['llama:f16'] if own and 'llama:f16' in speeds else None
    return best, f16


def label(key):
    what, depth, batch = key
    if what == 'prompt':
        return f'prompt to {depth:,}'
    return f'decode at {depth:,}' + (f', batch {batch}' if batch > 1 else '')


def kept(found, names, depth):
    """What part of its speed at depth 0 each kind keeps, batch 1."""
    parts = []
    shallow, deep = found.get(('decode', 0, 1)), found.get(('decode', depth, 1))
    for name in names if shallow and deep else ():
        share = middle(deep)[name] / middle(shallow)[name]
        parts.append(f'{name.replace(":", " ")} {100 * share:.0f}%')
    return f'Decoding at {depth:,} keeps of its speed at 0: ' + ', '.join(parts) if parts else None


def print_md(o, found):
    names = o.names
    own = o.main.split(':')[1] if o.main else 'kivi'
    head = ['tokens/s', *(name.replace(':', ' ') for name in names), f'{own} / best llama',
            f'{own} / llama f16']
    print('| ' + ' | '.join(head) + ' |')
    print('|---|' + '---:|' * (len(head) - 1))
    for key in sorted(found, key=lambda k: (k[0], k[2], k[1])):
        speeds = middle(found[key])
        cells = [f'{speeds[n]:.1f}' for n in names]
        cells += ['-' if r is None else f'{r:.2f}' for r in ratios(o, speeds)]
        print('| ' + ' | '.join([label(key), *cells]) + ' |')
    print()
    for depth in o.depths:
        text = kept(found, names, depth) if depth else None
        if text:
            print(text + '.')
    if any(o.depths):
        print()
    print(f'{o.machine["cpu"]}, {o.threads} threads; {os.path.basename(o.model)}; {o.kivi}; '
          f'{PACKAGE} {VERSION}; median of {o.reps} x {o.steps} steps; '
          f'load {o.machine["load"]:.2f} at the start.')


def scale(o, engine, kind, depth):
    """Tokens a second by number of threads, from one process that fills its cache once, with the most of them."""
    if engine == 'llama':
        return run_llama(o, kind, depth, 1)['decode']
    rows = bench(o, kind, ','.join(map(str, o.scaling)), '-p', '0', '-n', str(o.steps), '-d', str(depth))
    return [1e9 / row['median_step_ns'] for row in rows]


def print_scaling(o):
    """A table for each depth, a row for each number of threads."""
    print(f'Decoding, tokens/s. {o.machine["cpu"]}, {o.machine["cores"]} cores; {os.path.basename(o.model)}; '
          f'{PACKAGE} {VERSION}; median of {o.reps} x {o.steps} steps; load {o.machine["load"]:.2f} at the start.')
    for depth in o.depths:
        found = {name: [] for name in o.names}
        for rep in range(o.reps):
            for engine, kind in o.kinds if rep % 2 == 0 else o.kinds[::-1]:
                before = time.time()
                found[f'{engine}:{kind}'].append(scale(o, engine, kind, depth))
                say(f'{engine} {kind} depth {depth}: ' + ', '.join(f'{v:.1f}' for v in found[f'{engine}:{kind}'][-1])
                    + f' by threads, {time.time() - before:.0f} s')
        print(f'\n| threads, at depth {depth:,} | ' + ' | '.join(name.replace(':', ' ') for name in o.names) + ' |\n|'
              + '---:|' * (len(o.names) + 1))
        for i, threads in enumerate(o.scaling):
            cells = [statistics.median(run[i] for run in found[name]) for name in o.names]
            print(f'| {threads} | ' + ' | '.join(f'{v:.1f}' for v in cells) + ' |', flush=True)
    print(f'\n{o.kivi}')


def print_json(o, found):
    tests = []
    for (what, depth, batch), cell in found.items():
        speeds = middle(cell)
        best, f16 = ratios(o, speeds)
        tests.append({'test': what, 'depth': depth, 'batch': batch, 'tokens_per_second': speeds,
                      'samples': cell, 'ratio_best': best, 'ratio_f16': f16})
    report = {'machine': o.machine, 'threads': o.threads, 'model': os.path.basename(o.model),
              'kivi': o.kivi, 'llama': f'{PACKAGE} {VERSION}', 'llama_features': o.features,
              'main': o.main, 'reps': o.reps, 'steps': o.steps, 'tests': tests}
    print(json.dumps(report, indent=1))


# ---- what is needed ----

def cache_folder():
    if os.environ.get('KIVI_CACHE_DIR'):
        return os.environ['KIVI_CACHE_DIR']
    base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return os.path.join(base, 'kivi')


def has_llama(python):
    check = f'from importlib.metadata import version; assert version("{PACKAGE}") == "{VERSION}"'
    try:
        return subprocess.run([python, '-c', check], capture_output=True).returncode == 0
    except OSError:
        return False


def find_python():
    """The interpreter of the environment, built if it is not there."""
    folder = os.path.join(cache_folder(), 'llama-venv')
    python = os.path.join(folder, 'bin', 'python')
    if has_llama(python):
        return python
    say(f'building {PACKAGE} {VERSION} in {folder}: ten minutes and more')
    settings = dict(os.environ, CMAKE_ARGS='-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF')
    steps = [[sys.executable, '-m', 'venv', folder],
             [python, '-m', 'pip', 'install', '--quiet', '--no-binary', PACKAGE,
              f'{PACKAGE}=={VERSION}']]
    for step in steps:
        if subprocess.run(step, env=settings, stdout=sys.stderr).returncode:
            die('the build failed; it needs python3-venv, cmake and g++', 4)
    return python


def find_model(name):
    if name == 'smollm2' and not os.path.exists(name):
        done = subprocess.run([os.path.join(ROOT, 'tools', 'fetch_model.sh'), name],
                              stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        return done.stdout.strip()
    if not os.path.isfile(name):
        die(f'{name}: no such file; a GGUF file is needed, both engines read it', 5)
    return os.path.abspath(name)


def numbers(text):
    values = [int(v) for v in text.split(',')]
    if min(values) < 0:
        raise ValueError
    return values


def parse_kinds(text):
    kinds = []
    for name in text.split(','):
        engine, kind = name.split(':', 1) if ':' in name else ('kivi', name)
        if engine not in ('kivi', 'llama') or engine == 'llama' and kind not in LLAMA_TYPES:
            die(f"--kinds: '{name}', expected kivi:KIND or llama:{'|'.join(LLAMA_TYPES)}")
        kinds.append((engine, kind))
    return kinds


def alternate(kinds):
    """The engines in turn, each in the order given."""
    sides = [[k for k in kinds if k[0] == engine] for engine in ('llama', 'kivi')]
    longest = max(len(side) for side in sides)
    return [side[i] for i in range(longest) for side in sides if i < len(side)]


def parse():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                epilog='Leave the machine idle; see the top of this file.')
    p.add_argument('--model', default='smollm2', help='a GGUF file, or smollm2 (default)')
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--scaling', type=numbers, metavar='T,T,..', help='decoding by these numbers of threads instead')
    p.add_argument('--quick', action='store_true', help='depths 0,2048, batch 1, once, 8 steps')
    p.add_argument('--kinds', default=KINDS, help=f'default {KINDS}')
    p.add_argument('--depths', type=numbers, help='default 0,2048,7680')
    p.add_argument('--batches', type=numbers, help='default 1,8; '
                   f'above 1 where batch * depth <= {MAX_FILLED}')
    p.add_argument('--reps', type=int, help='repetitions, each a process (3)')
    p.add_argument('--python', help=f'an interpreter that has {PACKAGE} {VERSION}')
    p.add_argument('-o', '--output', choices=('md', 'json'), default='md')
    p.add_argument('--llama-job', help=argparse.SUPPRESS)
    o = p.parse_args()
    o.depths = o.depths or ([0, 2048] if o.quick else [0, 2048, 7680])
    o.batches = o.batches or ([1] if o.quick else [1, 8])
    o.reps = o.reps or (1 if o.quick else 3)
    o.steps = QUICK_STEPS if o.quick else STEPS
    if o.scaling and o.output == 'json':
        p.error('--scaling has a table only')
    if min([o.threads, o.reps, *o.batches, *(o.scaling or [])]) < 1:
        p.error('threads, repetitions and batches start at 1')
    return o


def main():
    o = parse()
    if o.llama_job:
        return llama_job(json.loads(o.llama_job))
    kinds = parse_kinds(o.kinds)
    o.kinds, o.names = alternate(kinds), [f'{engine}:{kind}' for engine, kind in kinds]
    own = [name for name in o.names if name.startswith('kivi:')]
    o.main = 'kivi:kivi2' if 'kivi:kivi2' in own else own[-1] if own else None
    o.kivi, o.features = 'no kivi', ''
    if own and not os.access(KIVI, os.X_OK):
        die(f'{KIVI} is not there: run make first, or set KIVI_BIN')
    o.model = find_model(o.model)
    if any(engine == 'llama' for engine, _ in o.kinds):
        o.python = o.python or find_python()
        if not has_llama(o.python):
            die(f'{o.python} has no {PACKAGE} {VERSION}')
    o.machine = {'cpu': cpu_name(), 'cores': os.cpu_count(), 'load': os.getloadavg()[0]}
    if o.machine['load'] > IDLE_LOAD:
        say(f"the machine is not idle (load {o.machine['load']:.2f}): figures will be disturbed, "
            'llama.cpp\'s most of all, whose threads spin')
    if o.scaling:
        return print_scaling(o)
    (print_json if o.output == 'json' else print_md)(o, measure(o))


if __name__ == '__main__':
    main()
