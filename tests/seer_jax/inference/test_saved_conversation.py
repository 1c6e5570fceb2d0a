"""Conversations that were saved: they go on exactly, and what does not fit is refused by name."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from seer_jax import Conversation, Transformer
from seer_jax.selection.rules import Threshold, TokenBudget
from tests.seer_jax.conftest import LLAMA, tiny_model

pytestmark = pytest.mark.usefixtures("compile_quickly")

TURNS = [np.random.default_rng(i).integers(0, 63, n).tolist() for i, n in enumerate((37, 16))]
NEW: dict[str, Any] = dict(max_new_tokens=5, eos=())
SETTINGS: dict[str, Any] = dict(prefill=Threshold(0.1, dense_last_rows=0), decode=TokenBudget(32), prefill_chunk=32)


@functools.cache
def first_turn() -> Conversation:
    talk = Conversation(tiny_model(), 100, **SETTINGS)
    talk.generate(TURNS[0], **NEW)
    return talk


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Conversation]:
    """A conversation after its first turn, in its folder and in memory."""
    talk = first_turn()
    talk.save(tmp_path / "talk")
    return tmp_path / "talk", talk


def test_a_loaded_conversation_goes_on_as_the_one_that_was_never_saved(
    saved: tuple[Path, Conversation],
):
    folder, talk = saved
    again = Conversation.load(folder, tiny_model())
    assert again.tokens == talk.tokens and again.capacity == 100
    rows = talk.branch().generate(TURNS[1], **NEW).rows()
    assert again.generate(TURNS[1], **NEW).rows() == rows
    # What is saved is what the next turn does not read again: 32 of the 42 tokens.
    assert {x.shape[2] for name, x in arrays_in(folder).items() if name in ("keys", "values")} == {32}
    again.save(folder)  # over the earlier one, whose arrays go
    assert {x.shape[2] for name, x in arrays_in(folder).items() if name in ("keys", "values")} == {48}
    assert Conversation.load(folder, tiny_model(), capacity=200).tokens == again.tokens


def test_a_conversation_without_turns_in_bfloat16(tmp_path: Path):
    model = tiny_model(dtype=jnp.bfloat16)
    Conversation(model, 100, **SETTINGS).save(tmp_path)
    talk = Conversation.load(tmp_path, model)
    assert talk.tokens == [] and talk.capacity == 100


def test_a_full_conversation_goes_on_with_more_room(tmp_path: Path):
    """Its answer has one token more than the cache has room for, as the last one is never fed."""
    talk = Conversation(tiny_model(), 41, **SETTINGS)
    talk.generate(TURNS[0], **NEW)
    assert len(talk.tokens) == talk.capacity + 1
    talk.save(tmp_path)
    assert Conversation.load(tmp_path, talk.model).tokens == talk.tokens
    more = Conversation.load(tmp_path, talk.model, capacity=100)
    assert more.generate(TURNS[1], **NEW).rows() == first_turn().branch().generate(TURNS[1], **NEW).rows()


@pytest.mark.parametrize(("given", "chunk"), [(None, 1024), (0, 2560), (96, 96)])
def test_turns_are_filled_up_to_chunks_that_are_short_beside_the_conversation(
    given: int | None, chunk: int, tmp_path: Path
):
    Conversation(tiny_model(), 2500, prefill_chunk=given).save(tmp_path)
    assert json.loads((tmp_path / "conversation.json").read_text())["prefill_chunk"] == chunk


def arrays_in(folder: Path) -> dict[str, np.ndarray]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def without_gates() -> Transformer:
    """The model that was saved, not one that is drawn anew: that may differ in its last bits, by how programs are compiled."""
    model = tiny_model()
    model.prefill_gate = model.decode_gate = None
    return model


def other_gate() -> Transformer:
    model = tiny_model()
    model.decode_gate = tiny_model(seed=5).decode_gate
    return model


def gate_without_rope() -> Transformer:
    model = tiny_model()
    gate = model.decode_gate
    assert gate is not None
    gate.config = dataclasses.replace(gate.config, use_rope=False)
    return model


WRONG_MODELS: list[tuple[Callable[[], Transformer], str]] = [
    (lambda: tiny_model(seed=1), r"model\.weights must be \w+, as in .*talk; got \w+\. Load those, or start a new"),
    (lambda: tiny_model(dtype=jnp.bfloat16), "model.dtype must be float32, as in .*; got bfloat16"),
    (
        lambda: tiny_model(dataclasses.replace(LLAMA, intermediate_size=64)),
        "model.intermediate_size must be 48, as in .*; got 64",
    ),
    (without_gates, "prefill_gate.block_size must be 16, as in .*; got None"),
    (other_gate, r"decode_gate\.weights must be \w+, as in"),
    (gate_without_rope, "decode_gate.use_rope must be True, as in .*; got False"),
]


@pytest.mark.parametrize(("model", "message"), WRONG_MODELS, ids=[m.split(" ")[0] for _, m in WRONG_MODELS])
def test_a_conversation_of_another_model_is_refused_by_name(
    model: Callable[[], Transformer], message: str, saved: tuple[Path, Conversation]
):
    with pytest.raises(ValueError, match=message):
        Conversation.load(saved[0], model())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (None, FileNotFoundError, "A conversation's folder must hold conversation.json; .* has none"),
        ("{", ValueError, r"conversation\.json must hold JSON"),
        ("[]", ValueError, "must be a saved conversation; it is JSON of another kind"),
        (dict(layout=2), ValueError, "must have layout version 1, .*; got 2. Load it with the version that saved it"),
        (dict(more=1), ValueError, "must hold tokens, read, capacity, .*, arrays_file; got tokens, .*, more. Save"),
        (dict(prefill=dict(rule="best")), ValueError, "A saved policy must name a rule out of"),
        (
            dict(read=50),
            ValueError,
            r"must hold whole numbers, with 0 <= read <= tokens <= capacity \+ 1; it is damaged",
        ),
        (dict(capacity=40), ValueError, r"must hold whole numbers, with .* <= capacity \+ 1; it is damaged"),
        (dict(tokens=["a"] * 42), ValueError, "must hold whole numbers"),
        (dict(tokens=[64] * 42), ValueError, r"Tokens must lie in \[0, 64\)"),
        (dict(read=10), ValueError, r"must hold keys, float32 \(2, 1, 16, 2, 16\); got float32 \(2, 1, 32, 2, 16\)"),
        (dict(arrays_file="gone.safetensors"), FileNotFoundError, "gone.safetensors"),
        (
            dict(arrays_file="conversation.json"),
            ValueError,
            "must hold what was saved, which its name tells; its bytes are",
        ),
    ],
)
def test_damaged_folders_are_refused(
    changes: Any, error: type[Exception], message: str, saved: tuple[Path, Conversation]
):
    folder, talk = saved
    path = folder / "conversation.json"
    text = json.dumps(json.loads(path.read_text()) | changes) if isinstance(changes, dict) else changes
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(error, match=message):
        Conversation.load(folder, talk.model)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_arrays_that_are_not_those_that_were_saved_are_refused(
    damage: Callable[[bytes], bytes], saved: tuple[Path, Conversation]
):
    folder, talk = saved
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        ValueError, match=r"must hold what was saved, which its name tells; .*\. Save the conversation anew"
    ):
        Conversation.load(folder, talk.model)


@pytest.mark.usefixtures("unchecked")  # sizes may be NumPy's integers
def test_a_folder_stays_whole_where_another_process_saves_too(saved: tuple[Path, Conversation]):
    """It has written its arrays, and is about to write the file that names them. What an interrupted one left goes with the save after the next."""
    folder, talk = saved
    (first,) = folder.glob("*.safetensors")
    other = folder / "cache-0123456789abcdef.safetensors"
    other.write_bytes(b"arrays")
    size: Any = np.int64(100)
    Conversation(talk.model, size, **SETTINGS).save(folder)
    assert other.exists() and not first.exists()
    Conversation.load(folder, talk.model).save(folder)
    assert not other.exists() and len(arrays_in(folder))


@pytest.mark.parametrize(
    ("capacity", "message"), [(40, "capacity must be at least the 41 tokens .* but its last; got 40"), (0, "got 0")]
)
def test_a_capacity_must_hold_the_conversation(capacity: int, message: str, saved: tuple[Path, Conversation]):
    with pytest.raises(ValueError, match=message):
        Conversation.load(saved[0], saved[1].model, capacity=capacity)
