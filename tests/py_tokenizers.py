#!/usr/bin/env python3
"""py_tokenizers.py: the second oracle of tokenizer.json, Hugging Face's `tokenizers`, on 10,000 random and hostile
strings with every kind of pipeline: tools/compare_tokenizers.py with a package fetched into the user's cache, once.
Skips where there is no network, or no build of the package for this machine."""
import os
import subprocess
import sys

import vocab_files

HERE = os.path.dirname(os.path.abspath(__file__))
TOOL = os.path.join(HERE, '..', 'tools', 'compare_tokenizers.py')


def main():
    folder, why = vocab_files.fetch_tokenizers()
    vocabularies, other_why = vocab_files.fetch()
    if not folder or not vocabularies:
        print(f'skip tokenizers: {why or other_why}')
        return 0
    paths = [folder, *filter(None, [os.environ.get('PYTHONPATH')])]
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(paths), 'KIVI_DEVICE': 'cpu'}
    if subprocess.run([sys.executable, '-c', 'import tokenizers'], env=env, capture_output=True).returncode:
        print('skip tokenizers: the package is not for this Python')
        return 0
    quick = os.environ.get('KIVI_TEST_QUICK', '0') not in ('', '0')
    # Its lines are `ok KIND: ...` and `not ok KIND: ...`.
    return subprocess.run([sys.executable, TOOL, '--kivi', os.environ.get('KIVI_BIN') or 'build/kivi', '--strings',
                           '1000' if quick else '10000'], env=env).returncode


if __name__ == '__main__':
    sys.exit(main())
