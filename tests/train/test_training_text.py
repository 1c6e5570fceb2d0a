"""Documents from files, folders and datasets, tokens from documents, batches from rows."""

import dataclasses
import itertools
import json
import sys
import types
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from seer_jax.train.data.batches import DataConfig, batches, hold_out, load_dataset
from seer_jax.train.data.packing import PackedDataset, Packing
from seer_jax.train.data.sources import SourceConfig, list_files, read_documents
from seer_jax.train.data.store import TokenStore
from seer_jax.train.data.tokens import ModelTokenizer, Piece, load_tokens

CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


@pytest.fixture
def folder(tmp_path):
    """Every kind of file, with names whose order is not that of creation."""
    root = tmp_path / "text"
    (root / "sub").mkdir(parents=True)
    (root / "z.txt").write_text("text z")
    (root / "b.py").write_bytes(b"\xef\xbb\xbfcode = 1\r\n")
    (root / "empty.txt").write_text(" \n")
    (root / "sub" / "a.md").write_text("text a")
    (root / "c.jsonl").write_text('{"text": "row 1"}\n\n{"text": "", "n": 1}\n{"text": "row 2"}\n')
    (root / "image.png").write_bytes(b"\x89PNG")
    pq.write_table(pa.table({"text": ["cell 1", "cell 2"], "other": [1, 2]}), root / "d.parquet")
    return root


def documents(**settings):
    return list(read_documents(SourceConfig(**settings)))


def test_folder_is_read_in_sorted_order(folder):
    expected = ["code = 1\r\n", "row 1", "row 2", "cell 1", "cell 2", "text a", "text z"]
    assert documents(paths=(str(folder),)) == expected


def test_include_and_exclude(folder):
    files = list_files(SourceConfig(paths=(str(folder),), include=("*.txt", "sub/*"), exclude=("empty*",)))
    assert [f.name for f in files] == ["a.md", "z.txt"]


def test_several_paths_keep_their_order(folder):
    paths = (str(folder / "z.txt"), str(folder / "sub"))
    assert documents(paths=paths) == ["text z", "text a"]


def test_chats_and_other_fields(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"messages": []}))
    assert documents(paths=(str(path),), field="messages") == [CHAT]


def test_huggingface_dataset(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return iter([{"text": "x"}, {"text": "y"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert documents(dataset="org/name", subset="small", split="test") == ["x", "y"]
    assert calls == [(("org/name", "small"), {"split": "test", "streaming": True})]


def test_huggingface_dataset_on_disk(monkeypatch, tmp_path):
    (tmp_path / "dataset_dict.json").write_text("{}")
    stub = types.SimpleNamespace(load_from_disk=lambda path: {"train": [{"text": "x"}]})
    monkeypatch.setitem(sys.modules, "datasets", stub)
    assert documents(dataset=str(tmp_path)) == ["x"]


BAD_SOURCES = [
    ({}, ValueError, r"needs text; got none\. Set `paths` .* or `dataset`"),
    ({"paths": ("{}/none.txt",)}, FileNotFoundError, r"must exist; got .*none.txt"),
    ({"paths": ("{}/image.png",)}, ValueError, r"must end in \.txt, .*got .*image.png"),
    ({"paths": ("{}",), "include": ("*.png",)}, ValueError, r"must end in \.txt"),
    ({"paths": ("{}",), "include": ("*.rst",)}, ValueError, r"must hold a file to read, .*got 7 other files"),
    ({"paths": ("{}/c.jsonl",), "field": "body"}, ValueError, r"c.jsonl:1: .*field 'body'; got \['text'\]"),
    ({"paths": ("{}/d.parquet",), "field": "body"}, ValueError, r"d.parquet: .*'body'; got \['other', 'text'\]"),
    ({"paths": ("{}/d.parquet",), "field": "other"}, ValueError, r"must hold a text or a list of chat .*got int"),
    ({"paths": ("{}/broken.jsonl",)}, ValueError, r"broken\.jsonl:2, a line of a JSONL file, must hold JSON; "),
    ({"paths": ("{}/list.jsonl",)}, ValueError, r"list.jsonl:1: .*got list"),
]
# Files of each kind whose content is not what it should be, in a folder of others.
DAMAGED = {
    "latin.txt": (
        "ünï".encode("latin-1"),
        r"latin.txt must be UTF-8 text; byte 0xfc at position 0 .*iconv.* name it in `exclude`",
    ),
    "picture.md": (
        b"\x89PNG\x00",
        r"picture.md must be UTF-8 text; got a zero byte at position 4.* name it in `exclude`",
    ),
    "wide.txt": ("ünï".encode("utf-16"), "wide.txt must be UTF-8 text; it is UTF-16"),
    "latin.jsonl": (
        b'{"text": "x"}\n{"text": "\xfc"}\n',
        r"latin\.jsonl:2 must be UTF-8 text; byte 0xfc at position 10 .* UTF-8 '.*latin\.jsonl' > NEW",
    ),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl:1, a line .*, must hold JSON of a few levels; it is nested too deeply"),
    "surrogate.jsonl": (
        rb'{"text": "a\ud800"}',
        r"surrogate.jsonl:1: .*valid Unicode; got the lone surrogate '\\ud800'",
    ),
    "sharegpt.jsonl": (
        b'{"text": [{"from": "human", "value": "x"}]}',
        "sharegpt.jsonl:1: .*with `role` and `content`; got a list whose messages have from, value",
    ),
    "null.jsonl": (b'{"text": null}', "null.jsonl:1: .*got NoneType"),
    "text.parquet": (b"text", r"text\.parquet must be a parquet file; .*[^.]\. Download or write it again"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_by_name(folder, name):
    data, message = DAMAGED[name]
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        documents(paths=(str(folder),))


def test_columns_of_bytes_are_refused_by_row(tmp_path):
    pq.write_table(pa.table({"text": ["x", "y"], "raw": [b"x", b"y"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, row 1: .*got bytes \(cast the column to text\)"):
        documents(paths=(str(tmp_path),), field="raw")


@pytest.mark.parametrize(("settings", "error", "message"), BAD_SOURCES)
def test_source_errors(folder, settings, error, message):
    (folder / "broken.jsonl").write_text('{"text": "x"}\n{"text"\n') if "broken" in message else None
    (folder / "list.jsonl").write_text("[1]\n") if "list.jsonl" in message else None
    if "paths" in settings:
        settings = settings | {"paths": tuple(p.format(folder) for p in settings["paths"])}
    with pytest.raises(error, match=message):
        documents(**settings)


@pytest.mark.parametrize(
    ("package", "settings", "message"),
    [
        (
            "pyarrow.parquet",
            {"paths": ("{}/d.parquet",)},
            r"needs the package pyarrow; it is not installed\. Run pip install pyarrow\.$",
        ),
        (
            "datasets",
            {"dataset": "x"},
            r"needs the package datasets; it is not installed\. Run pip install datasets\.$",
        ),
    ],
)
def test_missing_package(monkeypatch, folder, package, settings, message):
    monkeypatch.setitem(sys.modules, package, None)
    if "paths" in settings:
        settings = {"paths": tuple(p.format(folder) for p in settings["paths"])}
    with pytest.raises(ImportError, match=message):
        documents(**settings)


def test_max_tokens_is_checked():
    with pytest.raises(ValueError, match=r"max_tokens must be positive.*got 0"):
        SourceConfig(max_tokens=0)


WORDS = ["<unk>", "<bos>", "<eos>", "one", "two", "three", "user", "assistant"]


@pytest.fixture
def model_folder(tmp_path):
    """A tokenizer that puts <bos> in front, saved the Hugging Face way."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    root = tmp_path / "model"
    root.mkdir()
    tokenizer.save(str(root / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": template}
    (root / "tokenizer_config.json").write_text(json.dumps(settings))
    return root


def test_tokenizer_marks_documents(model_folder):
    encode = ModelTokenizer(str(model_folder)).encode
    # bos from the tokenizer itself, eos after each document, neither twice; the chat template writes its own.
    assert encode(["one two", CHAT, "three <eos>"]) == [
        [1, 3, 4, 2],
        [6, 3, 2, 7, 4, 2],
        [1, 5, 2],
    ]


def test_tokenizer_without_end_or_template(model_folder):
    before = ModelTokenizer(str(model_folder)).fingerprint
    (model_folder / "tokenizer_config.json").write_text("{}")
    plain = ModelTokenizer(str(model_folder))
    assert plain.encode(["one"]) == [[1, 3]]
    assert plain.fingerprint != before
    with pytest.raises(ValueError, match=r"needs a chat template"):
        plain.encode([CHAT])


KEEPS = "{% for m in messages %}{{ m['role'] }} {{ m['reasoning_content'] }} {{ m['content'] }} {% endfor %}"
CUTS = "{% for m in messages %}{{ m['role'] }} {{ m['content'].split('</think>')[-1] }} <eos> {% endfor %}"


def thoughts(length):
    return [CHAT[0], {"role": "assistant", "content": "<think>" + "three " * length + "</think> two"}]


def test_a_template_that_leaves_out_thoughts_is_told_once(model_folder):
    settings = json.loads((model_folder / "tokenizer_config.json").read_text()) | {"chat_template": CUTS}
    (model_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = ModelTokenizer(str(model_folder))
    with pytest.warns(
        UserWarning, match=r"at least 5[\d,]+ of 6[\d,]+ char.*, in 1 of the first 3 chats: .*--data.chat-template"
    ) as told:
        assert tokenizer.encode([CHAT, thoughts(1000), "one", CHAT])[1] == [6, 3, 2, 7, 4, 2]
        tokenizer.encode([thoughts(1000)])
    assert len(told) == 1
    ModelTokenizer(str(model_folder)).encode([CHAT, thoughts(1)])  # little


@pytest.mark.parametrize("as_file", [True, False])
def test_a_run_has_its_own_template(model_folder, tmp_path, as_file):
    (tmp_path / "own.jinja").write_text(KEEPS)
    plain = ModelTokenizer(str(model_folder))
    own = ModelTokenizer(str(model_folder), str(tmp_path / "own.jinja") if as_file else KEEPS)
    chat = [CHAT[0], CHAT[1] | {"reasoning_content": "three " * 3}]
    assert own.encode([chat]) == [[6, 3, 7, 5, 5, 5, 4, 2]]
    assert own.fingerprint == ModelTokenizer(str(model_folder), KEEPS).fingerprint != plain.fingerprint
    (tmp_path / "chats.jsonl").write_text(json.dumps({"text": chat}))
    config = DataConfig(paths=(str(tmp_path / "chats.jsonl"),), chat_template=KEEPS, packing=Packing.BEST_FIT)
    sizes: dict[str, Any] = {"vocab_size": 8, "row_length": 16, "block_size": 4}
    assert load_dataset(config, model=str(model_folder), **sizes)[0].tokens[:8].tolist() == [6, 3, 7, 5, 5, 5, 4, 2]
    with pytest.raises(FileNotFoundError, match=r"chat_template must be Jinja text or a file of it; got 'none.jinja'"):
        ModelTokenizer(str(model_folder), "none.jinja")


def test_a_template_that_refuses_a_chat_is_named(model_folder, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ raise_exception('no chats') }}")
    tokenizer = ModelTokenizer(str(model_folder), str(tmp_path / "own.jinja"))
    with pytest.raises(
        ValueError, match=r"own\.jinja does not accept .*: no chats\. Correct the chat, or set another template"
    ):
        tokenizer.encode([CHAT])


def test_model_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer.json in"):
        ModelTokenizer(str(tmp_path))


class Letters:
    """A tokenizer for tests: one token per character; counts its work."""

    fingerprint = "letters"
    calls = 0

    def encode(self, documents):
        self.calls += len(documents)
        return [[ord(c) for c in d] for d in documents]


def test_token_store_is_read_back(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("de")
    config, tokenizer, cache = SourceConfig(paths=(str(tmp_path),)), Letters(), tmp_path / "cache"
    fresh = load_tokens(config, tokenizer, cache)
    again = load_tokens(config, tokenizer, cache)
    assert tokenizer.calls == 2  # the second load read the store
    np.testing.assert_array_equal(again.tokens, [97, 98, 99, 100, 101])
    np.testing.assert_array_equal(again.ends, [3, 5])
    np.testing.assert_array_equal(again.lengths, [3, 2])
    assert TokenStore.from_documents([[97, 98, 99], [], [100, 101]]).digest == fresh.digest == again.digest
    said = []
    (tmp_path / "a.txt").write_text("changed")
    resumed = load_tokens(config, tokenizer, cache, resumes=True, say=said.append)
    assert resumed.digest == fresh.digest and tokenizer.calls == 2
    assert said == [f"{tmp_path}/a.txt changed since this run began; it goes on with the text as it was then."]
    tokenizer.fingerprint = "other"
    with pytest.raises(
        ValueError, match=r"must hold the tokens of this run; they are of other tokenizer\. Restore the text"
    ):
        load_tokens(config, tokenizer, cache, resumes=True)
    assert load_tokens(config, tokenizer, cache).digest != fresh.digest  # a run that starts reads changed text


TORN = {
    "another tokenizer": (None, b""),
    "a flipped bit": ("tokens.int32", b"d\x00\x00\x00b\x00\x00\x00c\x00\x00\x00"),
    "a cut file": ("tokens.int32", b"abc"),
    "no description": ("store.json", b""),
    "a list": ("store.json", b"[1]"),
    "a deep description": ("store.json", b"[" * 100_000),
    "no ends": ("ends.npy", b""),
    "an archive": ("ends.npy", b"PK\x03\x04"),
}


@pytest.mark.parametrize("torn", TORN)
def test_torn_or_foreign_store_is_made_anew(tmp_path, torn):
    (tmp_path / "a.txt").write_text("abc")
    config, tokenizer, cache = SourceConfig(paths=(str(tmp_path / "a.txt"),)), Letters(), tmp_path / "cache"
    load_tokens(config, tokenizer, cache)
    name, content = TORN[torn]
    if name is None:
        tokenizer.fingerprint = "other"
    else:
        (cache / name).write_bytes(content)
    np.testing.assert_array_equal(load_tokens(config, tokenizer, cache).tokens, [97, 98, 99])
    assert tokenizer.calls == 2


def test_max_tokens_ends_with_a_document(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "abcd"}) for _ in range(9)))
    config = SourceConfig(paths=(str(tmp_path / "a.jsonl"),), max_tokens=10)
    assert len(load_tokens(config, Letters()).tokens) == 12


@pytest.mark.parametrize(
    ("packing", "documents", "rows"),
    [(Packing.CONCATENATE, 6, 3), (Packing.BEST_FIT, 8, 4)],  # best fit drops the remainder, 6 tokens, of each document
)
def test_no_more_is_read_than_the_run_takes(tmp_path, packing, documents, rows):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "x" * 22}) for _ in range(999)))
    config, said, tokenizer = DataConfig(paths=(str(tmp_path),), packing=packing, min_length=8), [], Letters()
    settings: dict[str, Any] = dict(
        model="", vocab_size=200, row_length=16 if packing is Packing.BEST_FIT else 40, block_size=8
    )
    data = load_dataset(config, **settings, rows=rows * 2 if rows == 4 else rows, tokenizer=tokenizer, say=said.append)
    assert data.report.documents == documents and len(data) >= rows and tokenizer.calls < 999
    assert said == [
        f"Read {documents} documents, {documents * 22} tokens: as many as the run takes. For a wider choice set max_tokens of the data (--data.max-tokens)."
    ]
    wider = dataclasses.replace(config, max_tokens=2000)
    assert load_dataset(wider, **settings, rows=rows, tokenizer=tokenizer).report.tokens == 2002


def test_long_texts_are_tokenized_in_pieces(model_folder, tmp_path, monkeypatch):
    text = "one two three\n" * 9 + "one " * 9
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("two")
    config, tokenizer = (
        SourceConfig(paths=(str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))),
        ModelTokenizer(str(model_folder)),
    )
    whole = load_tokens(config, tokenizer)
    monkeypatch.setattr("seer_jax.train.data.tokens.PIECE_LENGTH", 30)
    pieces = list(Piece.split(text))
    assert "".join(pieces) == text and [p[-1] for p in pieces[:4]] == ["\n"] * 4 and max(map(len, pieces)) <= 30
    assert [(p.first, p.last) for p in pieces] == [(True, False)] + [(False, False)] * (len(pieces) - 2) + [
        (False, True)
    ]
    for store in (load_tokens(config, tokenizer), load_tokens(config, tokenizer, tmp_path / "cache")):
        assert store.digest == whole.digest and len(store.ends) == 2
    few = load_tokens(dataclasses.replace(config, max_tokens=5), tokenizer)
    assert 5 <= len(few.tokens) < 12


def test_rows_held_out_are_not_trained_on():
    data = PackedDataset.from_rows(np.arange(10)[:, None] + np.zeros((10, 3), int))
    rest, held = hold_out(data, 3, seed=1)
    assert held is not None and len(rest) == 7 and len(held) == 3
    numbers = [[int(part[i].tokens[0]) for i in range(len(part))] for part in (rest, held)]
    assert sorted(numbers[0] + numbers[1]) == list(range(10)) and numbers[1] != [7, 8, 9]
    assert hold_out(data, 0, seed=1) == (data, None)
    with pytest.raises(ValueError, match=r"held_out_rows must leave rows to train on; got 10 of 10 rows"):
        hold_out(data, 10, seed=1)


def test_load_dataset(model_folder, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one two three " * 40)
    config = DataConfig(paths=(str(path),), packing=Packing.BEST_FIT)
    data = load_dataset(config, model=str(model_folder), vocab_size=8, row_length=64, block_size=16)
    assert len(data) == 2 and data[0].tokens[0] == 1
    with pytest.raises(ValueError, match=r"Tokens must lie in \[0, 4\), .* got 1 .. 5"):
        load_dataset(config, model=str(model_folder), vocab_size=4, row_length=64, block_size=16)


def test_every_epoch_has_each_row_once_in_its_own_order():
    data = PackedDataset.from_rows(np.arange(7)[:, None])
    stream = batches(data, 7, seed=3)
    orders = [next(stream)[0].tokens[:, 0].tolist() for _ in range(3)]
    assert all(sorted(o) == list(range(7)) for o in orders)
    assert len({tuple(o) for o in orders}) == 3
    assert next(batches(data, 7, seed=4))[0].tokens[:, 0].tolist() != orders[0]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_batches_resume_at_any_position(batch_size):
    data = PackedDataset.from_rows(np.arange(14).reshape(7, 2))
    whole = list(itertools.islice(batches(data, batch_size, seed=0), 12))
    for n, (_, _, position) in enumerate(whole[:-1]):
        rest = itertools.islice(batches(data, batch_size, seed=0, start=position), 11 - n)
        for (expected, _, at), (got, _, now) in zip(whole[n + 1 :], rest, strict=True):
            np.testing.assert_array_equal(got.tokens, expected.tokens)
            assert at == now
    assert [p.epoch * 7 + p.index for _, _, p in whole] == [batch_size * n for n in range(1, 13)]
