#!/usr/bin/env python3
"""py_manual.py: man pages and completions have every command and option, and parse. Skips the shells and tools that are
not installed."""
import os
import re
import shutil
import subprocess
import sys
import tempfile

KIVI = os.environ.get('KIVI_BIN') or 'build/kivi'
N_FAILED = 0


def case(name, ok, why=''):
    global N_FAILED
    N_FAILED += not ok
    print(f'ok {name}' if ok else f'not ok {name}: {why}', flush=True)


def kivi(*arguments):
    return subprocess.run([KIVI, *arguments], capture_output=True, text=True)


def spellings(command):
    """All that --help of a command lists: --name, and the shorter ones."""
    found = []
    for line in kivi(command, '--help').stdout.split('\n'):
        m = re.match(r'  (--[\w-]+)', line)
        if m:
            found += [m[1]] + re.findall(r'(?<=[ ])--?[a-zA-Z0-9][\w-]*', line[:46][len(m[0]):])
    return found


def parses(name, tool, text, *command):
    if not shutil.which(tool):
        print(f'skip {name} parses: {tool} is not installed')
        return
    with tempfile.NamedTemporaryFile('w', suffix='.txt') as f:
        f.write(text)
        f.flush()
        done = subprocess.run([tool, *command, f.name], capture_output=True, text=True)
        case(f'{name} parses', done.returncode == 0 and not done.stderr, done.stderr[:200])


BASH = r'''
source "$1"
complete_for() { COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _kivi; echo "${COMPREPLY[@]}"; }
complete_for kivi ru; complete_for kivi run --thr; complete_for kivi run -p ''; complete_for kivi bench m.gguf --rep
'''


def check_bash(text):
    with tempfile.NamedTemporaryFile('w') as f:
        f.write(text)
        f.flush()
        done = subprocess.run(['bash', '-c', BASH, 'bash', f.name], capture_output=True, text=True)
    case('bash completes', done.stdout.split('\n') == ['run', '--threads', '', '--repetitions', ''],
         done.stdout + done.stderr)


def check_page(command, words):
    """The page in scdoc's format; what scdoc makes of it; and what man shows of that."""
    name = f'man page of {command}' if command else 'man page of kivi'
    text = kivi('--man', *command.split()).stdout
    missing = [w for w in words if w not in text]
    case(f'{name} is complete', words and not missing, str(missing))
    if not shutil.which('scdoc'):
        print(f'skip {name} is one to scdoc: scdoc is not installed')
        return
    made = subprocess.run(['scdoc'], input=text, capture_output=True, text=True)
    case(f'{name} is one to scdoc', made.returncode == 0 and made.stdout.count('.SH') >= 4, made.stderr[:200])
    parses(name, 'man', made.stdout, '--warnings', '-E', 'UTF-8', '-l', '-Tutf8', '-P', 'cat')


def main():
    names = kivi('--completion', 'names').stdout.split()
    case('commands are listed', {'run', 'info', 'chat', 'tokenize'} <= set(names), str(names))
    scripts = {shell: kivi('--completion', shell).stdout for shell in ('bash', 'zsh', 'fish')}
    for command in names:
        words = spellings(command)
        check_page(command, words)
        for shell in ('bash', 'zsh'):
            missing = [w for w in words if w not in scripts[shell]]
            case(f'{shell} knows {command}', not missing, str(missing))
        lines = '\n'.join(s for s in scripts['fish'].split('\n') if f'from {command}\'' in s)
        missing = [w for w in words if not re.search(rf' -[lso] {re.escape(w.lstrip("-"))} ', lines)]
        case(f'fish knows {command}', not missing, str(missing))
    check_page('', [f'kivi-{n}' for n in names])
    parses('bash script', 'bash', scripts['bash'], '-n')
    parses('zsh script', 'zsh', scripts['zsh'], '-n')
    parses('fish script', 'fish', scripts['fish'], '-n')
    check_bash(scripts['bash'])
    for arguments in (('--completion',), ('--completion', 'csh'), ('--man', 'nothing')):
        case(' '.join(arguments) + ' is refused', kivi(*arguments).returncode == 2)
    return 1 if N_FAILED else 0


if __name__ == '__main__':
    sys.exit(main())
