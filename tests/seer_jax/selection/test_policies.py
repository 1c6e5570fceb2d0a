"""Policies on the contexts of a layer: values per layer and head, rows in chunks, kept shares, exact scores."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockIndices
from seer_jax.models import attention
from seer_jax.models.attention import prefill_attention
from seer_jax.models.dense_attention import dense_attention
from seer_jax.selection.context import Context, PrefillContext
from seer_jax.selection.policies import Dense, Given, Policy
from seer_jax.selection.rules import CumulativeMass, RankingPolicy, Threshold, TokenBudget, TopK
from seer_jax.selection.scorers import SCORERS, LearnedGate, SinkWindow
from tests.products import rounded_products
from tests.seer_jax.conftest import tiny_model
from tests.seer_jax.selection.contexts import (
    BLOCK,
    HEADS,
    KV_HEADS,
    LAYERS,
    Recorded,
    decode_context,
    prefill_context,
)

pytestmark = pytest.mark.usefixtures("compile_quickly")

TOKENS, LENGTHS = 70, (70, 16, 33)
POSITIONS = (69, 3, 48)


# --- Values per layer and head.


def values(shape: tuple[int, ...]) -> np.ndarray:
    """Distinct values that keep some blocks and leave some out."""
    return np.linspace(0.02, 0.9, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def by_layer_and_head(value: np.ndarray, heads: int) -> np.ndarray:
    """[L, heads]: what a value stands for, spelled out."""
    if value.shape == (LAYERS,):
        value = value[:, None]
    return np.broadcast_to(value, (LAYERS, heads))


@functools.cache
def chooser(phase: str) -> tuple[Callable[[str], jax.Array], Callable[[RankingPolicy, jax.Array], jax.Array]]:
    """Scores of a context by the scorer of a name, and a program that makes lists of scores, as a mask."""
    context = prefill_context(TOKENS, LENGTHS) if phase == "prefill" else decode_context(80, POSITIONS)

    @functools.cache
    def scores(name: str) -> jax.Array:
        return jax.jit(lambda: getattr(SCORERS[name](), f"{phase}_scores")(context))()

    select = jax.jit(lambda policy, scores: policy.select(scores, context).to_mask(context.num_key_blocks))
    return scores, select


# In every run: each rule in both phases, by the gate's scores and another scorer's. Rules see scores alone.
QUICK = {
    ("gate", "prefill", Threshold),
    ("gate", "decode", CumulativeMass),
    ("oracle", "prefill", CumulativeMass),
    ("oracle", "decode", Threshold),
}
PHASES_OF_SCORERS = [(phase, name) for name, kind in SCORERS.items() for phase in kind.phases()]
# The rules take turns with the scorers that only slow runs have.
CHOICES = [
    pytest.param(phase, rule, name, marks=() if (name, phase, rule) in QUICK else pytest.mark.slow)
    for number, (phase, name) in enumerate(PHASES_OF_SCORERS)
    for turn, rule in enumerate((Threshold, CumulativeMass))
    if name in ("gate", "oracle") or turn == number % 2
]


@pytest.mark.parametrize(("phase", "rule", "scorer"), CHOICES)
def test_values_per_layer_and_head_choose_as_a_number_of_each_does(
    phase: str, rule: type[Threshold | CumulativeMass], scorer: str
):
    heads = HEADS if phase == "prefill" else KV_HEADS
    scores, select = chooser(phase)
    assert scores("window").shape[1] == (1 if phase == "prefill" else heads)

    def chosen(policy: RankingPolicy) -> np.ndarray:
        mask = np.asarray(select(policy, scores(scorer)))
        return np.repeat(mask, heads // mask.shape[1], axis=1)

    for shape in ((), (LAYERS,), (heads,), (LAYERS, heads), (LAYERS, 1), (1, heads)):
        value = values(shape)
        stacked: Any = rule(jnp.asarray(value) if shape else float(value), dense_last_rows=0).stacked(LAYERS, heads)
        expected, choices = by_layer_and_head(value, heads), set()
        for layer in range(LAYERS):
            mask = chosen(stacked.of_layer(jnp.int32(layer)))
            for head in range(heads):
                alone = chosen(rule(float(expected[layer, head]), dense_last_rows=0))
                np.testing.assert_array_equal(mask[:, head], alone[:, head], f"{shape} {layer} {head}")
                choices.add(mask[:, head].tobytes())
        assert len(choices) > 1 or shape == ()


@pytest.mark.slow
def test_a_value_of_each_layer_and_head_reaches_attention():
    """A threshold of 0 keeps everything: layer by layer, head by head, of a prompt and of a new token."""
    model, most = tiny_model(), 0.9
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, TOKENS)), jnp.int32)
    _, cache, _ = jax.jit(model.prefill)(tokens, None, model.make_cache(2, 80))
    phases = (
        (4, jax.jit(lambda policy: model.hidden_states(tokens, sparsity=policy)[1])),
        (2, jax.jit(lambda policy: model.decode(tokens[:, 0], cache, sparsity=policy)[2])),
    )
    for heads, kept_by in phases:
        threshold = np.full((2, heads), most, np.float32)
        few = kept_by(Threshold(jnp.asarray(threshold), dense_last_rows=0))
        assert (few < 0.6).all()
        threshold[0, 0] = 0
        kept = kept_by(Threshold(jnp.asarray(threshold), dense_last_rows=0))
        np.testing.assert_allclose(kept[0], (1 + (heads - 1) * few[0]) / heads, rtol=1e-6)
        threshold[0] = 0
        kept = kept_by(Threshold(jnp.asarray(threshold), dense_last_rows=0))
        np.testing.assert_array_equal(kept[0], 1)
        assert (kept[1] < 0.6).all()


@pytest.mark.parametrize(
    "shape", [(2,), (5,), (HEADS, LAYERS), (2, HEADS), (LAYERS, 2), (1, LAYERS), (1, 1, HEADS), (0,)], ids=str
)
def test_values_of_another_shape_are_refused(shape: tuple[int, ...]):
    message = f"Threshold.threshold must be a number, [L] = [{LAYERS}], [heads] = [{HEADS}] or [L, heads] = "
    message += f"[{LAYERS}, {HEADS}]; got shape {shape}."
    with pytest.raises(ValueError, match=re.escape(message)):
        Threshold(jnp.full(shape, 0.5)).stacked(LAYERS, HEADS)


def test_an_axis_that_could_be_either_is_refused():
    with pytest.raises(
        ValueError, match=re.escape("as many heads; got shape (4,). Give [4, 1] for one value per layer, or [1, 4]")
    ):
        CumulativeMass(jnp.full(4, 0.5)).stacked(4, 4)
    for shape in ((4, 1), (1, 4), (4, 4)):
        stacked: Any = CumulativeMass(jnp.full(shape, 0.5)).stacked(4, 4)
        assert jnp.shape(stacked.mass)[0] == 4
    single: Any = CumulativeMass(jnp.full(1, 0.5)).stacked(1, 1)
    assert jnp.shape(single.mass) == (1, 1)


def wrong(value: Any) -> Any:
    """A value that a type checker would not let through."""
    return value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Threshold(1.0), r"Threshold.threshold.* must lie in \[0, 1\).*; got 1.0"),
        (lambda: Threshold(-0.1), r"Threshold.threshold.* must lie in \[0, 1\).*; got -0.1"),
        (lambda: Threshold(float("nan")), r"Threshold.threshold.* must lie in \[0, 1\).*; got nan"),
        (lambda: Threshold(jnp.asarray([0.5, 1.0])), r"Threshold.threshold.* must lie in \[0, 1\).*; got 1.0"),
        (lambda: Threshold(np.asarray([0.5, -1.0])), r"Threshold.threshold.* must lie in \[0, 1\).*; got -1.0"),
        (lambda: CumulativeMass(0.0), r"CumulativeMass.mass.* must lie in \(0, 1\].*; got 0.0"),
        (lambda: CumulativeMass(jnp.asarray([[0.5], [1.5]])), r"CumulativeMass.mass.* must lie in \(0, 1\].*; got"),
        (
            lambda: Threshold(wrong([0.1, 0.2])),
            r"Threshold.threshold.* must be a number or an array; got \[0.1, 0.2\]. .*asarray",
        ),
        (lambda: CumulativeMass(wrong((0.1,))), r"CumulativeMass.mass.* must be a number or an array; got \(0.1,\)"),
        (lambda: CumulativeMass(wrong("0.1")), "CumulativeMass.mass.* must be a number or an array; got '0.1'"),
        (lambda: TopK(0.0), r"TopK.density.* must lie in \(0, 1\].*; got 0.0"),
        (lambda: TopK(1.1), r"TopK.density.* must lie in \(0, 1\].*; got 1.1"),
        (lambda: TokenBudget(0), "TokenBudget.tokens must be an integer of at least 1; got 0"),
        (lambda: TokenBudget(15).blocks_per_row(16), "must hold at least one block of 16 tokens; got 15.* 16 or more"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_values_out_of_their_domain_are_refused(make: Callable[[], Policy], message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("rule", [Threshold, CumulativeMass, TopK])
@pytest.mark.parametrize("field", ["dense_last_rows", "dense_layers"])
def test_counts_below_zero_are_refused(rule: type[RankingPolicy], field: str):
    with pytest.raises(ValueError, match=rf"{field} .* at least 0; got -1"):
        rule(0.5, **{field: -1})  # pyright: ignore[reportCallIssue]


@pytest.mark.usefixtures("unchecked")
def test_a_mask_of_another_model_is_refused():
    for mask in (jnp.ones((2, 1, 1, 5, 5), bool), jnp.ones((LAYERS, 1, 1), bool), jnp.ones((LAYERS, 1, 2, 5))):
        with pytest.raises(ValueError, match=rf"Given.mask must be bool .* with L = {LAYERS}; got {mask.dtype} "):
            Given(mask, BLOCK).stacked(LAYERS, HEADS)
    with pytest.raises(ValueError, match=r"and 5, 5 blocks; got shape \(1, 1, 4, 4\)"):
        Given(jnp.ones((LAYERS, 1, 1, 4, 4), bool), BLOCK).of_layer(jnp.int32(0)).blocks(prefill_context(TOKENS, (70,)))


# --- Rows in chunks.

RULES = [
    Threshold(jnp.asarray([0.1, 0.2, 0.3, 0.4]), dense_last_rows=1),
    CumulativeMass(0.6, dense_last_rows=2),
    TopK(0.4, dense_last_rows=0),
    TokenBudget(2 * BLOCK),
]
# Every rule by the gate's scores; every other scorer by one rule, which take turns.
BY_GATE = [dataclasses.replace(rule, scorer=LearnedGate()) for rule in RULES]
BY_OTHERS = [
    dataclasses.replace(rule, scorer=scorer())
    for rule, scorer in zip(
        itertools.cycle(RULES),
        (kind for kind in SCORERS.values() if "prefill" in kind.phases() and kind is not LearnedGate),
        strict=False,
    )
]
MASK = jnp.asarray(np.random.default_rng(3).random((3, HEADS, 5, 5)) < 0.4)


def attended(policy: Policy, context: PrefillContext) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output, kept shares and masks."""
    recorded = Recorded(policy)
    out, kept = jax.jit(lambda: prefill_attention(recorded, context))()
    return np.asarray(out), np.asarray(kept), recorded.masks()


def assert_chunks_change_nothing(
    policy: Policy, context: PrefillContext, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, kept, masks = attended(policy, context)
    monkeypatch.setattr(attention, "ROWS_AT_ONCE", rows_at_once)
    parts_out, parts_kept, parts_masks = attended(policy, context)
    np.testing.assert_array_equal(parts_masks, masks)
    np.testing.assert_array_equal(parts_kept, kept)
    valid = np.arange(out.shape[1])[None] < np.asarray(context.lengths)[:, None]
    np.testing.assert_allclose(parts_out[valid], out[valid], atol=1e-6)
    assert kept_share(masks, context) == pytest.approx(kept, rel=1e-6)


@pytest.mark.parametrize("rows_at_once", [attention.ROWS_AT_ONCE, 1])
def test_half_a_block_behind_the_end_is_not_skipped(rows_at_once: int, monkeypatch: pytest.MonkeyPatch):
    """Blocks of 128 are skipped by halves of a block row, of which the last row may have one."""
    monkeypatch.setattr(attention, "ROWS_AT_ONCE", rows_at_once)
    context = dataclasses.replace(prefill_context(192, (192, 129, 40)), block_size=128)
    _, kept = jax.jit(lambda: prefill_attention(Dense(skip=0.0), context))()
    np.testing.assert_array_equal(kept, 1)


def kept_share(masks: np.ndarray, context: PrefillContext) -> list[float]:
    """Of each row of the batch: listed blocks of the block rows that hold a token, over those that causality allows."""
    shares = []
    for row, length in zip(masks, np.asarray(context.lengths), strict=True):
        rows = -(-int(length) // BLOCK)
        assert not row[:, rows:].any(), "blocks are listed behind the sequence"
        assert not np.triu(row, 1).any(), "blocks are listed that are to come"
        shares.append(row.sum() / (row.shape[0] * rows * (rows + 1) / 2))
    return shares


@pytest.mark.cpu  # the lists come by a callback
@pytest.mark.parametrize(
    "policy",
    [
        Given(MASK, BLOCK),
        BY_GATE[0],
        *(pytest.param(policy, marks=pytest.mark.slow) for policy in BY_GATE[1:] + BY_OTHERS),
    ],
    ids=lambda p: f"{type(p).__name__}-{getattr(p, 'scorer', '')}",
)
def test_chunks_of_rows_have_the_lists_of_the_whole(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    assert_chunks_change_nothing(policy, prefill_context(TOKENS, LENGTHS), 2, monkeypatch)


SIZES = [(70, 3), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((64, 1), (70, 1), (70, 4), (64, 3), (33, 1)))]


@pytest.mark.cpu
@pytest.mark.parametrize(("tokens", "rows_at_once"), SIZES)
def test_chunks_of_any_number_of_rows(tokens: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch):
    """Whether chunks divide the rows or not, and the block size the tokens."""
    context = prefill_context(tokens, (tokens, 20))
    assert_chunks_change_nothing(TopK(0.4, dense_last_rows=1), context, rows_at_once, monkeypatch)


@jax.default_matmul_precision("highest")  # of plain attention: a GPU would multiply in TF32
@pytest.mark.parametrize("rows_at_once", [2, pytest.param(512, marks=pytest.mark.slow)])
def test_a_policy_that_gives_no_lists_is_dense(rows_at_once: int, monkeypatch: pytest.MonkeyPatch):
    class Everything(Policy):
        def blocks(self, context: Context) -> BlockIndices | None:
            return None

    monkeypatch.setattr(attention, "ROWS_AT_ONCE", rows_at_once)
    context = prefill_context(TOKENS, LENGTHS)
    out, kept = prefill_attention(Everything(), context)
    expected = dense_attention(context.q_rotated, context.k_rotated, context.v, lengths=context.lengths)
    valid = np.arange(TOKENS)[None] < np.asarray(LENGTHS)[:, None]
    np.testing.assert_allclose(out[valid], expected[valid], atol=3e-6)
    np.testing.assert_array_equal(kept, 1)


# --- What every scorer must do.


def scorer_in(phase: str, name: str) -> tuple[Any, Callable[[Any], jax.Array]]:
    """A context of the phase, and the scorer's scores of such."""
    context = prefill_context(TOKENS, LENGTHS) if phase == "prefill" else decode_context(80, POSITIONS)
    return context, getattr(SCORERS[name](), f"{phase}_scores")


@pytest.mark.parametrize(("phase", "name"), PHASES_OF_SCORERS)
def test_products_of_scores_are_exact_on_accelerators_too(phase: str, name: str):
    """Scores are compared with thresholds: a GPU would otherwise round queries and keys to TF32."""
    context, scores_of = scorer_in(phase, name)
    assert not rounded_products(lambda: scores_of(context))


@pytest.mark.parametrize(("phase", "name"), PHASES_OF_SCORERS)
def test_a_row_is_scored_as_if_it_were_alone(phase: str, name: str):
    context, scores_of = scorer_in(phase, name)
    score = jax.jit(lambda q, q_rotated: scores_of(dataclasses.replace(context, q=q, q_rotated=q_rotated)))
    scores = score(context.q, context.q_rotated)
    changed = score(context.q.at[1:].set(7), context.q_rotated.at[1:].set(7))
    np.testing.assert_array_equal(changed[0], scores[0])


@pytest.mark.parametrize("rows", [5, 7])
@pytest.mark.parametrize("at_once", [2, 512])
def test_a_given_mask_has_a_row_for_each_block_row(rows: int, at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("seer_jax.models.attention.ROWS_AT_ONCE", at_once)
    model, tokens = tiny_model(), jnp.zeros((1, 96), jnp.int32)
    with pytest.raises(ValueError, match=r"\[B, Hs, Tb, Sb\] in each layer, with .* and 6, 6 blocks; got shape"):
        model.hidden_states(tokens, sparsity=Given(jnp.ones((2, 1, 1, rows, 6), bool), block_size=16))


@jax.default_matmul_precision("highest")
@pytest.mark.parametrize("policy", [Dense(), TopK(0.5, SinkWindow()), Threshold(0.0, SinkWindow())], ids=str)
def test_late_queries_attend_as_in_the_whole_prompt(policy: Policy):
    """Queries from a later block row on: the same output, and a share of 0 for a sequence that ended before them."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 96, n, 16)) for i, n in enumerate((4, 2, 2)))
    arrays: dict[str, Any] = dict(
        k=k, k_rotated=k, v=v, lengths=jnp.asarray([96, 20]), layer=jnp.int32(0), block_size=16
    )
    whole, _ = prefill_attention(policy, PrefillContext(q=q, q_rotated=q, **arrays))
    late, kept = prefill_attention(policy, PrefillContext(q=q[:, 48:], q_rotated=q[:, 48:], offset=48, **arrays))
    np.testing.assert_allclose(late[0], whole[0, 48:], atol=1e-6)
    assert kept[1] == 0 and np.isfinite(kept).all()


@pytest.mark.parametrize(("density", "kept"), [(0.29, 29), (0.57, 57), (0.1, 10), (0.005, 2), (1.0, 100)])
def test_a_share_of_a_hundred_blocks_is_that_many(density: float, kept: int):
    """0.29 * 100 is less than 29 in binary."""
    assert TopK(density).blocks_per_token(100) == kept
    assert TopK(1 - (1 - 0.29) ** 2).blocks_per_row(100) == 29
