"""Policies come back from JSON, and what is no policy is refused."""

import json
import re
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from hypothesis.extra import numpy as arrays

from seer_jax.selection.notation import policy_from_json, policy_to_json, write_policy
from seer_jax.selection.policies import Dense, Given, Policy
from seer_jax.selection.rules import CumulativeMass, Threshold, TokenBudget, TopK
from seer_jax.selection.scorers import SCORERS, LearnedGate, Random, Scorer

COUNTS = strategies.integers(0, 99)
# The domains of threshold and mass overlap in these.
VALUES = strategies.floats(0, 1, exclude_min=True, exclude_max=True)
ARRAYS = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=1, max_dims=2, max_side=4),
    elements=strategies.floats(2**-100, 1 - 2**-20, width=32),
)
SCORER = strategies.one_of(
    strategies.sampled_from([scorer() for scorer in SCORERS.values()]),
    strategies.integers(0, 2**31).map(Random),
)
MASKS = arrays.arrays(np.bool_, arrays.array_shapes(min_dims=4, max_dims=5, max_side=3))
POLICIES = strategies.one_of(
    strategies.builds(Dense, strategies.none() | VALUES),
    strategies.builds(
        lambda rule, value, *fields: rule(value, *fields),
        strategies.sampled_from([Threshold, CumulativeMass]),
        strategies.one_of(VALUES, ARRAYS.map(jnp.asarray)),
        SCORER,
        COUNTS,
        COUNTS,
    ),
    strategies.builds(TopK, VALUES, SCORER, COUNTS, COUNTS),
    strategies.builds(TokenBudget, strategies.integers(1, 10**6), SCORER, COUNTS, strategies.none() | VALUES),
    strategies.builds(Given, MASKS.map(jnp.asarray), strategies.sampled_from([16, 32, 64, 128])),
)


@hypothesis.given(POLICIES)
def test_every_policy_comes_back_from_json_as_it_was(policy: Policy):
    again = policy_from_json(json.loads(json.dumps(policy_to_json(policy))))
    assert type(again) is type(policy)
    assert jax.tree.structure(again) == jax.tree.structure(policy), "static fields and scorer"
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(policy), strict=True):
        assert jnp.shape(ours) == jnp.shape(theirs)
        assert jnp.result_type(ours) == jnp.result_type(theirs)
        np.testing.assert_array_equal(ours, theirs)


def test_fields_that_are_left_out_have_their_defaults():
    assert policy_from_json({"rule": "threshold", "threshold": 0.5}) == Threshold(0.5)
    assert policy_from_json({"rule": "budget", "tokens": 64, "scorer": {"name": "random"}}) == TokenBudget(64, Random())


def test_a_saved_policy_is_read_inside_a_program():
    """Its arrays are no tracers of the program that happens to be traced: they can be checked, and outlive it."""
    saved, seen = policy_to_json(Threshold(jnp.asarray([0.1, 0.2]))), []

    @jax.jit
    def read(x: jax.Array) -> jax.Array:
        seen.append(policy_from_json(saved))
        return x

    read(jnp.ones(()))
    np.testing.assert_array_equal(seen[0].threshold, np.asarray([0.1, 0.2], np.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rule="best"), "must name a rule out of dense, given, threshold, mass, topk, budget; got 'best'."),
        (dict(rule=None), "must name a rule out of dense, given"),
        (
            dict(mass=0.5),
            "A saved threshold policy must have the fields threshold, scorer, dense_last_rows, dense_layers, skip; got mass.",
        ),
        (dict(scorer={"name": "best"}), f"must name a scorer out of {', '.join(SCORERS)}; got 'best'."),
        (dict(threshold=2.0), "Threshold.threshold"),
        (dict(threshold=[[0.1], [1.5]]), "Threshold.threshold"),
        (dict(dense_layers=-1), "dense_layers"),
        (dict(dense_last_rows=1.5), "A saved threshold policy: dense_last_rows must be a whole number; got 1.5."),
        (dict(dense_layers=True), "dense_layers must be a whole number; got True."),
        (dict(dense_layers=[1]), "dense_layers must be a whole number; got [1]."),
        (dict(threshold="0.5"), "threshold must be a number or an array of numbers; got '0.5'."),
        (dict(threshold=None), "threshold must be a number or an array of numbers; got None."),
        (dict(threshold={}), "threshold must be a number or an array of numbers; got {}."),
        (
            dict(threshold=[0.1, [0.2]]),
            "threshold must be a number or an array of numbers; got lists of unequal length.",
        ),
        (dict(threshold=["a"]), "threshold must be a number or an array of numbers; got ['a']."),
        (dict(threshold=[True]), "threshold must be a number or an array of numbers; got [True]."),
        (dict(scorer=3), f"must name a scorer out of {', '.join(SCORERS)}; got 3."),
        (
            dict(scorer={"name": "random", "seed": "x"}),
            "A saved scorer 'random': seed must be a whole number; got 'x'.",
        ),
        (dict(scorer={"name": "random", "seeds": 1}), "A saved scorer 'random' must have the fields seed; got seeds."),
        (dict(rule=["topk"]), "must name a rule out of dense"),
    ],
)
def test_what_is_no_saved_policy_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        policy_from_json(policy_to_json(Threshold(0.5)) | changes)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"rule": "budget", "tokens": [64]}, "A saved budget policy: tokens must be a whole number; got [64]."),
        ({"rule": "budget", "tokens": 64.0}, "tokens must be a whole number; got 64.0."),
        ({"rule": "budget", "tokens": True}, "tokens must be a whole number; got True."),
        ({"rule": "topk", "density": [0.1]}, "density must be a number; got [0.1]."),
        ({"rule": "topk", "density": False}, "density must be a number; got False."),
        ({"rule": "given", "mask": 1}, "A saved given policy: mask must be nested lists of true and false; got 1."),
        ({"rule": "given", "mask": [[1, 0]]}, "mask must be nested lists of true and false; got [[1, 0]]."),
        ([1], "A saved policy must be a JSON object; got [1]."),
        (None, "A saved policy must be a JSON object; got None."),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_values_of_another_type_are_refused(saved: Any, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        policy_from_json(saved)


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_numpy_are_saved_as_numbers():
    saved = json.dumps(policy_to_json(TopK(0.5, Random(np.int64(7)))))  # pyright: ignore[reportArgumentType]
    assert policy_from_json(json.loads(saved)) == TopK(0.5, Random(7))


def test_what_a_rule_needs_is_asked_for():
    with pytest.raises(ValueError, match=r"A saved topk policy must hold what its fields take; got \{\}"):
        policy_from_json({"rule": "topk"})


def test_a_policy_of_a_scorer_without_a_name_is_not_saved():
    class Unregistered(LearnedGate):
        pass

    with pytest.raises(ValueError, match=r"only with a registered scorer; got .*Register its class"):
        policy_to_json(TopK(0.5, Unregistered()))


def test_arrays_are_written_as_their_shape():
    assert write_policy(Threshold(jnp.full((3, 4), 0.5))) == "threshold:[3 x 4]"
    assert write_policy(CumulativeMass(jnp.full(3, 0.5), dense_last_rows=0)) == "mass:[3],dense_last_rows=0"


def test_names_are_those_of_the_registry():
    for name, scorer in SCORERS.items():
        assert issubclass(scorer, Scorer) and scorer.name == name and scorer.title and scorer.meaning


def test_a_policy_class_without_a_name_is_not_saved():
    class Halved(TopK):
        pass

    with pytest.raises(ValueError, match=r"one of dense, given, threshold.* to be saved; got .*Halved"):
        policy_to_json(Halved(0.5))
