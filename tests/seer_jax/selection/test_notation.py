"""Policies as words: what is written comes back, and errors say what is wrong."""

import re

import hypothesis
import pytest
from hypothesis import strategies

from seer_jax.selection.notation import parse_policy, policy_syntax, write_policy
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.rules import CumulativeMass, Threshold, TokenBudget, TopK
from seer_jax.selection.scorers import SCORERS, Oracle, Random, SinkWindow

POLICIES = [
    ("dense", Dense()),
    ("dense,skip=0.001", Dense(skip=1e-3)),
    ("threshold:0.0005", Threshold(5e-4)),
    ("threshold:0.0", Threshold(0.0)),
    ("mass:0.9", CumulativeMass(0.9)),
    ("mass:1.0:oracle", CumulativeMass(1.0, Oracle())),
    ("topk:0.1", TopK(0.1)),
    ("topk:0.1:oracle", TopK(0.1, Oracle())),
    ("budget:4096", TokenBudget(4096)),
    ("budget:4096:window", TokenBudget(4096, SinkWindow())),
    ("threshold:0.5:random", Threshold(0.5, Random())),
    ("topk:0.1,dense_layers=2", TopK(0.1, dense_layers=2)),
    ("mass:0.9,dense_last_rows=0", CumulativeMass(0.9, dense_last_rows=0)),
    ("budget:512:oracle,dense_layers=3", TokenBudget(512, Oracle(), dense_layers=3)),
    ("threshold:0.5,dense_layers=1,dense_last_rows=1", Threshold(0.5, dense_last_rows=1, dense_layers=1)),
    ("topk:0.1:random,dense_layers=1,seed=7", TopK(0.1, Random(7), dense_layers=1)),
    ("mass:0.9,skip=0.01,dense_layers=1", CumulativeMass(0.9, dense_layers=1, skip=0.01)),
]


@pytest.mark.parametrize(("text", "policy"), POLICIES, ids=[text for text, _ in POLICIES])
def test_policies_are_written_as_words(text: str, policy: Policy):
    assert parse_policy(text) == policy
    assert write_policy(policy) == str(policy) == text


@pytest.mark.parametrize("text", ["topk:10%", "mass:10%", "threshold:10%"])
def test_shares_may_be_percentages(text: str):
    assert parse_policy(text) == parse_policy(text.replace("10%", "0.1"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Dense",
        "dense:1",
        "threshold",
        "threshold:",
        "threshold:1",
        "mass:0",
        "mass:1.5",
        "topk:x",
        "budget:1.5",
        "budget:0",
        "budget:10%",
        "topk:%",
        "topk:nan",
        "mass:1e999",
        "topk:0.1:",
        "topk:0.1:best",
        "topk:0.5:oracle:x",
        "topk:0.1,seed=1",
        "topk:0.1,",
        "topk:0.1,dense_layers",
        "topk:0.1,dense_layers=-1",
        "topk:0.1,dense_layers=1.5",
        "topk:0.1, dense_layers=1",
    ],
)
def test_other_words_are_no_policies(text: str):
    with pytest.raises(ValueError, match=f"^'{text}' is not a policy: .*A policy is written dense"):
        parse_policy(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sparse", "the rule must be one of dense, threshold, mass, topk, budget; got 'sparse'"),
        ("dense,dense_layers=1", "the settings of dense are skip; got 'dense_layers'"),
        ("dense,skip=2", "skip must lie in [0, 1]; got 2.0"),
        ("topk:0.1,skip=nan", "skip must lie in [0, 1]; got nan"),
        (
            "topk:0.1,layers=1",
            "the settings of topk:DENSITY:gate are skip, dense_layers, dense_last_rows; got 'layers'",
        ),
        (
            "topk:0.1,density=1",
            "the settings of topk:DENSITY:gate are skip, dense_layers, dense_last_rows; got 'density'",
        ),
        (
            "budget:512,dense_last_rows=0",
            "the settings of budget:TOKENS:gate are skip, dense_layers; got 'dense_last_rows'",
        ),
        ("topk:10", "density, the share of the causal map to keep, must lie in (0, 1]; got 10.0."),
        ("topk:ten", "density must be a number such as 0.1, or a percentage such as 10%; got 'ten'."),
        ("budget:512.5", "tokens must be a whole number; got '512.5'."),
        ("topk:0.1:oracle:x", f"the scorer must be one of {', '.join(SCORERS)}; got 'oracle:x'."),
        ("mass:0.9,dense_layers=1,dense_layers=1", "dense_layers must be given once; got it twice"),
        ("threshold:0.1,dense_last_rows=-1", "dense_last_rows must be an integer of at least 0; got -1."),
    ],
)
def test_what_is_wrong_with_a_policy_is_reported(text: str, reason: str):
    with pytest.raises(ValueError, match=re.escape(f"{text!r} is not a policy: {reason}")):
        parse_policy(text)


@hypothesis.given(
    kind=strategies.sampled_from([Threshold, CumulativeMass, TopK]),
    value=strategies.floats(0, 1, exclude_min=True, exclude_max=True),
    scorer=strategies.sampled_from(sorted(SCORERS)),
    counts=strategies.tuples(strategies.integers(0, 99), strategies.integers(0, 99)),
)
def test_policies_come_back_from_their_words(
    kind: type[Threshold | CumulativeMass | TopK], value: float, scorer: str, counts: tuple[int, int]
):
    rows, layers = counts
    for policy in (
        kind(value, SCORERS[scorer](), dense_last_rows=rows, dense_layers=layers),
        TokenBudget(1 + rows, SCORERS[scorer](), dense_layers=layers),
    ):
        assert parse_policy(write_policy(policy)) == policy


def test_the_syntax_names_every_rule_and_scorer():
    assert policy_syntax().startswith("dense|FILE.json|threshold:P|mass:P|topk:DENSITY|budget:TOKENS[:")
    assert all(name in policy_syntax() for name in SCORERS)
