"""Metrics of tasks, from 0 to 1: those of RULER and of LongBench for English and code."""

import collections
import difflib
import re
import string
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"\d+")
_PARAGRAPH = re.compile(r"Paragraph (\d+)")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_COMMENT = ("`", "#", "//")  # a line of code that holds one of these is passed over


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers that the prediction contains, whatever the case of letters.

    >>> string_match_all("It is 12 and 34.", ["12", "34", "56", "78"])
    0.5
    """
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """Whether the prediction contains one of the answers, whatever the case of letters.

    >>> string_match_part("It is 12.", ["12", "34"])
    1.0
    """
    return float(any(answer.lower() in prediction.lower() for answer in answers))


def qa_f1(prediction: str, answer: str) -> float:
    """F1 of the words in common, each as often as both have it: lower case, without punctuation and articles.

    >>> qa_f1("The red house!", "a big red house")
    0.8
    """
    return _f1(_normalized(prediction), _normalized(answer))


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L of whole texts: F1 of the longest common subsequence of words, split at white space (Lin, 2004, with beta = 1).

    >>> rouge_l("police killed the gunman", "police kill the gunman")
    0.75
    """
    words, right = prediction.split(), answer.split()
    common = _longest_common_subsequence(words, right)
    return 2 * common / (len(words) + len(right)) if common else 0.0


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """One divided by the number of labels that the prediction contains, if the right one is among them; labels that are part of the right
    one do not count.

    >>> classification("a human location", "Human location", ["location"]), classification("x or y", "x", ["x", "y", "z"])
    (0.0, 0.5)
    """
    found = [label for label in classes if label in prediction]
    found = [label for label in found if label == answer or label not in answer]
    return 1 / len(found) if answer in found else 0.0


def count(prediction: str, answer: str) -> float:
    """Share of the prediction's numbers that are the answer.

    >>> count("12, or 12, or 13", "12") == 2 / 3
    True
    """
    return _share(prediction, answer)


def retrieval(prediction: str, answer: str) -> float:
    """Share of the prediction's numbers that are the one of the answer, "Paragraph N".

    >>> retrieval("Paragraph 3", "Paragraph 3"), retrieval("paragraphs 3 and 4", "Paragraph 3")
    (1.0, 0.5)
    """
    found = _PARAGRAPH.search(answer)
    if found is None:
        raise ValueError(f'The answer of a retrieval task must be "Paragraph N"; got {answer!r}.')
    return _share(prediction, found[1])


def code_similarity(prediction: str, answer: str) -> float:
    """Edit similarity, in whole percent, of the first line that holds no comment or code fence: 2 M / T of difflib, with M matching
    characters of T in both.

    >>> code_similarity("# next\\nreturn a", "return b")
    0.88
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((one for one in lines if not any(mark in one for mark in _COMMENT)), "")
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100 if line and answer else 0.0


def _normalized(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _f1(words: Sequence[str], right: Sequence[str]) -> float:
    common = sum((collections.Counter(words) & collections.Counter(right)).values())
    return 2 * common / (len(words) + len(right)) if common else 0.0


def _share(prediction: str, number: str) -> float:
    numbers = _NUMBER.findall(prediction)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for i, other in enumerate(second, start=1):
            diagonal, row[i] = row[i], diagonal + 1 if word == other else max(row[i], row[i - 1])
    return row[-1]
