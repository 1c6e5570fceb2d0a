"""Damaged GGUF files are refused in one line: neither other errors nor memory, whatever a count claims."""

import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from seer_jax.convert.formats.gguf import GGUFSource
from seer_jax.gguf.config import config_of
from seer_jax.gguf.header import MAX_ITEMS, read_header
from seer_jax.gguf.tokenizer import tokenizer_config_of, tokenizer_of
from seer_jax.models.families import config_from_hf
from tests.convert.gguf.files import write_gguf
from tests.golden.data import transformers_case

MOST = 40 * 2**20  # bytes that reading a file of 60 KB may take
TOKENS = [*"abcdefgh", "ab", "cd", *(f"<{i}>" for i in range(38))]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * 10 + [3] * 38,
    "tokenizer.ggml.merges": ["a b", "c d"],
    "tokenizer.ggml.eos_token_id": 10,
    "tokenizer.chat_template": "{{ messages }}",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    golden = transformers_case("llama_llama3")
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", golden.config, golden.base, metadata=TOKENIZER)
    read(path)
    return path.read_bytes()


def read(path: Path) -> None:
    """All that a command reads of a file."""
    header = read_header(path)
    config = config_from_hf(config_of(header))
    tokenizer_config_of(header)
    tokenizer_of(header)
    with GGUFSource(path, head_dim=config.head_dim) as source:
        for name, info in source.tensors.items():
            source.read(name, 0, min(info.shape[0], 4))


def number(at: int, code: str, value: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + struct.pack(f"<{code}", value) + data[at + struct.calcsize(code) :]


def after(text: str, code: str, value: int, skip: int = 0) -> Callable[[bytes], bytes]:
    """Changes the number that comes `skip` bytes after the first place of a text."""

    def change(data: bytes) -> bytes:
        return number(data.index(text.encode()) + len(text) + skip, code, value)(data)

    return change


ARRAY = 8  # bytes of the types, before the count of a list
DAMAGES: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("empty", lambda data: b"", r"must be a GGUF file, which starts with b'GGUF' and is longer than 24 bytes; got b''"),
    ("a pointer", lambda data: b"version https://git-lfs", r"must be a GGUF file, .*; got b'vers'\. Download it again"),
    ("magic", lambda data: b"GGML" + data[4:], r"must be a GGUF file, .*; got b'GGML'"),
    ("version 1", number(4, "I", 1), r"must be a little-endian GGUF file of version 2 or 3; got version 1\. Convert"),
    (
        "big-endian",
        number(4, "I", 3 << 24),
        r"must be a little-endian GGUF file of version 2 or 3; got a big-endian file of version 3",
    ),
    (
        "tensors",
        number(8, "Q", 2**40),
        r"must be a whole GGUF file; it claims 1099511627776 tensors, at byte 16\. Download",
    ),
    ("entries", number(16, "Q", 2**63), r"it claims 9223372036854775808 metadata entries"),
    ("few entries", number(16, "Q", 1), r"must be"),
    ("key length", number(24, "Q", 2**60), r"it claims 1152921504606846976 bytes of text"),
    ("list", after("ggml.tokens", "Q", 2**50, ARRAY), r"it claims 1125899906842624 texts"),
    ("longest list", after("ggml.tokens", "Q", MAX_ITEMS, ARRAY), r"it claims 4194304 texts"),
    ("list of numbers", after("ggml.token_type", "Q", 2**32, ARRAY), r"it claims 4294967296 numbers"),
    ("list of lists", after("ggml.tokens", "I", 9, 4), r"a value is of the unknown type 9"),
    ("type", after("general.type", "I", 77), r"a value is of the unknown type 77"),
    ("axes", after("output_norm.weight", "I", 2**31), r"tensor 'output_norm\.weight' has 2147483648 axes"),
    ("no axes", after("output_norm.weight", "I", 0), r"tensor 'output_norm\.weight' has 0 axes"),
    (
        "shape",
        after("output_norm.weight", "Q", 2**62, 4),
        r"'model\.norm\.weight' of shape \(4611686018427387904,\) must be rows of whole",
    ),
    (
        "offset",
        after("output_norm.weight", "Q", 2**63, 16),
        r"'model\.norm\.weight' .* lie within the file of \d+ bytes; its 96 bytes start at",
    ),
    (
        "tensor type",
        after("output_norm.weight", "I", 99, 12),
        r"'model\.norm\.weight' is of type 99\. Use another quantisation",
    ),
    (
        "blocks of a vector",
        after("output_norm.weight", "I", 8, 12),
        r"'model\.norm\.weight' of shape \(24,\) must be rows of whole blocks of 32",
    ),
    (
        "name twice",
        lambda data: data.replace(b"blk.0.ffn_up", b"blk.1.ffn_up"),
        r"tensor 'blk\.1\.ffn_up\.weight' is there twice",
    ),
    (
        "key twice",
        lambda data: data.replace(b"llama.rope.freq_base", b"tokenizer.ggml.model"),
        r"'tokenizer\.ggml\.model' is there twice",
    ),
    (
        "no UTF-8",
        lambda data: data.replace(b"general.type", b"general.\xff\xfe\xfd\xfc"),
        r"must be a whole GGUF file; 'utf-8' codec",
    ),
    ("cut in the weights", lambda data: data[:-100], r"must be rows of whole blocks of 1 and lie within the file"),
    ("cut in the header", lambda data: data[:500], r"must be a whole GGUF file; .*\. Download it again"),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES])
def test_what_is_damaged_is_named(change: Callable[[bytes], bytes], message: str, whole: bytes, tmp_path: Path):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(change(whole))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"damaged\.gguf.*{message}"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()


def test_no_byte_of_the_header_gives_another_error(whole: bytes, tmp_path: Path):
    """Some of them; nor does an end at one."""
    rng = random.Random(0)
    path = tmp_path / "damaged.gguf"
    end = whole.index(b"blk.1.") + 2000
    for at in rng.sample(range(end), 100):
        data = bytearray(whole)
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data) if rng.random() < 0.8 else whole[:at])
        try:
            read(path)
        except ValueError as error:
            assert "\n" not in str(error)
