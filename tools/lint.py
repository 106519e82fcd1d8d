#!/usr/bin/env python3
"""lint.py: the project's style as rules a machine can check. STYLE.md says why each is there.

  lint.py               all rules: `file:line: rule: message`, then `lint: N problems`; exit 1 if there are any
  lint.py --list        the rules           lint.py --rule NAME   one rule
  lint.py --cases       one line a rule, `ok NAME` or `not ok NAME: why`, for tests/run.py
  lint.py --selftest    feeds each rule code that breaks it, and clean code; the same kind of lines

A rule is a function that takes a Tree and yields (path, line, message). To add one: write it, decorate it, and give it
a bad snippet in BAD; the self-test refuses a rule without one.
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile

# Folder -> what it may include besides itself. base.h brings kivi.h to everyone, so naming kivi.h is free too.
ARROWS = {
    'programs': {'include', 'src/base'},
    'src/serve': {'src/engine', 'src/model', 'src/cache', 'src/device', 'src/base', 'include'},
    'src/engine': {'src/model', 'src/cache', 'src/token', 'src/load', 'src/device', 'src/base', 'include'},
    'src/model': {'src/cache', 'src/kernel', 'src/load', 'src/device', 'src/base', 'include'},
    'src/cache': {'src/kernel', 'src/device', 'src/base', 'include'},
    'src/cuda': {'src/model', 'src/load', 'src/cache', 'src/kernel', 'src/device', 'src/base', 'include'},
    'src/kernel': {'src/device', 'src/base'},
    'src/load': {'src/base'},
    'src/token': {'src/base'},
    'src/device': {'src/base'},
    'src/base': set(),
    'include': set(),
}
WIDTH, WIDTH_WIDE = 100, 120  # the wide one: public headers, Makefile, scripts
FILE_LINES, PUBLIC_HEADER_LINES = 800, 300
FN_LONGEST, FN_P90, FN_MEDIAN, FN_ENOUGH = 150, 60, 15, 20  # quantiles mean nothing below FN_ENOUGH functions
COMMENT_SHARE = (0.10, 0.35)
# Printing and ending belong to programs/, memory to the tagged allocator, the environment to src/device.
BANNED = '''exit _exit _Exit quick_exit abort printf vprintf puts putchar fprintf vfprintf fputs perror strcpy strcat
            sprintf vsprintf gets strtok system popen rand srand strdup strndup asprintf vasprintf'''.split()
BANNED_ALLOC = 'malloc calloc realloc reallocarray free aligned_alloc posix_memalign'.split()
DUNDER_OK = re.compile(r'''__(attribute__|builtin_\w+|atomic_\w+|ATOMIC_\w+|asm__|volatile__|restrict|typeof__
    |extension__|m(64|128|256|512)[a-z]*|mmask\d+
    |(AVX|SSE|SSSE|F16C|FMA|BMI|ARM|CUDA|SANITIZE|SIZEOF|ORDER|BYTE_ORDER|FLT|DBL|INT|UINT|GNUC|STDC|GLIBC)\w*
    |cplusplus|clang\w*|x86_64__|i386__|aarch64__|linux__|VA_ARGS__|VA_OPT__|FILE__|LINE__|func__|int128|OPTIMIZE__
    |(global|host|device|shared|constant|forceinline|launch_bounds|grid_constant|align|restrict)__
    |sync(threads|warp)|nanosleep|cvta_\w+|shfl\w*|any_sync|ld(g|cs|cg)|st(cs|cg)|threadfence\w*
    |half2?|nv_bfloat162?|\w+_as_(half|ushort|uint|float|int|bfloat16)
    |h(mul|add|fma|max|sub)2?|(half|float|floats|halves|low|high|uint|int|bfloat)\w*2\w*|f(mul|add|sub|div|sqrt)_rn
    |has_\w+|cpuid\w*|get_cpuid\w*|NR_\w+|rdtsc\w*|cpu_\w+|fp16)$''', re.X)
# Assembled, so that this file does not hold what it looks for.
UNFINISHED = re.compile(r'\b(%s)\b' % '|'.join(('TO' + 'DO', 'FIX' + 'ME', 'X' * 3)))
MACHINE_PATH = re.compile(r'(?<![\w.~-])/(%s)(?=[/\s"\'`),;:]|$)' % '|'.join(('wo' + 'rk', 'fa' + 'rm')))
REGISTRY = re.compile('|'.join(map(re.escape, (
    'pypi.' + 'org', 'python' + 'hosted.org', 'deb.' + 'debian.org', 'security.' + 'debian.org', 'ftp.' + 'debian.org',
    'npmjs.' + 'org', 'npmjs.' + 'com', 'crates.' + 'io', 'proxy.' + 'golang.org'))))

TOKEN = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.S)
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.M)
PREPROCESSOR = re.compile(r'^[ \t]*#(?:[^\n\\]|\\.)*(?:\\\n(?:[^\n\\]|\\.)*)*', re.M)


def blank(text):
    """The same number of lines and columns, nothing to see."""
    return re.sub(r'[^\n]', ' ', text)


class Function:
    def __init__(self, signature, name, first, last):
        self.name, self.first, self.last = name, first, last
        self.words = set(re.findall(r'\w+', signature))
        self.static = 'static' in self.words
        self.lines = last - first + 1


class File:
    def __init__(self, root, path):
        self.path = path
        with open(os.path.join(root, path), encoding='utf-8', errors='replace', newline='') as f:
            self.text = f.read()
        self.lines = self.text.split('\n')
        if self.lines[-1] == '':
            self.lines.pop()
        self.folder, self.name = os.path.split(path)
        self.is_c = path.endswith(('.c', '.h', '.cu', '.cuh'))
        if self.is_c:
            # code: without comments and strings.  bare: without comments only.
            self.code = TOKEN.sub(lambda m: blank(m[0]), self.text)
            self.bare = TOKEN.sub(lambda m: blank(m[0]) if m[0][0] == '/' else m[0], self.text)

    def line_of(self, offset):
        return self.text.count('\n', 0, offset) + 1

    def includes(self):
        """(line, name) of each quoted include."""
        return [(self.line_of(m.start(1)), m[1]) for m in INCLUDE.finditer(self.bare)]

    def functions(self):
        """Functions with a body. A block at depth 0 is one when a `)` (and attributes) stands before it, and no `=`."""
        code = PREPROCESSOR.sub(lambda m: blank(m[0]), self.code)
        found, depth, start, head, transparent = [], 0, 0, None, 0
        for m in re.finditer(r'[{};]', code):
            if m[0] == '{':
                if depth == 0:
                    signature = code[start:m.start()]
                    if re.search(r'\bextern\s*$', signature):  # extern "C" {
                        transparent += 1
                        start = m.end()
                        continue
                    plain = re.sub(r'__attribute__\s*\(\(.*?\)\)', '', signature, flags=re.S).rstrip()
                    is_function = plain.endswith(')') and '=' not in plain
                    head = (start + len(signature) - len(signature.lstrip()), plain) if is_function else None
                depth += 1
            elif m[0] == '}':
                if depth == 0 and transparent:
                    transparent -= 1
                    start = m.end()
                    continue
                depth = max(depth - 1, 0)
                if depth == 0:
                    if head:
                        name = re.search(r'(\w+)\s*\(', head[1])
                        if name:
                            first, last = self.line_of(head[0]), self.line_of(m.start())
                            found.append(Function(head[1], name[1], first, last))
                        head = None
                    start = m.end()
            elif depth == 0:
                start = m.end()
        return found


class Tree:
    """The files that the rules look at; everything that could be committed, in a clone or without git."""
    def __init__(self, root):
        self.root = root
        paths = []
        for folder, folders, names in os.walk(root):
            relative = os.path.relpath(folder, root)
            folders[:] = sorted(d for d in folders
                                if d not in ('.git', '__pycache__') and not (relative == '.' and d.startswith('build')))
            paths += [os.path.normpath(os.path.join(relative, n)) for n in sorted(names)]
        text_names = ('Makefile', 'LICENSE', '.ci/run', '.gitignore')
        text_ends = ('.c', '.h', '.cu', '.cuh', '.py', '.sh', '.md', '.txt', '.json', '.supp')
        self.files = [File(root, p) for p in paths
                      if (p in text_names or p.endswith(text_ends)) and os.path.isfile(os.path.join(root, p))]
        self.by_path = {f.path: f for f in self.files}

    def c(self, *tops):
        """C files below these folders, golden data's neighbours left out."""
        return [f for f in self.files if f.is_c and f.path.split('/')[0] in tops]

    def resolve(self, file, name):
        """Paths in the tree that an include of `name` from `file` can mean: beside it, else by the flat -I list."""
        beside = os.path.normpath(os.path.join(file.folder, name))
        if beside in self.by_path:
            return [beside]
        return [p for p in self.by_path if p.startswith(('src/', 'include/'))
                and p.endswith('/' + name) and p.count('/') - name.count('/') <= 2]


RULES = {}


def rule(name):
    def add(function):
        RULES[name] = function
        return function
    return add


ALL_C = ('src', 'include', 'programs', 'tests')


@rule('arrows')
def check_arrows(tree):
    """a folder includes only the folders that DESIGN allows it"""
    for f in tree.c('src', 'include', 'programs'):
        home = f.path.split('/')[0] if f.path.startswith(('include/', 'programs/')) else f.folder
        if home not in ARROWS:
            yield f.path, 1, f'folder {home} is not in the table of arrows'
            continue
        for line, name in f.includes():
            targets = tree.resolve(f, name)
            if len(targets) != 1:
                what = 'ambiguous: ' + ', '.join(targets) if targets else 'not in the tree'
                yield f.path, line, f'"{name}" is {what}'
                continue
            there = os.path.dirname(targets[0])
            if there != home and not there.startswith(home + '/') and there not in ARROWS[home] \
                    and targets[0] != 'include/kivi.h':
                yield f.path, line, f'{home} may not include {targets[0]}'


@rule('private-include')
def check_private(tree):
    """no other folder's .c or _simd.h"""
    for f in tree.c('src', 'include', 'programs'):
        for line, name in f.includes():
            private = name.endswith(('.c', '_simd.h')) or os.path.basename(name) == 'simd.h'
            if private and any(os.path.dirname(t) != f.folder for t in tree.resolve(f, name)):
                yield f.path, line, f'"{name}" is private to its folder'


@rule('own-header-first')
def check_own_header(tree):
    """a .c in src/ includes a header of its own folder first (its contract), or the public one it implements"""
    for f in tree.c('src'):
        if not f.path.endswith('.c'):
            continue
        first = re.search(r'^[ \t]*#[ \t]*include[ \t]*(["<])([^">]+)', f.bare, re.M)
        if not first:
            yield f.path, 1, 'includes no header of its own folder'
        elif first[1] == '<' or not any(os.path.dirname(t) == f.folder for t in tree.resolve(f, first[2])):
            yield f.path, f.line_of(first.start(2)), f'the first include is {first[2]}, not a header of {f.folder}'


def compile_alone(tree, compiler):
    flags = [a for d in sorted({f.folder for f in tree.c('src', 'include', 'programs')}) for a in ('-I', d)]
    for f in tree.c('src', 'include', 'programs'):
        # Templates, and what collects them, make sense only inside the file that instantiates them.
        template = f.name.endswith('simd.h') or any(n.endswith('_simd.h') for _, n in f.includes())
        if template or not f.path.endswith('.h'):
            continue
        done = subprocess.run(compiler + ['-D_GNU_SOURCE', '-fsyntax-only', '-Wall', '-Werror', *flags, f.path],
                              cwd=tree.root, capture_output=True, text=True)
        if done.returncode:
            error = next((s for s in done.stderr.split('\n') if 'error' in s), done.stderr.strip())
            if f.folder == 'src/cuda' and re.search(r'fatal error: cu\w+\.h: No such file', error):
                continue  # NVIDIA's headers, on a machine without them: the backend is not built there either
            at = re.match(r'[^:]+:(\d+):', error)
            yield f.path, int(at[1]) if at and error.startswith(f.path) else 1, error


@rule('header-c17')
def check_header_c(tree):
    """every header compiles alone as C17"""
    return compile_alone(tree, ['gcc', '-std=c17', '-xc'])


@rule('header-cxx')
def check_header_cxx(tree):
    """every header compiles alone as C++17"""
    return compile_alone(tree, ['g++', '-std=gnu++17', '-xc++'])


@rule('width')
def check_width(tree):
    """lines fit"""
    for f in tree.files:
        if f.is_c and f.path.startswith(('src/', 'programs/', 'tests/')):
            limit = WIDTH
        elif f.path.startswith(('include/', '.ci/')) or f.path == 'Makefile' \
                or f.path.endswith(('.py', '.sh')) and not f.path.startswith('tests/golden/'):
            limit = WIDTH_WIDE
        else:
            continue
        for i, line in enumerate(f.lines, 1):
            if len(line) > limit:
                yield f.path, i, f'{len(line)} columns, at most {limit}'


@rule('file-length')
def check_file_length(tree):
    """files have one subject and fit in a head"""
    for f in tree.c(*ALL_C):
        limit = PUBLIC_HEADER_LINES if f.path.startswith('include/') else FILE_LINES
        if len(f.lines) > limit:
            yield f.path, len(f.lines), f'{len(f.lines)} lines, at most {limit}'


def long_form(f):
    """The functions that open and close at column 0; one-liners are not what the limits are about."""
    return [fn for fn in f.functions() if f.lines[fn.last - 1].startswith('}') and fn.lines > 1]


@rule('function-length')
def check_function_length(tree):
    """functions: none beyond the limit, and the whole of src and programs short"""
    lengths = []
    for f in tree.c('src', 'programs'):
        for fn in long_form(f):
            lengths.append(fn.lines)
            if fn.lines > FN_LONGEST:
                yield f.path, fn.first, f'{fn.name} has {fn.lines} lines, at most {FN_LONGEST}'
    lengths.sort()
    if len(lengths) >= FN_ENOUGH:
        for share, limit, word in ((0.5, FN_MEDIAN, 'median'), (0.9, FN_P90, '90th percentile')):
            value = lengths[min(int(share * len(lengths)), len(lengths) - 1)]
            if value > limit:
                yield 'src', 1, f'{word} of function lengths is {value} lines, at most {limit}'


def comment_share(tree):
    n_comment = n_all = 0
    for f in tree.c('src'):
        for line, bare in zip(f.lines, f.bare.split('\n')):
            n_all += bool(line.strip())
            n_comment += bool(line.strip()) and bare.rstrip() != line.rstrip()
    return n_comment / n_all if n_all else None


@rule('comments')
def check_comments(tree):
    """enough comments, not too many (lines of src/ that carry one)"""
    share = comment_share(tree)
    if share is not None and not COMMENT_SHARE[0] <= share <= COMMENT_SHARE[1]:
        yield 'src', 1, '%.0f%% of the lines carry a comment, expected %.0f to %.0f%%' % (
            100 * share, 100 * COMMENT_SHARE[0], 100 * COMMENT_SHARE[1])


@rule('banned-calls')
def check_banned(tree):
    """the library never exits or prints, and takes memory from its own allocator only"""
    for f in tree.c('src'):
        words = list(BANNED)
        words += [] if f.path == 'src/base/base.c' else BANNED_ALLOC
        words += [] if f.path.startswith('src/device/') else ['getenv', 'secure_getenv']
        for m in re.finditer(r'(?<![\w.])(?<!->)(%s)\s*\(|\b(stdout|stderr)\b' % '|'.join(words), f.code):
            yield f.path, f.line_of(m.start()), f'{m[1] or m[2]} is not used in {f.folder}'


@rule('prefix')
def check_prefix(tree):
    """what a linker can see starts with ki_ or kivi_"""
    # KI_INLINE and its like: macros that say static.
    files = tree.c('src')
    macros = {m[1] for f in files for m in re.finditer(r'^#\s*define\s+(\w+)\s+(?:\w+\s+)*?static\b', f.code, re.M)}
    for f in files:
        for fn in f.functions():
            if not fn.static and not fn.words & macros and not re.match(r'(ki|kivi|KI|KIVI|_)_', fn.name):
                yield f.path, fn.first, f'{fn.name} is neither static nor prefixed ki_ or kivi_'


@rule('double-underscore')
def check_dunder(tree):
    """no identifiers of the compiler's own kind; CUDA C++ is made of them"""
    for f in tree.c(*ALL_C):
        if f.path.endswith(('.cu', '.cuh')):
            continue
        for m in re.finditer(r'\b[A-Za-z_]\w*', f.code):
            if '__' in m[0] and not DUNDER_OK.match(m[0]):
                yield f.path, f.line_of(m.start()), f'{m[0]} is a reserved name'


@rule('error-last')
def check_error_last(tree):
    """a kivi_error * parameter is the last one (formatting helpers aside)"""
    for f in tree.c('src', 'include'):
        for m in re.finditer(r'[(,]\s*kivi_error\s*\*\s*\w*\s*,([^)]*)', f.code):
            if '...' not in m[1] and 'va_list' not in m[1]:
                yield f.path, f.line_of(m.start()), 'kivi_error * is not the last parameter'


@rule('field-units')
def check_fields(tree):
    """fields say their unit: n_bytes, page_tokens; never a bare size, len or time"""
    for f in tree.c('src', 'include', 'programs'):
        for m in re.finditer(r'\b(?:struct|union)\b\s*\w*\s*\{', f.code):
            depth, end = 1, m.end()
            while depth and end < len(f.code):
                depth += {'{': 1, '}': -1}.get(f.code[end], 0)
                end += 1
            for field in re.finditer(r'[\s*](size|len|time)\s*(?:\[[^\]]*\]\s*)*[,;:]', f.code[m.end():end]):
                yield f.path, f.line_of(m.end() + field.start(1)), f'field {field[1]} does not say its unit'


@rule('unfinished')
def check_unfinished(tree):
    """no notes to self"""
    for f in tree.files:
        if f.is_c or f.path == 'Makefile' or f.path.endswith(('.py', '.sh')):
            for m in UNFINISHED.finditer(f.text):
                yield f.path, f.line_of(m.start()), f'{m[0]}: finish it or file an issue'


@rule('tabs')
def check_tabs(tree):
    """no tabs in C"""
    for f in tree.c(*ALL_C):
        for i, line in enumerate(f.lines, 1):
            if '\t' in line:
                yield f.path, i, 'a tab'


@rule('white-space')
def check_space(tree):
    """no trailing white space, no CR, one newline at the end"""
    for f in tree.files:
        if f.path.endswith(('.json', '.txt')):
            continue  # data
        for i, line in enumerate(f.lines, 1):
            if line != line.rstrip():
                yield f.path, i, 'white space at the end of the line'
        if f.text and (not f.text.endswith('\n') or f.text.endswith('\n\n')):
            yield f.path, len(f.lines), 'the file does not end in exactly one newline'


@rule('fast-math')
def check_fast_math(tree):
    """the same bytes on every machine need IEEE arithmetic"""
    bad = re.compile(r'-f(?:fast-math|unsafe-math-optimizations|associative-math|reciprocal-math|finite-math-only)'
                     r'|-Ofast|-ffp-contract=(?:fast|on)'
                     r'|^[ \t]*#[ \t]*pragma[^\n]*(?:fast-math|FP_CONTRACT\s+ON)', re.M)
    for f in tree.files:
        if f.path == 'Makefile' or f.is_c:
            for m in bad.finditer(f.bare if f.is_c else f.text):
                yield f.path, f.line_of(m.start()), f'{m[0].strip()} changes results'


@rule('machine-names')
def check_machine(tree):
    """no path of one machine and no package registry's host"""
    for f in tree.files:
        for pattern in (MACHINE_PATH, REGISTRY):
            for m in pattern.finditer(f.text):
                yield f.path, f.line_of(m.start()), f'{m[0].strip()} means nothing elsewhere'


# ---- self-test ----

GOOD = {
    'include/kivi.h': '/* The door. */\n#ifndef KIVI_H\n#define KIVI_H\n'
                      'typedef struct kivi_error { int status; } kivi_error;\n'
                      '#ifdef __cplusplus\nextern "C" {\n#endif\nint kivi_one(int x, kivi_error *err);\n'
                      '#ifdef __cplusplus\n}\n#endif\n#endif\n',
    'src/base/base.h': '/* exit(1) in a comment is fine */\n#ifndef KI_BASE_H\n#define KI_BASE_H\n#include "kivi.h"\n'
                       'int ki_fail(kivi_error *err, int status, const char *format, ...);\n'
                       'typedef struct ki_box { int n_bytes; void (*free)(void *box); } ki_box;\n#endif\n',
    'src/base/base.c': '#include "base.h"\n\n#include <stdlib.h>\n/* Memory. */\n'
                       'int ki_fail(kivi_error *err, int status, const char *format, ...) {\n    free(NULL);\n'
                       '    return err && format ? status : 0;\n}\n',
    'src/load/load.h': '/* Files. */\n#ifndef KI_LOAD_H\n#define KI_LOAD_H\n#include "base.h"\n'
                       'int ki_load(ki_box *box);\n#endif\n',
    'src/load/load.c': '#include "load.h"\n/* Reads. */\n'
                       'static int helper(void) {\n    return __builtin_popcount(3); /* bits */\n}\n'
                       'int ki_load(ki_box *box) {\n    const char *s = "malloc(1) TAB";\n    box->free(box);\n'
                       '    return helper() + (s != 0);\n}\n',
    'src/token/token.h': '/* Words. */\n#ifndef KI_TOKEN_H\n#define KI_TOKEN_H\n#include "base.h"\n#endif\n',
    'src/kernel/quant_simd.h': '/* A template. */\n#define KI_INLINE static inline\n'
                               'KI_INLINE KI_VEC only_inside(KI_VEC x) { return x; }\n',
    'programs/main.c': '#include "kivi.h"\n#include <stdio.h>\n'
                       'int main(void) {\n    printf("TAB");\n    return 0;\n}\n',
    'Makefile': '# no fast-math\nCFLAGS := -O2\nall:\n\t@true\n',
}


def shorts(n, lines):
    one = 'static int f(void) {\n' + '    ;\n' * (lines - 3) + '    return 1; /* one */\n}\n'
    return '/* many */\n' + one * n


def body(text):
    return '#include "load.h"\n/* Bad. */\n' + text


# rule -> bad overlays on GOOD; every one must make its rule speak.
BAD = {
    'arrows': [{'src/load/bad.c': '#include "load.h"\n#include "token.h"\n/* sideways */\n'},
               {'src/base/bad.c': '#include "base.h"\n#include "load.h"\n/* up */\n'},
               {'programs/bad.c': '#include "load.h"\n'}, {'src/load/bad.c': body('#include "nowhere.h"\n')},
               {'src/new/new.h': '/* unknown folder */\n'},
               {'src/token/load.h': '/* twins */\n', 'src/engine/bad.c': '#include "load.h"\n'}],
    'private-include': [{'src/model/bad.c': '#include "quant_simd.h"\n'},
                        {'src/token/bad.c': '#include "../load/load.c"\n'}],
    'own-header-first': [{'src/load/bad.c': '#include <stdio.h>\n#include "load.h"\n'},
                         {'src/load/bad.c': '#include "base.h"\n#include "load.h"\n'},
                         {'src/load/bad.c': '/* none */\n'}],
    'header-c17': [{'src/load/bad.h': 'uint32_t forgot_stdint;\n'}],
    'header-cxx': [{'src/load/bad.h': '/* C only */\nstatic inline char *ki_c(void *p) { return p; }\n'},
                   {'src/load/bad.h': '/* a keyword there */\nint ki_f(int class);\n'}],
    'width': [{'src/load/bad.c': body('/* %s */\n' % ('x' * 100))}, {'include/bad.h': '/* %s */\n' % ('x' * 120)},
              {'Makefile': '# %s\n' % ('x' * 120)}],
    'file-length': [{'src/load/bad.c': body('\n' * 800)}, {'include/bad.h': '\n' * 301}],
    'function-length': [{'src/load/bad.c': shorts(1, 151)}, {'src/load/bad.c': shorts(30, 16)},
                        {'src/load/bad.c': shorts(30, 5) + shorts(10, 61)}],
    'comments': [{'src/load/bad.c': 'int x;\n' * 200}, {'src/load/bad.c': '/* x */\n' * 50}],
    'banned-calls': [{'src/load/bad.c': body('static void f(void) { %s; }\n' % call)} for call in
                     [w + ' (x)' for w in BANNED + BANNED_ALLOC + ['getenv']] + ['f(stderr)', 'x = y - malloc(3)']]
                    + [{'src/base/base.c': 'static void f(void) { abort(); }\n'}],
    'prefix': [{'src/load/bad.c': body('int helper(int x) {\n    return x;\n}\n')},
               {'src/load/bad.c': body('const char *\nname(void)\n{\n    return 0;\n}\n')}],
    'double-underscore': [{'src/load/bad.c': body('int ki__x;\n')}, {'src/load/bad.h': '#define __KI_H\n'}],
    'error-last': [{'src/load/bad.h': 'int ki_x(kivi_error *err, int n);\n'}],
    'field-units': [{'src/load/bad.h': 'struct x {\n    unsigned size;\n};\n'},
                    {'src/load/bad.h': 'typedef struct { struct { int a; } b; int *len, c; } x;\n'}],
    'unfinished': [{'src/load/bad.c': body('/* %s: later */\n' % word)}
                   for word in ('TO' + 'DO', 'FIX' + 'ME', 'X' * 3)],
    'tabs': [{'src/load/bad.c': body('\tint x;\n')}],
    'white-space': [{'src/load/bad.c': body('int x; \n')}, {'src/load/bad.c': body('int x;')},
                    {'src/load/bad.c': body('int x;\r\n')}],
    'fast-math': [{'Makefile': 'CFLAGS += -ffast' + '-math\n'}, {'Makefile': 'CFLAGS += -Ofast\n'},
                  {'src/load/bad.c': body('#pragma GCC optimize("fast-math")\n')}],
    'machine-names': [{'README.md': 'see /wo' + 'rk/shared\n'},
                      {'tools/x.sh': 'pip -i https://pypi.' + 'org/simple\n'}],
}


def planted(files):
    folder = tempfile.TemporaryDirectory()
    for path, text in files.items():
        full = os.path.join(folder.name, path)
        os.makedirs(os.path.dirname(full), exist_ok=True)
        with open(full, 'w', newline='') as f:
            f.write(text)
    return folder


def selftest():
    failed = 0
    for name, check in RULES.items():
        why = [] if BAD.get(name) else ['no bad snippet']
        with planted(GOOD) as good:
            why += ['speaks on clean code: %s:%d: %s' % p for p in check(Tree(good))]
        for i, overlay in enumerate(BAD.get(name, ())):
            with planted({**GOOD, **overlay}) as bad:
                if not list(check(Tree(bad))):
                    why.append(f'silent on bad snippet {i}: {list(overlay.values())[0][-60:]!r}')
        failed += bool(why)
        print(f'not ok selftest {name}: {"; ".join(why)}' if why else f'ok selftest {name}')
    return 1 if failed else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--list', action='store_true')
    parser.add_argument('--rule', choices=RULES, metavar='NAME')
    parser.add_argument('--cases', action='store_true')
    parser.add_argument('--selftest', action='store_true')
    parser.add_argument('--root', default=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    options = parser.parse_args()
    if options.list:
        for name, check in RULES.items():
            print(f'{name:18} {check.__doc__}')
        return 0
    if options.selftest:
        return selftest()
    tree, n_problems = Tree(options.root), 0
    for name in [options.rule] if options.rule else RULES:
        problems = sorted(RULES[name](tree))
        n_problems += len(problems)
        for path, line, message in problems:
            print(f'{path}:{line}: {name}: {message}')
        if options.cases:
            print(f'not ok {name}: {len(problems)} problems' if problems else f'ok {name}')
    if not options.cases:
        share = comment_share(tree)
        lengths = sorted(fn.lines for f in tree.c('src', 'programs') for fn in long_form(f))
        if not options.rule and share is not None and lengths:
            print('lint: %.0f%% of the lines of src carry a comment; %d functions, median %d lines, 90%% at most %d'
                  % (100 * share, len(lengths), lengths[len(lengths) // 2], lengths[int(.9 * len(lengths))]))
        print(f'lint: {n_problems} problems')
    return 1 if n_problems else 0


if __name__ == '__main__':
    sys.exit(main())
