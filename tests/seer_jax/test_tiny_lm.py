"""The bundled model: its logits and scores against those of transformers and of its recipe (reference.json)."""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax import tiny_lm
from seer_jax.convert import load_base, verify_logits
from seer_jax.evaluate import (
    EvalRows,
    Phase,
    SparsityLevel,
    compare,
    load_words,
    passkey_prompts,
    perplexity,
    score_prompts,
    text_windows,
)
from seer_jax.inference.text import Tokenizer
from seer_jax.models.decoder import Transformer
from seer_jax.models.pretrained import from_pretrained
from seer_jax.selection.rules import TopK
from seer_jax.selection.scorers import LearnedGate, SinkWindow
from seer_jax.tiny_lm.corpus import END_OF_TEXT, HELD_OUT, held_out_text, training_rows

REFERENCE = json.loads((tiny_lm.path() / "reference.json").read_text())
PASSKEY_SHA256 = "1098e6cd6ee88740585e66c782a3b44c4728ce2212ae186622c21961725cd6a2"


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load_base(tiny_lm.path(), dtype=jnp.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(tiny_lm.path())


@pytest.fixture(scope="module")
def text(tokenizer: Tokenizer) -> np.ndarray:
    return np.array(tokenizer.encode(tiny_lm.eval_text(), special_tokens=False))


def test_logits_are_those_of_transformers(model: Transformer):
    report = verify_logits(model, tiny_lm.path() / "logits_check.safetensors")
    assert report.passed
    assert report.relative_error < 1e-5


@pytest.mark.slow
def test_the_bundled_gates_find_what_a_window_misses(text: np.ndarray, tokenizer: Tokenizer):
    """With a fifth of the blocks, against the first block and the latest ones: better text from prompts, and the pass key."""
    model = from_pretrained("tiny-lm", "tiny-lm", dtype="float32")
    prompts = passkey_prompts(tokenizer, text, load_words("eval"), length=2048, count=1, vocab_size=4096)
    rows, methods = EvalRows(text_windows(text, 2048, 1), prompts), (LearnedGate(), SinkWindow())
    scores = {(s.phase, s.method): s for s in compare(model, rows, [SparsityLevel("20%", TopK(0.2))], methods=methods)}
    for phase in Phase:
        gate, window = (scores[phase, method.name] for method in methods)
        assert gate.kept <= 1.02 * window.kept < 0.3
        if phase is Phase.PREFILL:
            assert gate.perplexity < window.perplexity
        else:
            assert gate.passkey == 1 and window.passkey == 0


def test_the_text_is_tokenised_as_it_was(text: np.ndarray):
    assert len(text) == REFERENCE["perplexity"]["tokens"]
    assert text[:16].tolist() == REFERENCE["perplexity"]["first_tokens"]


@pytest.mark.slow  # the whole text, as it was measured
@pytest.mark.parametrize("length", [1024, *(pytest.param(n, marks=pytest.mark.gpu) for n in (4096, 8192))])
def test_perplexity_to_four_digits(model: Transformer, text: np.ndarray, length: int):
    expected = next(row for row in REFERENCE["perplexity"]["dense"] if row["length"] == length)
    windows = text_windows(text, length)
    assert len(windows) == expected["windows"]
    rows = 8192 // length
    parts = [score_prompts(model, jnp.asarray(w)) for w in np.split(windows, range(rows, len(windows), rows))]
    nll = np.concatenate([part.nll for part in jax.device_get(parts)])
    assert nll.size == expected["scored_tokens"]
    assert abs(perplexity(nll) / expected["perplexity"] - 1) < 5e-5


def test_pass_key_prompts_are_those_of_the_recipe(tokenizer: Tokenizer, text: np.ndarray):
    """The 50 prompts of 4096 tokens behind the first rows of reference.json, token by token."""
    prompts = passkey_prompts(tokenizer, text, load_words("eval"), length=4096, count=50, vocab_size=4096, seed=20253)
    tokens = np.stack([prompt.tokens for prompt in prompts]).astype("<i4")
    assert hashlib.sha256(tokens.tobytes()).hexdigest() == PASSKEY_SHA256


@pytest.mark.slow
def test_pass_keys_are_found(model: Transformer, tokenizer: Tokenizer, text: np.ndarray):
    """As in reference.json, dense attention finds every key; the first prompts of each length."""
    for length, count in ((1024, 9), (2048, 4)):
        prompts = passkey_prompts(
            tokenizer, text, load_words("eval"), length=length, count=count, vocab_size=4096, seed=20254, distractors=4
        )
        scores = score_prompts(model, jnp.asarray(np.stack([p.tokens for p in prompts]), jnp.int32))
        assert scores.best[:, -5:].all()


def test_training_text_keeps_away_from_the_evaluation(tokenizer: Tokenizer, text: np.ndarray):
    rows = training_rows(tokenizer, 4096, length=512, count=6, keys=1, questions=2, seed=1)
    assert rows.shape == (6, 512)
    again = training_rows(tokenizer, 4096, length=512, count=6, keys=1, questions=2, seed=1)
    np.testing.assert_array_equal(rows, again)
    assert not set(load_words("train")) & set(load_words("eval"))
    assert "argparse.py" in HELD_OUT
    long_lines = {line for line in tokenizer.decode(text.tolist()).splitlines() if len(line) > 60}
    seen = {line for row in rows for line in tokenizer.decode(row.tolist()).splitlines()}
    assert not long_lines & seen
    assert all("What is the pass key of" in tokenizer.decode(row.tolist()) for row in rows)


def test_calibration_text_is_neither_trained_on_nor_scored(tmp_path: Path):
    scored = tiny_lm.eval_text().split(END_OF_TEXT)[1]
    new = "".join(
        f"def function_{i}(argument):  # of a file that nothing was trained on\n    return {i}\n" for i in range(9)
    )
    for name, text in {"json/decoder.py": scored, "json/tool.py": new, "argparse.py": new, "os.py": new}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert held_out_text(tmp_path) == 2 * (END_OF_TEXT + new)
    (tmp_path / "argparse.py").unlink()
    (tmp_path / "json/tool.py").unlink()
    with pytest.raises(ValueError, match=r"must have the source code of argparse.py, .*; got none. Use an interpreter"):
        held_out_text(tmp_path)
