#!/usr/bin/env python3
"""py_eval.py: what `kivi eval` says against numpy, from the rows that `kivi logits` writes for the same ids.

The model is a golden one with a byte vocabulary written here: token 3 + i is the byte i, so a text's ids need no
tokenizer to be known. eval adds up in doubles in another order than numpy, and prints 6 digits (4 of a standard error,
5 decimals of top1): the tolerance below is one unit of the last digit printed.
"""
import json
import os
import shutil
import sys

import numpy as np

from blackbox import GOLDEN, ROOT, UNDER, bad, case, finish, good, kivi, logits, scratch, write

CTX, SKIP = 96, 20


def byte_name(b):
    """The printable stand-in of a byte in a byte-level vocabulary."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(b) if b in keep else chr(256 + [i for i in range(256) if i not in keep].index(b))


def make_model(name):
    folder = scratch(name)
    os.mkdir(folder)
    for file in ('config.json', 'model.safetensors'):
        shutil.copy(os.path.join(GOLDEN, name, file), folder)
    vocab = {'<unk>': 0, '<s>': 1, '</s>': 2, **{byte_name(b): 3 + b for b in range(256)}}
    special = [{'id': i, 'content': t, 'special': True, 'single_word': False, 'lstrip': False, 'rstrip': False,
                'normalized': False} for t, i in vocab.items() if i < 3]
    tokenizer = {'version': '1.0', 'added_tokens': special, 'normalizer': None, 'post_processor': None,
                 'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
                                   'use_regex': True},
                 'decoder': {'type': 'ByteLevel'},
                 'model': {'type': 'BPE', 'dropout': None, 'unk_token': None, 'vocab': vocab, 'merges': []}}
    for file, value in (('tokenizer.json', tokenizer), ('tokenizer_config.json', {})):
        with open(os.path.join(folder, file), 'w') as f:
            json.dump(value, f)
    return folder


def text(seed, n):
    return bytes(np.random.default_rng(seed).integers(32, 127, n, dtype=np.uint8))


def evaluate(what, *args):
    return json.loads(good('eval', what, *args, '-o', 'json').text)


# ---- the same numbers from rows of logits ----

def log_softmax(rows):
    rows = rows.astype(np.float64)
    top = rows.max(-1, keepdims=True)
    return rows - top - np.log(np.exp(rows - top).sum(-1, keepdims=True))


def expected(model, windows, *options):
    """The fields of one kind; a window is one observation of the standard errors."""
    kld, nll, nll_base, top1 = [], [], [], []
    for ids in windows:
        own, base = (log_softmax(logits(model, ids, '--rule', 'stream', *o)[SKIP:])
                     for o in (options, ('--kv', 'f16')))
        kld.append((np.exp(base) * (base - own)).sum(-1))
        next_ids, at = np.array(ids[SKIP + 1:]), np.arange(len(ids) - SKIP - 1)
        nll.append(-own[at, next_ids])
        nll_base.append(-base[at, next_ids])
        top1.append(own.argmax(-1) == base.argmax(-1))

    def se(per_window):
        means = [w.mean() for w in per_window]
        return np.std(means, ddof=1) / np.sqrt(len(means))
    every = np.concatenate(kld)
    ppl = np.exp(np.concatenate(nll).mean())
    return {'kld': {'mean': every.mean(), 'se': se(kld), 'median': np.quantile(every, 0.5),
                    'p99': np.quantile(every, 0.99)},
            'top1': np.concatenate(top1).mean(), 'ppl': ppl, 'ppl_se': ppl * se(nll),
            'ppl_base': np.exp(np.concatenate(nll_base).mean()),
            'ppl_ratio': ppl / np.exp(np.concatenate(nll_base).mean()), 'tokens': every.size, 'windows': len(windows)}


def close(name, got, want, digits):
    """A unit of the last digit printed, and the rounding of a difference of two log-sum-exps of about 6: a unit in
    the last place is 9e-16 there, six roundings."""
    room = (10.0 ** (np.floor(np.log10(abs(want))) + 1 - digits) if want else 0) + 5.4e-15
    assert abs(got - want) <= room, f'{name} is {got}, expected {want:.9g} +- {room:.1g}'


def compare(got, want):
    for name in ('mean', 'median', 'p99'):
        close(name, got['kld'][name], want['kld'][name], 6)
    close('se', got['kld']['se'], want['kld']['se'], 4)
    close('ppl', got['ppl'], want['ppl'], 6)
    close('ppl_base', got['ppl_base'], want['ppl_base'], 6)
    close('ppl_ratio', got['ppl_ratio'], want['ppl_ratio'], 6)
    close('ppl_se', got['ppl_se'], want['ppl_se'], 4)
    assert abs(got['top1'] - want['top1']) <= 0.5e-5 + 1e-12, f'top1 {got["top1"]}, expected {want["top1"]}'
    assert (got['tokens'], got['windows']) == (want['tokens'], want['windows']), got


LLAMA = make_model('llama-gqa')
TEXTS = [text(1, CTX * 3 + 7), text(2, CTX * 2), text(3, CTX - 1)]  # the last one is shorter than a window
FILES = [write(f'text{i}.txt', t) for i, t in enumerate(TEXTS)]
WINDOWS = [[3 + b for b in t[at:at + CTX]] for t in TEXTS[:2] for at in (0, CTX)]
ARGS = [LLAMA, '-f', FILES[0], '-f', FILES[1], '--ctx', CTX, '--skip', SKIP, '--chunks', 2, '--threads', 2]
SMALL = ('--residual', 32)  # so that 96 tokens have codes
# A + kind has codes from 128 tokens on.
LONG = text(4, 600)
LONG_WINDOWS = [[3 + b for b in LONG[at:at + 290]] for at in (0, 290)]
LONG_ARGS = [LLAMA, '-f', write('long.txt', LONG), '--ctx', 290, '--skip', SKIP]
PLUS_KINDS = (('kivi2+', ()), ('k4v2+', ()), ('k4v3+', ('--sinks', 0)), ('kivi2+', ('--parts', 'wide,turn')),
              ('kivi2+', ('--parts', 'wide,fit,turn,zero,k32')))


def numbers():
    with case('eval/the-text-is-its-bytes'):
        ids = good('tokenize', LLAMA, '-f', FILES[0], '--ids').text.split()
        assert [int(i) for i in ids] == [3 + b for b in TEXTS[0]]
    for kv, bits, more in (('kivi2', 3, SMALL), ('k4v2', 4, SMALL), ('kivi4', 5, SMALL), ('kivi8', 9, SMALL),
                           ('kivi2', 2.5, ('--group', 64, '--residual', 64)), ('kivi2', 3, (*SMALL, '--sinks', 4)),
                           ('kivi2', 3, ())):
        with case('eval/kld-is-numpy/' + '-'.join([kv, *(str(m).strip('-') for m in more)])):
            got = evaluate('kld', *ARGS, '--kv', kv, *more)
            assert len(got) == 1 and got[0]['kv'] == kv and abs(got[0]['bits'] - bits) < 1e-9, got
            if not more:  # a window of 128 holds it all: no distance at all
                assert got[0]['kld']['mean'] == 0 and got[0]['top1'] == 1 and got[0]['ppl'] == got[0]['ppl_base'], got
                continue
            want = expected(LLAMA, WINDOWS, '--kv', kv, *more)
            assert want['kld']['mean'] > 1e-9, 'the kinds do not differ'
            compare(got[0], want)
    for kv, more in PLUS_KINDS:
        with case('eval/kld-is-numpy/' + '-'.join([kv, *(str(m).strip('-') for m in more)])):
            got = evaluate('kld', *LONG_ARGS, '--kv', kv, *more)
            want = expected(LLAMA, LONG_WINDOWS, '--kv', kv, *more)
            assert want['kld']['mean'] > 1e-9, 'the kinds do not differ'
            compare(got[0], want)
    with case('eval/parts-differ'):
        parts = ('all', 'fit,turn,step', 'wide,turn,step', 'wide,fit,step', 'wide,fit,turn', 'wide,fit,turn,zero',
                 'wide,fit,turn,step,k32', 'none', 'zero', 'k32', 'zero,k32,v32')
        means = {evaluate('kld', *LONG_ARGS, '--kv', 'kivi2+', '--parts', p)[0]['kld']['mean'] for p in parts}
        assert len(means) == len(parts), means
    with case('eval/no-part-is-plain'):  # of all that makes kivi2+ out of kivi2 nothing is left
        plain = evaluate('kld', *LONG_ARGS, '--kv', 'kivi2', '--sinks', 4)[0]
        none = evaluate('kld', *LONG_ARGS, '--kv', 'kivi2+', '--parts', 'zero,k32,v32')[0]
        assert plain['kld']['mean'] > 1e-9 and {**none, 'kv': 'kivi2'} == plain, (none, plain)
    with case('eval/ppl-is-the-same-without-a-base'):
        whole, alone = evaluate('kld', *ARGS, '--kv', 'kivi2', *SMALL)[0], evaluate('ppl', *ARGS, '--kv', 'kivi2',
                                                                                   *SMALL)[0]
        assert all(alone[k] == whole[k] for k in ('ppl', 'ppl_se', 'tokens', 'windows', 'bits')), (alone, whole)
        assert 'kld' not in alone and 'ppl_base' not in alone and 'top1' not in alone, alone
    with case('eval/the-base-is-paired'):  # the base has the same rows whatever finer options say of the other side
        base = {evaluate('kld', *ARGS, '--kv', 'kivi2', *m)[0]['ppl_base']
                for m in (SMALL, ('--k-bits', 8), ('--sinks', 5))}
        base.add(evaluate('ppl', *ARGS, '--kv', 'f16')[0]['ppl'])
        assert len(base) == 1, base
        same = evaluate('kld', *ARGS, '--kv', 'f16')[0]
        assert same['kld'] == {'mean': 0, 'se': 0, 'median': 0, 'p99': 0} and same['top1'] == 1, same
        assert same['bits'] == 16, same


def strides():
    with case('eval/strides'):  # windows that overlap
        for stride, n_windows in ((CTX, 3), (40, 5), (CTX - SKIP, 3)):
            ids = [3 + b for b in TEXTS[0]]
            windows = [ids[at:at + CTX] for at in range(0, len(ids) - CTX + 1, stride)]
            assert len(windows) == n_windows
            got = evaluate('kld', LLAMA, '-f', FILES[0], '--ctx', CTX, '--skip', SKIP, '--stride', stride, '--kv',
                           'kivi2', *SMALL)
            compare(got[0], expected(LLAMA, windows, '--kv', 'kivi2', *SMALL))
    with case('eval/strides-of-an-exact-text'):  # the last window ends with the text
        exact = write('exact.txt', TEXTS[0][:CTX + 2 * 40])
        for name, n in (('exact.txt', 3), ('short.txt', 2)):
            path = write(name, TEXTS[0][:CTX + 2 * 40 - (name != 'exact.txt')])
            row = evaluate('ppl', LLAMA, '-f', path, '--ctx', CTX, '--skip', SKIP, '--stride', 40, '--kv', 'f16')[0]
            assert row['windows'] == n, row
        row = evaluate('ppl', LLAMA, '-f', exact, '--ctx', CTX, '--skip', SKIP, '--stride', 40, '--chunks', 2)[0]
        assert row['windows'] == 2, row


def extremes():
    with case('eval/json-has-no-infinity'):  # logits so far apart that a perplexity is beyond a double
        folder = make_model('llama')
        path = os.path.join(folder, 'model.safetensors')
        with open(path, 'rb') as f:
            data = f.read()
        n = int.from_bytes(data[:8], 'little')
        entry = json.loads(data[8:8 + n])['lm_head.weight']
        width = {'F32': 4, 'F16': 2, 'BF16': 2}[entry['dtype']]
        begin, end = (8 + n + at for at in entry['data_offsets'])
        rows = np.frombuffer(data[begin:end], {4: np.uint32, 2: np.uint16}[width]).copy()
        if entry['dtype'] == 'F16':
            rows = (rows.view(np.float16) * np.float16(2000)).view(np.uint16)
        else:
            rows += {4: 11 << 23, 2: 11 << 7}[width]  # times 2^11, in the exponent
        with open(path, 'wb') as f:
            f.write(data[:begin] + rows.tobytes() + data[end:])

        def refuse(text):
            raise AssertionError(f'{text} is no JSON')
        out = good('eval', 'kld', folder, '-f', FILES[0], '--ctx', CTX, '--skip', SKIP, '--kv', 'kivi2', *SMALL, '-o',
                   'json').text
        row = json.loads(out, parse_constant=refuse)[0]
        assert row['ppl'] is None and row['ppl_se'] is None and row['ppl_base'] is None, row
    with case('eval/table-without-a-standard-error'):
        text = good('eval', 'kld', LLAMA, '-f', FILES[1], '--ctx', CTX, '--skip', SKIP, '--chunks', 1).text
        assert 'nan' not in text and '+-' not in text, text


def same_everywhere():
    one = good('eval', 'kld', *ARGS, '--kv', 'kivi2,k4v2', *SMALL, '-o', 'json').out
    with case('eval/threads'):
        for n in (1, 3, 7):
            assert good('eval', 'kld', *ARGS, '--threads', n, '--kv', 'kivi2,k4v2', *SMALL, '-o', 'json').out == one, n
    with case('eval/instruction-sets'):
        for off in ('avx512', 'avx512,avx2'):
            out = good('eval', 'kld', *ARGS, '--kv', 'kivi2,k4v2', *SMALL, '-o', 'json', env={'KIVI_DISABLE': off}).out
            assert out == one, off
    with case('eval/plus-kinds-everywhere'):
        args = ('eval', 'kld', *LONG_ARGS, '--kv', 'kivi2+,k4v2+,k4v3+', '-o', 'json')
        want = good(*args, '--threads', 1).out
        assert good(*args, '--threads', 3).out == want
        for off in ('avx512', 'avx512,avx2'):
            assert good(*args, env={'KIVI_DISABLE': off}).out == want, off
    with case('eval/lists-are-single-runs'):
        both = json.loads(one)
        assert both == [evaluate('kld', *ARGS, '--kv', kv, *SMALL)[0] for kv in ('kivi2', 'k4v2')]


def shape():
    with case('eval/json-fields'):
        for row in evaluate('kld', *ARGS, '--kv', 'kivi2,f16', *SMALL):
            assert list(row) == ['kv', 'bits', 'kld', 'top1', 'ppl', 'ppl_se', 'ppl_base', 'ppl_ratio', 'tokens',
                                 'windows'], row
            assert list(row['kld']) == ['mean', 'se', 'median', 'p99'], row
    with case('eval/one-window-has-no-standard-error'):
        row = evaluate('kld', LLAMA, '-f', FILES[1], '--ctx', CTX, '--skip', SKIP, '--chunks', 1, '--kv', 'kivi2')[0]
        assert row['kld']['se'] is None and row['ppl_se'] is None and row['windows'] == 1, row
        assert row['tokens'] == CTX - SKIP, row
    with case('eval/all-chunks'):
        row = evaluate('ppl', LLAMA, '-f', FILES[0], '--ctx', CTX, '--skip', SKIP, '--kv', 'kivi2')[0]
        assert row['windows'] == 3 and row['tokens'] == 3 * (CTX - SKIP), row
    with case('eval/short-texts-are-left-out'):
        result = good('eval', 'ppl', *ARGS, '-f', FILES[2], '--kv', 'f16', '-o', 'json')
        assert json.loads(result.text)[0]['windows'] == 4 and 'text2.txt' in result.errors, result
    with case('eval/table'):
        lines = good('eval', 'kld', *ARGS, '--kv', 'kivi2,k4v2', *SMALL).text.splitlines()
        assert len(lines) == 4 and all(x.startswith('|') and x.count('|') == lines[0].count('|') for x in lines), lines


def refused():
    for name, code, says, args in (
            ('no-kind-of-evaluation', 2, None, ['eval']),
            ('unknown-evaluation', 2, "'best'", ['eval', 'best', *ARGS]),
            ('no-text', 2, '-f', ['eval', 'ppl', LLAMA]),
            ('no-such-text', 5, 'nothing.txt', ['eval', 'ppl', LLAMA, '-f', scratch('nothing.txt')]),
            ('skip-all', 2, '--skip 96', ['eval', 'ppl', *ARGS, '--skip', CTX]),
            ('skip-all-but-the-last', 2, '--skip 95', ['eval', 'kld', *ARGS, '--skip', CTX - 1]),  # no next token
            ('one-token', 2, '--ctx 1', ['eval', 'ppl', LLAMA, '-f', FILES[0], '--ctx', 1, '--skip', 0]),
            ('stride-0', 2, '--stride', ['eval', 'ppl', *ARGS, '--stride', 0]),
            ('stride-above-ctx', 2, '--stride 97', ['eval', 'ppl', *ARGS, '--stride', CTX + 1]),
            ('format', 2, "'csv'", ['eval', 'ppl', *ARGS, '-o', 'csv']),
            ('kind', 2, "'kivi3'", ['eval', 'kld', *ARGS, '--kv', 'kivi3']),
            ('kind-in-a-list', 2, "'kivi3'", ['eval', 'kld', *ARGS, '--kv', 'f16,kivi3']),
            ('kind-before-any-work', 2, "'kivi3'",
             ['eval', 'kld', scratch('no-model'), *ARGS[1:], '--kv', 'f16,kivi3']),
            ('kinds-without-end', 2, '--kv: more than 16', ['eval', 'ppl', *ARGS, '--kv', 'kivi2,' * 16 + 'f16']),
            ('sinks', 2, '4096', ['eval', 'kld', *ARGS, '--sinks', 4097]),
            ('chunks-0', 2, '--chunks', ['eval', 'ppl', *ARGS, '--chunks', 0])):
        with case(f'eval/refused/{name}'):
            bad(code, *args, says=says)
    with case('eval/refused/no-text-is-long-enough'):
        result = kivi('eval', 'ppl', LLAMA, '-f', FILES[2], '--ctx', CTX, '--skip', SKIP)
        assert result.code == 2 and result.out == b'' and f'--ctx {CTX}' in result.errors, result


def verdicts():
    """tools/eval_quality.py: far below a reference that gives no error is neither agreement nor a failure."""
    sys.path.insert(0, os.path.join(ROOT, 'tools'))
    from eval_quality import verdict
    with case('eval/quality-verdicts'):
        said = [verdict(apart, se) for apart in (-2.1, -2, 0, 2, 2.1) for se in (None, 0.1)]
        assert said == ['below', 'DIFFERS', *['agrees'] * 6, 'DIFFERS', 'DIFFERS'], said


numbers()
strides()
extremes()
verdicts()
if not UNDER:
    same_everywhere()
shape()
refused()
finish()
