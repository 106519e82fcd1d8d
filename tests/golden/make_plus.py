"""Reference vectors of kivi2+, k4v2+ and k4v3+ (DESIGN.md 11): key pages and value rows in, codes, scales and zeros out.

Run as `python3 tests/golden/make_plus.py tests/golden/plus [SEED]`. It uses numpy alone and shares no code with kivi: float32
elementwise operations, so nothing is contracted, and sums as loops over tokens (or channels) in their order.

One file dD.bin for each head size D, arrays one after the other without headers, little endian (P = 3 pages, N = 22 rows,
W = D/4, G = the value group: 64, or the largest power of two that divides D if that is smaller):

    sinks  [P] u32          x      [P][128][D] f16   sinks of a page hold huge numbers: one that leaks in shows
    list   [P][W] u8        scale2 [P][D] f16   zero2 [P][D] f16   code2 [P][128][D] u8   wide channels 0..15, others 0..3
    scale4 [P][D] f16       zero4  [P][D] f16   code4 [P][128][D] u8
    rows   [N][D] f32       turned [N][D] f32   by the Hadamard blocks    half [N][D] f16   turned, saturated
    vscale2 [N][D/G] f16    vcode2 [N][D] u8    vscale3 [N][D/G] f16      vcode3 [N][D] u8

And for some of them dDg32.bin, the same pages x with keys in groups of 32 tokens (the wide channels are the page's):

    scale2 [P][4][D] f16   zero2 [P][4][D] f16   code2 [P][128][D] u8   scale4, zero4, code4 the same

Codes of sinks are those of the first token that is none; of a group of 32, the first in it, and where it has no such token
scale, zero and codes are 0. The kinds of input are those of make_quant.py; a page takes them
by channel, so that every kind is wide in one page and narrow in another.
"""
import os, sys
import numpy as np

f32, f16 = np.float32, np.float16
KINDS = ['normal', 'outlier', 'constant', 'two values', 'subnormal', 'huge', 'large mean', 'exact ties', 'negative',
         'tiny range', 'full range']
PAGES = [(0, KINDS),
         (4, ['huge', 'full range', 'negative', 'outlier', 'large mean']),
         (20, ['constant', 'two values', 'subnormal', 'exact ties', 'tiny range', 'normal'])]
KEY_STEPS = [f32(a) for a in (1, .93, .86, .79, .72)]
VALUE_STEPS = [f32(c) for c in (1, .95, .90, .85, .80, .75, .70, .65, .60, .55, .50, .45, .40, .35)]


def make(kind, n, G, rng):
    """n groups of G float16 values; the equations of make_quant.py."""
    x = rng.standard_normal((n, G)).astype(f32)
    if kind == 'outlier': x[:, 5 % G] *= 50
    if kind == 'constant': x = np.repeat(rng.standard_normal((n, 1)), G, 1)
    if kind == 'two values': x = np.where(rng.random((n, G)) < .5, -1.25, 0.375)
    if kind == 'subnormal': x = x * 2e-7
    if kind == 'huge': x = x * 3e4
    if kind == 'large mean': x = 1000 + x * 0.3
    if kind == 'exact ties':
        x = rng.integers(0, 7, (n, G)) * 0.5
        x[:, 0], x[:, 1] = 0, 3
    if kind == 'negative': x = -np.abs(x) - 1
    if kind == 'tiny range': x = 1 + rng.integers(0, 3, (n, G)) * 2.0 ** -10
    if kind == 'full range': x[:, 0], x[:, 1] = -65504, 65504
    return np.clip(x, -65504, 65504).astype(f16)


def f16_down(a):
    """The largest float16 <= a; 0 has a plus."""
    h = a.astype(f16)
    with np.errstate(over='ignore'):  # beside -65504, where it is not taken
        h = np.where(h.astype(f32) > a, np.nextafter(h, f16(-np.inf)), h)
    return np.where(h == 0, f16(0), h)


def f16_up(a):
    """The smallest float16 >= a."""
    h = a.astype(f16)
    h = np.where(h.astype(f32) < a, np.nextafter(h, f16(np.inf)), h)
    return np.where(h == 0, f16(0), h)


def codes_of(x, scale, zero, levels):
    """x [T][D] f32, scale and zero [D] f16."""
    s, z = scale.astype(f32), zero.astype(f32)
    with np.errstate(divide='ignore', invalid='ignore'):
        q = np.rint((x - z) / s)
    return np.where(s == 0, f32(0), np.clip(q, f32(0), f32(levels)))


def error_of(x, value):
    """Per channel, the squares added from the first token (or row) to the last."""
    total = np.zeros(x.shape[1:], f32)
    for t in range(len(x)):
        d = x[t] - value[t]
        total = total + d * d
    return total


def plain(x, levels):
    """Section 2, per channel: scale, zero, codes."""
    mn, mx = x.min(0), x.max(0)
    zero = f16_down(mn)
    scale = f16_up((mx - zero.astype(f32)) / f32(levels))
    return scale, zero, codes_of(x, scale, zero, levels)


def pulled_in(x):
    """Two bits, the best of five ranges."""
    mn, mx = x.min(0), x.max(0)
    mid = (mn + mx) / f32(2)
    best = None
    for a in KEY_STEPS:
        lo, hi = mid + (mn - mid) * a, mid + (mx - mid) * a
        zero = f16_down(lo)
        scale = f16_up((hi - zero.astype(f32)) / f32(3))
        q = codes_of(x, scale, zero, 3)
        e = error_of(x, q * scale.astype(f32) + zero.astype(f32))
        if best is None:
            best = [e, scale, zero, q]
            continue
        better = e < best[0]
        best = [np.where(better, new, old) for new, old in zip((e, scale, zero, q), best)]
    return best[1:]


def key_page(page, sinks):
    """page [128][D] f16 -> list, and scale, zero, codes of the kind with wide channels and of the one with 4 bits."""
    D = page.shape[1]
    x = page[sinks:].astype(f32)
    spread = x.max(0) - x.min(0)
    order = sorted(range(D), key=lambda c: (-float(spread[c]), c))
    wide = sorted(order[:D // 4])
    s4, z4, q4 = plain(x, 15)
    s2, z2, q2 = pulled_in(x)
    is_wide = np.isin(np.arange(D), wide)
    q2, s2, z2 = np.where(is_wide, q4, q2), np.where(is_wide, s4, s2), np.where(is_wide, z4, z2)

    def with_sinks(q):
        return np.concatenate([np.repeat(q[:1], sinks, 0), q]).astype(np.uint8)
    return np.array(wide, np.uint8), (s2, z2, with_sinks(q2)), (s4, z4, with_sinks(q4))


def grouped_page(page, sinks, wide, group):
    """The same for groups of `group` tokens: scale and zero [128/group][D] and codes, 2 bits with wide and 4."""
    D = page.shape[1]
    is_wide = np.isin(np.arange(D), wide)
    done = [[], []]
    for first in range(0, 128, group):
        n = min(max(sinks - first, 0), group)  # sinks in it
        x = page[first + n:first + group].astype(f32)
        if n == group:
            nothing = np.zeros(D, f16), np.zeros(D, f16), np.zeros((group, D), np.uint8)
            for d in done: d.append(nothing)
            continue
        four, two = plain(x, 15), pulled_in(x)
        for d, form in zip(done, ([np.where(is_wide, a, b) for a, b in zip(four, two)], four)):
            s, z, q = form
            d.append((s, z, np.concatenate([np.repeat(q[:1], n, 0), q]).astype(np.uint8)))
    return [(np.stack([g[0] for g in d]), np.stack([g[1] for g in d]), np.concatenate([g[2] for g in d])) for d in done]


def block_of(D):
    return D & -D


def hadamard(row):
    """By blocks of B: butterflies at distance 1, 2, 4, ... B/2, then the factor 1/sqrt(B)."""
    B, out = block_of(len(row)), row.copy()
    h = 1
    while h < B:
        pairs = out.reshape(-1, 2, h)
        out = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).reshape(-1)
        h *= 2
    return out * f32(1 / np.sqrt(B))


def value_row(half, bits):
    """half [D] f16 -> scale [D/G] f16, codes [D]."""
    D = len(half)
    G, middle, levels = min(64, block_of(D)), f32(2 ** bits - 1) / f32(2), f32(2 ** bits - 1)
    x = half.astype(f32).reshape(D // G, G).T  # channels first, as tokens in error_of
    base = np.abs(x).max(0) / middle
    best = None
    for c in VALUE_STEPS:
        scale = f16_up(base * c)
        s = scale.astype(f32)
        with np.errstate(divide='ignore', invalid='ignore'):
            q = np.rint(x / s + middle)
        q = np.where(s == 0, f32(0), np.clip(q, f32(0), levels))
        e = error_of(x, (q - middle) * s)
        if best is None:
            best = [e, scale, q]
            continue
        better = e < best[0]
        best = [np.where(better, new, old) for new, old in zip((e, scale, q), best)]
    return best[1], best[2].T.reshape(D).astype(np.uint8)


def main():
    out = sys.argv[1]
    rng = np.random.default_rng(int(sys.argv[2]) if len(sys.argv) > 2 else 11)
    os.makedirs(out, exist_ok=True)
    for D in (64, 80, 96, 128, 256):
        pages = []
        for sinks, kinds in PAGES:
            x = np.stack([make(kinds[c % len(kinds)], 1, 128 - sinks, rng)[0] for c in range(D)], 1)
            head = np.clip(rng.standard_normal((sinks, D)) * 4e4, -65504, 65504).astype(f16)
            pages.append((sinks, np.concatenate([head, x])))
        done = [key_page(x, sinks) for sinks, x in pages]
        rows = np.concatenate([make(k, 2, D, rng) for k in KINDS]).astype(f32)
        rows = rows * (1 + rng.standard_normal(rows.shape) * 2.0 ** -13).astype(f32)  # more than 11 bits
        turned = np.stack([hadamard(r) for r in rows])
        half = np.clip(turned, f32(-65504), f32(65504)).astype(f16)
        v2, v3 = ([value_row(h, bits) for h in half] for bits in (2, 3))
        arrays = [np.array([s for s, _ in pages], '<u4'), np.stack([x for _, x in pages]),
                  np.stack([d[0] for d in done]), *(np.stack([d[1][i] for d in done]) for i in range(3)),
                  *(np.stack([d[2][i] for d in done]) for i in range(3)), rows, turned, half,
                  *(np.stack([v[i] for v in v2]) for i in range(2)), *(np.stack([v[i] for v in v3]) for i in range(2))]
        assert all(a.dtype in (np.uint8, np.uint32, f16, f32) for a in arrays)
        assert rows.dtype == f32 and turned.dtype == f32
        with open(os.path.join(out, f'd{D}.bin'), 'wb') as f:
            for a in arrays: f.write(np.ascontiguousarray(a).astype(a.dtype.newbyteorder('<')).tobytes())
        if D in (64, 80):
            parts = [grouped_page(x, sinks, d[0], 32) for (sinks, x), d in zip(pages, done)]
            with open(os.path.join(out, f'd{D}g32.bin'), 'wb') as f:
                for k in range(2):
                    for i in range(3):
                        f.write(np.ascontiguousarray(np.stack([p[k][i] for p in parts])).tobytes())
        print(D, 'narrow channels by factor of the range, values by factor of the step:', report(pages, done, half))


def report(pages, done, half):
    """How often each candidate won: all of them should occur."""
    keys, values = np.zeros(len(KEY_STEPS), int), np.zeros(len(VALUE_STEPS), int)
    for (sinks, page), d in zip(pages, done):
        x = page[sinks:].astype(f32)
        mn, mx = x.min(0), x.max(0)
        mid, wide = (mn + mx) / f32(2), set(d[0].tolist())
        for c in range(x.shape[1]):
            if c in wide: continue
            for i, a in enumerate(KEY_STEPS):
                z = f16_down(mid + (mn - mid) * a)
                s = f16_up((mid + (mx - mid) * a - z.astype(f32)) / f32(3))
                if z[c] == d[1][1][c] and s[c] == d[1][0][c]:
                    keys[i] += 1
                    break
    for h in half:
        s, _ = value_row(h, 2)
        base = np.abs(h.astype(f32).reshape(len(s), -1)).max(1) / f32(1.5)
        for g in range(len(s)):
            values[next(i for i, c in enumerate(VALUE_STEPS) if f16_up(base * c)[g] == s[g])] += 1
    return keys.tolist(), values.tolist()


main()
