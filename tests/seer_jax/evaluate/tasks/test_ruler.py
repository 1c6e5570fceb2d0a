"""Tasks in RULER's form: sizes exact in tokens, prompts that hold what is asked for, and scores that tell right from wrong."""

import collections
import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from seer_jax import load_tokenizer
from seer_jax.evaluate.tasks import RULER, PromptEncoder, Sample, Task, TaskSettings
from seer_jax.evaluate.tasks.ruler import CommonWords, Needles, QuestionAnswering, VariableTracking
from seer_jax.evaluate.tasks.ruler.haystack import insert
from seer_jax.evaluate.tasks.ruler.passages import generated_passages, read_passages
from seer_jax.evaluate.tasks.ruler.words import NOISE, draw_distinct, sentences, word_pool

LENGTH = 1500
EVERY = pytest.mark.parametrize("task", RULER, ids=lambda task: task.name)


def written(encoder: PromptEncoder, sample: Sample) -> str:
    return encoder.tokenizer.decode(sample.tokens.tolist(), skip_special_tokens=False)


def drawn(task: Task, encoder: PromptEncoder, **settings: int | str | None) -> list[Sample]:
    given = dict(length=LENGTH, count=2) | settings
    return task.samples(encoder, TaskSettings(**given))  # pyright: ignore[reportArgumentType]


@functools.cache
def samples(task: Task, encoder: PromptEncoder) -> list[Sample]:
    """Two of each task, which most tests look at."""
    return drawn(task, encoder)


@EVERY
def test_prompts_fill_their_length_exactly(task: Task, encoder: PromptEncoder):
    assert [len(sample.tokens) + task.new_tokens for sample in samples(task, encoder)] == [LENGTH] * 2
    (longer,) = drawn(task, encoder, length=LENGTH + 1, count=1)
    assert len(longer.tokens) + task.new_tokens == LENGTH + 1


@EVERY
def test_prompts_are_text_as_a_model_reads_it(task: Task, encoder: PromptEncoder):
    """Encoding the text anew gives the same tokens: nothing is cut within a word."""
    for sample in samples(task, encoder):
        text = written(encoder, sample)
        assert encoder.tokenizer.encode(text, special_tokens=False) == sample.tokens.tolist()
        assert text.count("<bos>") == text.count("<turn>model") == int(encoder.is_chat)


@EVERY
def test_answers_are_scored(task: Task, encoder: PromptEncoder):
    is_question = isinstance(task, QuestionAnswering)
    for sample in samples(task, encoder):
        assert task.score(f"I think: {', '.join(sample.answers).upper()}.", sample) == 1
        assert all(answer in written(encoder, sample) for answer in sample.answers)
        wrong = ["", "I do not know.", *(answer[:-1] for answer in sample.answers)]
        assert max(task.score(one, sample) for one in wrong) == 0
        first = task.score(sample.answers[0], sample)
        assert first == (1 if is_question else pytest.approx(1 / len(sample.answers)))


@EVERY
def test_seeds_reproduce(task: Task, encoder: PromptEncoder):
    first, second = samples(task, encoder)
    assert first.answers != second.answers
    (again,), (other,) = (drawn(task, encoder, seed=seed, count=1) for seed in (0, 1))
    if not isinstance(task, QuestionAnswering):  # whose questions are drawn together
        assert again.tokens.tolist() == first.tokens.tolist() and again.answers == first.answers
    assert other.answers != again.answers


@pytest.mark.parametrize("name", ["niah_single_1", "cwe", "fwe", "vt", "qa_1hop"])
def test_too_short_a_prompt_is_refused(name: str, encoder: PromptEncoder):
    task = next(task for task in RULER if task.name == name)
    with pytest.raises(ValueError, match=r"must have room for its text and question: at least \d+ .* Raise `length`"):
        drawn(task, encoder, length=task.new_tokens + 40)


NEEDLE = re.compile(r"One secret (word|number|code) of (\S+) is ([\w-]+)\.")


@pytest.mark.parametrize("task", [t for t in RULER if isinstance(t, Needles)], ids=lambda task: task.name)
def test_needles(task: Needles, encoder: PromptEncoder):
    for sample in samples(task, encoder):
        text = written(encoder, sample)
        found = collections.defaultdict(list)
        for _, key, value in NEEDLE.findall(text):
            found[key].append(value)
        question = text[text.rindex("\nWhat ") :]
        asked = [key for key in found if key in question]
        assert len(asked) == task.queries
        assert sorted(value for key in asked for value in found[key]) == sorted(sample.answers)
        assert all(len(found[key]) == task.values for key in asked)
        assert len(found) > task.keys if task.hay == "needles" else len(found) == task.keys
        assert (f"{NOISE}\n{NOISE}" in text) == (task.hay == "noise")
        assert sample.depth is not None and 0 <= sample.depth <= 1


def test_needles_stand_at_their_depth(encoder: PromptEncoder):
    task = next(task for task in RULER if task.name == "niah_single_1")
    for sample in samples(task, encoder):
        text = written(encoder, sample)
        place = (text.index(sample.answers[0]) - text.index(NOISE)) / (
            text.rindex(NOISE) + len(NOISE) - text.index(NOISE)
        )
        assert place == pytest.approx(sample.depth, abs=0.12)


def test_needles_are_hidden_in_a_text_of_the_users(encoder: PromptEncoder):
    task = next(task for task in RULER if task.name == "niah_single_2")
    essay = "Snow lay on the roof. Nobody was at home! Why not? We never knew."
    for sample in drawn(task, encoder, essay=essay, count=1):
        text = written(encoder, sample)
        assert text.count("Nobody was at home!") > 10 and len(NEEDLE.findall(text)) == 1
    with pytest.raises(ValueError, match="essay must hold words"):
        TaskSettings(essay=" \n")


def test_variables_follow_their_chain(encoder: PromptEncoder):
    for sample in drawn(VariableTracking("vt_two", chains=2, hops=3), encoder, length=600):
        text = written(encoder, sample)
        value = dict(re.findall(r"VAR (\w+) = (\d+)", text))
        for new, old in re.findall(r"VAR (\w+) = VAR (\w+)", text):
            value[new] = value[old]  # an assignment comes after the one that it needs
        asked = re.findall(r"the value (\d+)", text)[0]
        assert sorted(name for name, number in value.items() if number == asked) == sorted(sample.answers)
        assert len(value) == 8 and len(sample.answers) == 4


@pytest.mark.parametrize(("length", "often", "seldom"), [(LENGTH, 6, 1), (6500, 30, 3)])
def test_common_words_are_the_most_common(length: int, often: int, seldom: int):
    task = next(task for task in RULER if isinstance(task, CommonWords))
    encoder = PromptEncoder(load_tokenizer("tiny-lm"))
    (sample,) = drawn(task, encoder, length=length, count=1)
    listed = written(encoder, sample).split("Remember those that occur most often.\n")[2].split("\nQuestion")[0]
    numbers, words = zip(*re.findall(r"(\d+)\. ([a-z-]+)", listed), strict=True)
    assert list(map(int, numbers)) == list(range(1, len(words) + 1))
    counts = collections.Counter(words)
    assert {word for word, n in counts.items() if n == often} == set(sample.answers)
    assert max(n for word, n in counts.items() if word not in sample.answers) <= seldom


def test_frequent_words_are_the_most_frequent(encoder: PromptEncoder):
    task = next(task for task in RULER if task.name == "fwe")
    for sample in samples(task, encoder):
        coded = written(encoder, sample).split("most frequent ones.")[-1].split("\nQuestion")[0].split()
        (dots, _), *most = collections.Counter(word for word in coded if len(word) in (3, 6)).most_common(5)
        assert dots == "..." and [word for word, _ in most[:3]] == list(sample.answers) and most[2][1] > most[3][1]


@pytest.mark.parametrize("hops", [1, 2])
def test_generated_questions_follow_from_passages_alone(hops: int):
    given = generated_passages(hops)
    assert len(set(given.passages)) == len(given.passages)
    for question in given.questions[::100]:
        read = [given.passages[i] for i in question.passages]
        (answer,) = question.answers
        assert len(read) == hops and answer in read[-1] and (hops == 1 or answer not in read[0])


def test_question_and_its_passages_are_in_the_prompt(encoder: PromptEncoder):
    for sample in drawn(QuestionAnswering("qa", hops=2), encoder, count=1):
        text = written(encoder, sample)
        asked = re.findall(r"where (\w+) was born\?", text)[0]
        town = re.findall(rf"{asked} was born in (\w+)", text)[0]
        assert f"{town} is a town in the land of {sample.answers[0]}" in text
        numbers = [int(n) for n in re.findall(r"Passage (\d+):", text)]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 5


SQUAD = {"data": [{"paragraphs": [
    {"context": "Mill is in Ost.", "qas": [
        {"question": "Where is Mill?", "answers": [{"text": "Ost"}, {"text": "in Ost"}], "is_impossible": False},
        {"question": "Who?", "answers": [], "is_impossible": True},
    ]},
    {"context": "Farn is in West.", "qas": [{"question": "Where is Farn?", "answers": [{"text": "West"}]}]},
]}]}  # fmt: skip
ROW = {"question": "Where is Mill?", "context": "Mill is in Ost.", "answers": {"text": ["Ost"], "answer_start": [11]}}
OTHER = {"question": "Where is Farn?", "context": "Farn is in West.", "answers": ["West"]}
HOTPOT = {
    "question": "Which land?",
    "answer": "Ost",
    "context": [["Mill", ["Mill is in A.", " It is old."]], ["A", ["A is in Ost."]]],
}
HUB = HOTPOT | {"context": {"title": ["Mill", "A"], "sentences": [["Mill is in A.", " It is old."], ["A is in Ost."]]}}


@pytest.mark.parametrize(
    ("name", "text", "passages", "answers"),
    [
        ("squad.json", json.dumps(SQUAD), ["Mill is in Ost.", "Farn is in West."], [("Ost", "in Ost"), ("West",)]),
        (
            "rows.jsonl",
            f"{json.dumps(ROW)}\n\n{json.dumps(OTHER)}\n",
            [ROW["context"], OTHER["context"]],
            [("Ost",), ("West",)],
        ),
        ("hotpot.json", json.dumps([HOTPOT]), ["Mill\nMill is in A. It is old.", "A\nA is in Ost."], [("Ost",)]),
        ("hub.jsonl", json.dumps(HUB), ["Mill\nMill is in A. It is old.", "A\nA is in Ost."], [("Ost",)]),
    ],
)
def test_passages_are_read(tmp_path: Path, name: str, text: str, passages: list[str], answers: list[tuple[str, ...]]):
    (tmp_path / name).write_text(text)
    given = read_passages(tmp_path / name)
    assert list(given.passages) == passages and [q.answers for q in given.questions] == answers


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "a.json must hold JSON"),
        ("a.jsonl", '{"question": 1', "a.jsonl:1, a line of a JSONL file, must hold JSON"),
        ("a.jsonl", "[1]", "a.jsonl:1 must hold a JSON object"),
        ("a.json", "3", "must hold SQuAD's JSON, or objects .*; it holds something else"),
        ("a.json", '{"data": [{"x": 1}]}', "got another form .KeyError: 'paragraphs'"),
        ("a.jsonl", '\n{"question": "Who?", "context": "a"}', "a.jsonl:2 must be of .* got another form .KeyError: 'answers'"),
        ("a.jsonl", json.dumps(ROW | {"question": 3}), "texts must be strings"),
        ("a.jsonl", json.dumps(ROW | {"answers": "Ost"}), "answers must be a list"),
        ("a.jsonl", json.dumps(ROW), "at least one answerable question and two passages; got 1 and 1"),
        ("a.jsonl", "", "at least one answerable question and two passages; got 0 and 0"),
    ],
)  # fmt: skip
def test_other_passages_are_refused(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_passages(tmp_path / name)


def test_questions_of_a_file(tmp_path: Path, encoder: PromptEncoder):
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    task = QuestionAnswering("qa:squad", tmp_path / "squad.json")
    found = drawn(task, encoder, length=600, count=5)
    assert sorted(s.answers for s in found) == [("Ost", "in Ost"), ("West",)]
    assert [len(s.tokens) for s in found] == [600 - 32] * 2
    for sample in found:
        assert task.score(f"{sample.answers[0]}!", sample) == 1 and task.score("elsewhere", sample) == 0
    (tmp_path / "one.jsonl").write_text(json.dumps(HOTPOT))
    with pytest.raises(ValueError, match="passages of a question must be fewer than all; got 2 of 2"):
        drawn(QuestionAnswering("qa:one", tmp_path / "one.jsonl"), encoder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(keys=0), "keys must be an integer of at least 1; got 0"),
        (dict(queries=2), "queries must be at most keys = 1; got 2"),
        (dict(hay="straw"), "hay must be one of noise, essay, needles; got 'straw'"),
        (dict(value_kind="dates"), "value_kind must be one of words, numbers, uuids; got 'dates'"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, str | int], message: str, unchecked: None):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Needles("mine", "noise"), **changes)  # pyright: ignore[reportArgumentType]


def test_statements_are_inserted_by_depth():
    assert insert("abcd", [(0.0, "1"), (0.5, "2"), (0.6, "3"), (1.0, "4")]) == list("1ab23cd4")


def test_words_are_different():
    assert len(set(word_pool(20000))) == 20000
    chosen = draw_distinct(lambda rng: str(rng.integers(4)), 3, np.random.default_rng(0), taken=["2"])
    assert sorted(chosen) == ["0", "1", "3"]
    assert len(set(sentences(None))) > 1900
