"""Scorers of published methods against their papers' definitions, and what holds for every scorer: padding, chunks, phases, what is kept."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax import CumulativeMass, Request, Threshold, TokenBudget, TopK
from seer_jax.selection.notation import parse_policy
from seer_jax.selection.rules import RankingPolicy
from seer_jax.selection.scorers import (
    SCORERS,
    FlexPrefill,
    MassOracle,
    MInference,
    ProxyAttn,
    Quest,
    Scorer,
    SubBlock,
    XAttention,
    register,
)
from tests.seer_jax.conftest import tiny_model
from tests.seer_jax.selection import definitions
from tests.seer_jax.selection.contexts import BLOCK, KV_HEADS, decode_context, prefill_context

pytestmark = pytest.mark.usefixtures("compile_quickly")

TOKENS, LENGTHS = 150, (150, 16, 77)
CAPACITY, POSITIONS = 160, (149, 40, 48)
ARRAYS = "q", "q_rotated", "k", "k_rotated", "v"

PREFILL: dict[Scorer, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    XAttention(): lambda q, k: definitions.xattention(q, k, BLOCK, 8),
    XAttention(16): lambda q, k: definitions.xattention(q, k, BLOCK, 16),
    FlexPrefill(): lambda q, k: definitions.flexprefill(q, k, BLOCK, 0.1),
    FlexPrefill(0.22): lambda q, k: definitions.flexprefill(q, k, BLOCK, 0.22),  # heads of both patterns
    FlexPrefill(1): lambda q, k: definitions.flexprefill(q, k, BLOCK, 1),
    MInference(): lambda q, k: definitions.minference(q, k, BLOCK),
    ProxyAttn(): lambda q, k: definitions.proxyattn(q, k, BLOCK),
    SubBlock(): lambda q, k: definitions.subblock(q, k, BLOCK, 4),
    SubBlock(1): lambda q, k: definitions.subblock(q, k, BLOCK, 1),
    MassOracle(): lambda q, k: definitions.oracle_mass(q, k, BLOCK),
}
DECODE: dict[Scorer, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    Quest(): lambda q, k: definitions.of_group(definitions.quest(q, k, BLOCK), KV_HEADS, "max"),
    SubBlock(): lambda q, k: definitions.of_group(definitions.subblock_token(q, k, BLOCK, 4), KV_HEADS, "mean"),
    MassOracle(): lambda q, k: definitions.of_group(definitions.mass_token(q, k, BLOCK), KV_HEADS, "mean"),
}


def shares(scores: Any, seen: np.ndarray) -> np.ndarray:
    return np.where(seen, definitions.softmax(np.where(seen, np.asarray(scores, np.float64), -np.inf)), 0)


def poisoned(dtype: Any = jnp.float32) -> Any:
    """A context of ragged prompts whose padding is NaN."""
    context = prefill_context(TOKENS, LENGTHS)
    inside = context.valid_keys[..., None, None]
    changes = {name: jnp.where(inside, getattr(context, name), jnp.nan).astype(dtype) for name in ARRAYS}
    return dataclasses.replace(context, gate=None, **changes)


@functools.cache
def prefill_scores(dtype: Any = jnp.float32) -> dict[Scorer, list[jax.Array]]:
    """Scores of a poisoned context: of all rows at once, and of two chunks."""
    context = poisoned(dtype)

    @jax.jit
    def scores() -> list[list[jax.Array]]:
        found = []
        for scorer in PREFILL:
            prepared = dataclasses.replace(context, prepared=scorer.prepare(context))
            first, rest = prepared.rows(0, 4 * BLOCK), prepared.rows(jnp.int32(4), TOKENS - 4 * BLOCK)
            found.append([scorer.prefill_scores(context), *map(scorer.prefill_scores, (first, rest))])
        return found

    return dict(zip(PREFILL, scores(), strict=True))


def check_definition(scorer: Scorer, scores: jax.Array, context: Any, tolerance: float) -> None:
    for row, length in enumerate(LENGTHS):
        q, k = (np.asarray(x[row, :length], np.float64) for x in (context.q_rotated, context.k_rotated))
        expected = PREFILL[scorer](q, k)
        n = expected.shape[1]
        got = shares(scores[row, :, :n, :n], np.tri(n, dtype=bool))
        np.testing.assert_allclose(got, expected, atol=tolerance, err_msg=f"row {row}")


@pytest.mark.parametrize("scorer", PREFILL, ids=str)
def test_prompts_are_scored_as_the_paper_defines(scorer: Scorer):
    check_definition(scorer, prefill_scores()[scorer][0], poisoned(), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scorer", PREFILL, ids=str)
def test_scores_of_bfloat16_are_those_of_its_values(scorer: Scorer):
    """Sums are float32; only the mean queries of ProxyAttn are rounded."""
    tolerance = 2e-2 if isinstance(scorer, ProxyAttn) else 5e-6
    check_definition(scorer, prefill_scores(jnp.bfloat16)[scorer][0], poisoned(jnp.bfloat16), tolerance)


@pytest.mark.parametrize("scorer", PREFILL, ids=str)
def test_scores_do_not_depend_on_chunks(scorer: Scorer):
    whole, *parts = prefill_scores()[scorer]
    parts = np.concatenate(parts, axis=2)
    for row, length in enumerate(LENGTHS):
        n = -(-length // BLOCK)
        seen = np.tri(n, dtype=bool)
        got = shares(parts[row, :, :n, :n], seen)
        np.testing.assert_allclose(got, shares(whole[row, :, :n, :n], seen), atol=1e-6)


@pytest.mark.parametrize("scorer", [FlexPrefill(0.22), MInference()], ids=str)
def test_the_last_queries_of_a_part_of_a_prompt_are_those_of_the_prompt(scorer: Scorer):
    """Of a pass over the later rows alone, which hold them."""
    scores = jax.jit(lambda: scorer.prefill_scores(poisoned().rows(4, TOKENS - 4 * BLOCK)))()
    n = -(-TOKENS // BLOCK)
    seen = np.tri(n, dtype=bool)[4:]
    got, expected = (shares(x, seen) for x in (scores[0], prefill_scores()[scorer][0][0, :, 4:]))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_heads_of_both_patterns_are_tested():
    """Otherwise a threshold of FlexPrefill stood for one of them."""
    by_tau = {tau: np.asarray(prefill_scores()[FlexPrefill(tau)][0])[0, :, 1:, 0] for tau in (0.1, 0.22, 1)}
    aware = np.isclose(by_tau[0.22], by_tau[1]).all(1)
    assert aware.any() and not aware.all()
    assert np.isclose(by_tau[0.22], by_tau[0.1]).all(1)[~aware].all()


@functools.cache
def decode_scores() -> tuple[Any, list[jax.Array]]:
    """A context whose cache holds NaN behind each row's token, and the scores."""
    context: Any = decode_context(CAPACITY, POSITIONS)
    cache = context.cache.cache
    behind = jnp.arange(CAPACITY)[None] > context.position[:, None]
    keys = jnp.where(behind[None, :, :, None, None], jnp.nan, cache.keys)
    poisoned = dataclasses.replace(cache, keys=keys).view(context.layer)
    context = dataclasses.replace(context, cache=poisoned, gate=None)
    return context, jax.jit(lambda: [scorer.decode_scores(context) for scorer in DECODE])()


@pytest.mark.parametrize("number", range(len(DECODE)), ids=[str(scorer) for scorer in DECODE])
def test_new_tokens_are_scored_as_the_paper_defines(number: int):
    context, scores = decode_scores()
    for row, position in enumerate(POSITIONS):
        q = np.asarray(context.q_rotated[row, 0], np.float64)
        k = np.asarray(context.cache.keys[row, : position + 1], np.float64)
        expected = list(DECODE.values())[number](q, k)
        got = shares(scores[number][row, :, : position // BLOCK], np.ones((1, 1), bool))
        np.testing.assert_allclose(got, expected, atol=2e-6, err_msg=f"row {row}")


# --- What methods keep whatever their scores.

ROW, COLUMN = np.indices((10, 10))
OWN, FIRST = ROW == COLUMN, COLUMN == 0
KEPT: list[tuple[Scorer, np.ndarray]] = [
    (XAttention(), OWN | FIRST),
    (FlexPrefill(), OWN | FIRST),
    # The first 30 tokens, and distances below 100: the nearest in a block 7 blocks before is 97, 8 blocks before 113.
    (MInference(), (COLUMN < 2) | (ROW - COLUMN <= 7)),
    (ProxyAttn(), OWN),
    (SubBlock(), OWN | FIRST),
    (MassOracle(), OWN),
]


@pytest.mark.parametrize(("scorer", "kept"), KEPT, ids=[scorer.name for scorer, _ in KEPT])
def test_a_method_keeps_what_its_paper_always_keeps(scorer: Scorer, kept: np.ndarray):
    context = prefill_context(TOKENS, (TOKENS,))
    nothing = jnp.full((1, 4, 10, 10), -jnp.inf)
    policies: list[RankingPolicy] = [
        Threshold(0.5, scorer, dense_last_rows=0),
        CumulativeMass(0.5, scorer, dense_last_rows=0),
        TopK(0.1, scorer, dense_last_rows=0),
    ]
    for policy in policies:
        mask = np.asarray(policy.select(nothing, context).to_mask(10))
        np.testing.assert_array_equal(mask, np.broadcast_to(kept & (COLUMN <= ROW), mask.shape), str(policy))


def test_a_budget_is_never_exceeded():
    """What a method always keeps comes first, and the own block is among it however small the budget is."""
    context, scores = prefill_context(TOKENS, (TOKENS,)), jnp.zeros((1, 4, 10, 10))
    for blocks in (1, 2, 3, 9):
        mask = np.asarray(TokenBudget(blocks * BLOCK, MInference()).select(scores, context).to_mask(10))[0, 0]
        assert (mask.sum(1) == np.minimum(blocks, 1 + np.arange(10))).all() and mask[OWN].all()
    # Nine blocks of the last row: the first two and the eight nearest are ten, of which the earlier ones come first.
    assert not mask[9, 8] and mask[9, :8].all()


# --- Phases.

WRONG = [
    (name, phase) for name, kind in SCORERS.items() for phase in ("prefill", "decode") if phase not in kind.phases()
]


@pytest.mark.parametrize(("name", "phase"), WRONG, ids=lambda x: x)
def test_a_policy_of_the_other_phase_is_refused(name: str, phase: str):
    policy: Any = parse_policy(f"topk:0.5:{name}")
    other = {"prefill": "decode", "decode": "prefill"}[phase]
    message = (
        rf"A {phase} policy must .* a scorer for {phase}; got {name}, which is for {other} alone. Use one of .*gate"
    )
    with pytest.raises(ValueError, match=message):
        Request(max_new_tokens=1, **{phase: policy})
    with pytest.raises(ValueError, match=message):
        getattr(tiny_model(), f"{phase}_gate").recommended = policy
    context = prefill_context(BLOCK, (BLOCK,)) if phase == "prefill" else decode_context(BLOCK, (1,))
    with pytest.raises(ValueError, match=message):
        policy.blocks(context)


def test_the_methods_for_one_phase_alone_are_known():
    assert [
        *[(name, "decode") for name in ("flexprefill", "minference", "proxyattn")],
        ("quest", "prefill"),
        ("xattention", "decode"),
    ] == WRONG


def test_a_scorer_without_scores_is_not_registered():
    with pytest.raises(ValueError, match=r"must define prefill_scores or decode_scores; got .*Nothing with neither"):

        @register
        class Nothing(Scorer):  # pyright: ignore[reportUnusedClass]
            name = title = meaning = "nothing"


# --- Settings.

SETTINGS = [
    ("topk:0.5:xattention,stride=0", "XAttention.stride must be an integer of at least 1; got 0"),
    ("topk:0.5:flexprefill,tau=1.5", r"FlexPrefill.tau must lie in \[0, 1\]; got 1.5"),
    ("topk:0.5:flexprefill,tau=nan", r"FlexPrefill.tau must lie in \[0, 1\]; got nan"),
    ("topk:0.5:subblock,parts=0", "SubBlock.parts must be an integer of at least 1; got 0"),
    ("topk:0.5:xattention,parts=2", "settings of topk:DENSITY:xattention are .*stride; got 'parts'"),
]


@pytest.mark.parametrize(("text", "message"), SETTINGS, ids=[text for text, _ in SETTINGS])
def test_settings_out_of_their_domain_are_refused(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_policy(text)


@pytest.mark.parametrize("scorer", [XAttention(3), SubBlock(3)], ids=lambda s: s.name)
def test_settings_that_do_not_divide_the_block_are_refused(scorer: Scorer):
    with pytest.raises(
        ValueError, match=rf"{type(scorer).__name__}\..* must divide the block size of 16 tokens; got 3. Use "
    ):
        scorer.prefill_scores(prefill_context(TOKENS, LENGTHS))
    with pytest.raises(ValueError, match="must divide the block size of 64 tokens"):  # before anything is computed
        TopK(0.5, scorer).check(2, None)


OF_TOKENS = [name for name, kind in SCORERS.items() if "decode" in kind.phases()]


@functools.cache
def lists_by_room() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Blocks that each scorer keeps of a cache, and of one with twice the room and the same tokens."""
    context = decode_context(CAPACITY, POSITIONS)
    view: Any = context.cache
    gate = view.cache.decode_gate
    more = {name: _padded(getattr(view.cache, name), 2) for name in ("keys", "values")}
    more["decode_gate"] = dataclasses.replace(gate, keys=_padded(gate.keys, 3))
    wider = dataclasses.replace(view, cache=dataclasses.replace(view.cache, **more))
    contexts = context, dataclasses.replace(context, cache=wider)

    def lists(name: str) -> tuple:
        policy = TokenBudget(4 * BLOCK, SCORERS[name]())
        return tuple(policy.blocks(x).to_mask(x.num_key_blocks) for x in contexts)

    return jax.tree.map(np.asarray, jax.jit(lambda: {name: lists(name) for name in OF_TOKENS})())


@pytest.mark.parametrize("name", OF_TOKENS)
def test_what_a_token_reads_does_not_depend_on_the_room_of_the_cache(name: str):
    """A cache has room for what a request asks for, and a slot of an engine for the largest one."""
    few, many = lists_by_room()[name]
    np.testing.assert_array_equal(many[..., : few.shape[-1]], few)
    assert many.shape[-1] == 2 * few.shape[-1] and not many[..., few.shape[-1] :].any()


def _padded(x: jax.Array, axis: int) -> jax.Array:
    """Twice as long along an axis."""
    return jnp.concatenate([x, jnp.zeros_like(x)], axis)
