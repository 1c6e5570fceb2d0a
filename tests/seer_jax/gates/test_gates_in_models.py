"""Every kind of gate in a model: read in parts as whole, decoded token by token as in one pass, packed as alone, trained."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.devices import assume_hopper
from seer_jax.evaluate import window as window_module
from seer_jax.evaluate.window import AtOnce, decode_window
from seer_jax.gates.configs import (
    DecodeGateConfig,
    GateConfig,
    HeadJoin,
    Join,
    Pool,
    PrefillGateConfig,
    QueryReduction,
)
from seer_jax.gates.make import Gate, make_gate
from seer_jax.gates.prefill import PrefillGate
from seer_jax.models import attention
from seer_jax.models.cache import Cache
from seer_jax.models.config import RopeKind
from seer_jax.models.decoder import Transformer
from seer_jax.selection.context import DecodeContext
from seer_jax.selection.rules import CumulativeMass
from seer_jax.selection.scorers import LearnedGate
from seer_jax.train.distillation import packed_decode_keys, packed_decode_logits
from seer_jax.train.distillation.prefill import packed_prefill_logits
from seer_jax.train.loss import row_kl
from tests.seer_jax.conftest import LLAMA, tiny_model
from tests.seer_jax.gates.definitions import Rows, definition

pytestmark = pytest.mark.usefixtures("compile_quickly")

DIM = LLAMA.head_dim
PREFILL = PrefillGateConfig(16, DIM)
DECODE = DecodeGateConfig(16, DIM)
HEADS = dataclasses.replace(DECODE, query_reduction=QueryReduction.HEADS)
KINDS: dict[str, tuple[PrefillGateConfig, DecodeGateConfig]] = {
    "release": (PREFILL, DECODE),
    "small pools": (
        dataclasses.replace(PREFILL, q_pool_size=4, k_pool_size=4),
        dataclasses.replace(HEADS, k_pool_size=4),
    ),
    "largest share": (
        dataclasses.replace(PREFILL, k_pool_size=4, join=Join.MAX, gate_dim=8),
        dataclasses.replace(HEADS, heads=HeadJoin.MAX, k_pool_size=8, join=Join.MAX, gate_dim=8),
    ),
    "tokens": (
        dataclasses.replace(PREFILL, q_pool_size=8, k_pool_size=1, k_pooling=(Pool.AVG,)),
        dataclasses.replace(DECODE, k_pool_size=1, k_pooling=(Pool.AVG,)),
    ),
}
EACH = {f"{name}, {phase}": kinds[i] for i, phase in enumerate(("prefill", "decode")) for name, kinds in KINDS.items()}
FAST = ("small pools", "small pools, prefill", "largest share, decode")


def kinds(names: Iterable[str]) -> pytest.MarkDecorator:
    """A test of each kind, as `name`."""
    parameters = [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in names]
    return pytest.mark.parametrize("name", parameters)


POLICY = CumulativeMass(0.5, dense_last_rows=0)
# A row of three sequences, each from a block's start on, and padding behind two of them.
CUTS = ((0, 37), (48, 80), (80, 93))
WIDTH = 96


def random_gate(config: GateConfig, seed: int = 0) -> Gate:
    """One layer's, with random weights."""
    rng, gate = np.random.default_rng(seed), nnx.eval_shape(lambda: make_gate(config, LLAMA, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape[1:]) * x.shape[-2] ** -0.5, x.dtype), gate)


@functools.cache
def model_of(name: str) -> Transformer:
    model = tiny_model(gates=False)
    for seed, config in enumerate(KINDS[name]):
        model.add_gate(config, rngs=nnx.Rngs(seed))
    return model


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, LLAMA.vocab_size, (2, 75)), jnp.int32)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_prompts_read_in_chunks_of_rows_are_read_as_whole(name: str, monkeypatch: pytest.MonkeyPatch):
    lengths = jnp.asarray([75, 38])

    def read() -> tuple[jax.Array, jax.Array]:
        return jax.jit(lambda model, *x: model.hidden_states(*x, sparsity=POLICY))(model_of(name), TOKENS, lengths)

    hidden, kept = read()
    assert float(kept.max()) < 1
    monkeypatch.setattr(attention, "ROWS_AT_ONCE", 2)
    in_chunks, kept_in_chunks = read()
    inside = (np.arange(75) < np.asarray(lengths)[:, None])[..., None]
    np.testing.assert_allclose(np.where(inside, in_chunks, 0), np.where(inside, hidden, 0), atol=2e-5)
    np.testing.assert_allclose(kept_in_chunks, kept, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_tokens_decoded_one_by_one_choose_as_in_one_pass(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(window_module, "ON_CPUS", AtOnce(64, 2**25, 128))
    model = model_of(name)
    expected = jax.jit(lambda model, tokens: decode_window(model, tokens, POLICY))(model, TOKENS)
    step = jax.jit(lambda model, *x: model.decode(*x, sparsity=POLICY))
    cache, losses, shares = model.make_cache(*TOKENS.shape), [], []
    for token in TOKENS.T:
        logits, cache, kept = step(model, token, cache)
        losses.append(logits)
        shares.append(kept)
    np.testing.assert_allclose(np.stack(shares, axis=2), expected.kept, rtol=1e-6)
    np.testing.assert_allclose(np.stack(losses, axis=1), model.logits(expected.hidden), atol=2e-5)


@kinds(KINDS)
def test_compressed_keys_made_while_decoding_are_those_of_prompts(name: str):
    """After prompts that end within a block and within a pool; of the first layer, whose keys no attention has changed."""
    model = model_of(name)
    assert model.decode_gate is not None
    lengths, steps = jnp.asarray([38, 21], jnp.int32), 30
    prefill = jax.jit(lambda model, lengths: model.prefill(TOKENS, lengths, model.make_cache(*TOKENS.shape))[1])
    step = jax.jit(lambda model, *x: model.decode(*x)[1])
    cache = prefill(model, lengths)
    for place in range(steps):
        cache = step(model, TOKENS[jnp.arange(2), lengths + place], cache)
    grown, whole = (np.asarray(x.gate_key_arrays[0][0]) for x in (cache, prefill(model, lengths + steps)))
    for row, done in enumerate((np.asarray(lengths) + steps) // model.decode_gate.config.key_pool):
        np.testing.assert_allclose(grown[row, :, :done], whole[row, :, :done], atol=2e-5)


def packed() -> tuple[np.ndarray, np.ndarray, Rows]:
    """Queries, keys and rows of sequences in one row."""
    rng = np.random.default_rng(1)
    q, k = (rng.standard_normal((1, WIDTH, heads, DIM)) for heads in (LLAMA.num_heads, LLAMA.num_kv_heads))
    positions, segments = np.zeros((1, WIDTH), int), np.zeros((1, WIDTH), int)
    for number, (first, end) in enumerate(CUTS):
        positions[0, first:end], segments[0, first:end] = np.arange(end - first), number + 1
    return q, k, Rows(positions, segments > 0, segments)


@jax.jit
def packed_logits(gate: Gate, q: Any, k: Any, positions: Any, segments: Any) -> jax.Array:
    if isinstance(gate, PrefillGate):
        return packed_prefill_logits(gate, q, k, positions, segments)
    keys = packed_decode_keys(gate, k, positions, segments)
    return packed_decode_logits(gate, q, keys, positions, segments)


def logits_of(gate: Gate, q: np.ndarray, k: np.ndarray, rows: Rows) -> jax.Array:
    arrays = (jnp.asarray(x, jnp.float32) for x in (q, k))
    return packed_logits(gate, *arrays, *(jnp.asarray(x, jnp.int32) for x in (rows.positions, rows.sequence)))


@kinds(EACH)
def test_packed_sequences_have_the_logits_of_each_alone(name: str):
    """And see nothing of their neighbours, nor of padding."""
    config, (q, k, rows) = EACH[name], packed()
    gate, b = random_gate(config), config.block_size
    got = np.asarray(logits_of(gate, q, k, rows))
    for first, end in CUTS:
        own = slice(first, -(-end // b) * b)
        alone = Rows(rows.positions[:, own], rows.valid[:, own], rows.sequence[:, own])
        expected = np.asarray(logits_of(gate, q[:, own], k[:, own], alone))
        size = (own.stop - first) // b
        lines = slice(first // b, first // b + size) if isinstance(gate, PrefillGate) else slice(first, end)
        part = got[:, :, lines]
        of_own = part[..., first // b : first // b + size]
        np.testing.assert_allclose(of_own, expected[:, :, : part.shape[2]], atol=2e-5)
        assert np.isneginf(np.delete(part, np.arange(first // b, first // b + size), axis=-1)).all()


@pytest.mark.parametrize("name", [name for name in EACH if "release" not in name])
def test_packed_logits_are_the_definition(name: str):
    config, (q, k, rows) = EACH[name], packed()
    gate = random_gate(config)
    # RoPE of the model is scaled by frequency; the definition takes the plain one.
    gate.model = dataclasses.replace(LLAMA, rope=dataclasses.replace(LLAMA.rope, kind=RopeKind.DEFAULT, factor=1.0))
    expected, got = definition(gate, q, k, rows).logits, np.asarray(logits_of(gate, q, k, rows))
    counted = rows.valid[:, :: config.block_size] if isinstance(gate, PrefillGate) else rows.valid
    expected, got = (np.where(counted[:, None, :, None], x, -np.inf) for x in (expected, got))
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(got[finite], expected[finite], atol=2e-5)


@kinds(EACH)
def test_the_gradient_is_the_slope_of_the_loss(name: str):
    """Along a random direction, by central differences."""
    q, k, rows = packed()
    gate, direction = random_gate(EACH[name]), random_gate(EACH[name], seed=1)
    weights = np.random.default_rng(2).exponential(size=np.shape(logits_of(gate, q, k, rows)))

    @jax.jit
    def loss(gate: Gate) -> jax.Array:
        logits = logits_of(gate, q, k, rows)
        target = jnp.where(jnp.isneginf(logits), 0, weights.astype(np.float32))
        return row_kl(target / jnp.maximum(target.sum(-1, keepdims=True), 1), logits).mean()

    gradient = jax.grad(loss)(gate)
    slope = sum(map(jnp.vdot, jax.tree.leaves(gradient), jax.tree.leaves(direction)))
    step = 2e-3  # few kinks of maxima lie within
    ahead, behind = (loss(jax.tree.map(lambda x, d: x + s * step * d, gate, direction)) for s in (1, -1))  # noqa: B023
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=0.02, atol=2e-4)


def test_finer_keys_are_scored_where_the_cache_keeps_them():
    """On Hopper GPUs no array holds the keys of a single layer; blocks that the cache adds to fill a group have no score."""
    config = dataclasses.replace(HEADS, block_size=64, k_pool_size=8, gate_dim=64)
    batch, heads, capacity, layer = 8, LLAMA.num_kv_heads, 64 * 1021, jnp.int32(1)

    def scores(q: jax.Array) -> jax.Array:
        gate = jax.tree.map(lambda x: x[0], make_gate(config, LLAMA, rngs=nnx.Rngs(0)))
        cache = Cache.create(LLAMA, batch, capacity, "bfloat16", decode_gate=config)
        context = DecodeContext(q=q, q_rotated=q, cache=cache.view(layer), layer=layer, block_size=64, gate=gate)
        return LearnedGate().decode_scores(context)

    with assume_hopper():
        traced = jax.jit(scores).trace(jax.ShapeDtypeStruct((batch, 1, LLAMA.num_heads, DIM), "bfloat16"))
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert traced.out_info.shape == (batch, heads, 1021)
    assert "mosaic_gpu" in lowered
    assert f"<{LLAMA.num_layers * batch}x{heads}x{8 * 1024}x64xbf16>" in lowered
    assert f"<{batch}x{heads}x{8 * 1024}x64xbf16>" not in lowered
