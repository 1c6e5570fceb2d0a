"""Conformance suite of `select_blocks`."""

from typing import Any, ClassVar

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import BlockIndices, select_blocks
from pallas_kernels.backends import Implementation
from pallas_kernels.gate_selection.cases import TINY, Case
from tests.pallas_kernels.suites.comparison import KEY, assert_same_lists, compare_with_sharded, listed_blocks
from tests.pallas_kernels.suites.padding import IgnoresPadding

SHAPE = (2, 3, 6)  # one shape for all drawn examples, so that each rule compiles once

_STATIC = ("block_size", "top_k", "max_blocks", "width", "implementation")
_compiled = jax.jit(select_blocks, static_argnames=_STATIC)
_compiled_for_arrays = jax.jit(select_blocks, static_argnames=[x for x in _STATIC if x not in ("top_k", "max_blocks")])


def chosen_by_hand(
    logits: np.ndarray,
    *,
    threshold: float | np.ndarray | None = None,
    mass: float | np.ndarray | None = None,
    top_k: int | np.ndarray | None = None,
    max_blocks: int | np.ndarray | None = None,
    width: int | None = None,
    keep: np.ndarray | None = None,
    visible: np.ndarray | None = None,
) -> np.ndarray:
    """Mask by the rules of `select_blocks`, row by row. No row may choose more than `width` blocks."""
    chosen = np.zeros(logits.shape, bool)
    keep = np.broadcast_to(False if keep is None else keep, logits.shape)
    visible = np.broadcast_to(logits.shape[-1] if visible is None else visible, (*logits.shape[:-1], 1))
    rules = dict(threshold=threshold, mass=mass, top_k=top_k, max_blocks=max_blocks)
    rule = next((name for name, value in rules.items() if value is not None), None)
    values = np.broadcast_to(0 if rule is None else rules[rule], (*logits.shape[:-1], 1))  # pyright: ignore
    for row in np.ndindex(logits.shape[:-1]):
        seen = range(min(visible[row][0], logits.shape[-1]))
        kept = [j for j in seen if keep[row][j]]
        allowed = [j for j in seen if logits[row][j] > -np.inf]
        ranked = sorted(allowed, key=lambda j: (-logits[row][j], j))
        weights = np.exp(logits[row].astype(np.float64) - max(logits[row][allowed], default=0))
        share, value = weights / max(weights[allowed].sum(), 1), values[row][0]
        match rule:
            case "threshold":
                picked = [j for j in allowed if share[j] > value]
            case "mass":
                better = np.cumsum([0, *share[ranked]])
                picked = [j for j, mass_before in zip(ranked, better, strict=False) if mass_before < value]
            case "top_k":
                picked = ranked[:value]
            case "max_blocks":
                kept = kept[:value]
                picked = [j for j in ranked if j not in kept][: value - len(kept)]
            case _:
                picked = ranked
        chosen[row][kept + picked] = True
        assert width is None or chosen[row].sum() <= width
    return chosen


class Definition(IgnoresPadding):
    """Properties that the definition and every backend share."""

    implementation: ClassVar[Implementation]

    def padded(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        visible = np.asarray([[[1], [2], [40]], [[40], [7], [0]]])
        logits = jax.random.normal(KEY, (2, 3, 40))
        arguments = dict(logits=logits, block_size=64, mass=jnp.float32(0.8), visible=jnp.asarray(visible))
        return arguments, {"logits": np.arange(40) >= visible}

    def told(self, result: Any) -> Any:
        """Fillers may be anything."""
        return result.counts, jnp.where(result.valid, result.indices, 0)

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
        "rule",
        [
            {},
            {"threshold": 0.15},
            pytest.param({"threshold": 0.0}, marks=pytest.mark.slow),
            {"mass": 0.62},
            pytest.param({"mass": 1e-6}, marks=pytest.mark.slow),
            pytest.param({"mass": 1.0}, marks=pytest.mark.slow),
            {"top_k": 2},
            {"max_blocks": 3, "width": 5},
        ],
    )
    def test_follows_the_rule_on_drawn_rows(self, rule: dict[str, Any]):
        """With ties, rows without candidates, and more kept blocks than the cap."""

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
            ({"mass": 0.1}, 6),
            ({"top_k": 2}, 2),
            ({"top_k": 9}, 6),
            ({"top_k": 2, "keep": np.zeros(SHAPE, bool)}, 6),
            ({"max_blocks": 3, "keep": np.zeros(SHAPE, bool)}, 3),
            ({"max_blocks": 9}, 6),
            ({"threshold": 0.3, "width": 3}, 3),
        ],
    )
    def test_the_rule_decides_the_width(self, arguments: dict[str, Any], width: int):
        assert self.run(np.zeros(SHAPE, np.float32), block_size=64, **arguments).width == width

    @pytest.mark.parametrize(
        ("rule", "values"),
        [
            ("threshold", np.linspace(0, 0.4, 4, dtype=np.float32)),
            ("mass", np.linspace(0.1, 1, 4, dtype=np.float32)),
            ("top_k", np.asarray([1, 3, 5, 7])),
            ("max_blocks", np.asarray([7, 5, 1, 2])),
        ],
    )
    def test_numbers_per_head_and_kept_blocks_of_all_heads(self, rule: str, values: np.ndarray):
        logits = np.asarray(jax.random.normal(KEY, (2, 4, 5, 6)))
        arguments = {rule: values[:, None, None], "keep": np.eye(5, 6, dtype=bool)}
        got = _compiled_for_arrays(logits, **arguments, block_size=64, implementation=self.implementation)
        assert got.width == 6
        np.testing.assert_array_equal(listed_blocks(got, 6), chosen_by_hand(logits, **arguments))

    @pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 33), (7, 100)])
    def test_any_number_of_rows_and_blocks(self, rows: int, columns: int):
        """With a number per row, and kept blocks that some of the leading axes share."""
        logits = np.asarray(jax.random.normal(KEY, (2, 3, rows, columns)))
        top_k = 1 + np.arange(rows)[:, None] % columns
        keep = np.asarray(jax.random.bernoulli(KEY, 0.1, (2, 1, rows, columns)))
        got = _compiled_for_arrays(logits, top_k=top_k, keep=keep, block_size=64, implementation=self.implementation)
        np.testing.assert_array_equal(listed_blocks(got, columns), chosen_by_hand(logits, top_k=top_k, keep=keep))

    @pytest.mark.parametrize(
        "rule",
        [
            {"mass": 0.8},
            {"top_k": 5},
            *(pytest.param(r, marks=pytest.mark.slow) for r in ({}, {"threshold": 0.01}, {"max_blocks": 9})),
        ],
        ids=lambda rule: str(*rule),
    )
    def test_invisible_blocks_have_no_influence(self, rule: dict[str, Any]):
        """Rows that see no blocks, some, all; any logits and kept blocks among the others."""
        visible = np.asarray([0, 1, 63, 64, 65, 128, 129, 200, 257, 300], np.int32)[:, None]
        logits = np.asarray(jax.random.normal(KEY, (2, 10, 300)))
        keep = np.asarray(jax.random.bernoulli(KEY, 0.02, (10, 300)))
        hidden = np.arange(300) >= visible
        for poison in (np.nan, np.inf, 100.0):
            arguments = dict(logits=np.where(hidden, poison, logits), keep=keep | hidden, visible=visible)
            got = self.run(**arguments, **rule, block_size=64)
            np.testing.assert_array_equal(listed_blocks(got, 300), chosen_by_hand(**arguments, **rule))

    @pytest.mark.parametrize("rule", [{"top_k": 3}, {"max_blocks": 3}, {"mass": 0.8}])
    def test_ranks_logits_of_any_magnitude(self, rule: dict[str, Any]):
        """Adjacent floats, zeros of both signs, the largest and smallest floats."""
        huge, tiny = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
        rows = [
            [1.0, np.nextafter(np.float32(1), 2), np.nextafter(np.float32(1), 0), 0.0, -1.0, 2.0],
            [huge, -huge, 0.0, 1.0, huge, -1.0],
            [tiny, -tiny, 0.0, 2 * tiny, -np.inf, -np.inf],
            [-0.0, 0.0, -0.0, 0.0, -1.0, -0.0],
            [-huge, -np.inf, -huge, -huge, -np.inf, -huge],
            [80.0, -80.0, 79.0, -200.0, 78.5, 77.0],
        ]
        logits = np.asarray(rows, np.float32)
        got = self.run(logits, **rule, block_size=64)
        np.testing.assert_array_equal(listed_blocks(got, 6), chosen_by_hand(logits, **rule))

    def test_a_narrow_list_loses_the_highest_blocks(self):
        got = self.run(np.zeros((2, 6), np.float32), block_size=64, width=4)
        np.testing.assert_array_equal(listed_blocks(got, 6), [[True] * 4 + [False] * 2] * 2)

    def test_nan_is_never_chosen(self):
        logits = np.asarray([[np.nan, 1.0, np.nan, 0.5]], np.float32)
        for rule in ({}, {"threshold": 0.0}, {"mass": 1.0}, {"top_k": 3}, {"max_blocks": 3}):
            got = self.run(logits, **rule, block_size=64)
            np.testing.assert_array_equal(listed_blocks(got, 4), [[False, True, False, True]])


class Conformance(Definition):
    """Properties that backends have beyond those of the definition: its lists, under transformations as well."""

    @pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
    def test_lists_equal_those_of_the_definition(self, case: Case):
        arguments = case.arguments(KEY)
        assert_same_lists(self.run(**arguments), _compiled(**arguments, implementation="reference"))

    def test_runs_under_shard_map(self):
        """Each device has rows of its own heads; what is kept and visible is the same for all."""
        arguments = TINY[0].arguments(KEY)
        arrays = {name: arguments[name] for name in ("logits", "keep", "visible")}

        def run(**arrays: Any) -> jax.Array:
            """As a mask, since fillers may differ."""
            return self.run(**arrays, threshold=TINY[0].threshold, block_size=64).to_mask(TINY[0].shape[-1])

        compare_with_sharded(run, arrays, {"logits": P(None, "model")}, P(None, "model"))

    def test_maps(self):
        logits = jax.random.normal(KEY, (3, 2, 7))
        mapped = jax.vmap(lambda x: select_blocks(x, block_size=64, top_k=3, implementation=self.implementation))(
            logits
        )
        whole = self.run(logits, block_size=64, top_k=3)
        assert_same_lists(mapped, whole)
        assert mapped.indices.shape == (3, 2, 3)
        assert jnp.all(mapped.counts == 3)
