"""What every implementation of `select_blocks` must do."""

from typing import Any, ClassVar

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockIndices, select_blocks
from pallas_kernels.backends import Implementation
from pallas_kernels.gate_selection.cases import TINY, Case
from tests.pallas_kernels.comparison import KEY, assert_bitwise_equal, listed_blocks

SHAPE = (2, 3, 6)  # one shape for all drawn examples, so that they compile once for each rule

_compiled = jax.jit(select_blocks, static_argnames=("block_size", "top_k", "max_blocks", "width", "implementation"))


def chosen_by_hand(
    logits: np.ndarray,
    *,
    threshold: float | np.ndarray | None = None,
    top_k: int | None = None,
    max_blocks: int | None = None,
    width: int | None = None,
    keep: np.ndarray | None = None,
) -> np.ndarray:
    """The rules of `select_blocks`, row by row: a mask. No row may choose more than `width` blocks."""
    chosen = np.zeros(logits.shape, bool)
    keep = np.zeros(logits.shape, bool) if keep is None else np.broadcast_to(keep, logits.shape)
    thresholds = np.broadcast_to(0 if threshold is None else threshold, (*logits.shape[:-1], 1))
    for row in np.ndindex(logits.shape[:-1]):
        kept = [j for j in range(logits.shape[-1]) if keep[row][j]]
        allowed = [j for j in range(logits.shape[-1]) if logits[row][j] > -np.inf]
        ranked = sorted(allowed, key=lambda j: (-logits[row][j], j))
        if threshold is not None:
            weights = np.exp(logits[row][allowed] - max(logits[row][allowed], default=0))
            picked = [
                j for j, weight in zip(allowed, weights, strict=True) if weight / weights.sum() > thresholds[row][0]
            ]
        elif max_blocks is not None:
            kept = kept[:max_blocks]
            picked = [j for j in ranked if j not in kept][: max_blocks - len(kept)]
        else:
            picked = ranked[:top_k]
        chosen[row][kept + picked] = True
        assert width is None or chosen[row].sum() <= width
    return chosen


class Definition:
    """Properties that the definition and every backend share."""

    implementation: ClassVar[Implementation]

    def run(self, logits: Any, **arguments: Any) -> BlockIndices:
        return _compiled(logits, **arguments, implementation=self.implementation)

    @pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
    def test_follows_the_rule(self, case: Case):
        arguments = case.arguments(KEY)
        logits, block_size = np.asarray(arguments.pop("logits")), arguments.pop("block_size")
        got = self.run(logits, **arguments, block_size=block_size).check(logits.shape[-1])
        np.testing.assert_array_equal(listed_blocks(got, logits.shape[-1]), chosen_by_hand(logits, **arguments))
        assert got.block_size == case.block_size

    @pytest.mark.parametrize(
        "rule", [{}, {"threshold": 0.15}, {"threshold": 0.0}, {"top_k": 2}, {"max_blocks": 3, "width": 5}]
    )
    def test_follows_the_rule_on_drawn_rows(self, rule: dict[str, Any]):
        """Ties, rows with nothing to choose, more kept blocks than the cap."""

        @hypothesis.given(
            logits=arrays.arrays(np.float32, SHAPE, elements=st.sampled_from([-np.inf, -2.0, -0.5, 0.0, 0.25, 3.0])),
            keep=arrays.arrays(np.bool_, SHAPE),
        )
        def follows(logits: np.ndarray, keep: np.ndarray):
            got = self.run(logits, keep=keep, **rule, block_size=64).check(SHAPE[-1])
            np.testing.assert_array_equal(listed_blocks(got, SHAPE[-1]), chosen_by_hand(logits, keep=keep, **rule))

        follows()

    @pytest.mark.parametrize(
        ("arguments", "width"),
        [
            ({}, 6),
            ({"threshold": 0.1}, 6),
            ({"top_k": 2}, 2),
            ({"top_k": 9}, 6),
            ({"top_k": 2, "keep": np.zeros(SHAPE, bool)}, 6),
            ({"max_blocks": 3, "keep": np.zeros(SHAPE, bool)}, 3),
            ({"max_blocks": 9}, 6),
            ({"threshold": 0.3, "width": 3}, 3),
        ],
    )
    def test_lists_are_as_wide_as_the_rule_needs(self, arguments: dict[str, Any], width: int):
        assert self.run(np.zeros(SHAPE, np.float32), block_size=64, **arguments).width == width

    def test_thresholds_and_kept_blocks_broadcast(self):
        logits = np.asarray(jax.random.normal(KEY, (2, 4, 5, 6)))
        thresholds = np.linspace(0, 0.4, 4, dtype=np.float32)[:, None, None]
        keep = np.eye(5, 6, dtype=bool)
        got = self.run(logits, threshold=thresholds, keep=keep, block_size=64)
        np.testing.assert_array_equal(listed_blocks(got, 6), chosen_by_hand(logits, threshold=thresholds, keep=keep))

    def test_a_logit_that_is_not_a_number_is_never_chosen(self):
        logits = np.asarray([[np.nan, 1.0, np.nan, 0.5]], np.float32)
        for rule in ({}, {"threshold": 0.0}, {"top_k": 3}, {"max_blocks": 3}):
            got = self.run(logits, **rule, block_size=64)
            np.testing.assert_array_equal(listed_blocks(got, 4), [[False, True, False, True]])


class Conformance(Definition):
    """What a backend must do besides: give the definition's arrays, however it is called."""

    @pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
    def test_gives_the_lists_of_the_definition(self, case: Case):
        arguments = case.arguments(KEY)
        assert_bitwise_equal(self.run(**arguments), _compiled(**arguments, implementation="reference"))

    def test_maps(self):
        logits = jax.random.normal(KEY, (3, 2, 7))
        mapped = jax.vmap(lambda x: select_blocks(x, block_size=64, top_k=3, implementation=self.implementation))(
            logits
        )
        whole = self.run(logits, block_size=64, top_k=3)
        assert_bitwise_equal(mapped, whole)
        assert mapped.indices.shape == (3, 2, 3)
        assert jnp.all(mapped.counts == 3)
