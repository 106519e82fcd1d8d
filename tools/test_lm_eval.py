#!/usr/bin/env python3
"""test_lm_eval.py: lm-evaluation-harness, unmodified, against `kivi serve`, with no tokenizer on disk.

  test_lm_eval.py MODEL [kivi serve's options]        needs: pip install "lm-eval[api]" numpy

Three tasks over local JSONL (loglikelihood, multiple choice, generate_until) at concurrency 8; every log-likelihood
must be, to the last digit, the sum of what `kivi logits` says of the same tokens, and every generated text what the
server gives to the same request alone. One line a case, then the count."""
import glob
import json
import os
import subprocess
import sys
import tempfile

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, 'tests'))
from serve_client import Server  # noqa: E402

KIVI = os.path.join(ROOT, os.environ.get('KIVI_BIN') or 'build/kivi')
COUNT = {True: 0, False: 0}

FACTS = [('France', 'Paris'), ('Germany', 'Berlin'), ('Italy', 'Rome'), ('Spain', 'Madrid'), ('Japan', 'Tokyo'),
         ('Egypt', 'Cairo'), ('Russia', 'Moscow'), ('Norway', 'Oslo'), ('Greece', 'Athens'), ('Peru', 'Lima'),
         ('Cuba', 'Havana'), ('Kenya', 'Nairobi')]
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: {target}
{more}
metadata:
  version: 1.0
"""
TASKS = [
    ('kivi_loglikelihood', 'loglikelihood', 'The capital of {{country}} is', '" {{capital}}"',
     'metric_list:\n  - metric: acc\n  - metric: perplexity'),
    ('kivi_choice', 'multiple_choice', 'Question: What is the capital of {{country}}?\\nAnswer:', 'label',
     'doc_to_choice: choices\nmetric_list:\n  - metric: acc\n  - metric: acc_norm'),
    ('kivi_generate', 'generate_until', 'Question: What is the capital of {{country}}?\\nAnswer:', '"{{capital}}"',
     'generation_kwargs:\n  until: ["\\n", "Question"]\n  max_gen_toks: 24\nmetric_list:\n  - metric: exact_match'),
]


def report(ok, name, why=''):
    COUNT[bool(ok)] += 1
    print(f'{"ok" if ok else "not ok"} lm-eval: {name}' + (f': {why}' if why else ''), flush=True)


def write_tasks(folder):
    file = os.path.join(folder, 'facts.jsonl')
    with open(file, 'w') as f:
        for i, (country, capital) in enumerate(FACTS):
            choices = [capital] + [FACTS[(i + k) % len(FACTS)][1] for k in (1, 4, 7)]
            choices = choices[i % 4:] + choices[:i % 4]
            f.write(json.dumps({'country': country, 'capital': capital, 'choices': choices,
                                'label': choices.index(capital)}) + '\n')
    for name, kind, text, target, more in TASKS:
        with open(os.path.join(folder, name + '.yaml'), 'w') as f:
            f.write(TASK.format(name=name, file=file, kind=kind, text=text, target=target, more=more))


def evaluate(server, folder):
    env = {**os.environ, 'HF_DATASETS_OFFLINE': '1', 'HF_HUB_OFFLINE': '1', 'HF_HOME': os.path.join(folder, 'hf')}
    done = subprocess.run(
        [os.path.join(os.path.dirname(sys.executable), 'lm_eval'), 'run', '--model', 'local-completions',
         '--model_args',
         f'model=small,base_url=http://127.0.0.1:{server.port}/v1/completions,num_concurrent=8,max_length=1024',
         '--tasks', *[t[0] for t in TASKS], '--include_path', folder, '--log_samples', '--output_path',
         os.path.join(folder, 'out')], env=env, capture_output=True, text=True, timeout=240)
    report(done.returncode == 0, 'the harness runs to its end', done.stderr[-600:] if done.returncode else '')
    remote = 'remote' in done.stderr.lower() + done.stdout.lower()
    report(remote, 'it takes the server for its tokenizer')
    for line in done.stdout.splitlines():
        if 'kivi_' in line or '|' in line:
            print('   ' + line)


def samples(folder, task):
    found = glob.glob(os.path.join(folder, 'out', '**', f'samples_{task}_*.jsonl'), recursive=True)
    assert found, f'no samples of {task}'
    with open(found[0]) as f:
        return [json.loads(line) for line in f]


def encode(server, text):
    return server.post('/tokenize', {'prompt': text, 'add_special_tokens': False})[1]['tokens']


def score(server, model, args, folder, context, continuation):
    """(sum of the printed log-probabilities, all are the likeliest), from `kivi logits`."""
    n = len(context) - len(context.rstrip())
    if n:
        context, continuation = context[:-n], context[-n:] + continuation
    whole, first = encode(server, context + continuation), encode(server, context)
    paths = os.path.join(folder, 'tokens.json'), os.path.join(folder, 'logits.npy')
    with open(paths[0], 'w') as f:
        json.dump(whole, f)
    subprocess.run([KIVI, 'logits', model, '--tokens', paths[0], '--out', paths[1], *args], check=True)
    rows = np.load(paths[1]).astype(np.float64)
    total, greedy = [], True
    for t in range(len(first), len(whole)):
        row = rows[t - 1]
        lp = row - row.max() - np.log(np.exp(row - row.max()).sum())
        total.append(float(str(np.float32(lp[whole[t]]))))  # as a client reads it
        greedy = greedy and lp[whole[t]] == lp.max()
    return sum(total), greedy


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    model, more = sys.argv[1], sys.argv[2:]
    same = [a for i, a in enumerate(more) if a in ('--kv', '--rule', '--residual', '--group', '--sinks')
            or i and more[i - 1] in ('--kv', '--rule', '--residual', '--group', '--sinks')]
    if '--rule' not in same:
        same += ['--rule', 'stream']  # serve's own, where none is asked for
    with tempfile.TemporaryDirectory() as folder, Server(KIVI, model, *more, '--served-model-name', 'small') as server:
        write_tasks(folder)
        evaluate(server, folder)
        for task in ('kivi_loglikelihood', 'kivi_choice'):
            n, wrong = 0, []
            for sample in samples(folder, task):
                requests = [sample['arguments'][k] for k in sorted(sample['arguments'])]
                answers = sample['resps']
                for request, answer in zip(requests, answers):
                    want = score(server, model, same, folder, request['arg_0'], request['arg_1'])
                    got = answer[0] if isinstance(answer[0], list) else answer
                    got = float(got[0]), str(got[1]) == 'True'
                    n += 1
                    if got != want:
                        wrong.append((request, got, want))
            report(not wrong and n, f'{task}: {n} log-likelihoods equal kivi logits', str(wrong[:2]) if wrong else '')
        wrong, n = [], 0
        for sample in samples(folder, 'kivi_generate'):
            request = sample['arguments']['gen_args_0']
            ids = encode(server, request['arg_0'])
            alone = server.complete(prompt=ids, max_tokens=24, stop=request['arg_1']['until'], seed=1234)
            n += 1
            if alone['choices'][0]['text'] != sample['resps'][0][0]:
                wrong.append((sample['resps'], alone))
        report(not wrong and n, f'kivi_generate: {n} texts equal the same request alone',
               str(wrong[:1]) if wrong else '')
    print(f'{COUNT[True]} passed, {COUNT[False]} failed')
    return 1 if COUNT[False] else 0


if __name__ == '__main__':
    sys.exit(main())
