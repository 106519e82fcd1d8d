"""blackbox.py: what the tests written in Python (py_*.py) share. They know the program `kivi` only from outside.

A case is `with case(NAME):`; it prints `ok NAME`, or `not ok NAME: why` if an assertion in it fails, or
`skip NAME: why` if it calls skip(). The last statement of a script is `finish()`.
"""
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _from_root(path):
    return os.path.abspath(os.path.join(ROOT, path))


KIVI = _from_root(os.environ.get('KIVI_BIN') or 'build/kivi')
GOLDEN = _from_root(os.environ.get('KIVI_GOLDEN') or 'tests/golden')
# Each family of golden logits with the options that reproduce its files; py_golden.py says why --rope-freq.
FAMILIES = (
    ('llama',),
    ('llama-gqa', '--rope-freq', 'bf16'),
    ('mistral-swa', '--rope-freq', 'f16'),
    ('falcon-mqa', '--rope-freq', 'bf16'),
    ('falcon-gqa', '--rope-freq', 'f16'),
    ('qwen2', '--rope-freq', 'bf16'),
    # made by the generator without that flaw: only parameters were converted
    ('qwen3',),
    ('gemma3',),
    ('yarn',),
    ('dynamic', '--ctx', 512),  # beyond the 128 of its config.json, where the base grows
)
MODEL = os.environ.get('KIVI_TEST_MODEL') or None  # the SmolLM2 file
UNDER = os.environ.get('KIVI_TEST_UNDER') or None  # asan, tsan, valgrind: everything is slow, do less
TIMEOUT_S = 600 if UNDER else 120

# What the caller has set for kivi would change what is tested; only the names the tests set themselves reach it.
# They are about the CPU, also where a GPU is: tests/gpu names its device.
CLEAN = {**{k: v for k, v in os.environ.items() if not k.startswith('KIVI_')}, 'KIVI_DEVICE': 'cpu'}

_count = {'ok': 0, 'not ok': 0, 'skip': 0}
_scratch = tempfile.TemporaryDirectory(prefix='kivi-test-')
SCRATCH = _scratch.name


class Skip(Exception):
    pass


def skip(why):
    raise Skip(why)


def needs_model():
    if not MODEL:
        skip('KIVI_TEST_MODEL is not set')
    return MODEL


def _report(kind, name, why=''):
    _count[kind] += 1
    line = f'{kind} {name}' + (': ' + ' '.join(str(why).split())[:600] if why else '')
    sys.stdout.write(line + '\n')  # at once: tests/gpu has cases on several threads
    sys.stdout.flush()


@contextlib.contextmanager
def case(name):
    try:
        yield
    except Skip as e:
        _report('skip', name, e)
    except Exception as e:
        if isinstance(e, AssertionError):
            _report('not ok', name, e if str(e) else 'an assertion failed')
        else:
            _report('not ok', name, f'{type(e).__name__}: {e}')
        trace = e.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        print(f'    line {trace.tb_lineno} of {os.path.basename(trace.tb_frame.f_code.co_filename)}', file=sys.stderr)
    else:
        _report('ok', name)


def finish():
    _scratch.cleanup()
    sys.exit(1 if _count['not ok'] or not sum(_count.values()) else 0)


def scratch(name):
    return os.path.join(SCRATCH, name)


def write(name, data):
    """A file in the scratch folder: bytes as they are, text in UTF-8, anything else as JSON."""
    if not isinstance(data, (bytes, str)):
        data = json.dumps(data)
    with open(scratch(name), 'wb') as f:
        f.write(data if isinstance(data, bytes) else data.encode())
    return scratch(name)


class Result:
    """What a run left: .code, .out and .err as bytes, .text and .errors as text."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err
        self.text, self.errors = out.decode('utf-8', 'replace'), err.decode('utf-8', 'replace')

    def __str__(self):
        return f'exit {describe(self.code)}, stdout {self.out[:200]!r}, stderr {self.errors[-400:]!r}'

    def stats(self):
        return json.loads(self.errors.rstrip('\n').split('\n')[-1])


def describe(code):
    return signal.Signals(-code).name if code < 0 else str(code)


def start(*args, env=None, **more):
    """The running program; `env` is added to a clean environment."""
    return subprocess.Popen([KIVI, *map(str, args)], env={**CLEAN, **(env or {})}, **more)


def kivi(*args, env=None, stdin=b'', timeout=TIMEOUT_S, **more):
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, **more}
    feed = {'stdin': stdin} if stdin is None or hasattr(stdin, 'fileno') else {'stdin': subprocess.PIPE}
    with start(*args, env=env, **feed, **pipes) as process:
        try:
            out, err = process.communicate(stdin if feed['stdin'] == subprocess.PIPE else None, timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise AssertionError(f'{" ".join(map(str, args))}: still running after {timeout} s')
    result = Result(process.returncode, out or b'', err or b'')
    assert result.code >= 0, f'{" ".join(map(str, args))}: {result}'
    return result


def good(*args, **more):
    result = kivi(*args, **more)
    assert result.code == 0, f'{" ".join(map(str, args))}: {result}'
    return result


def bad(code, *args, says=None, **more):
    """The program must refuse: this exit code, one line on stderr, nothing on stdout."""
    result = kivi(*args, **more)
    what = f'{" ".join(map(str, args))[-200:]}: {result}'
    assert result.code == code, f'expected exit {code}: {what}'
    assert result.out == b'', f'stdout is not empty: {what}'
    assert result.errors.startswith('kivi: error: '), f'no error line: {what}'
    assert result.errors.count('\n') == 1 and result.errors.endswith('\n'), f'not one line: {what}'
    assert len(result.errors) > len('kivi: error: \n') + 4, f'nothing is said: {what}'
    if says:
        assert says in result.errors, f'expected {says!r}: {what}'
    return result


def logits(model, tokens, *args, name='logits.npy', **more):
    """float32 [T][V] of `kivi logits`."""
    import numpy as np  # only here: most tests need none
    out = scratch(name)
    good('logits', model, '--tokens', write('tokens.json', [int(t) for t in tokens]), '--out', out, *args, **more)
    return np.load(out)
