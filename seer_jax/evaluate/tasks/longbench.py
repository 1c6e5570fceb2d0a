"""LongBench (Bai et al., arXiv 2308.14508): its English and code data sets from JSONL files, with its metrics.

Instructions are our own, in the order of LongBench's. A prompt that is too long loses its middle, as there; data sets that show
examples or code are not rendered by a chat template.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seer_jax.evaluate.tasks import metrics
from seer_jax.evaluate.tasks.base import PromptEncoder, Sample, Task, TaskSettings
from seer_jax.evaluate.tasks.json_rows import read_lines

LANGUAGES = ("en", "python", "java", "csharp")  # of the data sets below
_ONLY = "Answer with nothing but the answer."
_PASSAGES = "Answer the question from these passages.\n\n{context}\n\n" + _ONLY + "\n\nQuestion: {input}\nAnswer:"


class Kind(NamedTuple):
    """How one data set is asked and scored.

    Fields:
      prompt: with the fields {context} and {input}.
      new_tokens: tokens that the answer has room for.
      metric: of a prediction and one answer; the best one over all answers counts.
      chat: whether prompts are rendered by a chat template.
      first_line: whether the first line of a prediction counts alone.
    """

    prompt: str
    new_tokens: int
    metric: Callable[..., float]
    chat: bool = True
    first_line: bool = False


DATASETS = {
    "narrativeqa": Kind(
        "Read this story.\n\n{context}\n\nAnswer the question about it in a few words, without explanation.\n\nQuestion: {input}\nAnswer:",
        128,
        metrics.qa_f1,
    ),
    "qasper": Kind(
        "Read this scientific article.\n\n{context}\n\nAnswer the question about it in a few words or one sentence, without explanation: "
        '"yes" or "no" where that answers it, "unanswerable" where the article does not say.\n\nQuestion: {input}\nAnswer:',
        128,
        metrics.qa_f1,
    ),
    "multifieldqa_en": Kind(
        "Read this text.\n\n{context}\n\nAnswer the question about it. " + _ONLY + "\n\nQuestion: {input}\nAnswer:",
        64,
        metrics.qa_f1,
    ),
    "hotpotqa": Kind(_PASSAGES, 32, metrics.qa_f1),
    "2wikimqa": Kind(_PASSAGES, 32, metrics.qa_f1),
    "musique": Kind(_PASSAGES, 32, metrics.qa_f1),
    "gov_report": Kind(
        "Summarize this government report on one page.\n\nReport:\n{context}\n\nSummarize the report on one page.\n\nSummary:",
        512,
        metrics.rouge_l,
    ),
    "qmsum": Kind(
        "Read this transcript of a meeting.\n\nTranscript:\n{context}\n\nAnswer the request about the meeting in a few sentences.\n\n"
        "Request: {input}\nAnswer:",
        512,
        metrics.rouge_l,
    ),
    "multi_news": Kind(
        "Summarize these news articles on one page.\n\nNews:\n{context}\n\nSummarize all of the news on one page.\n\nSummary:",
        512,
        metrics.rouge_l,
    ),
    "trec": Kind(
        "Name the type of the last question, as in the examples.\n\n{context}\n{input}",
        64,
        metrics.classification,
        chat=False,
        first_line=True,
    ),
    "triviaqa": Kind(
        "Answer the question from its passage, as in the examples. " + _ONLY + "\n\n{context}\n\n{input}",
        32,
        metrics.qa_f1,
        chat=False,
        first_line=True,
    ),
    "samsum": Kind(
        "Summarize the last dialogue in a few sentences, as in the examples.\n\n{context}\n\n{input}",
        128,
        metrics.rouge_l,
        chat=False,
        first_line=True,
    ),
    "passage_count": Kind(
        "Some of these paragraphs may occur more than once. How many different ones are there?\n\n{context}\n\n"
        "Give the number of different paragraphs, as digits and nothing besides.\n\nAnswer:",
        32,
        metrics.count,
    ),
    "passage_retrieval_en": Kind(
        "Read these paragraphs. At the end comes a summary of one of them.\n\n{context}\n\nSummary: {input}\n\n"
        'Which paragraph does it summarize? Answer in the form "Paragraph 1".\n\nAnswer:',
        32,
        metrics.retrieval,
    ),
    "lcc": Kind("Continue this code.\n{context}Next line of code:\n", 64, metrics.code_similarity, chat=False),
    "repobench-p": Kind(
        "Continue this code.\n{context}{input}Next line of code:\n", 64, metrics.code_similarity, chat=False
    ),
}


class Row(NamedTuple):
    """What is read of one line: `context`, `input`, `answers` and `all_classes`."""

    context: str
    input: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LongBench(Task):
    """One data set of a file.

    Attributes:
      dataset: see `DATASETS`.
      source: the file.
    """

    dataset: str
    source: Path

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise ValueError(f"dataset must be one of {', '.join(DATASETS)}; got {self.dataset!r}.")

    @property
    def name(self) -> str:
        return f"longbench:{self.dataset}"

    @property
    def kind(self) -> Kind:
        """How the data set is asked and scored."""
        return DATASETS[self.dataset]

    @property
    def new_tokens(self) -> int:
        return self.kind.new_tokens

    def samples(self, encoder: PromptEncoder, settings: TaskSettings) -> list[Sample]:
        """The first rows of the file, without their middle where they have more tokens than `settings.length` leaves them."""
        rows = read_longbench(self.source)[self.dataset][: settings.count]
        return [self._sample(row, encoder, settings.length - self.new_tokens) for row in rows]

    def score(self, prediction: str, sample: Sample) -> float:
        if self.kind.first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        metric = self.kind.metric
        if metric is metrics.classification:
            metric = functools.partial(metric, classes=sample.classes)
        return max(metric(prediction, answer) for answer in sample.answers)

    def _sample(self, row: Row, encoder: PromptEncoder, size: int) -> Sample:
        prompt = _filled(self.kind.prompt, row)
        tokens = _without_middle(prompt, functools.partial(encoder.encode, chat=self.kind.chat), encoder, size)
        return Sample(np.array(tokens, np.int32), row.answers, classes=row.classes)


def _filled(prompt: str, row: Row) -> str:
    """The prompt with its fields; braces in the fields themselves stay as they are."""
    head, _, rest = prompt.partition("{context}")
    return f"{head}{row.context}{rest.replace('{input}', row.input)}"


def _without_middle(text: str, encode: Callable[[str], list[int]], encoder: PromptEncoder, size: int) -> list[int]:
    """Tokens of a prompt: the first and the last halves of what fits, decoded and joined, as LongBench cuts.

    Text that is decoded and joined may have other tokens, so what is kept shrinks until the prompt fits.
    """
    tokens = encode(text)
    if len(tokens) <= size:
        return tokens
    plain = encoder.tokenizer.encode(text, special_tokens=False)
    keep = size - (len(encode("")) if encoder.is_chat else 0)
    while keep >= 2:
        half = keep // 2
        ends = (encoder.tokenizer.decode(part, skip_special_tokens=False) for part in (plain[:half], plain[-half:]))
        tokens = encode("".join(ends))
        if len(tokens) <= size:
            return tokens
        keep -= max(1, len(tokens) - size)
    raise ValueError(
        f"A prompt must have room besides its chat template and its answer; got {size} tokens. Raise `length`."
    )


@functools.lru_cache(maxsize=4)
def read_longbench(path: Path) -> Mapping[str, list[Row]]:
    """The rows of a file by data set.

    Raises:
      FileNotFoundError: the file is not there.
      ValueError: a row lacks a field, or is of a data set or language that is not supported; the file has no row.
    """
    found: dict[str, list[Row]] = {}
    for place, values in read_lines(path):
        dataset, row = _row(values, place)
        found.setdefault(dataset, []).append(row)
    if not found:
        raise ValueError(f"{path} must hold at least one row of LongBench; got none.")
    return found


def _row(values: Mapping[str, Any], place: str) -> tuple[str, Row]:
    forms = dict(dataset=str, context=str, input=str, answers=list)
    for name, form in forms.items():
        if not isinstance(values.get(name), form):
            raise ValueError(
                f"{place} must have the fields of LongBench ({', '.join(forms)}); {name} is {str(values.get(name))[:40]!r}."
            )
    dataset, language = values["dataset"].removesuffix("_e"), values.get("language", "en")
    if dataset not in DATASETS or language not in LANGUAGES:
        raise ValueError(
            f"{place} must be of an English or code data set of LongBench ({', '.join(DATASETS)}); got {values['dataset']!r}, language "
            f"{language!r}. Leave the file out."
        )
    answers, classes = values["answers"], values.get("all_classes") or []
    if not answers or not all(isinstance(text, str) for text in (*answers, *classes)):
        raise ValueError(f"{place} must have one or more texts as answers, and texts as all_classes; got {answers!r}.")
    if DATASETS[dataset].metric is metrics.classification and not classes:
        raise ValueError(f"{place} must have all_classes, the labels of {dataset}; got none.")
    return dataset, Row(values["context"], values["input"], tuple(answers), tuple(classes))
