"""Passages with questions: from a file in the form of SQuAD or HotpotQA, or generated ones."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seer_jax.evaluate.tasks.json_rows import SUFFIX, read_lines, read_list, read_value
from seer_jax.evaluate.tasks.ruler.words import ADJECTIVES, NOUNS, draw_distinct, listed_words

FORMS = (
    "SQuAD's JSON, or objects with `question`, `context` and `answers` (as SQuAD) or `answer` (as HotpotQA), in a list (.json) or one a "
    "line (.jsonl)"
)

PEOPLE, TOWNS, LANDS = 2400, 800, 60  # of the generated passages, about 160k tokens
FIRST, MIDDLE, LAST = (
    listed_words("Ba Be Da Do El Fa Ga Ha Io Jo Ka Ke La Lo Ma Mi Na No Or Pe Ra Ri Sa So Ta To Ul Va Vi Wa Ya Ze"),
    listed_words("bra den dor fal gan hal kes lan mar mel nar nel pol quin ral ren san sel tam tor van vel win zan"),
    listed_words("da dan den dor e el en eth ia ick il in ira is o on or os ra ric ta us wen yn"),
)
TRADES = listed_words(
    "baker carpenter clockmaker cook farmer fisher gardener glazier librarian mason miller painter printer sailor tailor teacher"
)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about passages.

    Attributes:
      text: of the question.
      answers: each of which is right.
      passages: numbers of those that answer it.
    """

    text: str
    answers: tuple[str, ...]
    passages: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PassageSet:
    """Passages, all different, and questions about them."""

    passages: tuple[str, ...]
    questions: tuple[Question, ...]


@functools.lru_cache(maxsize=4)
def read_passages(path: Path) -> PassageSet:
    """Reads passages and answerable questions from a file.

    Raises:
      FileNotFoundError: the file is not there.
      ValueError: it has another form, holds no question, or fewer than two passages.
    """
    numbers: dict[str, int] = {}
    questions = []
    for place, row in _rows(path):
        try:
            given, answers = _contexts(row["context"]), _answers(row)
            question = row["question"]
            if not isinstance(question, str) or not all(isinstance(text, str) for text in (*given, *answers)):
                raise TypeError("texts must be strings")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{place} must be of {FORMS}; got another form ({type(error).__name__}: {error})."
            ) from error
        ids = tuple(numbers.setdefault(text, len(numbers)) for text in given)
        if any(answers):
            questions.append(Question(question, tuple(filter(None, answers)), ids))
    if not questions or len(numbers) < 2:
        raise ValueError(
            f"{path} must hold at least one answerable question and two passages; got {len(questions)} and {len(numbers)}."
        )
    return PassageSet(tuple(numbers), tuple(questions))


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Objects with question, context and answers, and their places in the file."""
    if path.suffix == SUFFIX:
        yield from read_lines(path)
        return
    whole = read_value(path)
    if isinstance(whole, list):
        yield from read_list(path, whole)
    elif isinstance(whole, Mapping) and "data" in whole:
        yield from _squad_rows(path, whole["data"])
    else:
        raise ValueError(f"{path} must hold {FORMS}; it holds something else.")


def _squad_rows(path: Path, data: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        for i, article in enumerate(data):
            for j, paragraph in enumerate(article["paragraphs"]):
                for k, question in enumerate(paragraph["qas"]):
                    if not question.get("is_impossible"):
                        yield f"data[{i}].paragraphs[{j}].qas[{k}]", {**question, "context": paragraph["context"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must hold {FORMS}; got another form ({type(error).__name__}: {error}).") from error


def _contexts(context: Any) -> list[str]:
    """Passages of a row: one text, pairs of title and sentences, or titles and sentences side by side as on the Hugging Face hub."""
    if isinstance(context, str):
        return [context]
    pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, Mapping) else context
    return [f"{title}\n{''.join(sentences)}" for title, sentences in pairs]


def _answers(row: Mapping[str, Any]) -> list[str]:
    if "answer" in row:
        return [row["answer"]]
    answers: Any = row["answers"]
    if isinstance(answers, Mapping):
        return list(answers["text"])
    if isinstance(answers, str):
        raise TypeError("answers must be a list")
    return [answer["text"] if isinstance(answer, Mapping) else answer for answer in answers]


@functools.lru_cache(maxsize=2)
def generated_passages(hops: int) -> PassageSet:
    """Facts about people and towns that never were: the town that a person comes from (1 hop), or that town's land (2 hops)."""
    rng = np.random.default_rng(1)
    names = draw_distinct(_draw_name, PEOPLE + TOWNS + LANDS, rng)
    lands, towns, people = names[:LANDS], names[LANDS : LANDS + TOWNS], names[LANDS + TOWNS :]

    def pick(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]

    passages, land_of = [], {town: pick(lands) for town in towns}
    for town, land in land_of.items():
        sight = f"{pick(ADJECTIVES)} {pick(NOUNS)}"
        passages.append(
            f"{town}\n{town} is a town in the land of {land}. Visitors come for its {sight}, and its {pick(NOUNS)} fair is held every year."
        )
    questions = []
    for person in people:
        number = int(rng.integers(len(towns)))
        town, year = towns[number], int(rng.integers(1700, 2000))
        passages.append(
            f"{person}\n{person} was born in {town} in {year}, became a {pick(TRADES)}, and wrote about the {pick(ADJECTIVES)} {pick(NOUNS)}."
        )
        own = len(passages) - 1
        if hops == 1:
            questions.append(Question(f"In which town was {person} born?", (town,), (own,)))
        else:
            asked = f"In which land lies the town where {person} was born?"
            questions.append(Question(asked, (land_of[town],), (own, number)))
    return PassageSet(tuple(passages), tuple(questions))


def _draw_name(rng: np.random.Generator) -> str:
    middle = "".join(MIDDLE[i] for i in rng.integers(0, len(MIDDLE), 2))
    return f"{FIRST[rng.integers(len(FIRST))]}{middle}{LAST[rng.integers(len(LAST))]}"
