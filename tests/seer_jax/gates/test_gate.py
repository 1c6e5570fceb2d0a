"""Both gates against their definition in plain float64 loops, piece by piece, and what a gate is as a pytree."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seer_jax.gates.configs import (
    DecodeGateConfig,
    GateConfig,
    HeadJoin,
    Join,
    Pool,
    PrefillGateConfig,
    QueryReduction,
)
from seer_jax.gates.decode import DecodeGate
from seer_jax.gates.make import Gate, make_gate
from seer_jax.gates.prefill import PrefillGate
from seer_jax.gates.projections import initial_projection, project
from seer_jax.models.cache import Cache
from seer_jax.models.config import ModelConfig, RopeConfig, RopeKind
from seer_jax.models.layers import layer_view
from seer_jax.models.rope import apply_rope
from seer_jax.selection.policies import Dense, Given, Policy
from seer_jax.selection.rules import CumulativeMass, Threshold, TokenBudget, TopK
from seer_jax.selection.scorers import Oracle
from tests.products import rounded_products
from tests.seer_jax.gates.definitions import Rows, decode_definition, prefill_definition

B, T, BLOCK, HEADS, KV_HEADS, DIM, FACTOR, ATTENTION_FACTOR = 2, 70, 16, 4, 2, 8, 4.0, 1.25
ROPE = RopeConfig(theta=100.0, kind=RopeKind.LINEAR, factor=FACTOR, attention_factor=ATTENTION_FACTOR)
MODEL = ModelConfig(
    family="llama",
    vocab_size=8,
    hidden_size=16,
    intermediate_size=16,
    num_layers=2,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=DIM,
    rope=ROPE,
)
POOLINGS = [kinds for n in (1, 2, 3) for kinds in itertools.combinations(Pool, n)]
STARTS = np.array([[0], [48]])  # position of each row's first token
POSITIONS = STARTS + np.arange(T)
LENGTHS = np.array([[T], [37]])
VALID = np.arange(T) < LENGTHS
ROWS = Rows.of(POSITIONS, VALID)

pytestmark = pytest.mark.usefixtures("compile_quickly")


@jax.jit
def computed(gate: Gate, q: jax.Array, k: jax.Array) -> tuple[jax.Array, ...]:
    positions, valid = jnp.asarray(POSITIONS), jnp.asarray(VALID)
    keys = gate.keys(k, positions, valid)
    if isinstance(gate, PrefillGate):
        queries = gate.queries(q, positions, valid)
        return queries, keys, gate.logits(queries, keys, seen=gate.seen(jnp.arange(T)[None], valid))
    queries = gate.queries(q, positions)
    completed = jnp.broadcast_to(jnp.arange(T) // gate.config.block_size, (B, T))
    return queries, keys, gate.logits(queries, keys, completed=completed)


keys_of = jax.jit(lambda gate, *arguments: gate.keys(*arguments))
queries_of = jax.jit(lambda gate, *arguments: gate.queries(*arguments))


def one_layer(config: GateConfig, model: ModelConfig = MODEL) -> Gate:
    """The second layer of a gate with random weights."""
    gate, rng = nnx.eval_shape(lambda: make_gate(config, model, rngs=nnx.Rngs(0))), np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32)[1], gate)


def random_qk(seed: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Invalid tokens are NaN among the keys: what they hold must not matter."""
    rng = np.random.default_rng(seed)
    q, k = (rng.standard_normal((B, T, heads, DIM)).astype(np.float32) for heads in (HEADS, KV_HEADS))
    return q, np.where(VALID[:, :, None, None], k, np.nan).astype(np.float32)


def named(config: GateConfig) -> str:
    """What differs from the defaults."""
    fields = dataclasses.fields(config)
    changed = {f.name: getattr(config, f.name) for f in fields if getattr(config, f.name) != f.default}
    kinds = {name: "+".join(x) if isinstance(x, tuple) else str(x) for name, x in changed.items()}
    return "-".join([type(config).__name__.removesuffix("GateConfig"), *(f"{k}={x}" for k, x in kinds.items())])


def assert_close(got: Any, expected: np.ndarray, *, where: Any = True) -> None:
    """Within 1e-5 of the largest entry; infinities agree."""
    got = np.asarray(got, float)
    assert got.shape == expected.shape
    np.testing.assert_array_equal(np.isneginf(got) & where, np.isneginf(expected) & where)
    compared = np.isfinite(expected) & where
    np.testing.assert_allclose(got[compared], expected[compared], rtol=0, atol=1e-5 * np.abs(expected[compared]).max())


FORMS: list[dict[str, Any]] = [dict(), dict(gate_dim=12), dict(force_double=True)]
DEFAULT = PrefillGateConfig(BLOCK, DIM)
AVG = dict(k_pooling=(Pool.AVG,))
FINER_PREFILL = [
    dataclasses.replace(DEFAULT, q_pool_size=4, k_pool_size=4),
    dataclasses.replace(DEFAULT, k_pool_size=4, join=Join.MAX, gate_dim=12),
    dataclasses.replace(DEFAULT, q_pool_size=8),
    dataclasses.replace(DEFAULT, q_pool_size=2, k_pool_size=1, force_double=True, **AVG),
    dataclasses.replace(DEFAULT, block_size=32, q_pool_size=8, k_pool_size=16),
]
# Each pooling in the first form and in one of the others, which take turns.
QUERIES = [
    dataclasses.replace(DEFAULT, q_pooling=q, **FORMS[n]) for i, q in enumerate(POOLINGS) for n in (0, 1 + i % 2)
]
KEYS = [dataclasses.replace(DEFAULT, k_pooling=k, **FORMS[n]) for i, k in enumerate(POOLINGS) for n in (0, 2 - i % 2)]
PREFILL = list(dict.fromkeys([*FINER_PREFILL, *QUERIES, *KEYS]))
COARSE = [dataclasses.replace(DEFAULT, k_pooling=POOLINGS[-1], **form) for form in FORMS]


def of_two_kinds(config: PrefillGateConfig) -> bool:
    """Whether queries or keys are pooled in two ways and projected otherwise than by default: a mix of quicker cases."""
    pooled = 2 in (len(config.q_pooling), len(config.k_pooling))
    return pooled and (config.gate_dim, config.force_double) != (DIM, False)


@pytest.mark.parametrize(
    "config", [pytest.param(c, marks=pytest.mark.slow if of_two_kinds(c) else (), id=named(c)) for c in PREFILL]
)
def test_prefill_gate_is_its_definition(config: PrefillGateConfig):
    gate = one_layer(config)
    assert isinstance(gate, PrefillGate)
    q, k = random_qk()
    queries, keys, logits = computed(gate, jnp.asarray(q), jnp.asarray(k))
    expected = prefill_definition(gate, q.astype(float), k.astype(float), ROWS)
    assert gate.num_key_heads == keys.shape[2]
    assert_close(queries, expected.queries)
    assert_close(keys, expected.keys)
    blocks = logits.shape[-1]
    assert_close(logits, expected.logits, where=np.tril(np.ones((blocks, blocks), bool)))


RELEASED = [kind for kind in QueryReduction if kind is not QueryReduction.HEADS]
SWITCHES: list[dict[str, Any]] = [
    dict(use_qk_norm=norm, use_rope=rope) for norm in (False, True) for rope in (False, True)
]
HEAD_QUERIES = DecodeGateConfig(BLOCK, DIM, QueryReduction.HEADS)
FINER_DECODE = [
    HEAD_QUERIES,
    dataclasses.replace(HEAD_QUERIES, heads=HeadJoin.MAX, k_pool_size=4, use_qk_norm=True),
    dataclasses.replace(HEAD_QUERIES, k_pool_size=4, join=Join.MAX, gate_dim=12),
    dataclasses.replace(HEAD_QUERIES, k_pool_size=1, use_rope=False, **AVG),
    DecodeGateConfig(BLOCK, DIM, k_pool_size=4),
    DecodeGateConfig(32, DIM, QueryReduction.AVG, k_pool_size=8, join=Join.MAX),
]
DECODE = [
    *FINER_DECODE,
    *(DecodeGateConfig(BLOCK, DIM, reduction, **switches) for reduction in RELEASED for switches in SWITCHES),
    *(DecodeGateConfig(BLOCK, 12, reduction) for reduction in RELEASED if reduction is not QueryReduction.AVG),
    *(DecodeGateConfig(BLOCK, DIM, k_pooling=k) for k in POOLINGS),
]


@pytest.mark.parametrize("config", DECODE, ids=named)
def test_decode_gate_is_its_definition(config: DecodeGateConfig):
    gate = one_layer(config)
    assert isinstance(gate, DecodeGate)
    q, k = random_qk()
    got = computed(gate, jnp.asarray(q), jnp.asarray(k))
    for ours, expected in zip(got, decode_definition(gate, q.astype(float), k.astype(float), ROWS), strict=True):
        assert_close(ours, expected)


@pytest.mark.parametrize("reduction", QueryReduction)
def test_queries_of_a_single_token_are_those_of_many(reduction: QueryReduction):
    """Few vectors are projected by a sum of products, many by a matrix product."""
    gate = one_layer(DecodeGateConfig(BLOCK, DIM, reduction))
    q = jnp.asarray(random_qk()[0])
    whole = queries_of(gate, q, jnp.asarray(POSITIONS))
    for t in (0, 17, T - 1):
        one = queries_of(gate, q[:, t : t + 1], jnp.asarray(POSITIONS[:, t : t + 1]))
        assert_close(one[:, 0], np.asarray(whole[:, t], float))


def test_positions_of_one_row_serve_all():
    q, k = (jnp.asarray(np.nan_to_num(x)) for x in random_qk())
    one, each = jnp.arange(T)[None], jnp.broadcast_to(jnp.arange(T), (B, T))
    for config in (DEFAULT, DecodeGateConfig(BLOCK, DIM)):
        gate = one_layer(config)
        np.testing.assert_array_equal(queries_of(gate, q, one), queries_of(gate, q, each))
        np.testing.assert_array_equal(keys_of(gate, k, one), keys_of(gate, k, each))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("config", [DEFAULT, DecodeGateConfig(BLOCK, DIM)], ids=named)
def test_half_precision_inputs_are_computed_in_float32(config: GateConfig, dtype: str):
    gate = one_layer(config)
    half = [jnp.asarray(x, dtype) for x in random_qk()]
    for a, b in zip(computed(gate, *half), computed(gate, *(x.astype(jnp.float32) for x in half)), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("config", [FINER_PREFILL[0], HEAD_QUERIES, *COARSE, *DECODE[6::4]], ids=named)
def test_products_are_exact_on_accelerators_too(config: GateConfig):
    """Each product asks for its precision by itself: a GPU would otherwise round its inputs to TF32."""
    q, k = (jnp.asarray(x) for x in random_qk())
    assert not rounded_products(computed, one_layer(config), q, k)


# --- Keys and logits piece by piece.


@pytest.mark.parametrize("config", [FINER_PREFILL[0], *COARSE], ids=named)
@pytest.mark.parametrize("cuts", [(0, 16, 32, 48, 64, T), (0, 48, T)], ids=str)
def test_keys_appended_in_chunks_are_the_keys_of_the_whole(config: PrefillGateConfig, cuts: tuple[int, ...]):
    """Each piece starts at a block; the cache gives back what was appended, layer by layer."""
    gate, k = one_layer(config), jnp.asarray(random_qk()[1])
    assert isinstance(gate, PrefillGate)
    positions, valid = jnp.asarray(POSITIONS), jnp.asarray(VALID)
    whole = keys_of(gate, k, positions, valid)
    caches = [Cache.create(MODEL, B, T, jnp.float32, prefill_gate=config) for _ in range(2)]
    for layer, first, last in ((layer, *cut) for layer in (1, 0) for cut in itertools.pairwise(cuts)):
        piece = keys_of(gate, k[:, first:last], positions[:, first:last], valid[:, first:last])
        first_key = first // config.key_pool
        assert_close(piece, np.asarray(whole[:, first_key:][:, : piece.shape[1]], float))
        sent = piece + layer
        caches = [
            caches[0].append_prefill_gate_keys(jnp.int32(layer), sent, first_key=first_key),
            jax.jit(Cache.append_prefill_gate_keys)(caches[1], jnp.int32(layer), sent, first_key=jnp.int32(first_key)),
        ]
    for cache, layer in itertools.product(caches, range(2)):
        kept = cache.view(jnp.int32(layer)).prefill_gate_keys
        assert kept is not None and kept.shape[2] == gate.num_key_heads
        assert_close(kept[:, : whole.shape[1]], np.asarray(whole, float) + layer)


def test_a_cache_without_a_prefill_gate_keeps_no_keys_of_one():
    cache = Cache.create(MODEL, B, T, jnp.float32, decode_gate=DecodeGateConfig(BLOCK, DIM))
    assert cache.view(jnp.int32(0)).prefill_gate_keys is None


@pytest.mark.parametrize("traced", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("config", [*FINER_PREFILL[:3], *COARSE], ids=named)
def test_logits_of_later_rows_are_rows_of_the_whole(config: PrefillGateConfig, traced: bool):
    gate = one_layer(config)
    assert isinstance(gate, PrefillGate)
    q, k = (jnp.asarray(np.nan_to_num(x)) for x in random_qk())
    queries, keys = queries_of(gate, q, jnp.asarray(POSITIONS)), keys_of(gate, k, jnp.asarray(POSITIONS))
    whole, per_row = jax.jit(gate.logits)(queries, keys), config.queries_per_row
    blocks = whole.shape[-1]
    for first, count in ((0, 2), (1, 3), (3, 2), (blocks - 1, 1)):
        offset = jnp.int32(first) if traced else first
        rows = jax.jit(gate.logits)(queries[:, first * per_row : (first + count) * per_row], keys, row_offset=offset)
        visible = np.arange(blocks) <= first + np.arange(count)[:, None]
        assert_close(rows, np.asarray(whole[:, :, first : first + count], float), where=visible)


# --- The gate as a pytree.

MASK = jnp.asarray(np.random.default_rng(0).random((2, 1, 1, 3, 3)) > 0.5)
RECOMMENDATIONS = [
    None,
    Dense(),
    Threshold(5e-4),
    Threshold(jnp.asarray([[0.1], [0.3]]), Oracle(), dense_last_rows=0, dense_layers=1),
    CumulativeMass(0.95),
    CumulativeMass(jnp.asarray([[0.5], [0.75]])),
    TopK(0.1),
    TokenBudget(4096),
    Given(MASK, 16),
]


def assert_same_policy(a: Policy | None, b: Policy | None) -> None:
    assert type(a) is type(b)
    if a is not None:
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("policy", RECOMMENDATIONS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("config", [DEFAULT, DecodeGateConfig(BLOCK, DIM)], ids=named)
def test_a_recommendation_stays_with_its_gate(config: GateConfig, policy: Policy | None):
    gate = make_gate(config, MODEL, rngs=nnx.Rngs(0))
    assert gate.recommended is None
    gate.recommended = policy
    traced = []

    @jax.jit
    def through(gate: Gate) -> Gate:
        traced.append(gate.recommended)
        return gate

    copies = [
        gate,
        nnx.merge(*nnx.split(gate)),
        nnx.clone(gate),
        jax.tree.map(lambda x: x[0], gate),
        jax.tree.unflatten(*reversed(jax.tree.flatten(gate))),
        through(gate),
        nnx.eval_shape(lambda: gate),
    ]
    for copy in copies:
        assert_same_policy(copy.recommended, policy)
    assert_same_policy(traced[0], policy)
    through(nnx.clone(gate))
    assert len(traced) == 1, "compiled anew"
    gate.recommended = None
    assert gate.recommended is None
    assert_same_policy(copies[2].recommended, policy)


# --- Where training starts.

LLAMA3 = RopeConfig(theta=1e4, kind=RopeKind.LLAMA3, factor=8, original_max_position=64)


@pytest.mark.parametrize("rope", [ROPE, LLAMA3], ids=lambda rope: rope.kind)
@pytest.mark.parametrize(("head_dim", "gate_dim"), [(16, 16), (64, 16), (16, 64)])
def test_training_starts_from_channels_that_turn_alike(head_dim: int, gate_dim: int, rope: RopeConfig):
    """Projected, then rotated, is rotated, then projected; up to the noise in which the channels differ."""
    kinds = (Pool.MAX, Pool.AVG)
    weight = initial_projection(jax.random.key(0), (3, 2 * head_dim, gate_dim), kinds, head_dim)[:, head_dim:]
    kept = np.asarray(weight.round())
    assert (kept.sum(1) <= 1).all() and (kept.sum((1, 2)) == min(head_dim, gate_dim)).all()
    np.testing.assert_allclose(weight, kept, atol=0.02)
    x = jax.random.normal(jax.random.key(1), (1, 5, 3, head_dim))
    positions = jnp.asarray([[0, 1, 17, 300, 5000]])
    after = apply_rope(project(x, jnp.asarray(kept)), positions, rope)
    assert_close(after, np.einsum("bnhd,hdc->bnhc", apply_rope(x, positions, rope), kept))


def test_training_starts_at_random_where_no_channels_turn_alike():
    weight = initial_projection(jax.random.key(0), (3, 16, 12), (Pool.AVG,), 16)
    np.testing.assert_allclose(np.square(weight).mean(), 1 / 16, rtol=0.1)


# --- What a gate can't be.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: PrefillGateConfig(block_size=48), "block_size must be one of 16, 32, 64, 128 tokens; got 48"),
        (lambda: DecodeGateConfig(gate_dim=7), "gate_dim must be even and positive, .*; got 7"),
        (lambda: PrefillGateConfig(q_pooling=()), r"q_pooling must be some of max, min, avg, .*; got none"),
        (lambda: DecodeGateConfig(k_pooling=(Pool.AVG, Pool.MAX)), r"k_pooling .*in that order; got avg, max"),
        (lambda: DecodeGateConfig(start_layer=-1), "at least 0; got -1"),
        (lambda: make_gate(DecodeGateConfig(start_layer=2), MODEL, rngs=nnx.Rngs(0)), "below 2; got 2"),
        (
            lambda: make_gate(
                DecodeGateConfig(gate_dim=12, query_reduction=QueryReduction.AVG), MODEL, rngs=nnx.Rngs(0)
            ),
            "gate_dim must be the model's head dim, 8; got 12. Set DecodeGateConfig.gate_dim=8, or",
        ),
        (
            lambda: make_gate("fine", MODEL, rngs=nnx.Rngs(0)),  # pyright: ignore[reportArgumentType]
            "must be a PrefillGateConfig or a DecodeGateConfig; got 'fine'",
        ),
        (
            lambda: PrefillGate(DecodeGateConfig(), MODEL, rngs=nnx.Rngs(0)),  # pyright: ignore[reportArgumentType]
            "config of a PrefillGate must be a PrefillGateConfig; got DecodeGateConfig",
        ),
        (
            lambda: DecodeGate(DecodeGateConfig(), nnx.Module(), rngs=nnx.Rngs(0)),  # pyright: ignore[reportArgumentType]
            "model of a DecodeGate must be a ModelConfig; got Module. Pass `model.config`, or let",
        ),
        (
            lambda: make_gate(DecodeGateConfig(), MODEL, rngs=0),  # pyright: ignore[reportArgumentType]
            "rngs of a DecodeGate must be nnx.Rngs; got int",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_wrong_gate_is_refused(config: Any, message: str):
    with pytest.raises(ValueError, match=message):
        config()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "config", [PrefillGateConfig(block_size=BLOCK, q_pool_size=4), DecodeGateConfig(block_size=BLOCK)]
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda q, k, at: (q[:, :, :1], k[:, :, :1], at),
            r"must be floats \[B, T, {heads}, 8\], .*; got float32 \(2, 70, 1, 8\)",
        ),
        (lambda q, k, at: (q[..., :4], k[..., :4], at), r"\[B, T, {heads}, 8\], .*; got float32 \(2, 70, {heads}, 4\)"),
        (lambda q, k, at: (q[0], k[0], at), r"must be floats .*; got float32 \(70, {heads}, 8\)"),
        (lambda q, k, at: (q.astype(int), k.astype(int), at), r"must be floats .*; got int"),
        (
            lambda q, k, at: (q, k, at[0]),
            r"positions must be integers, one of \(\(2, 70\), \(1, 70\)\); got int\d\d \(70,\)",
        ),
        (lambda q, k, at: (q, k, at[:, :50]), r"positions must be integers, .*; got int\d\d \(2, 50\)"),
        (lambda q, k, at: (q, k, at * 0.5), r"positions must be integers, .*; got float"),
        (lambda q, k, at: (q, k, None), r"positions must be an array; got NoneType"),
    ],
)
def test_a_gate_is_not_called_with_what_is_not_the_model_s(config: GateConfig, change: Any, message: str):
    gate = one_layer(config)
    q, k, positions = change(jnp.ones((B, T, HEADS, DIM)), jnp.ones((B, T, KV_HEADS, DIM)), jnp.asarray(POSITIONS))
    with pytest.raises(ValueError, match=message.format(heads=HEADS)):
        gate.queries(q, positions)
    with pytest.raises(ValueError, match=message.format(heads=KV_HEADS)):
        gate.keys(k, positions)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "config", [PrefillGateConfig(block_size=BLOCK, gate_dim=DIM), DecodeGateConfig(block_size=BLOCK)]
)
def test_a_gate_is_called_layer_by_layer(config: GateConfig):
    gate = make_gate(config, MODEL, rngs=nnx.Rngs(0))
    q, k, positions = jnp.ones((B, T, HEADS, DIM)), jnp.ones((B, T, KV_HEADS, DIM)), jnp.asarray(POSITIONS)
    for call, x in ((gate.queries, q), (gate.keys, k)):
        with pytest.raises(
            ValueError,
            match=r"weights must be those of one layer; got those of all 2\. Take seer_jax\.models\.layers\.layer_view",
        ):
            call(x, positions)
    first = layer_view(gate, jnp.asarray(0))
    assert first.queries(q, positions).shape[0] == first.keys(k, positions).shape[0] == B
