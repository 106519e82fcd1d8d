#!/usr/bin/env python3
"""py_headers.py: the public headers as a stranger uses them. Their usage examples are taken out of the comments,
compiled as C and as C++, linked statically and through an installed pkg-config file, and run.
"""
import os
import re
import shutil
import subprocess

from blackbox import GOLDEN, ROOT, SCRATCH, case, finish, needs_model, skip
from extract_examples import example

BUILD = os.path.join(ROOT, os.environ.get('KIVI_BUILD') or 'build')
HEADERS = ('kivi', 'kivi_cache', 'kivi_text', 'kivi_convert', 'kivi_serve', 'kivi_bench')
EXAMPLES = ('kivi', 'kivi_cache')  # those whose first comment is a program
PKGS = ('jansson', 'libpcre2-8', 'libutf8proc')
STRICT = ['-Wall', '-Wextra', '-Wpedantic', '-Werror']
DEST = os.path.join(SCRATCH, 'dest')
CC, CXX = os.environ.get('CC') or 'cc', os.environ.get('CXX') or 'g++'
LANGUAGES = {'c': ([CC, '-std=c17'], '.c'), 'c++': ([CXX, '-std=c++17'], '.cc')}


def run(command, env=None, code=0):
    """(stdout, stderr) of a command that must end with this exit status."""
    p = subprocess.run(command, cwd=ROOT, env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL,
                       capture_output=True, timeout=300)
    out, err = p.stdout.decode('utf-8', 'strict'), p.stderr.decode('utf-8', 'replace')
    assert p.returncode == code, f'{" ".join(command[:4])} ...: exit status {p.returncode}: {(err or out)[-400:]}'
    return out, err


def compiler(language):
    command, end = LANGUAGES[language]
    if not shutil.which(command[0]):
        skip(f'there is no {command[0]}')
    return command, end


def static_libraries():
    return [f'{BUILD}/libkivi.a', *run(['pkg-config', '--libs', '--static', *PKGS])[0].split(), '-lm', '-pthread']


def build(header, language, flags, libraries, name):
    command, end = compiler(language)
    source, program = os.path.join(SCRATCH, name + end), os.path.join(SCRATCH, name)
    with open(source, 'w') as f:
        f.write(example(f'{ROOT}/include/{header}.h'))
    run([*command, *STRICT, *flags, source, '-o', program, *libraries])
    return program


def check_cache_example(program, env=None):
    out, err = run([program], env)
    assert re.fullmatch(r'500 tokens, out\[0\] = -?[0-9.e+-]+\n', out), f'printed {out!r}'
    assert not err, err
    return out


def check_engine_example(program, env=None):
    """Without the real model it can still say what is missing."""
    _, err = run([program, os.path.join(GOLDEN, 'llama')], env, code=1)
    assert 'tokenizer.json' in err and err.count('\n') == 1, err
    _, err = run([program, os.path.join(SCRATCH, 'nothing.gguf')], env, code=1)
    assert 'nothing.gguf' in err and 'No such file' in err and err.count('\n') == 1, err


def pkg_config(*words):
    env = {'PKG_CONFIG_PATH': f'{DEST}/usr/lib/pkgconfig', 'PKG_CONFIG_SYSROOT_DIR': DEST,
           'PKG_CONFIG_ALLOW_SYSTEM_CFLAGS': '1', 'PKG_CONFIG_ALLOW_SYSTEM_LIBS': '1'}
    return run(['pkg-config', *words, 'kivi'], env)[0].split()


def make(*words):
    # Called by make: the options of that one are not for this one.
    env = {k: v for k, v in os.environ.items() if k not in ('MAKEFLAGS', 'MFLAGS', 'MAKELEVEL', 'MAKEOVERRIDES')}
    p = subprocess.run(['make', f'BUILD={os.path.relpath(BUILD, ROOT)}', f'DESTDIR={DEST}', 'PREFIX=/usr', *words],
                       cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-400:]


def installed():
    return {os.path.relpath(os.path.join(folder, name), DEST)
            for folder, _, names in os.walk(DEST) for name in names}


# ---- straight from the tree ----

for h in HEADERS:
    for lang in LANGUAGES:
        with case(f'headers/{h}.h alone as {lang}'):
            compile_command, ending = compiler(lang)
            alone = os.path.join(SCRATCH, 'alone' + ending)
            with open(alone, 'w') as f:
                f.write(f'#include <{h}.h>\n#include <{h}.h>\nint main(void) {{ return KIVI_OK; }}\n')
            run([*compile_command, *STRICT, '-Wconversion', '-Iinclude', '-c', alone, '-o', alone + '.o'])

programs = {}
for h in EXAMPLES:
    for lang in LANGUAGES:
        with case(f'headers/example of {h}.h as {lang}, static'):
            programs[h, lang] = build(h, lang, ['-Iinclude'], static_libraries(), f'{h}-{lang}')
            (check_cache_example if h == 'kivi_cache' else check_engine_example)(programs[h, lang])

with case('headers/example of kivi.h on SmolLM2'):
    model = needs_model()
    texts = {lang: run([programs['kivi', lang], model])[0] for lang in LANGUAGES if ('kivi', lang) in programs}
    text = texts['c']
    assert text.endswith('\n') and len(text.strip()) >= 8, f'printed {text!r}'
    assert all(c.isprintable() or c == '\n' for c in text), f'printed {text!r}'
    assert len(set(texts.values())) == 1, f'C and C++ print different texts: {texts}'

# ---- installed ----

with case('headers/make install'):
    make('install')
    found = installed()
    version = re.search(r'KIVI_VERSION "(.*)"', open(f'{ROOT}/include/kivi.h').read())[1]
    expected = {'usr/bin/kivi', 'usr/include/kivi.h', 'usr/include/kivi_cache.h',
                'usr/include/kivi_text.h', 'usr/include/kivi_convert.h', 'usr/include/kivi_serve.h',
                'usr/lib/libkivi.a',
                'usr/lib/libkivi.so', 'usr/lib/libkivi.so.0', f'usr/lib/libkivi.so.{version}',
                'usr/lib/pkgconfig/kivi.pc', 'usr/share/man/man1/kivi.1', 'usr/share/man/man1/kivi-run.1'}
    assert expected <= found, f'missing: {sorted(expected - found)}'
    assert all(p.startswith('usr/') for p in found), sorted(found)
    assert DEST not in open(f'{DEST}/usr/lib/pkgconfig/kivi.pc').read(), 'DESTDIR is in kivi.pc'
    assert pkg_config('--modversion') == [version]
    out, _ = run([f'{DEST}/usr/bin/kivi', '--version'])
    assert version in out, out

shared = {'LD_LIBRARY_PATH': f'{DEST}/usr/lib'}
for h in EXAMPLES:
    for lang in LANGUAGES:
        with case(f'headers/example of {h}.h as {lang}, installed and shared'):
            program = build(h, lang, pkg_config('--cflags'), pkg_config('--libs'), f'{h}-{lang}-shared')
            needed = run(['readelf', '-d', program])[0]
            assert '[libkivi.so.0]' in needed, 'not linked to libkivi.so.0'
            (check_cache_example if h == 'kivi_cache' else check_engine_example)(program, shared)

with case('headers/installed and static'):
    libraries = [w for w in pkg_config('--libs', '--static') if w != '-lkivi' and not w.startswith('-L')]
    program = build('kivi_cache', 'c', pkg_config('--cflags'), [f'{DEST}/usr/lib/libkivi.a', *libraries], 'installed')
    check_cache_example(program)

with case('headers/the shared library shows only its interface'):
    symbols = run(['nm', '-D', '--defined-only', f'{DEST}/usr/lib/libkivi.so'])[0]
    names = {line.split()[-1] for line in symbols.split('\n') if line}
    foreign = sorted(n for n in names if not n.startswith('kivi_'))
    assert not foreign, f'exported: {foreign[:5]}'
    text = ''.join(open(f'{ROOT}/include/{h}.h').read() for h in HEADERS)
    declared = set(re.findall(r'^KIVI_API [^;]*?\b(kivi_\w+)\(', text, re.M))
    assert declared == names, f'not both declared and exported: {sorted(declared ^ names)}'

with case('headers/make uninstall'):
    make('uninstall')
    assert not installed(), f'left behind: {sorted(installed())}'

finish()
