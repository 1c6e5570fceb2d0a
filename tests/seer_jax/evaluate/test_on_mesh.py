"""Evaluation, calibration and block maps of a model on a mesh of four CPU devices: what one device computes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax import Threshold, TokenBudget, TopK, parse_policy
from seer_jax.calibrate.collect import collect_curves, kept_mass
from seer_jax.calibrate.sensitivity import output_gradients
from seer_jax.convert.logits import _logits_at
from seer_jax.evaluate import EvalRows, Phase, compare, decode_window, score_decoded, score_prompts, score_windows
from seer_jax.evaluate.harness.model import _score_ends
from seer_jax.evaluate.scoring import read_prompts
from seer_jax.models.decoder import Transformer
from seer_jax.plots import block_maps, decode_block_maps
from seer_jax.selection.scorers import SCORERS, LearnedGate, Oracle, Quest, Random, XAttention
from tests.seer_jax.sharding.spread import LENGTHS, MESHES, TOKENS, alone, collectives, on, unordered

pytestmark = [pytest.mark.mesh, pytest.mark.usefixtures("compile_quickly")]

ROWS = jnp.asarray(TOKENS[:, :96])
# A value for each layer and head, so that heads on the wrong device show.
PER_HEAD = np.linspace(0.05, 0.3, 8, dtype=np.float32).reshape(2, 4)
PER_KV_HEAD = np.linspace(0.1, 0.4, 4, dtype=np.float32).reshape(2, 2)


def decoded(model: Transformer) -> Any:
    scores, cache = read_prompts(model, ROWS, keep=80)
    # No number is NaN: two programs in one must wait for each other.
    rows = ROWS[:, 80:88] + sum(jnp.isnan(x).any() for x in jax.tree.leaves(scores))
    return scores, score_decoded(model, cache, rows, Threshold(PER_KV_HEAD))


def observed(model: Transformer) -> Any:
    def observe(context: Any) -> Any:
        return Oracle().decode_scores(context)[0], LearnedGate().decode_scores(context)[0]

    return decode_window(model, ROWS[:2], TokenBudget(32, Random()), observe=observe)


def curves(phase: Phase, scorer: Any, model: Transformer) -> Any:
    gradients = output_gradients(model, ROWS)
    return gradients, collect_curves(model, ROWS, gradients, scorer, phase=phase, rules=("threshold",))


OPERATIONS: dict[str, Callable[[Transformer], Any]] = {
    "prompts": lambda model: score_prompts(model, ROWS, Threshold(PER_HEAD, dense_last_rows=0)),
    "prompts, random": lambda model: score_prompts(model, ROWS, TopK(0.4, Random(), dense_last_rows=0)),
    "windows": lambda model: score_windows(model, ROWS, Threshold(PER_KV_HEAD)),
    "windows, dense": lambda model: score_windows(model, ROWS),
    "decoded": decoded,
    "observed": observed,
    "curves, prefill": functools.partial(curves, Phase.PREFILL, XAttention()),
    "curves, decode": functools.partial(curves, Phase.DECODE, LearnedGate()),
    "mass, prefill": lambda model: kept_mass(model, ROWS, Threshold(PER_HEAD), phase=Phase.PREFILL),
    "mass, decode": lambda model: kept_mass(model, ROWS, Threshold(PER_KV_HEAD, Quest()), phase=Phase.DECODE),
    "maps, prefill": lambda model: block_maps(model, TOKENS[0], Threshold(PER_HEAD, dense_last_rows=0)),
    "maps, decode": lambda model: decode_block_maps(model, TOKENS[0], Threshold(PER_KV_HEAD), rows=20),
    "likelihoods": lambda model: _score_ends(
        model, jnp.asarray(TOKENS), jnp.asarray(LENGTHS), Threshold(PER_HEAD), count=5
    ),
    "logits": lambda model: _logits_at(model, ROWS, jnp.array([3, 40])),
}


DECODING = [
    name for name, kind in SCORERS.items() if "decode" in kind.phases() and name != "gate"
]  # whose are "windows"
OPERATIONS |= {
    f"windows, {name}": functools.partial(lambda name, model: score_windows(model, ROWS, parse_policy(f"topk:0.4:{name}")), name)
    for name in DECODING
}  # fmt: skip
FAST = {("prompts", "data=2,tensor=2")}
# On every mesh; the others on one each, in turn.
EVERYWHERE = ("prompts",)
CASES = [
    (name, text)
    for i, name in enumerate(OPERATIONS)
    for j, text in enumerate(MESHES)
    if name in EVERYWHERE or (i + j) % len(MESHES) == 0
]
# What ends in the head dim and is exchanged, where devices share a key/value head: the queries of its group, once in a layer (and in a
# backward pass the gradients of their outputs). Never keys, values or cache.
QUERIES = "f32[1,96,2,16]"
OF_GROUPS = {
    **{key: [QUERIES] for key in ("windows", "observed", "mass, decode", *(f"windows, {name}" for name in DECODING))},
    "decoded": ["f32[4,1,2,16]"],
    "curves, decode": [QUERIES, "f32[4,2,96,2,16]"],
    "maps, decode": ["f32[1,112,2,16]"],
}


@functools.cache
def of_one_device(name: str) -> Any:
    return jax.device_get(jax.jit(OPERATIONS[name])(alone()))


def case(name: str, text: str) -> Any:
    return pytest.param(name, text, marks=() if (name, text) in FAST else pytest.mark.slow)


@pytest.mark.parametrize(("name", "text"), [case(*pair) for pair in CASES])
def test_a_mesh_gives_what_one_device_gives_and_keeps_keys_and_cache_where_they_are(name: str, text: str):
    program = jax.jit(OPERATIONS[name]).lower(on(text)).compile()
    got, expected = jax.device_get(program(on(text))), of_one_device(name)
    for (path, theirs), ours in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(got), strict=True):
        # Losses of levels that drop almost all of a row are divided by what is left, squared: a thousandth at least.
        rtol = 1e-3 if "loss" in str(path) or "blind" in str(path) else 1e-5
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=rtol, err_msg=str(path))
    assert not unordered(program)
    found = collectives(program)
    assert found.keys() <= {"all-reduce", "all-gather"}
    moved = [shape for shape in found.get("all-gather", ()) if shape.endswith(",16]")]
    assert moved == (OF_GROUPS.get(name, []) if text == "tensor=4" else [])


def test_a_backward_pass_over_fsdp_gathers_in_the_order_of_the_program():
    """Compiled alone; the slow cases run it."""
    assert not unordered(output_gradients.lower(on("fsdp=4"), ROWS[:, :32]).compile())


def test_what_a_mesh_can_not_do_is_refused_by_name():
    with pytest.raises(
        NotImplementedError, match=r"arrays with the 2 key/value heads of its device first.*got shape \(\)"
    ):
        decode_window(on("fsdp=4"), ROWS, observe=lambda context: context.position[0])
    rows = EvalRows(TOKENS, [])
    with pytest.raises(ValueError, match=r"workers must be 1 for a model on a mesh; got 2\. Leave it out"):
        next(compare(on("fsdp=4"), rows, [], workers=2))
