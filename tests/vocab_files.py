"""vocab_files.py: the vocabularies and chat templates inside the llama-cpp-python source package, for tests and tools.

The package is fetched with pip into the user's cache folder, once; its vocabularies come with texts and the ids that
llama.cpp gives for them. Nothing of it is kept in the repository."""
import os
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile

PACKAGE, VERSION = 'llama-cpp-python', '0.3.36'
WANTED = re.compile(r'/vendor/llama\.cpp/'
                    r'(models/ggml-vocab-[\w.-]+|models/templates/[\w.-]+|tests/test-chat-template\.cpp)$')


def cache_folder():
    folder = os.environ.get('KIVI_CACHE_DIR')
    if not folder:
        base = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
        folder = os.path.join(base, 'kivi')
    return folder


def unpack(archive, folder):
    with tarfile.open(archive) as tar:
        for member in tar:
            m = WANTED.search(member.name)
            if m and member.isfile():
                path = os.path.join(folder, m[1])
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, 'wb') as out:
                    out.write(tar.extractfile(member).read())


def fetch_package(package, version, binary, unpack_to, name):
    """The folder `name` of the cache with what unpack_to(archive, folder) takes from a package, or (None, why)."""
    cache = cache_folder()
    folder = os.path.join(cache, f'{name}-{version}')
    if os.path.isdir(folder):
        return folder, None
    try:
        os.makedirs(cache, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix='.fetch.') as tmp:
            command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check', '--no-deps',
                       '--no-cache-dir', '--only-binary' if binary else '--no-binary', package, '--retries', '1',
                       '--dest', tmp, f'{package}=={version}']
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            archives = [n for n in os.listdir(tmp) if n.endswith(('.tar.gz', '.whl'))]
            if not archives:
                return None, 'cannot download: ' + (done.stderr.strip().split('\n') or [''])[-1][:120]
            ready = os.path.join(tmp, 'ready')
            unpack_to(os.path.join(tmp, archives[0]), ready)
            os.rename(ready, folder)
    except (OSError, subprocess.TimeoutExpired, tarfile.TarError, zipfile.BadZipFile) as e:
        if not os.path.isdir(folder):  # another test may have been faster
            return None, f'cannot fetch: {e}'
    return folder, None


def fetch():
    """The folder with models/ and tests/ in it, or (None, why)."""
    return fetch_package(PACKAGE, VERSION, False, unpack, 'llama-vocab')


def fetch_tokenizers():
    """A folder from which Hugging Face's `tokenizers` can be imported, or (None, why)."""
    def unzip(archive, folder):
        with zipfile.ZipFile(archive) as z:
            z.extractall(folder)
    return fetch_package('tokenizers', '0.23.3', True, unzip, 'tokenizers')


# ---- GGUF metadata ----

FORMATS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd'}


class Gguf:
    """The keys of a GGUF file: enough to read a vocabulary."""
    def __init__(self, path):
        with open(path, 'rb') as f:
            self.data = f.read()
        self.at = 4
        self.number('I')
        self.number('Q')
        self.keys = {}
        for _ in range(self.number('Q')):
            name = self.string().decode()
            self.keys[name] = self.value(self.number('I'))

    def number(self, form):
        value, = struct.unpack_from('<' + form, self.data, self.at)
        self.at += struct.calcsize('<' + form)
        return value

    def string(self):
        n = self.number('Q')
        self.at += n
        return self.data[self.at - n:self.at]

    def value(self, kind):
        if kind == 8:
            return self.string()
        if kind == 9:
            item, n = self.number('I'), self.number('Q')
            if item in FORMATS:
                form = f'<{n}{FORMATS[item]}'
                self.at += struct.calcsize(form)
                return list(struct.unpack_from(form, self.data, self.at - struct.calcsize(form)))
            return [self.value(item) for _ in range(n)]
        return self.number(FORMATS[kind])
