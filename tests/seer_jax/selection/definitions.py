"""What published methods rank blocks by, as their papers define it: NumPy in float64, one prompt or one new token, no padding.

Letters: q `[T, H, D]` and k `[T, K, D]` after RoPE; scores are shares of a block row, `[H, Tb, Sb]`, 0 above the diagonal.
"""

from collections.abc import Callable

import numpy as np


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_head(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """k repeated for the heads of q."""
    return np.repeat(k, q.shape[1] // k.shape[1], axis=1)


def attention(q: np.ndarray, k: np.ndarray, first: int = 0) -> np.ndarray:
    """Causal attention map [H, T, S] of queries at positions from `first` on."""
    logits = np.einsum("thd,shd->hts", q, by_head(q, k)) / np.sqrt(q.shape[-1])
    seen = np.arange(len(k)) <= first + np.arange(len(q))[:, None]
    return softmax(np.where(seen, logits, -np.inf))


def blocks(tokens: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, tokens)) for first in range(0, tokens, size)]


def rows_of(score: Callable[[int, int, int], float], heads: int, count: int) -> np.ndarray:
    """Shares of each row from scores of head, row and column."""
    found = np.zeros((heads, count, count))
    for h, i in np.ndindex(heads, count):
        row = np.array([score(h, i, j) for j in range(i + 1)])
        found[h, i, : i + 1] = row / row.sum()
    return found


def xattention(q: np.ndarray, k: np.ndarray, size: int, stride: int) -> np.ndarray:
    heads, dim, k = q.shape[1], q.shape[2], by_head(q, k)
    tiles, pad = -(-len(q) // stride), -len(q) % stride
    q, k = (np.pad(x, ((0, pad), (0, 0), (0, 0))) for x in (q, k))
    logits = np.full((heads, tiles, tiles), -np.inf)
    for h, i, j in np.ndindex(heads, tiles, tiles):
        if j <= i:  # from the lower left of the tile to its upper right
            pairs = ((i * stride + stride - 1 - p, j * stride + p) for p in range(stride))
            logits[h, i, j] = sum(q[t, h] @ k[s, h] for t, s in pairs) / stride / np.sqrt(dim)
    shares, parts = softmax(logits), blocks(tiles, size // stride)
    return rows_of(lambda h, i, j: shares[h, parts[i], parts[j]].sum(), heads, len(parts))


def last_attention(q: np.ndarray, k: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of the last queries, [H, D], and their mean attention by key and by distance, [H, T]."""
    last = q[-count:]
    shares, first = attention(last, k, len(q) - len(last)), len(q) - len(last)
    slash = np.zeros((q.shape[1], len(q)))
    for h, r, s in np.ndindex(shares.shape):
        if s <= first + r:
            slash[h, first + r - s] += shares[h, r, s] / len(last)
    return last.mean(0), shares.mean(1), slash


def flexprefill(q: np.ndarray, k: np.ndarray, size: int, tau: float) -> np.ndarray:
    heads, dim, parts = q.shape[1], q.shape[2], blocks(len(q), size)
    query, vertical, slash = last_attention(q, k, size)
    mean_q, mean_k = (np.stack([x[part].mean(0) for part in parts]) for x in (q, by_head(q, k)))
    pooled = softmax(np.einsum("hd,jhd->hj", query, mean_k) / np.sqrt(dim))
    true = np.stack([vertical[:, part].sum(1) for part in parts], 1)
    lines = np.stack([slash[:, part].sum(1) for part in parts], 1)
    middle = (pooled + true) / 2
    twice = (pooled * np.log(pooled / middle)).sum(1) + (true * np.log(true / middle)).sum(1)
    divergence = np.sqrt(np.maximum(twice, 0) / 2)  # rounding may leave less than 0

    def score(h: int, i: int, j: int) -> float:
        if divergence[h] < tau:
            return np.exp(mean_q[i, h] @ mean_k[j, h] / np.sqrt(dim))
        return max(true[h, j], lines[h, i - j])

    return rows_of(score, heads, len(parts))


def minference(q: np.ndarray, k: np.ndarray, size: int) -> np.ndarray:
    _, vertical, slash = last_attention(q, k, 64)
    parts = blocks(len(q), size)
    slash = np.pad(slash, ((0, 0), (0, size)))  # a block of a partial row is crossed by longer distances

    def score(h: int, i: int, j: int) -> float:
        crossing = {max(0, t - s) for t in range(i * size, (i + 1) * size) for s in range(j * size, (j + 1) * size)}
        return max(vertical[h, parts[j]].max(), max(slash[h, d] for d in crossing))

    return rows_of(score, q.shape[1], len(parts))


def proxyattn(q: np.ndarray, k: np.ndarray, size: int) -> np.ndarray:
    shares, parts = attention(q.reshape(len(q), k.shape[1], -1, q.shape[2]).mean(2), k), blocks(len(q), size)
    return rows_of(lambda h, i, j: shares[h, parts[i], parts[j]].max(), k.shape[1], len(parts))


def subblock(q: np.ndarray, k: np.ndarray, size: int, parts: int) -> np.ndarray:
    runs = blocks(len(q), size // parts)
    mean_q, mean_k = (np.stack([x[run].mean(0) for run in runs]) for x in (q, by_head(q, k)))

    def score(h: int, i: int, j: int) -> float:
        pairs = [(a, c) for a in range(i * parts, (i + 1) * parts) for c in range(j * parts, (j + 1) * parts)]
        pairs = [(a, c) for a, c in pairs if c <= a < len(runs)]
        return sum(np.exp(mean_q[a, h] @ mean_k[c, h] / np.sqrt(q.shape[2])) for a, c in pairs)

    return rows_of(score, q.shape[1], -(-len(q) // size))


def oracle_mass(q: np.ndarray, k: np.ndarray, size: int) -> np.ndarray:
    shares, parts = attention(q, k), blocks(len(q), size)
    return rows_of(lambda h, i, j: shares[h, parts[i], parts[j]].sum(1).max(), q.shape[1], len(parts))


# --- One new token at the last position of k; q [H, D]; shares of the completed blocks, [K, n].


def _shares(x: np.ndarray) -> np.ndarray:
    return x / x.sum(-1, keepdims=True)


def quest(q: np.ndarray, k: np.ndarray, size: int) -> np.ndarray:
    k = by_head(q[None], k)
    bounds = np.zeros((len(q), (len(k) - 1) // size))
    for h, j in np.ndindex(bounds.shape):
        part = k[j * size : (j + 1) * size, h]
        bounds[h, j] = np.maximum(q[h] * part.max(0), q[h] * part.min(0)).sum() / np.sqrt(q.shape[1])
    return softmax(bounds)


def subblock_token(q: np.ndarray, k: np.ndarray, size: int, parts: int) -> np.ndarray:
    k, count, run = by_head(q[None], k), (len(k) - 1) // size, size // parts
    mass = np.zeros((len(q), count))
    for h, j, c in np.ndindex(len(q), count, parts):
        first = j * size + c * run
        mass[h, j] += np.exp(q[h] @ k[first : first + run, h].mean(0) / np.sqrt(q.shape[1]))
    return _shares(mass)


def mass_token(q: np.ndarray, k: np.ndarray, size: int) -> np.ndarray:
    shares = attention(q[None], k, len(k) - 1)[:, 0]
    return np.stack([shares[:, j * size : (j + 1) * size].sum(1) for j in range((len(k) - 1) // size)], 1)


def of_group(x: np.ndarray, kv_heads: int, how: str) -> np.ndarray:
    """Shares of a group's blocks: the keenest or the mean head's."""
    heads = x.reshape(kv_heads, len(x) // kv_heads, -1)
    return _shares(heads.max(1) if how == "max" else heads.mean(1))
