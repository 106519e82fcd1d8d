"""extract_examples.py: the usage example in a header's first comment, as the program it is.

  extract_examples.py HEADER > example.c
"""
import re
import sys

INDENT = ' *     '


def example(path):
    """The indented lines of the first comment, from the first #include to the last closing brace."""
    with open(path) as f:
        comment = re.match(r'/\*.*?\*/', f.read(), re.S)
    assert comment, f'{path}: does not begin with a comment'
    lines = []
    for line in comment[0].split('\n'):
        if line.startswith(INDENT):
            lines.append(line[len(INDENT):])
        elif lines and line.rstrip() == ' *':
            lines.append('')
    code = '\n'.join(lines).strip() + '\n'
    assert code.startswith('#include <') and 'int main(' in code and code.endswith('}\n'), f'{path}: no whole program'
    return code


if __name__ == '__main__':
    sys.stdout.write(example(sys.argv[1]))
