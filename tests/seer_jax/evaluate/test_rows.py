"""Rows of an evaluation: windows, pass-key prompts, and what both refuse."""

import numpy as np
import pytest

from seer_jax import load_tokenizer, tiny_lm
from seer_jax.evaluate import load_words, make_rows, passkey_prompts, text_windows
from seer_jax.evaluate.passkey import insert_lines, passkey_lines
from seer_jax.inference.text import Tokenizer

VOCAB_SIZE = 4096


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(tiny_lm.NAME)


def test_windows_are_consecutive():
    text = np.arange(103)
    np.testing.assert_array_equal(text_windows(text, 10), np.arange(100).reshape(10, 10))
    np.testing.assert_array_equal(text_windows(text, 10, 3)[:, 0], [0, 40, 90])
    with pytest.raises(ValueError, match="at least one window of 6 tokens; got 5"):
        text_windows(np.arange(5), 6)


def test_rows_hold_windows_and_prompts_of_one_length(tokenizer: Tokenizer):
    text = tiny_lm.eval_text()[:20000]
    rows = make_rows(tokenizer, text, vocab_size=VOCAB_SIZE, length=512, windows=2, passkeys=3, decoded=32, seed=1)
    assert rows.windows.shape == (2, 512) and rows.prompt_tokens.shape == (3, 512) and rows.decoded == 32
    assert tokenizer.decode(rows.windows[0].tolist()) in text
    for prompt, depth in zip(rows.prompts, (0.1, 0.2, 0.3), strict=True):
        whole = tokenizer.decode(prompt.tokens.tolist())
        statement, question = passkey_lines(prompt.name, prompt.answer)
        assert whole.count(statement) == 1 and whole.endswith("\n" + question.removesuffix(".\n"))
        assert whole.index(statement) / len(whole) == pytest.approx(depth, abs=0.1) and prompt.depth == depth
        assert tokenizer.decode(prompt.tokens[-prompt.answer_length :].tolist()) == prompt.answer


def test_distractors_state_other_keys(tokenizer: Tokenizer):
    text = np.array(tokenizer.encode(tiny_lm.eval_text()[:20000], special_tokens=False))
    settings = dict(length=512, count=1, vocab_size=VOCAB_SIZE, distractors=3)
    (prompt,) = passkey_prompts(tokenizer, text, load_words("eval"), **settings)
    whole = tokenizer.decode(prompt.tokens.tolist())
    assert whole.count("# The pass key of") == 4 and whole.count("# What is the pass key of") == 1


def test_texts_that_are_too_short_are_refused(tokenizer: Tokenizer):
    text = np.array(tokenizer.encode(tiny_lm.eval_text()[:500], special_tokens=False))
    with pytest.raises(ValueError, match=r"length=512 tokens or more.*got \d+ tokens and room for"):
        passkey_prompts(tokenizer, text, load_words("eval"), length=512, count=1, vocab_size=VOCAB_SIZE)


def test_words_of_training_and_evaluation_differ():
    train, evaluation = load_words("train"), load_words("eval")
    assert len(train) > 1000 < len(evaluation) and not set(train) & set(evaluation)


def test_lines_are_inserted_where_they_belong():
    text, line = np.arange(5), np.array([9])
    np.testing.assert_array_equal(
        insert_lines(text, [(5, np.array([8])), (0, line), (2, line), (2, line + 1)]), [9, 0, 1, 9, 10, 2, 3, 4, 8]
    )
    np.testing.assert_array_equal(insert_lines(text, []), text)
