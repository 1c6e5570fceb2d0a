"""LongBench's rows: read, asked in the order of their fields, cut in the middle, and scored by their data set's metric."""

import json
from pathlib import Path
from typing import Any

import pytest

from seer_jax.evaluate.tasks import LongBench, PromptEncoder, TaskSettings
from seer_jax.evaluate.tasks.longbench import DATASETS, read_longbench

ROW: dict[str, Any] = {
    "input": "What {context} is it?",
    "context": "It is {input} red.",
    "answers": ["red"],
    "length": 6,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "1",
}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(ROW | row) + "\n" for row in rows))
    return path


def texts(task: LongBench, encoder: PromptEncoder, length: int = 1000) -> list[str]:
    found = task.samples(encoder, TaskSettings(length=length))
    return [encoder.tokenizer.decode(sample.tokens.tolist(), skip_special_tokens=False) for sample in found]


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_data_set_asks_for_its_fields(tmp_path: Path, encoder: PromptEncoder, dataset: str):
    row = dict(dataset=dataset, answers=["Paragraph 3"], all_classes=["Paragraph 3"])
    task = LongBench(dataset, write(tmp_path / "rows.jsonl", row))
    (text,) = texts(task, encoder)
    assert "It is {input} red." in text
    # Summaries of a context, counts in it and the next line of it have no input.
    has_none = dataset in ("gov_report", "multi_news", "passage_count", "lcc")
    assert ("What {context} is it?" in text) == (not has_none)
    assert ("<turn>model" in text) == (encoder.is_chat and DATASETS[dataset].chat)
    (sample,) = task.samples(encoder, TaskSettings(length=1000))
    right = "3" if dataset == "passage_count" else "Paragraph 3"
    if dataset == "passage_count":
        assert task.score(right, sample) == 0  # the answer of a count is the number alone
    else:
        assert task.score(right, sample) == 1 and task.score("nothing", sample) < 0.6


def test_the_best_answer_counts_and_the_first_line_where_examples_are_shown(tmp_path: Path, encoder: PromptEncoder):
    rows = dict(answers=["blue", "dark red"]), dict(answers=["blue"], dataset="triviaqa")
    path = write(tmp_path / "rows.jsonl", *rows)
    (best,), (first,) = (
        LongBench(name, path).samples(encoder, TaskSettings(length=1000)) for name in ("hotpotqa", "triviaqa")
    )
    assert LongBench("hotpotqa", path).score("red", best) == pytest.approx(2 / 3)
    assert LongBench("triviaqa", path).score("\nblue\nPassage: red", first) == 1
    assert LongBench("triviaqa", path).score("red\nblue", first) == 0


def test_long_prompts_lose_their_middle(tmp_path: Path, encoder: PromptEncoder):
    words = " ".join(f"word{i}" for i in range(600))
    path = write(tmp_path / "rows.jsonl", dict(context=f"START {words} END"))
    (sample,) = LongBench("hotpotqa", path).samples(encoder, TaskSettings(length=800))
    assert 800 - 32 - 8 <= len(sample.tokens) <= 800 - 32
    text = encoder.tokenizer.decode(sample.tokens.tolist(), skip_special_tokens=False)
    assert "START word0" in text and "word599 END" in text and "word300" not in text
    assert text.count("What {context} is it?") == 1 and ("<turn>model" in text) == encoder.is_chat
    with pytest.raises(ValueError, match="must have room besides its chat template and its answer; got 1 tokens"):
        LongBench("hotpotqa", path).samples(encoder, TaskSettings(length=33))


def test_rows_are_sorted_by_data_set(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", {}, dict(dataset="lcc", language="python"), dict(dataset="hotpotqa_e"))
    assert {name: len(rows) for name, rows in read_longbench(path).items()} == {"hotpotqa": 2, "lcc": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (dict(language="zh"), r"rows.jsonl:1 must be of an English or code data set .*; got 'hotpotqa', language 'zh'"),
        (dict(dataset="dureader"), "got 'dureader', language 'en'. Leave the file out"),
        (dict(context=None), "must have the fields of LongBench .*; context is 'None'"),
        (dict(answers=[]), r"one or more texts as answers, and texts as all_classes; got \[\]"),
        (dict(answers=[3]), r"got \[3\]"),
        (dict(dataset="trec"), "must have all_classes, the labels of trec; got none"),
    ],
)
def test_other_rows_are_refused(tmp_path: Path, row: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        read_longbench(write(tmp_path / "rows.jsonl", row))


def test_empty_and_missing_files_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="at least one row of LongBench; got none"):
        read_longbench(write(tmp_path / "rows.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"tasks must name files that are there; got .*absent.jsonl"):
        read_longbench(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="dataset must be one of narrativeqa"):
        LongBench("squad", tmp_path / "rows.jsonl")
