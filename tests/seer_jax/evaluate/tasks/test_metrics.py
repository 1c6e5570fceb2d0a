"""Metrics of tasks against values worked out by hand."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from seer_jax.evaluate.tasks import metrics

CASES: list[tuple[Callable[..., float], str, Any, float]] = [
    (metrics.string_match_all, "ONE and two", ["one", "TWO", "three"], 2 / 3),
    (metrics.string_match_all, "", ["one"], 0),
    (metrics.string_match_all, "1234567", ["1234567"], 1),
    (metrics.string_match_all, "12345", ["1234567"], 0),
    (metrics.string_match_part, "It is Two.", ["one", "two"], 1),
    (metrics.string_match_part, "It is tw.", ["one", "two"], 0),
    # 3 words and 3 words, 2 in common: 2 * 2 / 6.
    (metrics.qa_f1, "blue old house", "the old, BLUE car", 2 / 3),
    # "b" counts twice on one side, once on the other: 2 * 2 / (3 + 2). "a" is an article.
    (metrics.qa_f1, "b b c", "a b c", 4 / 5),
    (metrics.qa_f1, "", "b", 0),
    (metrics.qa_f1, "nothing", "something", 0),
    (metrics.qa_f1, "The U.S.A.", "usa", 1),
    # Longest common subsequence "the cat mat" of 4 and 6 words: 2 * 3 / 10.
    (metrics.rouge_l, "the cat on mat", "the cat sat near the mat", 3 / 5),
    (metrics.rouge_l, "b a", "a b", 1 / 2),
    (metrics.rouge_l, "", "a", 0),
    (metrics.rouge_l, "x y", "x y", 1),
    (metrics.count, "There are 5 of 10.", "5", 1 / 2),
    (metrics.count, "15", "5", 0),
    (metrics.count, "five", "5", 0),
    (metrics.retrieval, "Paragraph 12", "Paragraph 12", 1),
    (metrics.retrieval, "Paragraph 1, 2 or 12", "Paragraph 12", 1 / 3),
    (metrics.retrieval, "Paragraph 1", "Paragraph 12", 0),
    # "abcd" and "abxd": 3 matching characters of 8: 6 / 8.
    (metrics.code_similarity, "abcd", "abxd", 0.75),
    (metrics.code_similarity, "\n\n# say\n```python\nx = 1\nz", "x = 1", 1),
    (metrics.code_similarity, "# only a comment", "x = 1", 0),
    (metrics.code_similarity, "", "x = 1", 0),
]  # fmt: skip


@pytest.mark.parametrize(("metric", "prediction", "answer", "expected"), CASES)
def test_values(metric: Callable[..., float], prediction: str, answer: Any, expected: float):
    assert metric(prediction, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "classes", "expected"),
    [
        ("Type: City", "City", ["City", "State", "Food"], 1),
        ("City or State", "City", ["City", "State", "Food"], 1 / 2),
        ("State", "City", ["City", "State"], 0),
        # A label that is part of the right one does not count against it.
        ("Other location", "Other location", ["location", "Other location", "Food"], 1),
        ("a location", "Other location", ["location", "Other location"], 0),
        ("", "City", ["City"], 0),
    ],
)
def test_classification(prediction: str, answer: str, classes: Sequence[str], expected: float):
    assert metrics.classification(prediction, answer, classes) == pytest.approx(expected)


def test_an_answer_without_a_paragraph_is_refused():
    with pytest.raises(ValueError, match="must be \"Paragraph N\"; got '12'"):
        metrics.retrieval("12", "12")
