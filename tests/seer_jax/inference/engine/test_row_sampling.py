"""Rows with sampling methods of their own against each method by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax import Greedy, Sample
from seer_jax.inference.engine.row_sampling import RowSampling
from seer_jax.inference.sampling import Sampling

pytestmark = pytest.mark.usefixtures("compile_quickly")

METHODS: tuple[Sampling, ...] = (
    Greedy(),
    Sample(0.9),
    Sample(0.7, top_k=9),
    Sample(0.5, top_k=1000),
    Sample(1.1, top_k=30, top_p=0.8),
    Sample(top_p=0.8),
    Sample(top_p=1.0),
)
ROWS, VOCABULARY, DRAWS = len(METHODS), 200, 60


@pytest.mark.parametrize("active", [slice(None), slice(3), slice(2), slice(1)], ids=["all", "few", "plain", "greedy"])
def test_each_row_draws_as_it_would_alone(active: slice):
    """The work is that of the rows that are active; the others may draw anything."""
    rows = jax.tree.map(lambda *x: np.concatenate(x), *(RowSampling.of(method, VOCABULARY) for method in METHODS))
    used = np.zeros(ROWS, bool)
    used[active] = True
    draw = jax.jit(lambda rows, logits, keys, used: rows.sample(logits, keys, used))
    keys = jax.random.split(jax.random.key(1), (DRAWS, ROWS))
    # With equal logits, also at the cuts.
    logits = jnp.round(3 * jax.random.normal(jax.random.key(2), (DRAWS, ROWS, VOCABULARY)), 1)
    together = np.stack([draw(rows, *x, used) for x in zip(logits, keys, strict=True)])
    for row in np.flatnonzero(used):
        np.testing.assert_array_equal(
            together[:, row], jax.jit(METHODS[row].sample)(logits[:, row], keys[:, row]), str(row)
        )


def test_other_methods_are_refused():
    class Own(Sampling):
        def sample(self, logits, key=None):
            return logits.argmax(-1)

    with pytest.raises(ValueError, match=r"must be Greedy\(\) or Sample\(...\), which its rows can mix; got .*Own"):
        RowSampling.of(Own(), VOCABULARY)
