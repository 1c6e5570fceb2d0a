"""A scorer of one's own: one class, registered here, that works everywhere without a change of the product."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax import Given, TokenBudget, Transformer, generate, stream
from seer_jax.commands import main as cli
from seer_jax.evaluate import (
    EvalRows,
    PassKeyPrompt,
    SparsityLevel,
    all_methods,
    compare,
    legend,
    table_rows,
)
from seer_jax.plots import block_maps
from seer_jax.selection.notation import parse_policy, policy_from_json, policy_syntax, policy_to_json, write_policy
from seer_jax.selection.scorers import SCORERS, Scorer, register
from tests.seer_jax.conftest import LLAMA, tiny_model

pytestmark = pytest.mark.usefixtures("compile_quickly", "registered")

BLOCK, LENGTH, NEW = 16, 112, 24
TOKENS = np.random.default_rng(0).integers(0, 63, (1, LENGTH)).astype(np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Earliest(Scorer):
    """The earliest blocks first."""

    name = "earliest"
    title = "earliest blocks"
    meaning = "the blocks at the start of the text"

    def prepare(self, context: Any) -> jax.Array:
        return -jnp.arange(context.num_key_blocks, dtype=jnp.float32)

    def prefill_scores(self, context: Any) -> jax.Array:
        return jnp.broadcast_to(context.prepared, (context.batch, 1, context.num_rows, context.num_key_blocks))

    def decode_scores(self, context: Any) -> jax.Array:
        return jnp.broadcast_to(-jnp.arange(context.num_key_blocks, dtype=jnp.float32), context.shape)


POLICY = TokenBudget(3 * BLOCK, Earliest())  # the own block and the first two


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    register(Earliest)
    yield
    del SCORERS[Earliest.name]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(block_size=BLOCK)


def kept_blocks(tokens: int) -> np.ndarray:
    row, column = np.indices((-(-tokens // BLOCK),) * 2)
    return (column == row) | ((column < 2) & (column < row))


def test_the_model_reads_the_blocks_that_it_ranks_best(model: Transformer):
    blocks = -(-LENGTH // BLOCK)
    mask = np.broadcast_to(kept_blocks(LENGTH), (LLAMA.num_layers, 1, 1, blocks, blocks))
    sparse = model(jnp.asarray(TOKENS), sparsity=POLICY)
    np.testing.assert_array_equal(sparse, model(jnp.asarray(TOKENS), sparsity=Given(jnp.asarray(mask), BLOCK)))
    assert np.abs(np.asarray(sparse) - model(jnp.asarray(TOKENS)))[:, 4 * BLOCK :].max() > 1e-3


@pytest.mark.slow
def test_generation_goes_on_as_a_forward_pass_does(model: Transformer):
    result = generate(model, TOKENS, max_new_tokens=NEW, eos=(), prefill=POLICY, decode=POLICY)
    text = np.concatenate([TOKENS, np.asarray(result.tokens)], axis=1)
    best = model(jnp.asarray(text), sparsity=POLICY).argmax(-1)
    np.testing.assert_array_equal(best[:, LENGTH - 1 : -1], result.tokens)
    assert (result.decode_kept < 0.5).all()


@pytest.mark.slow
def test_a_stream_goes_on_alike(model: Transformer):
    result = generate(model, TOKENS, max_new_tokens=NEW, eos=(), prefill=POLICY, decode=POLICY)
    pieces = list(stream(model, TOKENS, max_new_tokens=NEW, eos=(), prefill=POLICY, decode=POLICY))
    assert [token for piece in pieces for token in piece[0]] == result.rows()[0]


def test_gates_can_recommend_it(model: Transformer):
    model = tiny_model(block_size=BLOCK)
    assert model.prefill_gate is not None and model.decode_gate is not None
    model.prefill_gate.recommended = model.decode_gate.recommended = POLICY
    result = generate(model, TOKENS, max_new_tokens=2, eos=())
    assert (result.prefill_kept < 0.7).all() and (result.decode_kept < 0.5).all()


def test_it_has_a_name_in_policies():
    assert parse_policy("budget:48:earliest") == POLICY and write_policy(POLICY) == "budget:48:earliest"
    assert policy_from_json(json.loads(json.dumps(policy_to_json(POLICY)))) == POLICY
    assert "earliest" in policy_syntax()


@pytest.mark.slow
def test_it_is_a_method_of_comparisons(model: Transformer):
    prompt = PassKeyPrompt(name="x", answer="12345", depth=0.1, tokens=TOKENS[0], answer_length=5)
    levels = [SparsityLevel("48", TokenBudget(48))]
    scores = list(compare(model, EvalRows(TOKENS, [prompt], 16), levels, methods=[Earliest()]))
    assert [s.method for s in scores] == [None, "earliest", None, "earliest"]
    assert all(s.kept < 0.7 for s in scores if s.method)
    assert [row[1] for row in table_rows(scores)[1:]] == ["dense", "earliest blocks"] * 2
    assert legend(scores)["earliest blocks"] == "the blocks at the start of the text"
    assert [method.name for method in all_methods()][-2:] == ["earliest", "oracle"]


@pytest.mark.slow
def test_it_has_block_maps(model: Transformer):
    maps = block_maps(model, jnp.asarray(TOKENS[0]), POLICY)
    np.testing.assert_array_equal(maps.kept, np.broadcast_to(kept_blocks(LENGTH), maps.kept.shape))
    np.testing.assert_allclose(maps.scores[..., 1, :2], np.broadcast_to([0.731059, 0.268941], (2, 4, 2)), rtol=1e-5)


FILE = '''
from __future__ import annotations
import dataclasses, jax, jax.numpy as jnp
from seer_jax.selection.scorers import Scorer, register

@register
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Even(Scorer):
    """Blocks of even number first."""
    name, title, meaning = "even", "even blocks", "the blocks of even number"

    def prefill_scores(self, context):
        scores = 1.0 - jnp.arange(context.num_key_blocks) % 2
        return jnp.broadcast_to(scores, (context.batch, 1, context.num_rows, context.num_key_blocks))

    def decode_scores(self, context):
        return jnp.broadcast_to(1.0 - jnp.arange(context.num_key_blocks) % 2, context.shape)
'''


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # plans of memory are made of shapes, which stand for arrays
def test_commands_take_it_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "even_blocks.py"
    path.write_text(FILE)
    scorers = ["--scorers", str(path)]
    try:
        words = [
            "eval",
            *scorers,
            "--methods",
            "even",
            "--phases",
            "decode",
            "--policies",
            "budget:128",
            "--length",
            "256",
        ]
        words += ["--windows", "1", "--passkeys", "1", "--decoded", "8", "--output", str(tmp_path)]
        assert cli.main(words) == 0
        out = capsys.readouterr().out
        assert "decode even blocks, budget:128: perplexity" in out and "even blocks: the blocks of even number" in out
        written = json.loads((tmp_path / "scores.json").read_text())
        assert [s["method"] for s in written["scores"]] == [None, "even"]

        words = ["generate", *scorers, "--prompt", "import numpy as", "--decode", "budget:128:even"]
        assert cli.main([*words, "--max-new-tokens", "2"]) == 0
        assert "decode: budget:128:even (named)" in capsys.readouterr().err
    finally:
        SCORERS.pop("even", None)
