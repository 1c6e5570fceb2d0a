"""Names of tasks on a command line: what each stands for, and what is said of one that stands for none."""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from seer_jax.evaluate.tasks import RULER, find_tasks, names
from seer_jax.evaluate.tasks.base import TASKS, register
from seer_jax.evaluate.tasks.ruler import VariableTracking


@pytest.fixture(autouse=True)
def no_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [dict(question="Who?", context=f"{name} is here.", answers=[name]) for name in ("Ann", "Bob")]
    (tmp_path / "people.jsonl").write_text("\n".join(map(json.dumps, rows)))
    long = [dict(dataset=name, context="a", input="b", answers=["c"]) for name in ("qasper", "lcc")]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, long)))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (["ruler"], [task.name for task in RULER]),
        (["niah_single_1", "ruler:vt"], ["niah_single_1", "vt"]),
        (["niah_single"], ["niah_single_1", "niah_single_2", "niah_single_3"]),
        (["ruler:niah_multi"], []),
        (["qa", "qa_1hop"], ["qa_1hop", "qa_2hop"]),
        (["longbench:long.jsonl"], ["longbench:qasper", "longbench:lcc"]),
        (["qa:people.jsonl", "cwe"], ["qa:people", "cwe"]),
    ],
)
def test_names_stand_for_tasks(files: None, asked: list[str], found: list[str]):
    if not found:
        with pytest.raises(
            ValueError, match=r"tasks must be known; got 'ruler:niah_multi'\. Did you mean niah_multivalue"
        ):
            find_tasks(asked)
        return
    assert [task.name for task in find_tasks(asked).tasks] == found


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (
            "hellaswag",
            ImportError,
            r"tasks must be known; got 'hellaswag'\. Install .*: pip install 'seer-jax\[eval\]'\.$",
        ),
        ("lm_eval:arc", ImportError, r"got 'arc'\. Install lm-evaluation-harness"),
        ("niah_singel_1", ImportError, "Did you mean niah_single_1"),
        ("ruler:", ValueError, "Those in RULER's form are niah_single_1, "),
        ("longbank:a.jsonl", ValueError, "tasks must be ruler, ruler:NAME .*; got 'longbank:a.jsonl'"),
        ("longbench:absent.jsonl", FileNotFoundError, "got 'absent.jsonl', which is not"),
        ("qa:absent.json", FileNotFoundError, "got 'absent.json', which is not"),
        ("", ImportError, "tasks must be known; got ''"),
    ],
)
def test_a_name_without_a_task_is_refused(files: None, asked: str, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        find_tasks([asked])


def test_the_same_name_for_two_files_is_refused(files: None, tmp_path: Path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "long.jsonl").write_bytes((tmp_path / "long.jsonl").read_bytes())
    with pytest.raises(ValueError, match="names of their own; got two that are 'longbench:qasper'"):
        find_tasks(["longbench:long.jsonl", "longbench:more/long.jsonl"])


def test_tasks_of_the_harness(monkeypatch: pytest.MonkeyPatch):
    """A stand-in of the package: what it knows is asked for, what it does not is refused."""
    module: Any = types.ModuleType("lm_eval.tasks")
    module.TaskManager = lambda: types.SimpleNamespace(all_tasks=["arc_easy", "hellaswag", "vt"])
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found" if name == names.HARNESS else None)
    found = find_tasks(["hellaswag", "vt", "lm_eval:vt", "hellaswag"])
    assert [task.name for task in found.tasks] == ["vt"] and found.harness == ("hellaswag", "vt")
    with pytest.raises(ValueError, match=r"got 'helaswag'\. Did you mean hellaswag"):
        find_tasks(["helaswag"])


def test_a_task_of_ones_own_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("seer_jax.evaluate.tasks.base.TASKS", TASKS.copy())
    monkeypatch.setattr(names, "TASKS", known := {})
    task = VariableTracking("mine", hops=2)
    known[task.name] = task
    assert find_tasks(["mine"]).tasks == (task,)
    with pytest.raises(ValueError, match="A task's name must be its own; got 'vt'"):
        register(VariableTracking("vt", hops=2))
