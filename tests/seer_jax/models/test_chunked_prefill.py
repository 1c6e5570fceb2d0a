"""Prompts that are read in chunks against prompts that are read whole: the same lists, logits, cache and shares."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig
from seer_jax.models.attention import attend_prompt
from seer_jax.models.cache import Cache
from seer_jax.models.decoder import Transformer
from seer_jax.models.decoder.stack import LayerContext, Segment
from seer_jax.selection.context import PrefillContext
from seer_jax.selection.policies import Dense, Given, Policy
from seer_jax.selection.rules import CumulativeMass, Threshold, TokenBudget, TopK
from seer_jax.selection.scorers import SCORERS, Oracle
from tests.seer_jax.conftest import LLAMA, QWEN3, tiny_model

pytestmark = pytest.mark.usefixtures("compile_quickly")

# Beyond the last border, one before and one after a border, at a border, within the first chunk, one token.
LENGTHS = np.array([150, 127, 129, 128, 40, 1], np.int32)


class Prompts(NamedTuple):
    """Prompts, and the chunks and the cache that they are read by."""

    lengths: np.ndarray
    tokens: np.ndarray
    chunk: int
    capacity: int

    @classmethod
    def of(cls, lengths: np.ndarray, chunk: int, capacity: int, seed: int = 0) -> "Prompts":
        tokens = np.random.default_rng(seed).integers(0, 63, (len(lengths), lengths.max()))
        return cls(lengths, tokens.astype(np.int32), chunk, capacity)


USUAL = Prompts.of(LENGTHS, chunk=64, capacity=192)


@functools.cache
def model_of(kind: str) -> Transformer:
    """Gates of the release with grouped heads or without groups, finer gates, or none."""
    if kind in ("release", "no-groups"):
        return tiny_model(LLAMA if kind == "release" else QWEN3)
    model = tiny_model(LLAMA, gates=False)
    if kind == "finer":
        model.add_gate(PrefillGateConfig(16, 16, force_double=True, q_pool_size=8, k_pool_size=4), rngs=nnx.Rngs(1))
        model.add_gate(DecodeGateConfig(16, 16, k_pool_size=8), rngs=nnx.Rngs(2))
    elif kind == "pools-16-8":
        model.add_gate(PrefillGateConfig(16, 16, q_pool_size=16, k_pool_size=8), rngs=nnx.Rngs(1))
    return model


def mask_of(policy: Policy, context: PrefillContext) -> jax.Array:
    """The blocks that the heads of a layer keep."""
    blocks = policy.blocks(policy.prepare(context))
    if blocks is None:
        return jnp.broadcast_to(context.own, (context.batch, 1, context.num_rows, context.num_key_blocks))
    return blocks.to_mask(context.num_key_blocks)


@jax.jit
def whole_lists(model: Transformer, policy: Policy, tokens: jax.Array, lengths: jax.Array) -> Any:
    """The lists of each layer, as a mask."""

    def attend(layer: LayerContext, state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        context = model.prefill_context(layer, q, k, v, lengths)
        return attend_prompt(layer.policy, context).out, state, mask_of(layer.policy, context)

    return model.scan(tokens, attend, segments=[Segment(model.config.num_layers, policy)])[2]


@jax.jit
def chunk_lists(
    model: Transformer, policy: Policy, tokens: jax.Array, lengths: jax.Array, cache: Cache, offset: jax.Array
) -> tuple[Cache, Any]:
    def attend(layer: LayerContext, cache: Cache, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        context, cache = model.chunk_context(layer, cache, q, k, v, lengths, offset)
        return attend_prompt(layer.policy, context).out, cache, mask_of(layer.policy, context)

    return model.scan(tokens, attend, cache, segments=[Segment(model.config.num_layers, policy)])[1:]


def padded_mask(policy: Policy, capacity: int) -> Policy:
    """Masks for the room that the cache has."""
    if not isinstance(policy, Given):
        return policy
    more = capacity // policy.block_size - policy.mask.shape[-1]
    return Given(np.pad(policy.mask, [(0, 0)] * 3 + [(0, more)] * 2), policy.block_size)


def lists_in_chunks(model: Transformer, policy: Policy, prompts: Prompts) -> np.ndarray:
    lengths, tokens, chunk, capacity = prompts
    gate = model.prefill_gate
    cache = model.empty_cache(len(lengths), capacity, None, None if gate is None else gate.config)
    # What a cache held before must not matter.
    cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.dtype == jnp.float32 else x, cache)
    parts, policy = [], padded_mask(policy, capacity)
    for offset in range(0, tokens.shape[1], chunk):
        part = np.pad(tokens[:, offset : offset + chunk], ((0, 0), (0, max(offset + chunk - tokens.shape[1], 0))))
        cache, masks = chunk_lists(model, policy, part, lengths, cache, jnp.int32(offset))
        parts.append(masks)
    return np.concatenate(parts, axis=3)


def masks(kind: str) -> Given:
    heads = model_of(kind).config.num_heads
    return Given(np.random.default_rng(1).random((2, len(LENGTHS), heads, 10, 10)) < 0.5, 16)


PER_HEAD = Threshold(np.linspace(0.05, 0.3, 8, dtype=np.float32).reshape(2, 4), dense_last_rows=0)
SCORED = [name for name, kind in SCORERS.items() if "prefill" in kind.phases() and kind.reads_in_chunks]


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow, id=f"{case[0]}-{case[1]}")


CASES = [
    pytest.param("release", TopK(0.3), id="release-topk"),
    slow("finer", Threshold(0.05)),
    slow("release", PER_HEAD),
    slow("release", CumulativeMass(0.8, dense_last_rows=1)),
    slow("release", Threshold(0.1, dense_layers=1)),
    slow("release", Threshold(0.1, skip=0.01)),
    slow("no-groups", Threshold(0.1)),
    slow("finer", CumulativeMass(0.6)),
    slow("pools-16-8", TokenBudget(64)),
    slow("none", Dense()),
    slow("none", Dense(skip=0.01)),
    slow("none", TopK(0.3, Oracle())),
    pytest.param("release", masks("release"), id="release-given", marks=pytest.mark.slow),
    *(slow("release", TopK(0.3, SCORERS[name]())) for name in SCORED if name not in ("gate", "oracle")),
]


@pytest.mark.parametrize(("kind", "policy"), CASES)
def test_lists_logits_and_cache_are_those_of_whole_prompts(kind: str, policy: Policy):
    compare(model_of(kind), policy, USUAL)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_any_chunk_gives_the_lists_of_whole_prompts(seed: int):
    """Rules, scorers, chunks and lengths at random: also one chunk that is longer than the prompts."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(["release", "no-groups", "finer", "pools-16-8"])
    scorer = SCORERS[rng.choice(SCORED)]()
    rest: dict[str, Any] = dict(scorer=scorer, dense_layers=int(rng.integers(2)))
    rows: dict[str, Any] = dict(dense_last_rows=int(rng.integers(4)))
    share = rng.uniform(0.05, 0.95)
    policies = (
        *(TopK(share, **rest, **rows), CumulativeMass(share, **rest, **rows), Threshold(share**3, **rest, **rows)),
        TokenBudget(16 * int(rng.integers(1, 9)), **rest),
    )
    chunk, lengths = 16 * int(rng.integers(1, 13)), rng.integers(1, 181, rng.integers(1, 5)).astype(np.int32)
    prompts = Prompts.of(lengths, chunk, -(-int(lengths.max()) // chunk) * chunk, seed)
    compare(model_of(kind), policies[rng.integers(4)], prompts)


def compare(model: Transformer, policy: Policy, prompts: Prompts) -> None:
    """Lists bit by bit, then logits, cache and shares."""
    lengths, stacked = prompts.lengths, policy.stacked(2, 4)
    whole = whole_lists(model, stacked, jnp.asarray(prompts.tokens), jnp.asarray(lengths))
    chunked = lists_in_chunks(model, stacked, prompts)
    rows, blocks = whole.shape[3:]
    begun = np.arange(rows) * policy.tokens_per_block(model.prefill_gate) < lengths[:, None]
    theirs, ours = (np.moveaxis(np.asarray(x), 3, 2)[:, :, :rows][:, begun] for x in (whole, chunked))
    np.testing.assert_array_equal(ours[..., :blocks], theirs)
    assert not ours[..., blocks:].any()
    arrays = jax.tree.map(jnp.asarray, prompts[:2])
    read_whole, read_chunked = (
        read(model, policy, *arrays, prompts.capacity, chunk) for chunk in (None, prompts.chunk)
    )
    compare_prefills(model, lengths, read_whole, read_chunked)


@functools.partial(jax.jit, static_argnums=(4, 5))
def read(
    model: Transformer, policy: Policy, lengths: jax.Array, tokens: jax.Array, capacity: int, chunk: int | None
) -> tuple[jax.Array, Cache, jax.Array]:
    cache = model.make_cache(len(lengths), capacity)
    return model.prefill(tokens, lengths, cache, sparsity=policy, chunk=chunk)


def compare_prefills(model: Transformer, lengths: np.ndarray, whole: Sequence[Any], chunked: Sequence[Any]) -> None:
    """Logits, shares of kept blocks, and what the cache holds of each row."""
    np.testing.assert_allclose(chunked[0], whole[0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(chunked[2], whole[2], atol=1e-6, rtol=0)
    ours, theirs = chunked[1], whole[1]
    np.testing.assert_array_equal(ours.lengths, lengths)
    assert ours.prefill_gate_keys is None
    inside = np.arange(ours.capacity) < lengths[:, None]
    for x, y in zip(ours.token_arrays, theirs.token_arrays, strict=True):
        np.testing.assert_allclose(np.asarray(x)[:, inside], np.asarray(y)[:, inside], atol=1e-5, rtol=0)
    if model.decode_gate is None:
        return
    pool = model.decode_gate.config.key_pool
    x, y = (np.moveaxis(np.asarray(c.decode_gate.keys), 3, 2) for c in (ours, theirs))
    complete = np.arange(x.shape[2]) < (lengths // pool)[:, None]
    np.testing.assert_allclose(x[:, complete], y[:, complete], atol=1e-5, rtol=0)
    begun = lengths % pool > 0
    x, y = (np.asarray(c.decode_gate.pools)[:, begun] for c in (ours, theirs))
    np.testing.assert_allclose(x, y, atol=1e-5, rtol=0)
