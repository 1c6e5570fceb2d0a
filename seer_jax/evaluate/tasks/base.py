"""What a task is: prompts with known answers, the score of a prediction, and the registry of tasks by name."""

import abc
import dataclasses
import enum
import zlib

import numpy as np
from jaxtyping import Int

from seer_jax.checks import whole_number
from seer_jax.inference.text import Tokenizer


class TaskPhase(enum.StrEnum):
    """What a policy of a task makes sparse: prompts, new tokens, or both at once."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt and what its answer is scored by.

    Attributes:
      tokens: of the prompt, chat template and beginning of the answer included.
      answers: what a right prediction contains or equals, by the task's metric.
      depth: where the first answer stands in the text, as a share of it; None: nowhere in particular.
      classes: labels that the answer is one of; () for other tasks.
    """

    tokens: Int[np.ndarray, "T"]
    answers: tuple[str, ...]
    depth: float | None = None
    classes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PromptEncoder:
    """Prompts as tokens.

    Attributes:
      tokenizer: of the model.
      chat: render a prompt as the message of a user by the model's chat template, where it has one.
    """

    tokenizer: Tokenizer
    chat: bool = True

    @property
    def is_chat(self) -> bool:
        """Whether prompts are rendered by a chat template."""
        return self.chat and bool(self.tokenizer.chat_templates)

    def encode(self, text: str, prefix: str = "", *, chat: bool = True) -> list[int]:
        """Tokens of a prompt, with the beginning of the answer that the model goes on from.

        A chat template that knows `enable_thinking` gets False, as the answer begins at once.

        Args:
          text: of the prompt.
          prefix: beginning of the answer, "" for none.
          chat: False: plain text also where there is a template.
        """
        if self.is_chat and chat:
            message = dict(role="user", content=text)
            rendered = self.tokenizer.render_chat([message], enable_thinking=False)
            return self.tokenizer.encode(rendered + prefix, special_tokens=False)
        return self.tokenizer.encode(f"{text} {prefix}" if prefix else text)


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """How samples are drawn.

    Attributes:
      length: tokens of a prompt and of the room for its answer together.
      count: number of samples, at most; a task read from a file may have fewer.
      seed: of everything that is drawn at random.
      essay: text that needles are hidden in; None: generated sentences.
    """

    length: int = 4096
    count: int = 25
    seed: int = 0
    essay: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("count", 1), ("seed", 0)):
            whole_number(name, getattr(self, name), f"an integer of at least {least}", least=least)
        if self.essay is not None and not self.essay.split():
            raise ValueError("essay must hold words; got none. Use another text, or leave it out.")

    def generator(self, task: str, number: int) -> np.random.Generator:
        """The random numbers of one sample: they depend on neither other samples nor other tasks."""
        return np.random.default_rng((self.seed, zlib.crc32(task.encode()), number))


class Task(abc.ABC):
    """Prompts with known answers. A task is a frozen dataclass.

    Attributes:
      name: as a command line writes it.
      new_tokens: tokens that the answer has room for.
    """

    name: str
    new_tokens: int

    @abc.abstractmethod
    def samples(self, encoder: PromptEncoder, settings: TaskSettings) -> list[Sample]:
        """The samples; equal settings give equal ones.

        Raises:
          ValueError: a prompt does not fit `settings.length`.
        """

    @abc.abstractmethod
    def score(self, prediction: str, sample: Sample) -> float:
        """Score of a prediction, from 0 (wrong) to 1 (right)."""


TASKS: dict[str, Task] = {}


def register[T: Task](task: T) -> T:
    """Makes a task known by its name.

    Raises:
      ValueError: another task has the name.
    """
    if TASKS.get(task.name, task) != task:
        raise ValueError(
            f"A task's name must be its own; got {task.name!r}, which is {TASKS[task.name]}. Choose another name."
        )
    TASKS[task.name] = task
    return task
