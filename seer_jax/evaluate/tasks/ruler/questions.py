"""Question answering over passages, of which one or a few hold the answer and the others are distraction."""

import dataclasses
from pathlib import Path

import numpy as np

from seer_jax.checks import whole_number
from seer_jax.evaluate.tasks.base import PromptEncoder, Sample, Task, TaskSettings, register
from seer_jax.evaluate.tasks.metrics import string_match_part
from seer_jax.evaluate.tasks.ruler.fitting import Draft, beginnings, fit
from seer_jax.evaluate.tasks.ruler.haystack import insert
from seer_jax.evaluate.tasks.ruler.passages import PassageSet, Question, generated_passages, read_passages

ORDER = "Answer the question from the passages alone, with the answer and nothing besides."


@dataclasses.dataclass(frozen=True)
class QuestionAnswering(Task):
    """Questions over passages, right where the answer contains one of the known ones.

    The passages of the question stand among others of the same set at random places; where the set is too small they come again.

    Attributes:
      name: as a command line writes it.
      source: file of passages and questions, see `read_passages`; None: generated ones.
      hops: of the generated ones: passages that the answer needs, 1 or 2.
      new_tokens: tokens that the answer has room for.
    """

    name: str
    source: Path | None = None
    hops: int = 1
    new_tokens: int = 32

    def __post_init__(self) -> None:
        whole_number("new_tokens", self.new_tokens)
        if self.hops not in (1, 2):
            raise ValueError(f"hops must be 1 or 2; got {self.hops}.")

    def samples(self, encoder: PromptEncoder, settings: TaskSettings) -> list[Sample]:
        given = generated_passages(self.hops) if self.source is None else read_passages(self.source)
        order = settings.generator(self.name, settings.count).permutation(len(given.questions))[: settings.count]
        size = settings.length - self.new_tokens
        return [
            fit(
                self._draft(given, given.questions[i], settings.generator(self.name, number), settings.length),
                encoder,
                size,
            )
            for number, i in enumerate(order)
        ]

    def score(self, prediction: str, sample: Sample) -> float:
        return string_match_part(prediction, sample.answers)

    def _draft(self, given: PassageSet, question: Question, rng: np.random.Generator, most: int) -> Draft:
        other = np.array([i for i in rng.permutation(len(given.passages)) if i not in question.passages])
        if not len(other):
            raise ValueError(
                f"The passages of a question must be fewer than all; got {len(question.passages)} of {len(given.passages)}. "
                f"Add passages to {self.source}."
            )
        depths = sorted(rng.random(len(question.passages)).round(3).tolist())
        # The passages of the question in random order.
        own = [given.passages[i] for i in rng.permutation(np.array(question.passages))]
        first = depths[0] if depths else None

        def passage(number: int) -> str:
            return given.passages[other[number % len(other)]]

        def text(units: int, tail: str) -> str:
            chosen = insert([passage(i) for i in range(units)], list(zip(depths, own, strict=True)))
            numbered = [_headed(i, one) for i, one in enumerate(chosen, start=1)]
            passages = "\n\n".join(numbered) + tail
            return f"{ORDER}\n\nThe passages are:\n\n{passages}\n\n{ORDER}\n\nQuestion: {question.text}"

        def tails(units: int) -> list[str]:
            head, *rest = _headed(units + len(own) + 1, "").split()
            return [f"\n\n{head} {rest[0]}\n{words.lstrip()}" for words in beginnings(passage(units).split())]

        return Draft(text, tails, "Answer:", question.answers, least=0, most=most, depth=first)


def _headed(number: int, passage: str) -> str:
    return f"Passage {number}:\n{passage}"


QUESTIONS = register(QuestionAnswering("qa_1hop")), register(QuestionAnswering("qa_2hop", hops=2))
