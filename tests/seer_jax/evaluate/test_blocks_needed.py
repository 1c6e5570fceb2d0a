"""Blocks needed for a target of perplexity: on ladders whose answer is known."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from seer_jax.evaluate import Phase, Score, WindowScore, all_blocks_needed, blocks_needed, loss_at, write_scores
from seer_jax.evaluate.table import needed_text, print_scores

ONE_PERCENT = math.log1p(0.01)


def score(kept: float, losses: list[float], *, method: str | None = "gate", level: str = "", **policy: Any) -> Score:
    """Of windows with these losses over dense, which has 2 nats in each."""
    windows = tuple(WindowScore(2 + loss, kept) for loss in losses)
    level = level or (f"topk:{kept:g}" if method else "dense")
    values = {"rule": "topk", "density": kept, "scorer": {"name": method}} | policy if method else {"rule": "dense"}
    return Score(Phase.DECODE, method, level, windows, (), 10, 1.0, values)


def dense(windows: int) -> Score:
    return score(1.0, [0.0] * windows, method=None)


def ladder(losses: list[list[float]], kept: tuple[float, ...] = (0.1, 0.2, 0.4)) -> list[Score]:
    return [score(share, of) for share, of in zip(kept, losses, strict=True)]


def exponential(kept: float) -> float:
    """A loss that is 1% at a share of 0.25."""
    return ONE_PERCENT * math.exp(-20 * (kept - 0.25))


LADDERS = {
    "met by a level": (([0.1] * 2, [ONE_PERCENT] * 2, [0.001] * 2), 0.2),
    "between two levels": (([exponential(0.1)] * 2, [exponential(0.2)] * 2, [exponential(0.4)] * 2), 0.25),
    "within the target throughout": (([0.001] * 2, [0.0] * 2, [-0.001] * 2), -math.inf),
    "not reached": (([0.5] * 2, [0.3] * 2, [0.02] * 2), math.inf),
    "made monotone": (([0.001] * 2, [0.1] * 2, [0.0] * 2), 0.27),
    "infinite at the sparsest": (([math.inf] * 2, [ONE_PERCENT] * 2, [0.0] * 2), 0.2),
}


@pytest.mark.parametrize(("losses", "expected"), LADDERS.values(), ids=LADDERS)
def test_the_share_is_where_the_loss_meets_the_target(losses: Any, expected: float):
    value, low, high = blocks_needed(ladder(list(losses))[::-1], dense(2))  # in any order
    assert value == pytest.approx(expected, abs=0.015)
    assert low == high == value or math.isnan(low)  # windows that agree leave nothing uncertain


def test_the_loss_at_a_share_is_interpolated_as_blocks_needed_does():
    kept = (0.1, 0.2, 0.4)
    levels = ladder([[exponential(share)] * 2 for share in kept], kept)[::-1]
    for share in kept:
        assert loss_at(levels, dense(2), share).value == pytest.approx(math.expm1(exponential(share)))
    needed, *_ = blocks_needed(levels, dense(2))
    assert loss_at(levels, dense(2), needed) == pytest.approx((0.01, 0.01, 0.01))  # windows agree
    assert math.isnan(loss_at(levels, dense(2), 0.09).value)
    assert math.isnan(loss_at(levels, dense(2), 0.41).value)


def test_the_interval_is_where_the_band_of_the_losses_meets_the_target():
    rng, found = np.random.default_rng(0), []
    for _ in range(100):
        of_window = rng.normal(size=6) * 0.3  # a window is hard at every level
        losses = [(exponential(kept) * np.exp(of_window) / math.exp(0.045)).tolist() for kept in (0.1, 0.2, 0.3, 0.4)]
        value, low, high = blocks_needed(ladder(losses, (0.1, 0.2, 0.3, 0.4)), dense(6))
        assert low < value < high
        found.append(low <= 0.25 <= high)
    assert np.mean(found) > 0.9
    spread = ladder([[0.1, 0.2], [0.0, 0.03], [0.0, 0.003]])
    assert blocks_needed(spread, dense(2))[1:] == (-math.inf, math.inf)  # two windows that disagree say nothing
    assert np.isnan(blocks_needed(ladder([[0.1], [0.01], [0.001]]), dense(1))[1:]).all()


BAD = [
    (lambda: blocks_needed(ladder([[0.1], [0.0], [0.0]]), dense(1), target=0), "must be above 0; got 0"),
    (lambda: blocks_needed([score(0.1, [0.1])], dense(1)), "at least two levels; got 1"),
    (lambda: blocks_needed(ladder([[0.1], [0.0], [0.0]]), dense(2)), "of the same windows.*got 1 and 2"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_ladders_are_refused(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_methods_with_a_ladder_are_shown_and_kept(tmp_path: Path):
    """Three levels of one rule that differ in its value alone; the fewest blocks first."""
    rest = [[0.05, 0.06], [0.011, 0.012], [0.001, 0.002]]
    scores = [
        dense(2),
        *ladder(rest),
        *(score(kept, [0.5, 0.501], method="window", level=f"topk:{kept}") for kept in (0.1, 0.2, 0.4)),
        *(score(kept, [0.001, 0.00101], method="oracle") for kept in (0.1, 0.2, 0.4)),
        *(score(kept, [0.1, 0.2], level=f"topk:{kept},dense_layers=2", dense_layers=2) for kept in (0.1, 0.2)),
        *(score(kept, [0.1, 0.2], rule="mass", mass=kept) for kept in (0.8, 0.9)),
    ]
    needed = all_blocks_needed(scores)
    assert [(one.phase, one.method, one.rule, one.levels) for one in needed] == [
        (Phase.DECODE, method, "topk", 3) for method in ("oracle", "gate", "window")
    ]
    assert [needed_text(one) for one in needed][::2] == ["below 10.0%", "above 40.0%"]
    assert 0.2 < needed[1].kept < 0.25 and needed_text(needed[1]).startswith(f"{needed[1].kept:.1%} (")
    out = io.StringIO()
    print_scores(Console(file=out, width=80), scores)
    assert "Blocks needed to stay within +1% of dense perplexity" in out.getvalue()
    assert f"decode  learned gate  topk  {needed_text(needed[1])}" in out.getvalue()
    write_scores(tmp_path / "scores.json", scores)
    first, second, third = json.loads((tmp_path / "scores.json").read_text())["blocks_needed"]
    assert (first["kept"], first["is_below"], first["is_above"]) == (None, True, False)
    assert (third["kept"], third["is_below"], third["is_above"]) == (None, False, True)
    assert (
        second["kept"] == pytest.approx(needed[1].kept) and second["target"] == 0.01 and second["ladder"] == [0.1, 0.4]
    )
