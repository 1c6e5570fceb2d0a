"""Prompts that share a prefix: it is read once, and answers are those of each prompt alone."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from seer_jax import Transformer, generate, generate_each, pad_prompts
from seer_jax.inference.sampling import Greedy, Sample, Sampling
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.rules import CumulativeMass, Threshold, TokenBudget, TopK
from seer_jax.selection.scorers import MInference
from tests.seer_jax.conftest import tiny_model

pytestmark = pytest.mark.usefixtures("compile_quickly")

TEXT = np.random.default_rng(0).integers(0, 63, 80).tolist()
PROMPTS = [[*TEXT[:70], 1, 2], [*TEXT[:70], 3], TEXT[:40], TEXT]
NEW: dict[str, Any] = dict(max_new_tokens=5, eos=())


@functools.cache
def llama() -> Transformer:
    return tiny_model()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefill", "read"),
    [
        # The last two of five block rows keep every block, and are read again; three blocks keep fewer than five.
        (TopK(0.9), [72, 23, 40, 80]),
        (Threshold(0.1), [72, 23, 24, 64]),
        (Threshold(0.1, dense_last_rows=0), [72, 7, 8, 48]),
    ],
    ids=str,
)
@pytest.mark.parametrize("sampling", [Sample(2.0), Greedy()], ids=str)
def test_answers_are_those_of_each_prompt_alone(prefill: Policy, read: list[int], sampling: Sampling):
    settings: dict[str, Any] = dict(prefill=prefill, decode=TokenBudget(32), sampling=sampling, key=jax.random.key(3))
    continued = list(generate_each(llama(), PROMPTS, prefill_chunk=32, **settings, **NEW))
    alone = generate(llama(), *pad_prompts(PROMPTS), **settings, **NEW)  # rows of a batch do not see each other
    assert [c.result.rows()[0] for c in continued] == alone.rows()
    assert [c.read for c in continued] == read


@pytest.mark.parametrize(
    ("policy", "rows"),
    [
        (Dense(), 7),
        (TokenBudget(64), 7),
        (Threshold(0.1), 5),
        (CumulativeMass(0.9, dense_last_rows=9), 0),
        (TopK(0.5), 0),
        (TopK(0.01), 5),
        (TopK(0.5, MInference()), 0),
    ],
    ids=str,
)
def test_block_rows_that_choose_alike_at_two_lengths(policy: Policy, rows: int):
    assert policy.rows_alike(97, 200, 16) == policy.rows_alike(200, 97, 16) == rows


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "at least one prompt; got none"),
        ([[1], []], {}, "Prompt 1 must have at least one token; got none"),
        ([[1, 64]], {}, r"Tokens must lie in \[0, 64\), the model's vocabulary; prompt 0 has 64 at position 1"),
        ([[1] * 9000], {}, "must fit the model's context of 8192 tokens; got 9000"),
        ([[1] * 90], dict(cache_capacity=64), "all new tokens but the last, 94 tokens; got cache_capacity=64"),
        ([[1]], dict(prefill=TopK(0.5, MInference())), "looks at the whole prompt"),
        ([[1]], dict(sampling=Sample(1.0)), "so a key must be given"),
    ],
)
def test_refuses(prompts: list[list[int]], changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        generate_each(llama(), prompts, **dict(prefill_chunk=32) | changes, **NEW)
