"""Tokenizers and streamed text."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

import seer_jax
from seer_jax.inference.text import REPLACEMENT, Tokenizer

TINY_LM = Path(seer_jax.__file__).parent / "tiny_lm"
BYTE_LEVEL = Tokenizer.load(TINY_LM)


def byte_fallback() -> Tokenizer:
    """A tokenizer as Llama 2 had: words begin with U+2581, whatever is unknown is bytes."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + [*"▁abcdé", "▁a", "ab"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=[("▁", "a"), ("a", "b")],
            byte_fallback=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


BYTE_FALLBACK = byte_fallback()


def streamed(tokenizer: Tokenizer, tokens: list[int], sizes: int) -> list[str]:
    text = tokenizer.stream()
    pieces = [text.push(tokens[start : start + sizes]) for start in range(0, len(tokens), sizes)]
    return [*pieces, text.finish()]


@given(st.lists(st.integers(0, 4095), max_size=40), st.integers(1, 5))
def test_a_stream_of_any_tokens_gives_their_text(tokens: list[int], sizes: int):
    """Random tokens: special ones, and bytes that are no UTF-8, among them."""
    assert "".join(streamed(BYTE_LEVEL, tokens, sizes)) == BYTE_LEVEL.decode(tokens)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte level", "byte fallback"])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT), max_size=30))
def test_a_stream_never_shows_parts_of_characters(tokenizer: Tokenizer, text: str):
    tokens = tokenizer.encode(text)
    pieces = streamed(tokenizer, tokens, 1)
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte level", "byte fallback"])
def test_characters_come_when_they_are_complete(tokenizer: Tokenizer):
    tokens = tokenizer.encode("a🦜b")
    assert len(tokens) >= 5
    pieces = streamed(tokenizer, tokens, 1)
    assert [piece for piece in pieces if piece] == ["a", "🦜", "b"]
    cut = tokenizer.stream()
    assert cut.push(tokens[: len(tokens) - 2]) == "a"
    assert REPLACEMENT in cut.finish()


def test_encoding_is_the_tokenizers_own():
    text = "def f(x):\n    return x  # ünï 🦜\n"
    tokens = BYTE_LEVEL.encode(text)
    assert tokens == tokenizers.Tokenizer.from_file(str(TINY_LM / "tokenizer.json")).encode(text).ids
    assert BYTE_LEVEL.decode(tokens) == text
    end = BYTE_LEVEL.encode("<|endoftext|>")
    assert len(end) == 1
    assert BYTE_LEVEL.decode([*tokens, *end]) == text
    assert BYTE_LEVEL.decode([*tokens, *end], skip_special_tokens=False) == text + "<|endoftext|>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled tokenizer, to be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LM / name, tmp_path)
    return tmp_path


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_limits_left_in_the_file_do_not_cut_prompts(folder: Path):
    limit = dict(direction="Right", max_length=3, strategy="LongestFirst", stride=0)
    change(folder / "tokenizer.json", truncation=limit)
    assert Tokenizer.load(folder).encode("one two three four five six") == BYTE_LEVEL.encode(
        "one two three four five six"
    )


def test_special_tokens_of_the_post_processor_are_added_unless_refused(folder: Path):
    bos = dict(SpecialToken=dict(id="<|endoftext|>", type_id=0))
    template = dict(
        type="TemplateProcessing",
        single=[bos, dict(Sequence=dict(id="A", type_id=0))],
        pair=[bos, dict(Sequence=dict(id="A", type_id=0)), dict(Sequence=dict(id="B", type_id=1))],
        special_tokens={"<|endoftext|>": dict(id="<|endoftext|>", ids=[0], tokens=["<|endoftext|>"])},
    )
    change(folder / "tokenizer.json", post_processor=template)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("x") == [0, *BYTE_LEVEL.encode("x")]
    assert tokenizer.encode("x", special_tokens=False) == BYTE_LEVEL.encode("x")


def test_older_tokenizer_files_are_converted(tmp_path: Path):
    vocabulary = {piece: number for number, piece in enumerate([*"abĠ", "ab", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="Qwen2Tokenizer")))
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="qwen2")))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("ab a") == [3, 2, 0]
    assert tokenizer.decode([3, 2, 0]) == "ab a"


BAD_FOLDERS = [
    ({}, FileNotFoundError, "expected tokenizer.json in"),
    ({"tokenizer.json": "{}"}, ValueError, "must be a file of the tokenizers package"),
    ({"tokenizer_config.json": "{"}, ValueError, "tokenizer_config.json must hold JSON"),
    ({"tokenizer_config.json": "[]"}, ValueError, "must hold a JSON object; got a list"),
    ({"tokenizer.model": "x"}, ValueError, "has no tokenizer.json, and its other tokenizer files can't be converted"),
]


@pytest.mark.parametrize(("files", "error", "message"), BAD_FOLDERS, ids=[message for *_, message in BAD_FOLDERS])
def test_damaged_folders_are_refused(tmp_path: Path, files: dict[str, str], error: type[Exception], message: str):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        Tokenizer.load(tmp_path)
