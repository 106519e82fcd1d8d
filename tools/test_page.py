#!/usr/bin/env python3
"""test_page.py: the chat page in a headless Chromium, driven through its own protocol over a pipe.

  test_page.py MODEL [--shots DIR] [kivi serve's options]

Sends, reads the stream, stops, edits, regenerates, shows errors, runs two tabs at once and looks for lines in the
console; with --shots it leaves pictures in both themes and of a phone's size. One line a case, then the count; exits
with 77 when there is no Chromium."""
import base64
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, 'tests'))
from serve_client import Server  # noqa: E402

KIVI = os.path.join(ROOT, os.environ.get('KIVI_BIN') or 'build/kivi')
WAIT_S = 60


class Browser:
    def __init__(self, program, folder):
        # Chromium reads from descriptor 3 and writes to 4; messages end in a zero byte.
        (its_in, self.out), (self.inp, its_out) = os.pipe(), os.pipe()
        # From high numbers down to 3 and 4: either pipe may already sit on one of those.
        shell = f'exec 8<&{its_in} 9>&{its_out}; exec 3<&8 4>&9 8<&- 9>&-; exec "$@"'
        self.process = subprocess.Popen(
            ['bash', '-c', shell, 'sh', program, '--headless=new', '--no-sandbox', '--disable-gpu', '--no-first-run',
             '--remote-debugging-pipe', f'--user-data-dir={folder}', '--window-size=1280,860', 'about:blank'],
            pass_fds=(its_in, its_out), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(its_in)
        os.close(its_out)
        self.buffer, self.number, self.answers, self.events = b'', 0, {}, []

    def pump(self, limit_s):
        if select.select([self.inp], [], [], limit_s)[0]:
            data = os.read(self.inp, 1 << 20)
            assert data, 'Chromium ended'
            self.buffer += data
            *messages, self.buffer = self.buffer.split(b'\0')
            for message in map(json.loads, messages):
                if 'id' in message:
                    self.answers[message['id']] = message
                else:
                    self.events.append(message)

    def call(self, method, session=None, **params):
        self.number += 1
        number, message = self.number, {'id': self.number, 'method': method, 'params': params}
        if session:
            message['sessionId'] = session
        os.write(self.out, json.dumps(message).encode() + b'\0')
        end = time.monotonic() + WAIT_S
        while number not in self.answers:
            assert time.monotonic() < end, f'{method}: no answer'
            self.pump(0.2)
        answer = self.answers.pop(number)
        assert 'error' not in answer, f'{method}: {answer["error"]}'
        return answer['result']

    def close(self):
        self.process.kill()
        self.process.wait()


class Tab:
    def __init__(self, browser, url, width=1280, height=860, dark=False, phone=False):
        self.browser = browser
        target = browser.call('Target.createTarget', url='about:blank')['targetId']
        self.session = browser.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log'):
            self.call(domain + '.enable')
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=2 if phone else 1,
                  mobile=phone)
        self.dark(dark)
        self.call('Page.navigate', url=url)
        self.until("document.readyState === 'complete' && document.getElementById('model').textContent", 'it is loaded')

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def run(self, script):
        result = self.call('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in result, result['exceptionDetails']
        return result['result'].get('value')

    def until(self, script, what, limit_s=WAIT_S):
        end = time.monotonic() + limit_s
        while True:
            value = self.run(script)
            if value:
                return value
            assert time.monotonic() < end, f'{what}: not after {limit_s} s'
            time.sleep(0.03)

    def dark(self, on):
        self.call('Emulation.setEmulatedMedia', features=[{'name': 'prefers-color-scheme',
                                                           'value': 'dark' if on else 'light'}])

    def type(self, text):
        self.call('Input.insertText', text=text)

    def key(self, name, code, text=None, modifiers=0):
        more = {'text': text} if text else {}
        self.call('Input.dispatchKeyEvent', type='keyDown', key=name, code=name, windowsVirtualKeyCode=code,
                  modifiers=modifiers, **more)
        self.call('Input.dispatchKeyEvent', type='keyUp', key=name, code=name, windowsVirtualKeyCode=code)

    def enter(self):
        self.key('Enter', 13, '\r')

    def click(self, where):
        """A real click at the middle of the element that a selector or an expression names."""
        pick = where if where.startswith('(') else f'document.querySelector({json.dumps(where)})'
        x, y = self.run(f'(() => {{ const e = {pick}; e.scrollIntoView({{block: "nearest"}}); const r = '
                        'e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()')
        for kind in ('mousePressed', 'mouseReleased'):
            self.call('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1)

    def button(self, text):
        self.click(f'([...document.querySelectorAll("button")].filter(b => b.offsetParent && '
                   f'b.textContent === {json.dumps(text)}).at(-1))')

    def say(self, text):
        self.click('#input')
        self.type(text)
        self.enter()

    def answered(self):
        self.until("!running && turns.length && turns.at(-1).role === 'assistant'", 'the answer is whole')
        return self.run('turns.at(-1).text')

    def shot(self, path):
        if path:
            data = self.call('Page.captureScreenshot', format='png')['data']
            with open(path, 'wb') as f:
                f.write(base64.b64decode(data))


class Cases:
    def __init__(self):
        self.n = {True: 0, False: 0}

    def run(self, name, function):
        try:
            function()
            ok, why = True, ''
        except AssertionError as e:
            ok, why = False, f': {e}'
        self.n[ok] += 1
        print(f'{"ok" if ok else "not ok"} {name}{why}', flush=True)


def check(value, what='an assertion failed'):
    assert value, what


def size(text):
    """Bytes that the page shows as "1.2 MiB", and how far they may be from what it rounded."""
    found = re.fullmatch(r'(\d+(?:\.(\d+))?) (B|KiB|MiB|GiB)', text)
    assert found, f'{text!r} is no number of bytes'
    unit = 1024 ** ('B', 'KiB', 'MiB', 'GiB').index(found[3])
    return float(found[1]) * unit, 0.5 * unit / 10 ** len(found[2] or '')


def main():
    args = sys.argv[1:]
    shots = None
    if '--shots' in args:
        at = args.index('--shots')
        shots = args[at + 1]
        os.makedirs(shots, exist_ok=True)
        del args[at:at + 2]
    program = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not program or not args:
        print('skip the chat page: ' + ('no Chromium is there' if args else __doc__))
        return 77
    where = (lambda name: os.path.join(shots, name)) if shots else (lambda name: None)
    cases = Cases()
    with Server(KIVI, *args) as server, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(program, folder)
        try:
            drive(cases, browser, server, f'http://127.0.0.1:{server.port}/', where)
        finally:
            browser.close()
    print(f'{cases.n[True]} passed, {cases.n[False]} failed')
    return 1 if cases.n[False] else 0


def drive(cases, browser, server, url, where):
    tab = Tab(browser, url)

    def set_options(**more):
        tab.run(f'Object.assign(options, {json.dumps(more)})')

    def send():
        tab.shot(where('light-empty.png'))
        set_options(temperature=0, max_tokens=120, seed=1)
        tab.say('Name three animals that live in the sea, with a sentence each.')
        pieces = set()
        while tab.run('!!running'):
            pieces.add(tab.run('turns.at(-1).text.length'))
        check(len(pieces) > 4, f'it came in {len(pieces)} pieces')
        check(len(tab.answered()) > 20, 'no answer')
        shown = tab.run("document.querySelector('.turn.assistant .text').textContent")
        check(shown == tab.run('turns[1].text').replace('```', ''), 'what is shown is not what was said')
        check('tokens' in tab.run("document.querySelector('.turn.assistant .tools').textContent"), 'no count')

    def ask(messages):
        """The answer to what the page sends, as the server gives it to others; the options are those of the page."""
        options = tab.run('options')
        names = ('temperature', 'top_p', 'top_k', 'min_p', 'repetition_penalty', 'max_tokens', 'seed')
        return server.chat(messages, **{name: options[name] for name in names})['choices'][0]['message']['content']

    def stop():
        set_options(max_tokens=600)
        tab.say('Write a long story about a lighthouse.')
        tab.until('running && turns.at(-1).text.length > 20', 'text comes')
        tab.shot(where('light-busy.png'))
        tab.key('Escape', 27)
        tab.until('!running', 'it stops', 3)
        check(tab.run('turns.at(-1).note') == 'stopped')
        server.until(server.idle, 'the server has stopped, too', 3)

    def edit():
        set_options(max_tokens=12)
        story = tab.run('turns[2].text')
        tab.run('window.sent = []; window.plain_fetch = fetch; window.fetch = (url, more) => { '
                'if (more?.body) sent.push(JSON.parse(more.body)); return plain_fetch(url, more); }')
        tab.run("document.getElementById('input').focus()")
        tab.key('ArrowUp', 38)
        tab.until("document.activeElement.tagName === 'TEXTAREA' && document.activeElement.id !== 'input'",
                  'it is edited')
        tab.run('document.activeElement.select()')
        tab.type('What is the capital of France?')
        tab.enter()
        answer, sent = tab.answered(), tab.run('sent')
        turns = tab.run('turns.map(t => ({role: t.role, content: t.text}))')
        check(len(turns) == 4 and turns[2]['content'] == 'What is the capital of France?', f'the turns are {turns}')
        check(len(sent) == 1 and sent[0]['messages'] == turns[:3], f'{sent} was sent')
        # Greedy: the same messages without the page give the same text, those from before the edit another one.
        expected = ask(turns[:3])
        check(answer == expected, f'the answer is {answer!r}, without the page it is {expected!r}')
        check(answer != ask([*turns[:2], {'role': 'user', 'content': story}]), 'edited or not, the answer is one')

    def regenerate():
        before = tab.answered()
        tab.button('Regenerate')
        check(tab.answered() == before, 'greedy twice is not the same')
        check(tab.run('turns.length') == 4)
        sent = tab.run('sent')
        check(len(sent) == 2 and sent[0] == sent[1], f'not sent again: {sent}')

    def reload():
        count = tab.run('turns.length')
        tab.call('Page.reload')
        tab.until("document.readyState === 'complete' && window.turns === undefined && turns.length === " + str(count),
                  'the conversation is there again')

    def settings():
        tab.button('Settings')
        tab.until("document.getElementById('dialog').open", 'it opens')
        tab.run("document.getElementById('o-temperature').value = '0.25'")
        tab.shot(where('light-settings.png'))
        tab.button('Done')
        tab.until("!document.getElementById('dialog').open", 'it closes')
        tab.until('options.temperature === 0.25', 'it counts', 3)  # `close` comes a little after it is closed
        check(tab.run("JSON.parse(localStorage['kivi-options']).temperature") == 0.25, 'it is not kept')

    def error():
        set_options(top_p=2)
        tab.say('hello')
        tab.until("!!document.querySelector('.error')", 'the error is shown')
        check('top_p' in tab.run("document.querySelector('.error').textContent"))
        tab.shot(where('light-error.png'))
        set_options(top_p=0.9, max_tokens=5)
        tab.button('Try again')
        tab.answered()
        check(not tab.run("!!document.querySelector('.error')"), 'the error stays')

    def markup():
        tab.run("turns.push({role: 'assistant', text: '<img src=x onerror=alert(1)>\\n```js\\nlet a;\\n```\\nend'}); "
                'draw()')
        check(not tab.run("!!document.querySelector('.text img')"), 'markup is read')
        check(tab.run("document.querySelector('.text pre').textContent") == 'let a;')

    def cache():
        tab.until("document.getElementById('now-bytes').textContent.includes('B')", 'the cache is shown')
        check(tab.run("document.getElementById('pages').children.length") > 3)
        # At rest the server's own numbers stand still, and the page shows them at its next look.
        server.settle()
        m = server.metrics()
        pages, per_element = m['kv_pages{state="used"}'] * m['kv_page_bytes'], m['kv_bytes_per_element']
        codes, scales, window = (m[f'memory_bytes{{kind="kv_{kind}"}}'] for kind in ('codes', 'scales', 'residual'))
        share = codes / (codes + scales)
        parts = {'codes': pages * share, 'scales': pages * (1 - share), 'window': window}
        want = {**parts, 'now-bytes': pages + window, 'plain-bytes': pages * 2 / per_element + window}
        check(min(parts.values()) > 0, f'nothing is kept of the conversation: {want}')
        read = f'{json.dumps(list(want))}.map(id => document.getElementById(id).textContent)'

        def is_shown():
            return all(abs(n - expected) <= off * 1.001
                       for (n, off), expected in zip(map(size, tab.run(read)), want.values()))
        end = time.monotonic() + 20  # it looks every two seconds
        while not is_shown() and time.monotonic() < end:
            time.sleep(0.2)
        check(is_shown(), f'{list(want)}: {tab.run(read)}, the server has {list(want.values())}')
        # What is shown, by itself: the whole is its parts, and 16 bit takes more.
        *shown, (now, now_off), (plain, _) = map(size, tab.run(read))
        apart = abs(sum(n for n, _ in shown) - now)
        check(apart <= now_off + sum(off for _, off in shown), f'the sum: {tab.run(read)}')
        check(plain > now, f'16 bit takes no more: {tab.run(read)}')
        bits = tab.run("document.getElementById('bits').textContent")
        check(f'{8 * per_element:.2f} bits a number: {2 / per_element:.2f} times less' in bits, bits)

    def rate():
        """Each rate, times what has passed since the look before it, is tokens: together those of the answer."""
        tab.run("turns = []; draw(); Object.assign(options, {temperature: 0, max_tokens: 200, top_p: 1})")
        tab.until("before && document.getElementById('rate').textContent === '0.0'", 'it is 0 at rest', 20)
        tab.run("window.seen = [[before.at, 0]]; window.plain_look = look; look = async () => { await plain_look(); "
                "seen.push([before.at, Number(document.getElementById('rate').textContent)]); }")
        tab.say('Write a long story about a lighthouse.')
        tab.answered()
        tab.until('seen.some(([at, rate]) => rate > 0) && seen.at(-1)[1] === 0', 'it is 0 again', 20)
        seen, note = tab.run('seen'), tab.run('turns.at(-1).note')
        took = (seen[-1][0] - seen[0][0]) / 1000
        shown = sum(rate * (at - last) / 1000 for (last, _), (at, rate) in zip(seen, seen[1:]))
        tokens = int(re.match('([0-9]+) tokens', note)[1])
        check(abs(shown - tokens) <= 0.05 * took + 0.01, f'{shown:.2f} tokens by the rates, {note}: {seen}')

    def two_tabs():
        other = Tab(browser, url)
        check(other.run('turns.length') == 0, 'a new tab has the conversation of another')
        for t in (tab, other):
            t.run("turns = []; draw(); Object.assign(options, {temperature: 0, max_tokens: 60, top_p: 1})")
        tab.say('Count from one to ten.')
        other.say('What colour is the sky?')
        check(tab.run('!!running') or tab.run('turns.length') == 2)
        first, second = tab.answered(), other.answered()
        check(first and second and first != second)
        alone = server.chat('Count from one to ten.', max_tokens=60, top_p=1, top_k=40, min_p=0.05,
                            repetition_penalty=1.1, seed=1)['choices'][0]['message']['content']
        check(first == alone, 'two at once are not as one alone')

    def dark():
        tab.click('#theme')
        check(tab.run("getComputedStyle(document.body).backgroundColor") == 'rgb(22, 24, 15)')
        tab.say('Tell me about the sea.')
        tab.answered()
        time.sleep(1.2)
        tab.shot(where('dark-chat.png'))
        tab.click('#theme')
        check(tab.run("getComputedStyle(document.body).backgroundColor") == 'rgb(251, 251, 248)')
        tab.shot(where('light-chat.png'))
        follows = Tab(browser, url, dark=True)
        follows.run("localStorage.removeItem('kivi-theme')")
        follows.call('Page.reload')
        follows.until("document.readyState === 'complete' && getComputedStyle(document.body).backgroundColor === "
                      "'rgb(22, 24, 15)'", 'it follows the system')

    def phone():
        small = Tab(browser, url, width=390, height=780, phone=True, dark=True)
        small.run("Object.assign(options, {temperature: 0, max_tokens: 40})")
        small.say('What is a page?')
        small.answered()
        check(small.run('document.documentElement.scrollWidth <= innerWidth'), 'wider than the screen')
        for b in ('#send', '#settings', '#show-side', '#new'):
            inside = small.run(f"(() => {{ const r = document.querySelector('{b}').getBoundingClientRect(); "
                               "return r.left >= 0 && r.right <= innerWidth && r.bottom <= innerHeight; })()")
            check(inside, f'{b} is outside the screen')
        small.shot(where('phone-dark.png'))
        small.click('#show-side')
        check(small.run("getComputedStyle(document.querySelector('aside')).display") == 'block')
        small.shot(where('phone-cache.png'))

    def console():
        bad = [e for e in browser.events if e['method'] == 'Runtime.exceptionThrown'
               or (e['method'] == 'Log.entryAdded' and e['params']['entry']['level'] == 'error'
                   and '400' not in e['params']['entry']['text'])]
        check(not bad, str(bad)[:400])

    def gone():
        server.stop()
        tab.say('hello?')
        tab.until("!!document.querySelector('.error')", 'the error is shown')
        check('cannot be reached' in tab.run("document.querySelector('.error').textContent"))

    for function in (send, stop, edit, regenerate, reload, settings, error, markup, cache, rate, two_tabs, dark, phone,
                     console, gone):
        cases.run('page: ' + function.__name__.replace('_', ' '), function)


if __name__ == '__main__':
    sys.exit(main())
