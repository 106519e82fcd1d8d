#!/usr/bin/env python3
"""compare_logprobs.py: log-probabilities of kivi and of llama.cpp on the same texts, for any GGUF file.

  tools/compare_logprobs.py MODEL.gguf                  the texts of tests/golden/smollm2.json
  tools/compare_logprobs.py MODEL.gguf -f TEXT -n 200   the first 200 tokens of a file

Both engines get the ids that llama.cpp's tokenizer makes (kivi's are compared with them) and a cache of 16 bit. Of each
text every position's twenty likeliest tokens of the reference are compared. It passes when the likeliest token is the
same at 98% of the places where the reference's first two are more than 0.05 apart, and the twenty's log-probabilities
differ by at most 0.10 in the mean and 0.45 at the 99th percentile: what tests/py_smollm2.py asks for.

llama.cpp rounds the activations of quantized rows to 8 bits, which alone makes about a tenth. So the reference is
llama.cpp on the same numbers as float32, a file that llama.cpp writes itself (4 bytes a parameter, in the folder for
temporary files); its distance from the model as it is, and kivi's from that, stand beside. With --as-is there is no
such file, and the reference is llama.cpp on the model as it is.

llama-cpp-python is found or built as tools/compare_llama.py does. KIVI_BIN is the kivi to use (build/kivi).
"""
import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile

import compare_llama
from compare_llama import KIVI, PACKAGE, ROOT, VERSION, die

TOP, CLEAR, ROWS = 20, 0.05, 64
TOP1, MEAN, P99 = 0.98, 0.10, 0.45


class Reference:
    """llama.cpp with one context of n_ctx tokens, on the CPU."""

    def __init__(self, path, n_ctx, threads):
        from llama_cpp import llama_cpp as api
        self.api, self.n_ctx = api, n_ctx
        self.quiet = api.llama_log_callback(lambda level, text, user: None)
        api.llama_log_set(self.quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = api.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            die(f'{path}: llama.cpp cannot load it', 3)
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
        params.n_threads = params.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            die(f'{path}: llama.cpp makes no context of {n_ctx} tokens', 4)
        self.vocab = api.llama_model_get_vocab(self.model)
        self.n_vocab = api.llama_vocab_n_tokens(self.vocab)

    def tokenize(self, text):
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        n = self.api.llama_tokenize(self.vocab, data, len(data), ids, len(ids), True, False)
        return list(ids[:n])

    def logits(self, ids):
        """float32 [T][V]"""
        import numpy as np
        rows = self.api.llama_batch_init(len(ids), 0, 1)
        for i, token in enumerate(ids):
            rows.token[i], rows.pos[i], rows.n_seq_id[i], rows.logits[i] = token, i, 1, True
            rows.seq_id[i][0] = 0
        rows.n_tokens = len(ids)
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        code = self.api.llama_decode(self.context, rows)
        if code:
            die(f'llama_decode returned {code}', 4)
        out = np.ctypeslib.as_array(self.api.llama_get_logits(self.context), (len(ids), self.n_vocab)).copy()
        self.api.llama_batch_free(rows)
        return out


def kivi(*args):
    done = subprocess.run([KIVI, *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        die(f'kivi {args[0]}: {done.stderr.strip()}', done.returncode)
    return done.stdout


def kivi_logits(o, folder, ids):
    import numpy as np
    tokens, out = os.path.join(folder, 'ids.json'), os.path.join(folder, 'logits.npy')
    with open(tokens, 'w', encoding='utf-8') as f:
        json.dump(ids, f)
    kivi('logits', o.model, '--tokens', tokens, '--out', out, '--kv', o.kv, '--ctx', o.n_ctx,
         '--threads', o.threads)
    return np.load(out)


def same_ids(o, folder, text, ids):
    path = os.path.join(folder, 'text')
    with open(path, 'w', encoding='utf-8', newline='') as f:
        f.write(text)
    ours = [int(i) for i in kivi('tokenize', o.model, '-f', path, '--ids').split()]
    return ours[:len(ids)] == ids


def log_probabilities(x):
    import numpy as np
    x = x.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def compare(ours, theirs):
    """(hits, clear places, differences of the top tokens [T][20])"""
    import numpy as np
    hits, clear_places, all_off = 0, 0, []
    for first in range(0, len(ours), ROWS):  # a vocabulary of 262,144 in float64 is 2 MB a row
        a, b = (log_probabilities(x[first:first + ROWS]) for x in (ours, theirs))
        order = np.argpartition(-b, TOP, axis=-1)[:, :TOP]
        order = np.take_along_axis(order, np.argsort(-np.take_along_axis(b, order, -1), axis=-1), -1)
        top = np.take_along_axis(b, order, -1)
        clear = top[:, 0] - top[:, 1] > CLEAR
        hits += int(((a.argmax(-1) == order[:, 0]) & clear).sum())
        clear_places += int(clear.sum())
        all_off.append(np.abs(np.take_along_axis(a, order, -1) - top))
    return hits, clear_places, np.concatenate(all_off)


def as_f32(path, folder):
    """The same model with every row as float32: no activation is rounded then."""
    from llama_cpp import llama_cpp as api
    out, params = os.path.join(folder, 'f32.gguf'), api.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = api.LLAMA_FTYPE_ALL_F32, True
    if api.llama_model_quantize(path.encode(), out.encode(), ctypes.byref(params)):
        die(f'{path}: llama.cpp cannot write it as float32 to {folder}', 5)
    return out


class Distance:
    """Sums over texts of one comparison."""

    def __init__(self, name):
        self.name, self.hits, self.clear, self.off = name, 0, 0, []

    def add(self, ours, theirs):
        hits, clear, off = compare(ours, theirs)
        self.hits, self.clear = self.hits + hits, self.clear + clear
        self.off.append(off)

    def figures(self):
        import numpy as np
        off = np.concatenate(self.off)
        return self.hits / max(self.clear, 1), off.mean(), np.percentile(off, 99), off.max()

    def passes(self):
        share, mean, p99, _ = self.figures()
        return share >= TOP1 and mean <= MEAN and p99 <= P99

    def __str__(self):
        share, mean, p99, worst = self.figures()
        return (f'{self.name}: likeliest {self.hits} of {self.clear} ({share:.2%}), top {TOP} mean {mean:.4f}, '
                f'99th percentile {p99:.4f}, worst {worst:.3f}')


def read_texts(o):
    if o.files:
        texts = []
        for path in o.files:
            with open(path, encoding='utf-8', newline='') as f:
                texts.append(f.read())
        return texts
    with open(os.path.join(ROOT, 'tests', 'golden', 'smollm2.json'), encoding='utf-8') as f:
        return [p['text'] for p in json.load(f)['prompts']]


def run(o, folder):
    texts, other_ids = read_texts(o), 0
    plain = Reference(o.model, o.n_ctx, o.threads)
    exact = None if o.as_is else Reference(as_f32(o.model, folder), o.n_ctx, o.threads)
    distances = [Distance('kivi from llama.cpp')]
    if exact:
        distances = [Distance('kivi from float32'), Distance('llama.cpp from float32'), *distances]
    for text in texts:
        ids = plain.tokenize(text)[:o.tokens]
        other_ids += not same_ids(o, folder, text, ids)
        ours, theirs = kivi_logits(o, folder, ids), plain.logits(ids)
        if exact:
            reference = exact.logits(ids)
            distances[0].add(ours, reference)
            distances[1].add(theirs, reference)
        distances[-1].add(ours, theirs)
        print(f'{len(ids):5} tokens, mean {" ".join(f"{d.off[-1].mean():.4f}" for d in distances)}: {text[:40]!r}',
              flush=True)
    for d in distances:
        print(d)
    good = distances[0].passes() and not other_ids
    print(f'{os.path.basename(o.model)}, kivi {o.kv}, {PACKAGE} {VERSION}: {sum(len(x) for x in distances[0].off)} '
          f'tokens; ids differ in {other_ids} of {len(texts)} texts; {"pass" if good else "FAIL"}: expected of '
          f'{distances[0].name} at least {TOP1:.0%}, at most {MEAN} and {P99}')
    return 0 if good else 1


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('model', help='a GGUF file, or smollm2')
    p.add_argument('-f', '--file', dest='files', action='append', help='a text (repeatable)')
    p.add_argument('-n', '--tokens', type=int, default=256, help='of each text at most (256)')
    p.add_argument('--kv', default='f16', help="kivi's cache (f16)")
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--as-is', action='store_true', help='no float32 file: compare with llama.cpp on the model as it is')
    p.add_argument('--python', help=f'an interpreter that has {PACKAGE} {VERSION}')
    o = p.parse_args()
    if o.tokens < 1 or o.threads < 1:
        p.error('tokens and threads start at 1')
    python = o.python or compare_llama.find_python()
    if not compare_llama.has_llama(python):
        die(f'{python} has no {PACKAGE} {VERSION}')
    if not compare_llama.has_llama(sys.executable):
        os.execv(python, [python, os.path.abspath(__file__), *sys.argv[1:], '--python', python])
    o.model, o.n_ctx = compare_llama.find_model(o.model), (o.tokens + 255) // 256 * 256
    with tempfile.TemporaryDirectory(prefix='kivi-logprobs-') as folder:
        return run(o, folder)


if __name__ == '__main__':
    sys.exit(main())
