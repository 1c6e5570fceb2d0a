"""Sampling against its definition, and the independence of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax.inference.sampling import Greedy, Sample, Sampling, row_keys

DRAWS = 4000
draw = jax.jit(lambda method, logits, key: method.sample(logits, key))
PROBABILITIES = np.array([0.05, 0.4, 0.2, 0.3, 0.05])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))


pytestmark = pytest.mark.usefixtures("compile_quickly")


def frequencies(method: Sampling, logits: jax.Array = LOGITS) -> np.ndarray:
    """How often each token is drawn."""
    rows = jnp.broadcast_to(logits, (DRAWS, *logits.shape))
    tokens = draw(method, rows, jax.random.key(0))
    assert tokens.dtype == jnp.int32
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / DRAWS


def kept(*tokens: int) -> np.ndarray:
    """The distribution over these tokens alone."""
    masked = np.zeros_like(PROBABILITIES)
    masked[list(tokens)] = PROBABILITIES[list(tokens)]
    return masked / masked.sum()


CUTS = [
    (Sample(), PROBABILITIES),
    (Sample(temperature=0.5), PROBABILITIES**2 / (PROBABILITIES**2).sum()),
    (Sample(temperature=2.0), PROBABILITIES**0.5 / (PROBABILITIES**0.5).sum()),
    (Sample(top_k=1), kept(1)),
    (Sample(top_k=3), kept(1, 2, 3)),
    (Sample(top_k=100), PROBABILITIES),
    (Sample(top_p=1.0), PROBABILITIES),
    (Sample(top_p=1e-6), kept(1)),
    (Sample(top_p=0.39), kept(1)),
    (Sample(top_p=0.41), kept(1, 3)),
    (Sample(top_p=0.89), kept(1, 2, 3)),
    (Sample(top_p=0.91), kept(0, 1, 2, 3)),
    (Sample(top_k=2, top_p=0.6), kept(1, 3)),  # of the two that top_k leaves, 0.4 / 0.7 falls short of 0.6
    (Sample(top_k=2, top_p=0.5), kept(1)),
]


@pytest.mark.parametrize(("method", "expected"), CUTS, ids=[str(method) for method, _ in CUTS])
def test_tokens_follow_their_distribution(method: Sample, expected: np.ndarray):
    found = frequencies(method)
    np.testing.assert_array_equal(found[expected == 0], 0)
    deviation = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(found - expected) <= 5 * deviation + 1e-9).all()


def test_the_nucleus_ends_exactly_at_its_mass():
    logits = jnp.log(jnp.asarray([0.5, 0.25, 0.125, 0.125], jnp.float32))
    assert (frequencies(Sample(top_p=0.75), logits) > 0).tolist() == [True, True, False, False]
    assert (frequencies(Sample(top_p=0.7500001), logits) > 0).tolist() == [True, True, True, False]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ties_go_to_the_lower_token(dtype: jnp.dtype):
    logits = jnp.asarray([1, 3, 2, 3, 3, 0], dtype)
    assert Greedy().sample(logits[None]).tolist() == [1]
    assert set(np.flatnonzero(frequencies(Sample(top_k=2), logits))) == {1, 3}
    assert set(np.flatnonzero(frequencies(Sample(top_p=0.5), logits))) == {1, 3}


def test_excluded_tokens_are_never_drawn():
    logits = LOGITS.at[1].set(-jnp.inf)
    for method in (Sample(), Sample(top_p=1.0), Sample(top_k=5), Sample(temperature=100.0)):
        assert frequencies(method, logits)[1] == 0
    assert Greedy().sample(logits[None]).tolist() == [3]


def test_a_row_depends_on_its_own_key_alone():
    logits = jax.random.normal(jax.random.key(1), (6, 50))
    method, key = Sample(temperature=0.8, top_k=20, top_p=0.9), jax.random.key(7)
    together = draw(method, logits, key)
    keys = row_keys(key, 6)
    for row in range(6):
        others = jnp.roll(logits, 3, axis=0).at[row].set(logits[row])
        assert draw(method, others, key)[row] == together[row]
        assert draw(method, logits[row : row + 1], keys[row : row + 1])[0] == together[row]
    np.testing.assert_array_equal(draw(method, logits, jax.random.PRNGKey(7)), together)
    assert (draw(method, logits, jax.random.key(8)) != together).any()


def test_numbers_compile_nothing_anew():
    traces = []

    @jax.jit
    def counted(method: Sample, logits: jax.Array, key: jax.Array) -> jax.Array:
        traces.append(method)
        return method.sample(logits, key)

    for method in (Sample(0.5, 3, 0.9), Sample(0.7, 3, 0.8), Sample(jnp.float32(2), 3, 0.1)):
        counted(method, LOGITS[None], jax.random.key(0))
    assert len(traces) <= 2  # Python numbers, and arrays
    counted(Sample(0.5, 4, 0.9), LOGITS[None], jax.random.key(0))
    assert traces[-1].top_k == 4


BAD = [
    (lambda: Sample(temperature=0.0), r"positive and finite; got 0.0. Use Greedy\(\)"),
    (lambda: Sample(temperature=-1), "got -1"),
    (lambda: Sample(temperature=float("nan")), "got nan"),
    (lambda: Sample(temperature=float("inf")), "got inf"),
    (lambda: Sample(top_k=0), "top_k must be an integer of at least 1, or None for all tokens; got 0"),
    (lambda: Sample(top_p=0.0), r"mass in \(0, 1\], or None for all; got 0.0"),
    (lambda: Sample(top_p=1.5), "got 1.5"),
    (lambda: Sample(top_p=float("nan")), "got nan"),
    (lambda: Sample().sample(LOGITS[None]), r"so a key must be given; got None. Pass key=jax.random.key\(seed\)"),
    (lambda: Sample().sample(LOGITS[None], row_keys(jax.random.key(0), 2)), r"each of the 1 rows; got shape \(2,\)"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_values_are_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
