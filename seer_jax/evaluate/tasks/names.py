"""Tasks by the names that a command line gives."""

import difflib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from seer_jax.evaluate.tasks.base import TASKS, Task
from seer_jax.evaluate.tasks.longbench import LongBench, read_longbench
from seer_jax.evaluate.tasks.ruler import RULER, QuestionAnswering
from seer_jax.evaluate.tasks.ruler.passages import read_passages

HARNESS = "lm_eval"
KINDS = ("ruler", "longbench", "qa", HARNESS)
SYNTAX = (
    "ruler, ruler:NAME or NAME (a task in RULER's form, or all whose names begin so), longbench:FILE.jsonl, qa:FILE (passages and "
    "questions as SQuAD or HotpotQA have them), lm_eval:NAME or NAME (a task of lm-evaluation-harness)"
)
REMEDY = "Install lm-evaluation-harness for its tasks: pip install 'seer-jax[eval]'"


class NamedTasks(NamedTuple):
    """What names stand for.

    Fields:
      tasks: with prompts of their own.
      harness: names of tasks of lm-evaluation-harness.
    """

    tasks: tuple[Task, ...]
    harness: tuple[str, ...]


def find_tasks(names: Sequence[str]) -> NamedTasks:
    """The tasks of some names, each once.

    Raises:
      FileNotFoundError: a file is not there.
      ValueError: a name stands for no task, or a file is of another form.
      ImportError: a task is one of lm-evaluation-harness, which is not installed.
    """
    tasks: dict[str, Task] = {}
    harness: dict[str, None] = {}
    for name in names:
        found = _find(name)
        if isinstance(found, str):
            harness[found] = None
            continue
        for task in found:
            if tasks.setdefault(task.name, task) != task:
                raise ValueError(
                    f"tasks must have names of their own; got two that are {task.name!r}. Name one of them."
                )
    return NamedTasks(tuple(tasks.values()), tuple(harness))


def _find(name: str) -> Sequence[Task] | str:
    kind, colon, rest = name.partition(":")
    if name == "ruler" or (kind == "ruler" and colon):
        if found := RULER if name == "ruler" else _beginning(rest, RULER):
            return found
        raise ValueError(f"tasks must be known; got {name!r}.{_hint(rest)} Those in RULER's form are {_listed(RULER)}.")
    if colon and kind == "longbench":
        return [LongBench(dataset, Path(rest)) for dataset in read_longbench(Path(rest))]
    if colon and kind == "qa":
        read_passages(Path(rest))
        return [QuestionAnswering(f"qa:{Path(rest).stem}", Path(rest))]
    if found := [] if colon else _beginning(name, TASKS.values()):
        return found
    if kind == HARNESS and colon:
        return _of_harness(rest)
    if colon and kind not in TASKS and importlib.util.find_spec(HARNESS) is None:
        raise ValueError(f"tasks must be {SYNTAX}; got {name!r}.")
    return _of_harness(name)


def _beginning(name: str, tasks: Iterable[Task]) -> list[Task]:
    """The task of a name, otherwise those whose names go on behind it."""
    tasks = list(tasks)
    return [task for task in tasks if task.name == name] or [t for t in tasks if name and t.name.startswith(f"{name}_")]


def _of_harness(name: str) -> str:
    if importlib.util.find_spec(HARNESS) is None:
        raise ImportError(f"tasks must be known; got {name!r}.{_hint(name)} {REMEDY}.")
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    if name not in (known := TaskManager().all_tasks):
        raise ValueError(f"tasks must be {SYNTAX}; got {name!r}.{_hint(name, known)}")
    return name


def _hint(name: str, further: Iterable[str] = ()) -> str:
    close = difflib.get_close_matches(name, [*TASKS, *further], n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _listed(tasks: Iterable[Task]) -> str:
    return ", ".join(task.name for task in tasks)
