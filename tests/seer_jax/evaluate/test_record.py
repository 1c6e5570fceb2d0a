"""scores.json: continued where it fits, refused in one line where it does not or is damaged."""

import json
import math
import random
from pathlib import Path

import pytest

from seer_jax.evaluate import Phase, PromptScore, Record, Score, WindowScore
from seer_jax.evaluate.comparison import Measurement
from seer_jax.evaluate.record import describe_file, describe_folder
from seer_jax.selection.notation import policy_to_json
from seer_jax.selection.policies import Dense
from seer_jax.selection.rules import TopK

IDENTITY = {"settings": {"length": 256, "phases": (Phase.DECODE,)}, "text": "ab", "gates": ["cd"]}


def score(method: str | None) -> Score:
    windows, prompts = (WindowScore(1.5, 0.5), WindowScore(math.nan, 0.5)), (PromptScore(0.1, True, 1.0, 0.5),)
    policy = policy_to_json(Dense() if method is None else TopK(0.1))
    return Score(Phase.DECODE, method, "topk:0.1", windows, prompts, 14, 1.0, policy)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a record with two of three scores."""
    path = tmp_path / "out" / "scores.json"
    record = Record(path, {"command": "x"}, IDENTITY)
    for method in (None, "gate"):
        record.add(score(method), planned=3)
    return path


def test_a_record_goes_on_where_it_stopped(path: Path):
    record = Record(path, {"command": "x"}, IDENTITY)
    assert [s.key for s in record.scores] == [score(None).key, score("gate").key]
    before = path.read_text()
    record.add(record.scores[0], planned=3)
    assert path.read_text() == before and not json.loads(before)["complete"]
    record.add(score("window"), planned=3)
    after = json.loads(path.read_text())
    assert len(after["scores"]) == 3 and after["complete"] and after["command"] == "x"
    assert Record(path, {}, {}, force=True).scores == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "xy"}, 'text was "ab", now "xy". Repeat its settings'),
        ({"gates": []}, r'gates was \["cd"\], now \[\]'),
        (
            {"settings": {"length": 512, "phases": ["decode"], "seed": 1}},
            "length was 256, now 512, settings.seed was null, now 1",
        ),
        ({"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}, "c was null, now 1, and 2 more"),
    ],
)
def test_another_evaluation_is_refused_by_what_differs(path: Path, change: dict, message: str):
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"scores.json holds scores of another evaluation: .*{message}"):
        Record(path, {}, IDENTITY | change)
    assert path.read_bytes() == before


def test_scores_are_those_of_the_policies_that_are_asked_for(path: Path):
    record = Record(path, {}, IDENTITY)
    same, other, new = (
        Measurement(Phase.DECODE, "gate", level, TopK(density))
        for level, density in (("topk:0.1", 0.1), ("topk:0.1", 0.2), ("topk:0.2", 0.2))
    )
    record.check_policies([same, new])
    with pytest.raises(ValueError, match=r"decode gate at topk:0.1 has another density\. Give the policy another name"):
        record.check_policies([new, other])
    path.write_text(path.read_text().replace('"method": "gate"', '"method": "mine"'))
    with pytest.raises(ValueError, match=r"registered scorers; got mine\. Name their module \(--scorers MODULE\)"):
        Record(path, {}, IDENTITY)


def test_damage_is_refused_in_one_line(path: Path):
    rng, whole, refused = random.Random(0), path.read_bytes(), 0
    pieces = [b"{", b"]", b"null", b'"', b"-1e999", b"NaN", b"[[" * 5000, bytes([200]), b"0" * 5000]
    for _ in range(300):
        at, cut = rng.randrange(len(whole)), rng.randrange(1, 9)
        path.write_bytes(whole[:at] + rng.choice(pieces) + whole[at + cut * rng.randrange(2) :])
        try:
            Record(path, {}, IDENTITY)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "force=True" in str(error)
    assert refused > 100


def test_fingerprints_know_weights_that_were_trained_further(tmp_path: Path):
    folder = tmp_path / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(5 * 2**20))
    (folder / "other").write_text("not counted")
    patterns = ("config.json", "model*.safetensors")
    first = describe_folder("owner/name", folder, patterns)
    assert (first["name"], first["revision"]) == ("owner/name", "abc")
    (folder / "other").write_text("x")
    assert describe_folder("owner/name", folder, patterns) == first
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    changed = describe_folder("owner/name", folder, patterns)["fingerprint"]
    (folder / "config.json").write_text("{}")
    assert len({first["fingerprint"], changed, describe_folder("owner/name", folder, patterns)["fingerprint"]}) == 3
    assert describe_file(folder / "other")["bytes"] == 1 and len(describe_file(folder / "other")["sha256"]) == 64
