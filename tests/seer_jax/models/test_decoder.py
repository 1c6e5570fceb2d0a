"""The model against itself: policies that keep everything are dense, decoding equals prefill, rows do not see each other."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import BlockIndices
from seer_jax.bench import DecodeBench
from seer_jax.evaluate.window import decode_window
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig
from seer_jax.inference.request import Request
from seer_jax.models.attention import decode_attention
from seer_jax.models.cache import Cache
from seer_jax.models.decoder import Transformer
from seer_jax.models.decoder.stack import LayerContext, Segment
from seer_jax.models.dense_attention import dense_attention
from seer_jax.models.families import config_from_hf
from seer_jax.models.rope import rotate
from seer_jax.selection.context import Context, DecodeContext, PrefillContext
from seer_jax.selection.policies import Dense, Given, Policy
from seer_jax.selection.rules import CumulativeMass, RankingPolicy, Threshold, TokenBudget, TopK
from seer_jax.selection.scorers import Oracle, Random, SinkWindow
from tests.seer_jax.conftest import LLAMA, QWEN2, QWEN3, tiny_model

pytestmark = pytest.mark.usefixtures("compile_quickly")

LENGTHS = (70, 16, 33, 1)
TOKENS = 70

forward = jax.jit(lambda model, tokens, lengths, policy: model(tokens, lengths, sparsity=policy))
prefill = jax.jit(
    lambda model, tokens, lengths, cache, policy: model.prefill(tokens, lengths, cache, sparsity=policy)[:2]
)
decode = jax.jit(lambda model, tokens, cache, policy: model.decode(tokens, cache, sparsity=policy))


def relative(a: jax.Array, b: jax.Array) -> float:
    """||a - b|| / ||b||; NaN fails every comparison."""
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@functools.cache
def batch(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    tokens = np.random.default_rng(seed).integers(0, LLAMA.vocab_size, (len(LENGTHS), TOKENS))
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(LENGTHS, jnp.int32)


def counted(logits: jax.Array) -> jax.Array:
    """The logits at tokens that count, one after the other."""
    return jnp.concatenate([row[:n] for row, n in zip(logits, LENGTHS, strict=True)])


EVERYTHING = [
    Threshold(0.0),
    CumulativeMass(1.0),
    TopK(1.0),
    TokenBudget(80),
    TopK(1.0, Oracle()),
    Dense(skip=0.0),
]


def slow(policies: Iterable[Policy], *these: Policy) -> list[Any]:
    """Some of the policies, whose programs take seconds to compile, run with the slow tests."""
    return [pytest.param(p, marks=pytest.mark.slow if p in these else ()) for p in policies]


@pytest.mark.parametrize("policy", slow(EVERYTHING, *EVERYTHING[1:3], EVERYTHING[4]), ids=str)
def test_a_policy_that_keeps_everything_is_dense(policy: Policy):
    model = tiny_model()
    tokens, lengths = batch()
    dense = counted(forward(model, tokens, lengths, Dense()))
    assert relative(counted(forward(model, tokens, lengths, policy)), dense) < 2e-6


SPARSE = [
    Threshold(0.2, dense_last_rows=0),
    CumulativeMass(0.5, dense_last_rows=0),
    TopK(0.3),
    TopK(0.4, Oracle()),
    TokenBudget(32),
    TopK(0.4, Random(3)),
    TopK(0.4, SinkWindow()),
    Dense(skip=1.0),
]
QUICK = slow(SPARSE, *SPARSE[1:4], *SPARSE[5:7])


@pytest.mark.parametrize("policy", [pytest.param(Dense(), marks=pytest.mark.slow), *QUICK], ids=str)
def test_padding_and_neighbours_change_nothing(policy: Policy):
    """A row of a ragged batch gives what it gives alone, and what stands in the padding is never seen."""
    model = tiny_model()
    tokens, lengths = batch()
    poisoned = jnp.where(jnp.arange(TOKENS)[None] < lengths[:, None], tokens, LLAMA.vocab_size - 1)
    together = forward(model, poisoned, lengths, policy)
    if isinstance(getattr(policy, "scorer", None), Random):
        other = jnp.where(jnp.arange(TOKENS)[None] < lengths[:, None], tokens, 0)
        np.testing.assert_array_equal(counted(together), counted(forward(model, other, lengths, policy)))
        return
    row, n = 2, LENGTHS[2]
    alone = forward(model, tokens[row : row + 1, :n], None, policy)
    assert relative(together[row, :n], alone[0]) < 5e-6


@pytest.mark.parametrize("policy", QUICK, ids=str)
def test_kept_share_falls_and_output_changes(policy: Policy):
    model = tiny_model()
    tokens, _ = batch()
    hidden, kept = jax.jit(lambda m, t: m.hidden_states(t, sparsity=policy))(model, tokens)
    dense, everything = model.hidden_states(tokens)
    np.testing.assert_array_equal(everything, 1)
    assert kept.shape == (2, len(LENGTHS))
    assert ((kept > 0.1) & (kept < 1)).all()
    assert relative(hidden, dense) > 1e-4


@pytest.mark.parametrize(
    "model", [QWEN2, pytest.param(QWEN3, marks=pytest.mark.slow)], ids=lambda c: c.family, indirect=True
)
def test_given_masks_equal_masked_dense_attention(model: Transformer):
    """Each layer's output with random block masks equals softmax attention under the same mask, token by token."""
    tokens, _ = batch()
    blocks = -(-TOKENS // 16)
    shape = (2, len(LENGTHS), model.config.num_heads, blocks, blocks)
    mask = jax.random.bernoulli(jax.random.key(0), 0.4, shape) | jnp.eye(blocks, dtype=bool)[None, None, None]
    sparse = model(tokens, sparsity=Given(mask, block_size=16))

    def attend(context, state, q, k, v):
        from seer_jax.models.rope import rotate

        q, k = rotate(q, k, jnp.arange(TOKENS)[None], model.config.rope)
        allowed = jnp.repeat(jnp.repeat(mask[context.index], 16, -1), 16, -2)[..., :TOKENS, :TOKENS]
        allowed &= jnp.tril(jnp.ones((1, 1, TOKENS, TOKENS), bool))
        return jax.nn.dot_product_attention(q, k, v, mask=allowed), state, ()

    hidden, _, _ = model.scan(tokens, attend)
    assert relative(sparse, model.logits(hidden)) < 2e-6


def test_a_row_of_a_given_mask_that_keeps_nothing_keeps_its_diagonal():
    model = tiny_model()
    tokens, _ = batch()
    blocks = -(-TOKENS // 16)
    nothing = jnp.zeros((2, len(LENGTHS), 1, blocks, blocks), bool)
    diagonal = nothing | jnp.eye(blocks, dtype=bool)[None, None, None]
    np.testing.assert_array_equal(
        model(tokens, sparsity=Given(nothing, block_size=16)), model(tokens, sparsity=Given(diagonal, block_size=16))
    )


DECODED = [Dense(), Threshold(0.0), CumulativeMass(1.0), TopK(1.0), TokenBudget(96), TopK(1.0, Oracle())]


@pytest.mark.parametrize("policy", slow(DECODED, *DECODED[2:5]), ids=str)
def test_decoding_equals_prefill_for_ragged_rows_across_block_boundaries(policy: Policy):
    """Each step's logits equal those of the dense forward pass over the same tokens."""
    decode_equals_prefill(tiny_model(), policy)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [Dense(), TokenBudget(96)], ids=str)
def test_decoding_equals_prefill_in_every_family(model: Transformer, policy: Policy):
    decode_equals_prefill(model, policy)


def decode_equals_prefill(model: Transformer, policy: Policy) -> None:
    lengths = jnp.asarray([45, 16, 31, 1], jnp.int32)
    steps = 20
    tokens, _ = batch(1)
    expected = forward(model, tokens, None, Dense())
    prompts = jnp.where(jnp.arange(TOKENS)[None] < lengths[:, None], tokens, 0)
    logits, cache = prefill(model, prompts, lengths, model.make_cache(len(LENGTHS), 96), Dense())
    rows = jnp.arange(len(LENGTHS))
    for step in range(steps):
        assert relative(logits, expected[rows, lengths + step - 1]) < 1e-5
        logits, cache, kept = decode(model, tokens[rows, lengths + step], cache, policy)
        np.testing.assert_allclose(kept, 1, atol=1e-6)
    np.testing.assert_array_equal(cache.lengths, lengths + steps)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 2e-5), pytest.param("bfloat16", 0.05, marks=pytest.mark.slow)]
)
def test_compressed_keys_made_while_decoding_equal_those_of_prefill(dtype: str, tolerance: float):
    """They are as wide as the model."""
    model = tiny_model(dtype=dtype)
    tokens, _ = batch(2)
    _, whole = prefill(model, tokens, None, model.make_cache(len(LENGTHS), 96), Dense())
    start = jnp.asarray([1, 15, 16, 40], jnp.int32)
    _, cache = prefill(model, tokens, start, model.make_cache(len(LENGTHS), 96), Dense())
    rows = jnp.arange(len(LENGTHS))
    for step in range(30):
        _, cache, _ = decode(model, tokens[rows, start + step], cache, Dense())
    (whole_keys,), (grown_keys,) = whole.gate_key_arrays, cache.gate_key_arrays
    assert whole_keys.dtype == dtype
    for row in range(len(LENGTHS)):
        done = (int(start[row]) + 30) // 16
        ours, theirs = (x[:, row, :, :done].astype("float32") for x in (grown_keys, whole_keys))
        np.testing.assert_allclose(ours, theirs, atol=tolerance)


CAPS = [TokenBudget(32), TokenBudget(48, Oracle()), TokenBudget(32, Random())]


@pytest.mark.parametrize("policy", slow(CAPS, CAPS[2]), ids=str)
def test_a_decode_budget_is_a_hard_cap(policy: TokenBudget):
    model = tiny_model()
    tokens, _ = batch(3)
    _, cache = prefill(model, tokens, None, model.make_cache(len(LENGTHS), 80), Dense())
    _, _, kept = decode(model, tokens[:, 0], cache, policy)
    np.testing.assert_allclose(kept, policy.blocks_per_row(16) / 5, rtol=1e-6)


def test_start_layer_keeps_the_first_layers_dense():
    model = tiny_model(gates=False)
    model.add_gate(DecodeGateConfig(block_size=16, gate_dim=16, start_layer=1), rngs=nnx.Rngs(1))
    tokens, _ = batch()
    _, cache = prefill(model, tokens, None, model.make_cache(len(LENGTHS), 80), Dense())
    _, _, kept = decode(model, tokens[:, 0], cache, TokenBudget(16))
    np.testing.assert_allclose(kept, [[1.0] * 4, [0.2] * 4], rtol=1e-6)


@functools.cache
def deep_model(start_layer: int = 0) -> Transformer:
    """Four layers, both gates."""
    model = tiny_model(dataclasses.replace(LLAMA, num_layers=4))
    config = DecodeGateConfig(block_size=16, gate_dim=16, start_layer=start_layer)
    return model.add_gate(config, rngs=nnx.Rngs(2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recorded(Policy):
    """A policy whose lists are noted as masks, in the order of the layers that choose any."""

    policy: Policy
    masks: list[np.ndarray] = dataclasses.field(default_factory=list, metadata=dict(static=True), hash=False)

    def blocks(self, context: Context) -> BlockIndices | None:
        blocks = self.policy.blocks(context)
        assert blocks is not None
        mask = blocks.to_mask(context.num_key_blocks)
        jax.debug.callback(lambda mask: self.masks.append(np.asarray(mask)), mask, ordered=True)
        return blocks

    def dense_first_layers(self, gate: Any) -> int:
        return self.policy.dense_first_layers(gate)

    def prepare(self, context: PrefillContext) -> PrefillContext:
        return self.policy.prepare(context)


def recorded[R](run: Callable[[Policy], R], policy: Policy, shape: tuple[int, ...]) -> tuple[R, np.ndarray]:
    """What a program returns, and the masks that its sparse layers chose, in their order, each of the given shape."""
    recording = Recorded(policy)
    result = run(recording)
    jax.effects_barrier()
    return result, np.stack([np.broadcast_to(mask, shape) for mask in recording.masks])


@pytest.mark.slow
@pytest.mark.cpu  # the masks come by a callback, which needs a CPU device
@pytest.mark.parametrize(
    ("policy", "dense_layers"),
    [(TopK(0.4), 1), (TokenBudget(32), 2), (CumulativeMass(0.5, dense_last_rows=0), 3)],
    ids=str,
)
def test_dense_first_layers_of_a_prompt_are_masks_that_are_full(policy: RankingPolicy, dense_layers: int):
    """The others have the masks that they choose, as if these were given."""
    model, (tokens, lengths) = deep_model(), batch()
    policy = dataclasses.replace(policy, dense_layers=dense_layers)
    run = jax.jit(lambda model, policy: model.hidden_states(tokens, lengths, sparsity=policy))
    (hidden, kept), masks = recorded(lambda policy: run(model, policy), policy, (len(LENGTHS), 4, 5, 5))
    assert len(masks) == 4 - dense_layers
    given = np.concatenate([np.ones((dense_layers, *masks.shape[1:]), bool), masks])
    expected, expected_kept = run(model, Given(jnp.asarray(given), block_size=16))
    assert relative(counted(hidden), counted(expected)) < 2e-6
    np.testing.assert_allclose(kept, expected_kept, rtol=1e-6)
    np.testing.assert_array_equal(kept[:dense_layers], 1)
    assert (kept[dense_layers:, 0] < 1).all()


@pytest.mark.slow
@pytest.mark.cpu  # the masks come by a callback, which needs a CPU device
@pytest.mark.parametrize(
    ("policy", "dense_layers", "start_layer"),
    [(Threshold(0.2), 2, 1), (TokenBudget(32), 1, 2), (TokenBudget(32), 1, 0), (TokenBudget(32), 0, 2)],
    ids=str,
)
def test_dense_first_layers_of_a_new_token_are_masks_that_are_full(
    policy: RankingPolicy, dense_layers: int, start_layer: int
):
    """As many as the larger of the policy's count and the gate's."""
    model, (tokens, lengths) = deep_model(start_layer), batch()
    policy = dataclasses.replace(policy, dense_layers=dense_layers)
    first = max(dense_layers, start_layer)
    _, cache = prefill(model, tokens, lengths, model.make_cache(len(LENGTHS), 96), Dense())
    run = jax.jit(lambda model, policy: model.decode(tokens[:, 0], cache, sparsity=policy))
    (logits, after, kept), masks = recorded(lambda policy: run(model, policy), policy, (len(LENGTHS), 2, 6))
    assert len(masks) == 4 - first
    given = np.concatenate([np.ones((first, *masks.shape[1:]), bool), masks])
    expected, expected_after, expected_kept = run(model, Given(jnp.asarray(given), block_size=16))
    assert relative(logits, expected) < 2e-6
    np.testing.assert_allclose(kept, expected_kept, rtol=1e-6)
    np.testing.assert_array_equal(kept[:first], 1)
    assert (kept[first:, 0] < 1).all()
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(expected_after), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def split(model: Transformer, first: int) -> list[Segment]:
    """Two segments of different policies."""
    return [Segment(first), Segment(model.config.num_layers - first, TopK(0.5))]


@pytest.mark.slow
def test_two_loops_have_the_gradients_of_one():
    tokens, _ = batch()

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def gradients(model: Transformer, dense_layers: int, remat: bool) -> Transformer:
        def loss_of(model: Transformer) -> jax.Array:
            def attend(context: LayerContext, state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
                q, k = rotate(q, k, jnp.arange(TOKENS)[None], model.config.rope)
                return dense_attention(q, k, v), state, context.index

            hidden, _, order = model.scan(tokens, attend, segments=split(model, dense_layers), remat=remat)
            return jax.nn.logsumexp(model.logits(hidden), axis=-1).mean() + 0.0 * order.sum()

        return jax.grad(loss_of)(model)

    model = tiny_model(QWEN3, gates=False)
    one, *others = (jax.tree.leaves(gradients(model, *x)) for x in ((0, False), (1, False), (1, True), (2, True)))
    for other in others:
        assert all(relative(a, b) < 1e-5 for a, b in zip(other, one, strict=True))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dense_layers", [1, 4])
def test_each_layer_runs_once_and_in_order(dense_layers: int, in_place: bool):
    model, (tokens, _) = deep_model(), batch()

    def attend(context: LayerContext, state: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        gate = context.decode_gate
        assert gate is not None and gate.linear_k is not None
        seen = (context.index, jnp.int32(context.policy.is_dense), gate.linear_k[...].sum(), state)
        return q, state + 1, seen

    segments = split(model, dense_layers)
    hidden, count, seen = model.scan(tokens, attend, jnp.int32(0), segments=segments, in_place=in_place)
    expected, _, _ = model.scan(tokens, attend, jnp.int32(0))
    assert model.decode_gate is not None
    np.testing.assert_array_equal(seen[0], np.arange(4))
    np.testing.assert_array_equal(seen[1], np.arange(4) < dense_layers)
    np.testing.assert_allclose(seen[2], model.decode_gate.linear_k[...].sum((1, 2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(seen[3], np.arange(4))
    assert int(count) == 4 and relative(hidden, expected) < 2e-6


def test_dense_first_layers_make_no_choice_on_the_device():
    """A conditional would make the host wait in each layer of each step."""
    model = deep_model(start_layer=1)
    for policy, loops in ((Dense(), 1), (TokenBudget(32), 2), (TokenBudget(32, dense_layers=2), 2)):
        jaxpr = jax.make_jaxpr(
            lambda model, cache, policy=policy: model.decode(jnp.zeros(2, jnp.int32), cache, sparsity=policy)
        )
        names = [equation.primitive.name for equation in jaxpr(model, model.make_cache(2, 96)).eqns]
        assert names.count("scan") == loops and "cond" not in str(names)


@pytest.mark.parametrize("density", [0.3, 0.6])
def test_decode_top_k_follows_the_length_of_each_row(density: float):
    model = tiny_model()
    tokens, lengths = batch()
    _, cache = prefill(model, tokens, lengths, model.make_cache(len(LENGTHS), 96), Dense())
    _, _, kept = decode(model, tokens[:, 0], cache, TopK(density))
    blocks = np.asarray(LENGTHS) // 16 + 1
    wanted = np.minimum(np.maximum(2, np.floor(density * blocks)), blocks)
    np.testing.assert_allclose(kept[0], wanted / blocks, rtol=1e-6)


def test_decode_top_k_where_its_product_rounds_up():
    """0.29 of 100 blocks is 28.999... in binary; the lists hold 29."""
    b, blocks = 64, 100
    keys = jax.random.normal(jax.random.key(0), (2, 1, 1, b * blocks, 1, 8))
    cache = Cache(keys[0], keys[1], jnp.asarray([b * blocks - 1]))
    q = jax.random.normal(jax.random.key(1), (1, 1, 2, 8))
    layer = jnp.int32(0)
    context = DecodeContext(q=q, q_rotated=q, cache=cache.view(layer), layer=layer, block_size=b)
    out, kept = decode_attention(TopK(0.29, SinkWindow()), context)
    np.testing.assert_allclose(kept, 29 / blocks, rtol=1e-6)
    seen = jnp.asarray([0, *range(blocks - 28, blocks)])
    k, v = (x.reshape(1, blocks, b, 1, 8)[:, seen].reshape(1, -1, 1, 8) for x in keys[:, 0])
    np.testing.assert_allclose(out, jax.nn.dot_product_attention(q, k, v), atol=1e-6)


WHOLE_SIZES = {
    "llama-3.1-8b": (dict(model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                          num_attention_heads=32, num_key_value_heads=8, vocab_size=128256), 8.03e9),
    "llama-3.1-70b": (dict(model_type="llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                           num_attention_heads=64, num_key_value_heads=8, vocab_size=128256), 70.6e9),
    "qwen3-14b": (dict(model_type="qwen3", hidden_size=5120, intermediate_size=17408, num_hidden_layers=40,
                       num_attention_heads=40, num_key_value_heads=8, head_dim=128, vocab_size=151936), 14.8e9),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE_SIZES)
def test_whole_sizes_trace_without_memory(name: str):
    """Parameter counts as published; prefill and decode shapes at a context of 32k tokens."""
    hf, published = WHOLE_SIZES[name]
    config = config_from_hf(hf | dict(max_position_embeddings=131072, rope_theta=5e5, rms_norm_eps=1e-5))

    def build() -> Transformer:
        model = Transformer(config, rngs=nnx.Rngs(0))
        model.add_gate(PrefillGateConfig(), rngs=nnx.Rngs(1))
        return model.add_gate(DecodeGateConfig(), rngs=nnx.Rngs(2))

    model = nnx.eval_shape(build)
    base = nnx.state((model.embed_tokens, model.layers, model.norm, model.lm_head))
    count = sum(np.prod(x.shape) for x in jax.tree.leaves(base))
    assert abs(count / published - 1) < 0.005
    tokens = jax.ShapeDtypeStruct((1, 32768), jnp.int32)

    def run(model: Transformer, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, cache, _ = model.prefill(tokens, None, model.make_cache(1, 32832), sparsity=TopK(0.1))
        return logits, model.decode(tokens[:, 0], cache, sparsity=TokenBudget(4096))[0]

    first, second = nnx.eval_shape(run, model, tokens)
    assert first.shape == second.shape == (1, config.vocab_size)
    assert first.dtype == second.dtype == jnp.float32


@pytest.mark.slow
def test_rematerialised_layers_have_the_same_gradients():
    tokens, _ = batch()

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(model: Transformer, remat: bool) -> tuple[jax.Array, Transformer]:
        def loss_of(model: Transformer) -> jax.Array:
            def attend(context: LayerContext, state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
                q, k = rotate(q, k, jnp.arange(TOKENS)[None], model.config.rope)
                return dense_attention(q, k, v), state, None

            return jax.nn.logsumexp(model.logits(model.scan(tokens, attend, remat=remat)[0]), axis=-1).mean()

        return jax.value_and_grad(loss_of)(model)

    model = tiny_model(QWEN3, gates=False)
    kept, anew = (jax.tree.leaves(gradients(model, remat)) for remat in (False, True))
    assert all(relative(a, b) < 1e-5 for a, b in zip(anew, kept, strict=True))


BAD_INPUT = [
    (dict(tokens=np.zeros(3, np.int32)), r"tokens must be integers \[B, T\].*got int32 \(3,\)"),
    (dict(tokens=np.zeros((1, 3), np.float32)), r"tokens must be integers.*got float32"),
    (dict(tokens=np.zeros((1, 0), np.int32)), r"B, T >= 1; got int32 \(1, 0\)"),
    (dict(tokens=np.full((1, 3), 64)), r"\[0, 64\).*got 64 \.\. 64.*tokenizer"),
    (dict(tokens=np.full((1, 3), -1)), r"got -1 \.\. -1"),
    (dict(lengths=np.ones(2, np.int32)), r"lengths must be integers \[B\] with B = 1; got int32 \(2,\)"),
    (dict(lengths=np.ones(1, np.float32)), "lengths must be integers.*got float32"),
    (dict(lengths=np.zeros(1, np.int32)), "1 to T = 3 tokens.*got lengths 0 .. 0"),
    (dict(lengths=np.full(1, 4)), "got lengths 4 .. 4"),
    (dict(sparsity=TopK(0.1)), "the model has no prefill gate.*load one"),
    (dict(sparsity=TokenBudget(8, Random())), "at least one block of 64 tokens; got 8"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("change", "message"), BAD_INPUT, ids=[m for _, m in BAD_INPUT])
def test_bad_input_is_refused(change: dict[str, Any], message: str):
    model = tiny_model(gates=False)
    arguments: dict[str, Any] = dict(tokens=np.zeros((1, 3), np.int32)) | change
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_a_prompt_longer_than_the_cache_is_refused():
    model = tiny_model(gates=False)
    with pytest.raises(ValueError, match="got 3 tokens for 2 slots"):
        model.prefill(jnp.zeros((1, 3), jnp.int32), None, model.make_cache(1, 2))
    with pytest.raises(ValueError, match="A cache's batch must be an integer of at least 1; got 0"):
        Cache.create(LLAMA, 0, 2, jnp.float32)


def test_gates_of_another_model_are_refused():
    gate = tiny_model(QWEN3).prefill_gate
    assert gate is not None
    with pytest.raises(ValueError, match="num_kv_heads must be 2; got 4"):
        tiny_model(gates=False).attach(gate)
    with pytest.raises(ValueError, match="below 2; got 2"):
        tiny_model(gates=False).add_gate(DecodeGateConfig(gate_dim=16, start_layer=2), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_policy_leaves_a_sparse_layer(phase: str):
    model = tiny_model()
    tokens, policy = jnp.zeros((1, 3), jnp.int32), TokenBudget(16, dense_layers=2)
    with pytest.raises(ValueError, match=r"below 2, the model's layers; got 2. Lower it, or use the policy dense"):
        if phase == "prefill":
            model(tokens, sparsity=policy)
        else:
            model.decode(tokens[:, 0], model.make_cache(1, 16), sparsity=policy)


DECODING_SKIPS = [
    lambda model: model.decode(jnp.zeros(1, jnp.int32), model.make_cache(1, 16), sparsity=Dense(skip=0.1)),
    lambda model: decode_window(model, jnp.zeros((1, 16), jnp.int32), policy=Dense(skip=0.1)),
    lambda model: Request(max_new_tokens=1, decode=Dense(skip=0.1)),
    lambda model: DecodeBench(policies=("topk:0.5,skip=0.1",)),
    lambda model: TopK(0.5, Oracle(), skip=0.1).check_phase("decode"),
]


@pytest.mark.parametrize("use", DECODING_SKIPS)
def test_a_policy_with_skip_is_for_prompts(use: Callable[[Transformer], Any]):
    with pytest.raises(ValueError, match=r"A policy for decoding must have no skip.*got one in a (dense|topk) policy"):
        use(tiny_model())


@pytest.mark.slow
def test_what_is_skipped_is_no_longer_kept():
    model, (tokens, _) = tiny_model(), batch()
    keep = jax.jit(lambda m, t, p: m.hidden_states(t, sparsity=p)[1])
    for policy in (TopK(0.6), TopK(0.6, Oracle(), dense_layers=1)):
        assert keep(model, tokens, dataclasses.replace(policy, skip=1.0)).sum() < keep(model, tokens, policy).sum()


BAD_POLICIES = [
    (lambda: Dense(skip=1.5), r"Dense.skip must lie in \[0, 1\]; got 1.5"),
    (lambda: TopK(0.1, skip=-0.1), r"TopK.skip must lie in \[0, 1\]; got -0.1"),
    (lambda: Threshold(1.0), r"\[0, 1\); got 1.0"),
    (lambda: Threshold(-0.1), r"got -0.1"),
    (lambda: CumulativeMass(0), r"\(0, 1\]; got 0"),
    (lambda: CumulativeMass(1.1), r"got 1.1"),
    (lambda: TopK(0.0), r"\(0, 1\]; got 0.0"),
    (lambda: TopK(1.5), r"got 1.5"),
    (lambda: TokenBudget(0), "must be an integer of at least 1; got 0"),
    (lambda: TokenBudget(64, dense_layers=-1), "dense_layers must be an integer of at least 0; got -1"),
    (lambda: TopK(0.1, dense_layers=-2), "dense_layers must be an integer of at least 0; got -2"),
    (lambda: CumulativeMass(0.1, dense_last_rows=-1), "dense_last_rows must be an integer of at least 0; got -1"),
    (lambda: Threshold(0.1, dense_last_rows=-3), "dense_last_rows must be an integer of at least 0; got -3"),
]


@pytest.mark.parametrize(("make", "message"), BAD_POLICIES, ids=[m for _, m in BAD_POLICIES])
def test_bad_policies_are_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
