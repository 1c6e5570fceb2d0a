"""The gates' definitions in plain float64, from queries and keys before RoPE to logits."""

from typing import NamedTuple

import numpy as np

from seer_jax.gates.configs import Pool, QueryReduction
from seer_jax.gates.decode import DecodeGate
from seer_jax.gates.prefill import PrefillGate


class Rows(NamedTuple):
    """Tokens of a batch: positions and whether they count, `[B, T]`, and which sequence of its row each belongs to."""

    positions: np.ndarray
    valid: np.ndarray
    sequence: np.ndarray

    @classmethod
    def of(cls, positions: np.ndarray, valid: np.ndarray) -> "Rows":
        """Rows of one sequence each."""
        return cls(positions, valid, np.zeros_like(positions))


class Defined(NamedTuple):
    """Queries, keys and logits."""

    queries: np.ndarray
    keys: np.ndarray
    logits: np.ndarray


def pooled(x: np.ndarray, kinds: tuple[Pool, ...], size: int, valid: np.ndarray) -> np.ndarray:
    """[B, n, heads, P] of x [B, T, heads, D]: the valid tokens of each pool as one vector, 0 where it has none."""
    out = np.zeros((len(x), -(-x.shape[1] // size), x.shape[2], len(kinds), x.shape[3]))
    for row, pool in np.ndindex(out.shape[:2]):
        of_pool = slice(pool * size, (pool + 1) * size)
        tokens = x[row, of_pool][valid[row, of_pool]]
        for i, kind in enumerate(kinds if len(tokens) else ()):
            out[row, pool, :, i] = {"max": tokens.max, "min": tokens.min, "avg": tokens.mean}[kind](0)
    return out.reshape(*out.shape[:3], -1)


def turned(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray, factor: float) -> np.ndarray:
    """RoPE of x [B, n, heads, C], as complex numbers of modulus `factor`."""
    half = x.shape[-1] // 2
    angles = positions[..., None] * frequencies
    turned = (x[..., :half] + 1j * x[..., half:]) * factor * np.exp(1j * angles)[:, :, None]
    return np.concatenate([turned.real, turned.imag], -1)


def linear_frequencies(gate: PrefillGate | DecodeGate) -> np.ndarray:
    """Of plain or linearly scaled RoPE."""
    rope, half = gate.model.rope, gate.config.gate_dim // 2
    return rope.theta ** (-np.arange(half) / half) / rope.factor


def definition(gate: PrefillGate | DecodeGate, q: np.ndarray, k: np.ndarray, rows: Rows) -> Defined:
    """Of a gate of either kind."""
    if isinstance(gate, PrefillGate):
        return prefill_definition(gate, q, k, rows)
    return decode_definition(gate, q, k, rows)


def prefill_definition(gate: PrefillGate, q: np.ndarray, k: np.ndarray, rows: Rows) -> Defined:
    """One layer: pool, project by head, rotate at the pool's first token, compare."""
    config, wk, (positions, valid, sequence) = gate.config, np.asarray(gate.linear_k[...], float), rows
    heads, kv_heads, dim = q.shape[2], k.shape[2], q.shape[3]
    queries = pooled(q, config.q_pooling, config.query_pool, valid)
    keys = pooled(k, config.k_pooling, config.key_pool, valid)
    if len(config.q_pooling) == 1 and config.gate_dim == dim and not config.force_double:
        assert gate.linear_q is None
        keys = keys.repeat(heads // kv_heads, axis=2)
    else:
        assert gate.linear_q is not None
        queries = np.einsum("bnhp,hpc->bnhc", queries, np.asarray(gate.linear_q[...], float))
    keys = np.einsum("bnkp,kpc->bnkc", keys, wk)
    turn = linear_frequencies(gate), gate.model.rope.attention_factor
    queries = turned(queries, positions[:, :: config.query_pool], *turn)
    keys = turned(keys, positions[:, :: config.key_pool], *turn)
    every = keys.repeat(heads // keys.shape[2], axis=2)
    logits = np.einsum("bihc,bjhc->bhij", queries, every) / np.sqrt(config.gate_dim)
    if config.finer_than_release():
        seen = np.zeros((len(q), queries.shape[1], keys.shape[1]), bool)
        for row, u in np.ndindex(*seen.shape[:2]):
            tokens = np.arange(u * config.query_pool, min((u + 1) * config.query_pool, q.shape[1]))
            tokens = tokens[valid[row, tokens]]
            starts = np.arange(keys.shape[1]) * config.key_pool
            if len(tokens):
                seen[row, u] = (starts <= tokens[-1]) & (sequence[row, starts] == sequence[row, tokens[0]])
        logits = joined(logits, seen, config.queries_per_row, config.keys_per_block, config.join)
    return Defined(queries, keys, logits)


def decode_definition(gate: DecodeGate, q: np.ndarray, k: np.ndarray, rows: Rows) -> Defined:
    """As `prefill_definition`, of every query token; -inf from the token's own block on."""
    config, (positions, valid, sequence) = gate.config, rows
    (batch, tokens, _, dim), kv_heads, pool = q.shape, k.shape[2], config.key_pool
    grouped = q.reshape(batch, tokens, kv_heads, -1, dim)
    queries = grouped.mean(3)
    if gate.linear_q is not None:
        wq = np.asarray(gate.linear_q[...], float)
        if config.query_reduction is QueryReduction.HEADS:
            queries = np.einsum("btkgd,kgdc->btkgc", grouped, wq).reshape(batch, tokens, -1, config.gate_dim)
        elif config.query_reduction is QueryReduction.PROJ:
            queries = np.einsum("btkgd,kgdc->btkc", grouped, wq)
        else:
            queries = np.einsum("btkd,kdc->btkc", queries, wq)
    keys = np.einsum("bnkp,kpc->bnkc", pooled(k, config.k_pooling, pool, valid), np.asarray(gate.linear_k[...], float))
    sides = [(queries, gate.q_norm, positions), (keys, gate.k_norm, positions[:, ::pool])]
    turn = linear_frequencies(gate), gate.model.rope.attention_factor
    for i, (x, norm, at) in enumerate(sides):
        if config.normalizes:
            x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * np.asarray(norm[...], float)
        sides[i] = turned(x, at, *turn) if config.use_rope else x
    queries, keys = sides
    every = keys.repeat(queries.shape[2] // kv_heads, axis=2)
    logits = np.einsum("bthc,bjhc->bhtj", queries, every) / np.sqrt(config.gate_dim)
    block = np.arange(keys.shape[1]) * pool // config.block_size
    seen = block < (np.arange(tokens) // config.block_size)[:, None]
    of_key = sequence[:, np.arange(keys.shape[1]) * pool]
    seen = seen[None] & (sequence[:, :, None] == of_key[:, None])
    if config.finer_than_release():
        group = queries.shape[2] // kv_heads
        return Defined(queries, keys, joined(logits, seen, 1, config.keys_per_block, config.join, group, config.heads))
    return Defined(queries, keys, np.where(seen[:, None], logits, -np.inf))


def joined(
    logits: np.ndarray,
    seen: np.ndarray,
    queries_per_row: int,
    keys_per_block: int,
    join: str,
    group: int = 1,
    heads: str = "mean",
) -> np.ndarray:
    """[B, lists, rows, Sb] of logits [B, heads, Tu, Sw]: logarithms of the largest share of a block in a row's queries."""
    batch, count, tu, sw = logits.shape
    weights = np.where(seen[:, None], np.exp(logits), 0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = np.zeros((batch, count // group, -(-tu // queries_per_row), -(-sw // keys_per_block)))
    for row, block in np.ndindex(*out.shape[2:]):
        part = weights[:, :, row * queries_per_row :][:, :, :queries_per_row]
        part = part[..., block * keys_per_block :][..., :keys_per_block]
        shares = (part.max(-1) if join == "max" else part.sum(-1)).reshape(batch, -1, group, part.shape[2])
        out[..., row, block] = (shares.max(2) if heads == "max" else shares.mean(2)).max(-1)
    with np.errstate(divide="ignore"):
        return np.log(out)
