"""Folders are taken for what they hold, or refused with what is there and where it belongs."""

import json
from pathlib import Path
from typing import Any

import pytest

from seer_jax.folders import check_is_base, check_is_gate, contents
from seer_jax.models.hub import resolve_gate, resolve_gates

GATE = {"config.json": {"base_model": "some/base", "seerattn_gate_type": "Qavg_Kmax"}, "attn_gate_weights.pth": None}
BASE = {"config.json": {"model_type": "llama"}, "model.safetensors": None, "tokenizer.json": {}}
ADAPTER = {"adapter_config.json": {"peft_type": "LORA"}, "config.json": {"model_type": "llama"}}
RUN = {"config.json": {"model": "some/base", "optimizer": {}, "sequence_length": 64}, "metrics.jsonl": None}


def in_folder(name: str, files: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}/{path}": value for path, value in files.items()}


FOLDERS = {
    "gate": GATE,
    "base": BASE,
    "both": BASE | GATE,
    "run": RUN,
    "finished": RUN | in_folder("prefill_gate", GATE) | in_folder("decode_gate", GATE),
    "half": RUN | in_folder("decode_gate", GATE),
    "adapter": ADAPTER,
    "tuned": RUN | in_folder("model", BASE) | in_folder("adapter", ADAPTER),
    "adapting": RUN | in_folder("adapter", ADAPTER | {"adapter_config.json": {"base_model_name_or_path": "x/y"}}),
    "other": {f"{letter}.txt": None for letter in "abcdefg"},
    "damaged": {"config.json": "["},
    "empty": {},
}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name, files in FOLDERS.items():
        (tmp_path / name).mkdir()
        for path, value in files.items():
            file = tmp_path / name / path
            file.parent.mkdir(exist_ok=True)
            file.write_text(value if isinstance(value, str) else "" if value is None else json.dumps(value))
    return tmp_path


CONTENTS = [
    ("gate", "a gate of 'some/base'"),
    ("base", "base weights"),
    ("both", "base weights and a gate of 'some/base'"),
    ("run", "a training run without gates so far"),
    ("finished", "a training run with gates in prefill_gate and decode_gate"),
    ("half", "a training run with gates in decode_gate"),
    ("adapter", "a LoRA adapter"),
    ("tuned", "a training run with a model in model"),
    ("other", "a.txt, b.txt, c.txt, d.txt, e.txt and more"),
    ("damaged", "config.json"),
    ("empty", "nothing"),
]


@pytest.mark.parametrize(("name", "text"), CONTENTS)
def test_contents_are_named(name: str, text: str, folders: Path):
    assert contents(folders / name) == text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gate", r"must hold a base model; got a gate of 'some/base'\. Give model=some/base and gates=.*/gate\."),
        ("run", r"must hold a base model; got a training run without gates so far\. Give model=some/base\.$"),
        (
            "finished",
            r"got a training run with gates in prefill_gate and decode_gate\. Give model=some/base and gates=.*",
        ),
        ("adapter", r"must hold a base model; got a LoRA adapter\. Give model=\.\.\. and adapter=.*/adapter\.$"),
        ("tuned/adapter", r"must hold a base model; got a LoRA adapter\. Give model=.*/tuned/model\.$"),
        ("adapting", r"got a training run without gates so far\. Give model=x/y and adapter=.*/adapting\.$"),
        ("tuned", r"must hold a base model; got a training run with a model in model\. Give model=.*/tuned/model\.$"),
        *((name, None) for name in ("base", "both", "other", "damaged", "empty")),
    ],
)
def test_what_is_no_base_is_refused(name: str, message: str | None, folders: Path):
    if message is None:  # what reads the folder tells what is absent
        check_is_base(folders / name)
    else:
        with pytest.raises(ValueError, match=message):
            check_is_base(folders / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gate", None),
        ("both", None),
        ("base", r"has neither but base weights\. Give it as the base model"),
        ("run", r"has neither but a training run without gates so far\. Gates are written with the checkpoints"),
        ("other", r"has neither but a\.txt, .* and more\. Check that the download is complete"),
        ("empty", "has neither but nothing"),
    ],
)
def test_what_is_no_gate_is_refused(name: str, message: str | None, folders: Path):
    if message is None:
        check_is_gate(folders / name)
    else:
        with pytest.raises(FileNotFoundError, match=message):
            check_is_gate(folders / name)


def test_runs_stand_for_their_gates_and_files_for_their_folder(folders: Path):
    both = [folders / "finished" / name for name in ("prefill_gate", "decode_gate")]
    assert resolve_gates(folders / "finished", ["*"]) == both
    assert resolve_gates([folders / "half", folders / "both"], ["*"]) == [
        folders / "half/decode_gate",
        folders / "both",
    ]
    assert resolve_gates(folders / "gate" / "attn_gate_weights.pth", ["*"]) == [folders / "gate"]
    assert resolve_gate(folders / "gate" / "config.json", ["*"]) == folders / "gate"
    with pytest.raises(ValueError, match=r"A single gate must be named; got .*finished.*, which stands for 2 gates"):
        resolve_gate(folders / "finished", ["*"])
