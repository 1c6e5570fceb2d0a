"""Tokenizers of GGUF files: token for token those that the files were made from."""

import functools
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from seer_jax import Tokenizer, load_tokenizer, tiny_lm
from seer_jax.convert import load_base, save_base
from seer_jax.gguf.header import GGUFHeader
from seer_jax.gguf.tokenizer import PRE_TOKENIZERS, tokenizer_of
from seer_jax.inference.text import eos_token_of
from tests.convert.gguf.files import tokenizer_metadata, write_gguf
from tests.golden.data import transformers_case

GOLDEN = transformers_case("qwen3_tied")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|endoftext|>{% endfor %}"
TEXTS = (
    "import os\n\n\tx = 12345 ** 2",
    "été 汉字 \U0001f600 ½ it's I'LL",
    "",
    " ",
    "a<|endoftext|>b<|pad|>",
    "\r\n \u00a0 x",
)


@functools.cache
def tiny_metadata() -> dict[str, Any]:
    return tokenizer_metadata(tiny_lm.path(), "qwen2")


def changed(**changes: Any) -> dict[str, Any]:
    """The tokenizer of tiny-lm as metadata; `changes` are keys below "tokenizer.ggml", None leaves one out."""
    metadata = tiny_metadata() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def with_tokenizer(path: Path, **changes: Any) -> Path:
    """A file with it."""
    return write_gguf(path / "model.gguf", GOLDEN.config, GOLDEN.base, metadata=changed(**changes))


def rebuilt(**changes: Any) -> Tokenizer:
    """The tokenizer of such a file, without writing it."""
    return Tokenizer(tokenizer_of(GGUFHeader(Path("model.gguf"), 0, changed(**changes), {})))


def test_a_byte_level_tokenizer_comes_back(tmp_path: Path):
    ours, theirs = load_tokenizer(with_tokenizer(tmp_path)), load_tokenizer("tiny-lm")
    for text in (*TEXTS, tiny_lm.eval_text()[:20_000]):
        tokens = theirs.encode(text)
        assert ours.encode(text) == tokens
        assert ours.decode(tokens) == theirs.decode(tokens)
    assert ours.special == theirs.special and ours.vocab_size == theirs.vocab_size
    assert eos_token_of(tmp_path / "model.gguf") == eos_token_of(tiny_lm.path())


def test_its_files_are_read_by_transformers(tmp_path: Path):
    from transformers import AutoTokenizer

    path = with_tokenizer(tmp_path, add_bos_token=True)
    save_base(load_base(path), tmp_path / "folder", tokenizer=path)
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(tmp_path / "folder")
    again = load_tokenizer(tmp_path / "folder")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == again.encode(text) == ours.encode(text)
    assert (theirs.eos_token, theirs.pad_token, theirs.bos_token_id) == ("<|endoftext|>", "<|pad|>", 0)
    assert json.loads((tmp_path / "folder/generation_config.json").read_text())["eos_token_id"] == 0


def test_texts_of_qwen_are_composed():
    """As its own tokenizer.json says; llama.cpp alone does not do it."""
    tokenizer = rebuilt()
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_chat_templates_come_with_it(tmp_path: Path):
    metadata = tiny_metadata() | {"tokenizer.chat_template": TEMPLATE}
    path = write_gguf(tmp_path / "a.gguf", GOLDEN.config, GOLDEN.base, metadata=metadata)
    assert load_tokenizer(path).render_chat([dict(role="user", content="hi")]) == "<|im_start|>user\nhi<|endoftext|>"
    assert load_tokenizer(path).end_of_turn() == (0,)
    path = write_gguf(
        tmp_path / "b.gguf",
        GOLDEN.config,
        GOLDEN.base,
        metadata=metadata | {"tokenizer.chat_template.tool_use": "tools"},
    )
    assert load_tokenizer(path).chat_templates == {"default": TEMPLATE, "tool_use": "tools"}


# What a text is cut into before merges, by the pre-tokenizers of the models' own tokenizer.json.
PIECES = [
    ("gpt-2", "it's 12345  ok\n", ["it", "'s", " 12345", " ", " ok", "\n"]),
    ("gpt-2", "IT'S", ["IT", "'", "S"]),
    ("smollm", "it's 12345  ok\n", ["it", "'s", " ", "1", "2", "3", "4", "5", " ", " ok", "\n"]),
    ("llama-bpe", "IT'S 12345(ab)\n\n x", ["IT", "'S", " ", "123", "45", "(ab", ")\n\n", " x"]),
    ("llama3", "a\n  b", ["a", "\n", " ", " b"]),
    ("qwen2", "IT'S 123(ab)\n\n x", ["IT", "'S", " ", "1", "2", "3", "(ab", ")\n\n", " x"]),
    ("deepseek-r1-qwen", "x  1", ["x", " ", " ", "1"]),
    ("tekken", "HelloWorld 12/\n", ["Hello", "World", " ", "1", "2", "/\n"]),
]


@pytest.mark.parametrize(("pre", "text", "pieces"), PIECES)
def test_texts_are_cut_as_the_file_says(pre: str, text: str, pieces: list[str]):
    backend = rebuilt(pre=pre)._backend
    assert backend.pre_tokenizer is not None
    cut = [text[slice(*span)] for _, span in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert cut == pieces


def test_every_pre_tokenizer_has_a_case():
    assert {pre for pre, *_ in PIECES} | {"llama-v3"} == set(PRE_TOKENIZERS)  # another name of llama-bpe


def test_llama3_keeps_whole_tokens():
    """A piece that is a token stays one, even where its merges lead elsewhere."""
    tokens = ["a", "b", "c", "ab", "bc", "abc", "x"]
    byte_level = dict(
        tokens=tokens,
        token_type=[1] * 6 + [3],
        merges=["b c", "a b"],
        bos_token_id=6,
        eos_token_id=6,
        padding_token_id=6,
    )
    ids = {pre: rebuilt(pre=pre, **byte_level).encode("abc") for pre in ("llama-bpe", "qwen2")}
    assert ids == {"llama-bpe": [6, 5], "qwen2": [0, 4]}


ENDS = [
    (dict(pre="qwen2"), [], []),
    (dict(pre="qwen2", add_bos_token=True), [0], []),
    (dict(pre="qwen2", add_bos_token=True, add_eos_token=True, eos_token_id=1), [0], [1]),
    (dict(pre="llama-bpe"), [0], []),
    (dict(pre="tekken"), [0], []),
    (dict(pre="llama-bpe", add_bos_token=False), [], []),
]


@pytest.mark.parametrize(("keys", "bos", "eos"), ENDS)
def test_ends_are_added_as_the_file_says(keys: dict[str, Any], bos: list[int], eos: list[int]):
    tokenizer = rebuilt(**keys)
    plain = tokenizer.encode("def f", special_tokens=False)
    assert tokenizer.encode("def f") == [*bos, *plain, *eos]


# ------------------------------------------------------------------------------------------------------- SentencePiece

PARTS = ["▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "▁ab", "ca", "▁c", "abca", "aa", "▁▁"]
SCORES = {part: -float(i) for i, part in enumerate(["ab", "bc", "▁a", "aa", "ca", "▁ab", "abc", "▁c", "abca", "▁▁"])}


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """A vocabulary with all bytes, as llama.cpp writes it."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PARTS, "<tool>"]
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [SCORES.get(token, -100.0) for token in tokens],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(PARTS), 4],
        "merges": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": None,
        "unknown_token_id": 0,
        **changes,
    }


def reference(text: str, prefix: bool) -> list[int]:
    """SentencePiece as llama.cpp computes it: the pair whose token has the best score is merged, the leftmost first; bytes for the rest."""
    tokens = sentencepiece()["tokens"]
    pieces = list(text.replace(" ", "▁") if not prefix or not text else "▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(-SCORES[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in SCORES]
        if not pairs:
            break
        _, i = min(pairs)
        pieces[i : i + 2] = ["".join(pieces[i : i + 2])]
    return [
        id
        for piece in pieces
        for id in ([tokens.index(piece)] if piece in tokens else [3 + byte for byte in piece.encode()])
    ]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_comes_back(prefix: bool):
    tokenizer = rebuilt(**sentencepiece(add_space_prefix=prefix))
    rng = random.Random(0)
    for text in ["", "a", *("".join(rng.choices("abc ", k=rng.randint(1, 12))) for _ in range(200)), "é 汉ab\n"]:
        ids = reference(text, prefix)
        assert tokenizer.encode(text) == [1, *ids], text
        assert tokenizer.decode(ids) == text
    ids = tokenizer.encode("ab<tool>ab", special_tokens=False)
    assert ids == [*reference("ab", prefix), 3 + 256 + len(PARTS), *reference("ab", prefix)]


def test_its_merges_are_taken_where_the_file_has_them():
    tokenizer = rebuilt(**sentencepiece(merges=["b c", "a b"], add_space_prefix=False))
    tokens = sentencepiece()["tokens"]
    assert tokenizer.encode("abc", special_tokens=False) == [tokens.index("a"), tokens.index("bc")]


# ------------------------------------------------------------------------------------------------------------- refusals

REFUSED = [
    (dict(model=None), r"must hold a tokenizer of kind gpt2 or llama; it has no tokenizer\. Use a Hugging Face folder"),
    (dict(model=["gpt2"]), r"must hold a tokenizer of kind gpt2 or llama; it has tokenizer\.ggml\.model \['gpt2'\]"),
    (dict(pre=["qwen2"]), r"tokenizer\.ggml\.pre must be one of .*; got \['qwen2'\]"),
    (dict(model="t5"), r"must hold a tokenizer of kind gpt2 or llama; it has tokenizer\.ggml\.model 't5'"),
    (
        dict(pre="chatglm-bpe"),
        r"tokenizer\.ggml\.pre must be one of gpt-2, smollm, .*; got 'chatglm-bpe'\. Other pre-tokenizers",
    ),
    (dict(pre=None), r"tokenizer\.ggml\.pre must be one of .*; got none"),
    (dict(pre="default"), r"tokenizer\.ggml\.pre must be one of .*; got 'default'"),
    (dict(tokens=None), r"tokenizer\.ggml\.tokens must be a list; got none"),
    (dict(tokens=[1, 2]), r"tokenizer\.ggml\.tokens must be a list of type str; got \[1, 2\]"),
    (dict(token_type=[1, 3]), r"token_type must be as long as tokenizer\.ggml\.tokens, 4096; got 2"),
    (dict(merges=None), r"tokenizer\.ggml\.merges must be a list; got none"),
    (
        dict(merges=["a b", "nothing known"]),
        r"merges must be of two tokens to one; got 'nothing known'\. The file is damaged",
    ),
    (dict(merges=["x"]), r"merges must be of two tokens to one; got 'x '"),
    (dict(merges=["$ #"]), r"merges must be of two tokens to one; got '\$ #'"),
    (dict(eos_token_id=4096), r"tokenizer\.ggml\.eos_token_id must be one of 4096 tokens; got 4096"),
    (dict(bos_token_id=-1), r"tokenizer\.ggml\.bos_token_id must be one of 4096 tokens; got -1"),
    (
        dict(add_bos_token=True, bos_token_id=None),
        r"add_bos_token must come with tokenizer\.ggml\.bos_token_id; got none",
    ),
    (dict(add_bos_token="yes"), r"tokenizer\.ggml\.add_bos_token must be true or false; got 'yes'"),
    (
        dict(tokens=["x", "y", "xy", "x"], token_type=[3] * 4, merges=["x y"]),
        r"each token must be there once; got 'x' again\. The file",
    ),
    (sentencepiece(scores=None), r"tokenizer\.ggml\.scores must be a list; got none"),
    (sentencepiece(scores=[0.5]), r"tokenizer\.ggml\.scores must be as long as tokenizer\.ggml\.tokens, 274; got 1"),
    (
        sentencepiece(precompiled_charsmap=[1, 2]),
        r"precompiled_charsmap must be absent; such a tokenizer can't be rebuilt",
    ),
]


@pytest.mark.parametrize(
    ("changes", "message"), REFUSED, ids=lambda value: value[:30] if isinstance(value, str) else ",".join(value)[:30]
)
def test_what_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=rf"model\.gguf.*{message}"):
        rebuilt(**changes)


def test_rows_without_a_token_are_no_text():
    """llama.cpp calls them [PAD0] and marks them as unused."""
    keys = tiny_metadata()
    tokens, kinds = (keys[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    tokenizer = rebuilt(tokens=[*tokens, "[PAD4096]"], token_type=[*kinds, 5])
    assert tokenizer.vocab_size == 4096
    assert tokenizer.decode_known([*tokenizer.encode("x"), 4096]) == "x"
    assert tokenizers.Tokenizer.from_str(tokenizer.to_json()).get_vocab_size() == 4096
