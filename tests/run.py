#!/usr/bin/env python3
"""run.py: runs every test there is and counts the cases. The last line is `N passed, N failed, N skipped`; the exit
status is 1 if anything failed.

A test is a program that prints one line a case, `ok NAME`, `not ok NAME: why` or `skip NAME: why` (or TAP, as cmocka
does), and exits with 0 when nothing failed. A program that crashes, runs too long, stops half-way or prints no case at
all is a failure of its own: silence never counts as success. Tools called here may set these variables for the tests:

  KIVI_BIN         the program `kivi` to test            KIVI_GOLDEN      folder of the golden files
  KIVI_TEST_MODEL  the SmolLM2 file; without it, skip     KIVI_TEST_UNDER  asan, tsan or valgrind: do less, it is slow
  KIVI_TEST_QUICK  set to 1: no sanitizers, valgrind, qemu  KIVI_BUILD       the build folder (default: build)
"""
import argparse
import concurrent.futures
import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.environ.get('KIVI_BUILD') or 'build'
GOLDEN = 'tests/golden'
TIMEOUT_S = 900
COMMAND_TESTS = ('py_cli', 'py_convert', 'py_turns')
LONGER_S = {'aarch64': 1800}  # compiles two instruction sets, then runs them in an emulator
TAIL_LINES = 40  # of a failing program's output

SANITIZER_ENV = {
    'ASAN_OPTIONS': 'detect_leaks=1:detect_stack_use_after_return=1:strict_string_checks=1:allocator_may_return_null=1',
    'UBSAN_OPTIONS': 'print_stacktrace=1:halt_on_error=1',
    'TSAN_OPTIONS': 'halt_on_error=1:second_deadlock_stack=1',
}
# A report goes to a file, not to stderr: a test may have read stderr away, or expect an error anyway, and a server may
# be one that the test kills. Whatever the test says, a file with a report in it is a failure. An allocation that fails
# as it should (allocator_may_return_null) writes a warning there, which is none.
REPORTED = re.compile(r'ERROR: |WARNING: ThreadSanitizer: |runtime error: ')
SANITIZED_EXIT = 99  # no exit code of kivi's


# ---- what there is to run: functions that return a list of (name, command) ----

def lint(build):
    tool = [sys.executable, 'tools/lint.py']
    return [('lint', tool + ['--cases']), ('lint-selftest', tool + ['--selftest'])]


def unit(build):
    # From the sources, so that a test that was not built is missed, and a left-over binary is not run.
    names = sorted(os.path.basename(p)[:-2] for p in glob.glob('tests/test_*.c'))
    return [(n, [f'{build}/{n}']) for n in names]


def kernels(build):
    """One program a group of cases, the two long ones first."""
    program = f'{build}/check-kernels'
    try:
        names = subprocess.run([program, '--list'], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return [('check-kernels', [program])]  # which then says what is wrong
    groups = sorted({name.split('/')[0] for name in names}, key=lambda g: (g != 'attn', g != 'cache', g))
    return [(f'check-kernels {group}/', [program, f'--test={group}/']) for group in groups]


def emulated(build):
    """Decode attention of src/cuda without a GPU. Not under sanitizers: its threads are stacks of its own."""
    return [('check-emulated', [f'{build}/check-emulated'])]


def threads(build):
    """What the thread sanitizer is for: the rest of check-kernels has one thread."""
    return [(f'check-kernels {group}', [f'{build}/check-kernels', f'--test={group}'])
            for group in ('cache/batch/3/', 'cache/threads/', 'workers/')]


def python(build):
    return [(os.path.basename(p)[:-3], [sys.executable, p]) for p in sorted(glob.glob('tests/py_*.py'))]


def server(build):
    """The server: connections, preparation, steps, log."""
    return [('py_serve', [sys.executable, 'tests/py_serve.py'])]


def command(build):
    """The command, where it reads files and text from outside. Of the other Python tests most are about numbers."""
    return [(n, [sys.executable, f'tests/{n}.py']) for n in COMMAND_TESTS]


def aarch64(build):
    return [('aarch64', [sys.executable, 'tests/aarch64.py'])]


def valgrind(build):
    """A small model, a prompt, decode steps that close key groups and overflow the window, and the end."""
    model = f'{GOLDEN}/llama-gqa'
    out = os.path.join(tempfile.gettempdir(), f'kivi-valgrind-{os.getpid()}.npy')
    run = [f'{build}/kivi', 'logits', model, '--tokens', f'{model}/tokens.json', '--prompt', '200', '--out', out,
           '--kv', 'kivi2', '--residual', '32', '--threads', '2', '--device', 'cpu']
    check = ['valgrind', '--quiet', '--error-exitcode=99', '--leak-check=full',
             '--errors-for-leak-kinds=definite,indirect']
    return [('logits', ['sh', '-c', '"$@" && echo "ok logits"; code=$?; rm -f "$0"; exit $code', out, *check, *run])]


def gpu(build):
    found = [(os.path.basename(p)[:-3], [sys.executable, p]) for p in sorted(glob.glob('tests/gpu/py_*.py'))]
    programs = [('check_dense', [f'{build}/check-dense']), ('check_cuda', [f'{build}/check-cuda', '--small']),
                ('check_engine', [f'{build}/gpu_engine', GOLDEN, tempfile.gettempdir()])]
    return programs + found


TESTED = ['tests', '{build}/check-kernels', '{build}/kivi']  # not the shared library: sanitizers are in programs
# What may run beside others: one program a core. Not the Python tests, which start servers and watch their time.
BESIDE = (unit, kernels, threads)
# name, what to run, folder of the binaries, `make` arguments that build them, whether KIVI_TEST_QUICK leaves it out.
# At least one program must be found for each entry: a stage that has nothing to run has failed.
STAGES = [
    ('lint', [lint], BUILD, None, False),
    ('unit', [unit], BUILD, None, False),
    ('kernels', [kernels, emulated], BUILD, None, False),
    ('python', [python], BUILD, None, False),
    ('aarch64', [aarch64], BUILD, None, True),
    ('asan', [kernels, unit, command, server], 'build-asan', ['SAN=address,undefined', *TESTED], True),
    ('tsan', [threads, unit, server], 'build-tsan', ['SAN=thread', *TESTED], True),
    ('valgrind', [valgrind], BUILD, None, True),
]
# Stages that are run only when they are asked for: they need a machine of their own.
ASKED = [('gpu', [gpu], BUILD, None, False)]

CASE = re.compile(r'\s*(ok|not ok|skip(?:ped)?)\b(?::|\s+(\d+)(?=\s|$))?\s*(?:-\s+)?(.*)', re.I)
PLAN = re.compile(r'\s*1\.\.(\d+)\s*$')
SKIP = re.compile(r'#\s*skip(?:ped)?\b:?\s*', re.I)


def parse(output):
    """(kind, name) of each case, and how many cases the plans promise (None: no plan)."""
    cases, planned = [], None
    for line in output.split('\n'):
        plan = PLAN.match(line)
        if plan:
            planned = (planned or 0) + int(plan[1])
            continue
        m = CASE.match(line)
        if not m:
            continue
        kind, number, name = m[1].lower(), m[2], m[3].strip()
        if SKIP.search(name):  # cmocka writes `not ok 2 # SKIP name`
            kind, name = 'skip', SKIP.sub('', name)
        cases.append(('skip' if kind.startswith('skip') else kind, name, number))
    # In TAP only numbered lines are cases; whatever else begins with such a word is the test talking.
    return [(kind, name) for kind, name, number in cases if planned is None or number], planned


def verdict(cases, planned, code, timeout_s):
    """What is wrong with a run beyond its own `not ok` lines; None if nothing."""
    failed = any(kind == 'not ok' for kind, _ in cases)
    if timeout_s:
        return f'ran longer than {timeout_s} s'
    if code < 0:
        try:
            return f'ended by {signal.Signals(-code).name}'
        except ValueError:
            return f'ended by signal {-code}'
    if code and not failed:
        return f'exit status {code} without a failed case'
    if planned is not None and len(cases) != planned:
        return f'{planned} cases were planned, {len(cases)} reported'
    if not cases:
        return 'reported no case'
    if failed and code == 0:
        return 'reported a failed case but exit status 0'
    return None


def execute(command, env, limit_s=TIMEOUT_S):
    """(exit status, output, limit_s if it ran longer, else 0). The whole process group ends with the program."""
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                       start_new_session=True)
        except OSError as e:
            return 127, f'{command[0]}: {e.strerror}', 0
        timeout_s = 0
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            timeout_s = limit_s
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        log.seek(0)
        return process.returncode, log.read().decode('utf-8', 'replace'), timeout_s


def take_reports(folder):
    """What sanitizers wrote since the last call, as text; the files are gone then."""
    found = ''
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), '*'))):
        with open(path, encoding='utf-8', errors='replace') as f:
            text = f.read()
        os.remove(path)
        found += text if REPORTED.search(text) else ''
    return found


class Report:
    def __init__(self, verbose):
        self.verbose, self.total, self.took_s = verbose, {'ok': 0, 'not ok': 0, 'skip': 0}, []
        self.lock = threading.Lock()  # of a program's lines and counts

    def case(self, stage, program, kind, name):
        self.total[kind] += 1
        if kind != 'ok' or self.verbose:
            word = {'ok': 'ok  ', 'not ok': 'FAIL', 'skip': 'skip'}[kind]
            print(f'{word} {stage}: {program}: {name}' if name else f'{word} {stage}: {program}', flush=True)

    def program(self, stage, name, command, env):
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix='kivi-reports-') as folder:
            ran = execute(command, {**env, **sanitizers(stage, folder)}, LONGER_S.get(name, TIMEOUT_S))
            reported = take_reports(folder).rstrip().split('\n')
        with self.lock:
            self.took_s.append((time.monotonic() - start, name))
            self.ended(stage, name, *ran, reported)

    def ended(self, stage, name, code, output, timeout_s, reported):
        cases, planned = parse(output)
        for kind, case in cases:
            self.case(stage, name, kind, case)
        problem = verdict(cases, planned, code, timeout_s)
        if problem:
            self.case(stage, name, 'not ok', problem)
        if reported != ['']:
            self.case(stage, name, 'not ok', 'a sanitizer reported')
            print('\n'.join('    | ' + s for s in reported[:2 * TAIL_LINES]), flush=True)
        if problem or any(kind == 'not ok' for kind, _ in cases):
            lines = [s for s in output.rstrip().split('\n') if s and not re.match(r'\s*ok\b', s)]
            if len(lines) > TAIL_LINES:
                print(f'    | ... {len(lines) - TAIL_LINES} lines before')
            for s in lines[-TAIL_LINES:]:
                print('    | ' + s, flush=True)


def sanitizers(stage, folder):
    if stage not in ('asan', 'tsan', 'valgrind'):
        return {}
    return {name: f'{options}:exitcode={SANITIZED_EXIT}:log_path={folder}/report'
            for name, options in SANITIZER_ENV.items()}


def environment(stage, build):
    env = dict(os.environ)
    for name in ('MAKEFLAGS', 'MFLAGS', 'MAKELEVEL', 'MAKEOVERRIDES', 'CMOCKA_XML_FILE'):
        env.pop(name, None)  # we are called by make; its options are not ours
    env.update(CMOCKA_MESSAGE_OUTPUT='TAP', KIVI_GOLDEN=GOLDEN, KIVI_BIN=f'{build}/kivi', PYTHONDONTWRITEBYTECODE='1')
    if stage in ('asan', 'tsan', 'valgrind'):
        env['KIVI_TEST_UNDER'] = stage
    return env


def run_stage(report, name, sources, build, make):
    env = environment(name, build)
    if make:
        command = ['make', '-j2', f'BUILD={build}', *(word.format(build=build) for word in make)]
        code, output, _ = execute(command, env)
        if code:
            report.case(name, 'build', 'not ok', ' '.join(command))
            print('\n'.join('    | ' + s for s in output.rstrip().split('\n')[-TAIL_LINES:]))
            return
    # Address randomization as strong as new kernels have it leaves GCC 12's thread sanitizer no room.
    still = ['setarch', '-R'] if name == 'tsan' and shutil.which('setarch') \
        and subprocess.run(['setarch', '-R', 'true'], capture_output=True).returncode == 0 else []
    cores = len(os.sched_getaffinity(0))
    for together in (True, False):
        with concurrent.futures.ThreadPoolExecutor(cores if together else 1) as pool:
            waiting = []
            for source in sources:
                if (source in BESIDE) != together:
                    continue
                programs = source(build)
                if not programs:
                    report.case(name, source.__name__, 'not ok', 'there is nothing to run')
                waiting += [pool.submit(report.program, name, program, still + command, env)
                            for program, command in programs]
            for program in waiting:
                program.result()  # what was raised there is raised here


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--stage', action='append', choices=[s[0] for s in STAGES + ASKED],
                        help='only this one (repeatable)')
    parser.add_argument('--list', action='store_true', help='stages and their programs')
    parser.add_argument('-v', '--verbose', action='store_true', help='show cases that passed, too')
    options = parser.parse_args()
    os.chdir(ROOT)
    quick = os.environ.get('KIVI_TEST_QUICK', '0') not in ('', '0')
    report = Report(options.verbose)
    for name, sources, build, make, slow in STAGES + (ASKED if options.stage else []):
        if options.stage and name not in options.stage:
            continue
        if options.list:
            print(f'{name}: ' + ' '.join(program for source in sources for program, _ in source(build)))
            continue
        if slow and quick and not options.stage:
            print(f'{name}: left out (KIVI_TEST_QUICK)')
            continue
        before, start, report.took_s = dict(report.total), time.monotonic(), []
        run_stage(report, name, sources, build, make)
        n = {kind: report.total[kind] - before[kind] for kind in before}
        longest = ', '.join(f'{program} {s:.0f} s' for s, program in sorted(report.took_s, reverse=True)[:3])
        print(f'{name}: {n["ok"]} ok, {n["not ok"]} failed, {n["skip"]} skipped, {time.monotonic() - start:.1f} s '
              f'(longest: {longest})', flush=True)
    if options.list:
        return 0
    total = report.total
    print(f'{total["ok"]} passed, {total["not ok"]} failed, {total["skip"]} skipped', flush=True)
    return 1 if total['not ok'] or not total['ok'] else 0


if __name__ == '__main__':
    sys.exit(main())
