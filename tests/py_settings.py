#!/usr/bin/env python3
"""py_settings.py: what the command line says against what the environment says, and what the Makefile rebuilds for."""
import json
import os
import shutil
import subprocess

import convert_files as files
from blackbox import GOLDEN, ROOT, bad, case, finish, good, scratch, skip

GQA = os.path.join(GOLDEN, 'llama-gqa')


def bits(*args, **env):
    return json.loads(good('info', GQA, '--json', '--ctx', 384, *args, env=env).text)['memory_plan'][0]['bits']


def environment():
    fine = {'KIVI_K_BITS': '8', 'KIVI_V_BITS': '8', 'KIVI_GROUP': '64', 'KIVI_RESIDUAL': '64', 'KIVI_SINKS': '64',
            'KIVI_CACHE_TYPE_K': 'q8_0', 'KIVI_CACHE_TYPE_V': 'q8_0'}
    with case('kv/of the command line is a whole'):
        assert bits(**fine) == 8.5 and bits('--kv', 'kivi2', **fine) == bits('--kv', 'kivi2') == 3
        assert bits('--kv', 'f16', **fine) == 16
        assert bits('--kv', 'k4v2+', KIVI_PARTS='none', **fine) == bits('--kv', 'k4v2+')
    with case('kv/parts of a + kind'):
        assert bits('--kv', 'kivi2+', '--parts', 'fit,turn,step') < bits('--kv', 'kivi2+') < 3
        assert abs(bits('--kv', 'kivi2+', '--v-bits', 3) - bits('--kv', 'kivi2+') - 0.5) < 1e-3
        assert bits('--kv', 'kivi2+', '--parts', 'zero,k32,v32') == bits('--kv', 'kivi2')
        whole = bits('--kv', 'kivi2+')
        for parts, more in (('wide,fit,turn,step,k32', 0.375), ('wide,fit,turn,zero', 0.125)):  # 3 x 32 / 128 / 2, ...
            assert abs(bits('--kv', 'kivi2+', '--parts', parts) - whole - more) < 0.05, (parts, more)
    with case('kv/sizes without a name are of plain kinds'):
        for size in ('--group', '--residual'):
            plans = json.loads(good('info', GQA, '--json', '--ctx', 384, size, 64).text)['memory_plan']
            assert [p['kv'] for p in plans] == ['f16', 'kivi8', 'kivi4', 'k4v2', 'kivi2'], plans
    with case('kv/finer settings beside it count'):
        assert bits('--kv', 'kivi2', '--k-bits', 4, **fine) == 4
        assert bits('--kv', 'kivi2', '--group', 64, **fine) == 2.5
    with case('kv/of the environment does not hide its finer settings'):
        assert bits(KIVI_KV='kivi2', KIVI_K_BITS='4') == 4
    with case('kv/a type of one side hides the other word for it'):
        assert bits('-ctk', 'q4_0', '--kv', 'kivi2', KIVI_K_BITS='8') == 4
        assert bits('-ctk', 'q4_0', KIVI_K_BITS='8', KIVI_V_BITS='2') == 4
    with case('prompt/two names for two things'):
        ids = scratch('ids.json')
        with open(ids, 'w') as f:
            f.write('[1, 2, 3, 4]')
        args = ('logits', GQA, '--tokens', ids, '--out', scratch('o.npy'))
        good(*args, env={'KIVI_PROMPT': 'Once upon a time'})
        bad(2, *args, env={'KIVI_LOGITS_PROMPT': 'Once upon a time'}, says='KIVI_LOGITS_PROMPT')
        good(*args, env={'KIVI_LOGITS_PROMPT': '2'})
        assert 'KIVI_LOGITS_PROMPT' in good('--man', 'logits').text.replace('\\', '')  # scdoc's escapes
        folder = files.make_folder('llama-gqa', 'words')
        env = {'KIVI_PROMPT': 'hello'}
        assert good('tokenize', folder, '--ids', env=env).out == good('tokenize', folder, '--ids', '-p', 'hello').out
    with case('convert/environment'):
        folder, out = files.make_folder('llama-gqa', 'words'), scratch('env.gguf')
        good('convert', folder, out, env={'KIVI_TYPE': 'q8_0'})
        assert files.File(out).keys['general.file_type'] == 7


def makefile():
    with case('make/flags of single files are among those that rebuild'):
        if not shutil.which('make'):
            skip('make is not installed')
        build, seen = scratch('build'), []
        for more in ((), ('AVX2=-mavx2 -mfma -mf16c -O1',), ('AVX512=-mavx512f',), ('KERNEL_OPT=-O2',), ()):
            done = subprocess.run(['make', '-s', '-C', ROOT, f'BUILD={build}', f'{build}/flags', *more],
                                  capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            with open(os.path.join(build, 'flags')) as f:
                seen.append(f.read())
        assert len(set(seen[:4])) == 4 and seen[0] == seen[4], seen


environment()
makefile()
finish()
