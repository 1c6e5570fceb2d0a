"""Names to folders: the bundled model, then folders, then the hub; its call is stubbed, the network is never touched."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from flax import nnx
from huggingface_hub import errors

from seer_jax import tiny_lm
from seer_jax.convert import base_model, load_base, load_gates, recommended_policy, save_gates
from seer_jax.convert.base import BASE_PATTERNS
from seer_jax.convert.gate_config import gate_config_from_hf
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig, QueryReduction
from seer_jax.gates.make import make_gate
from seer_jax.models.hub import (
    GATES,
    NAMED,
    config_text,
    named_gates,
    read_config,
    resolve,
    resolve_gates,
)
from seer_jax.train import DistillConfig
from seer_jax.train.config import absolute
from tests.golden.data import transformers_case, write_base, write_gates
from tests.seer_jax.conftest import QWEN3


class Hub:
    """Stands for huggingface_hub.snapshot_download and notes how it was called."""

    def __init__(self, answer: Any):
        self.answer, self.calls = answer, []

    def __call__(self, repo_id: str, **options: Any) -> str:
        self.calls.append((repo_id, options))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def http(kind: type[Exception]) -> Exception:
    """An error as the hub's client raises it, without the response of a server."""
    error = kind.__new__(kind)
    Exception.__init__(error, "from the hub")
    return error


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stub = Hub(AssertionError("the hub must not be asked"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stub)
    return stub


def test_a_folder_wins_over_a_hub_id(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name", ["*"]) == Path("owner/name")
    assert resolve(tmp_path, ["*"]) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/owner", ["*"]) == tmp_path / "owner"
    assert hub.calls == []


def test_the_name_of_the_bundled_model_wins_over_all(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tiny-lm").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny-lm", ["*"]) == resolve(Path("tiny-lm"), ["*"]) == tiny_lm.path()
    assert resolve("./tiny-lm", ["*"]) == Path("tiny-lm")
    assert hub.calls == []


@pytest.mark.parametrize("name", GATES)
def test_a_name_stands_for_a_prefill_and_a_decode_gate(name: str, hub: Hub, tmp_path: Path):
    """Of the model that it begins with; those of the release's kinds can be written in the release's layout."""
    model, place = GATES[name]
    both = [model.GATES / place / kind for kind in ("prefill", "decode")]
    hub.answer = tmp_path / "downloaded"
    assert resolve_gates(name, ["*"]) == resolve_gates([Path(name)], ["*"]) == list(named_gates(name).values()) == both
    assert resolve_gates(("owner/name", name, tmp_path), ["*"]) == [hub.answer, *both, tmp_path]
    assert base_model([name]) == model.NAME == name.removesuffix("-release")
    kinds = [gate_config_from_hf(read_config(folder)) for folder in both]
    assert [type(kind) for kind in kinds] == [PrefillGateConfig, DecodeGateConfig]
    if name.endswith("-release"):
        assert place == "release" and not any(kind.finer_than_release() for kind in kinds)
    for read in (load_gates, recommended_policy):
        message = rf"must be named; got '{name}', which stands for 2 gates\. Give .*prefill or "
        with pytest.raises(ValueError, match=message):
            read(name)
    with pytest.raises(ValueError, match=f"revision must be that of a hub id; got 'v2' for '{name}'"):
        resolve_gates(name, ["*"], revision="v2")
    assert absolute(DistillConfig(initial_gates=(name,))).initial_gates == (name,)


def test_models_and_gates_have_their_names(hub: Hub):
    """Each model has a name for its own gates and one for those of the release's kinds."""
    assert set(GATES) == {name for model in NAMED for name in (model, f"{model}-release")}
    for name in set(GATES) - set(NAMED):
        model = GATES[name][0].NAME
        message = (
            f"A model must be named; got '{name}', which stands for gates. Give model={model}, and '{name}' as its"
        )
        with pytest.raises(ValueError, match=message):
            resolve(name, ["*"])
    for find, names in ((resolve, NAMED), (resolve_gates, GATES)):
        message = rf"There is no folder 'smolm2', .*, or a name that is known here: {', '.join(names)}\."
        with pytest.raises(FileNotFoundError, match=message):
            find("smolm2", ["*"])
    assert resolve_gates(None, ["*"]) == []
    assert hub.calls == []


def test_the_table_decides_which_gates_a_name_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiny_lm, "GATES", tmp_path)
    monkeypatch.setitem(GATES, "tiny-lm", (tiny_lm, "fine"))
    finer = PrefillGateConfig(q_pool_size=16), DecodeGateConfig(query_reduction=QueryReduction.HEADS, k_pool_size=8)
    message = r"There are no gates for 'tiny-lm' in this version\. Distil them: seer-jax train .*--model tiny-lm "
    with pytest.raises(FileNotFoundError, match=message):
        resolve_gates("tiny-lm", ["*"])
    for kind, config in zip(("prefill", "decode"), finer, strict=True):
        save_gates(make_gate(config, QWEN3, rngs=nnx.Rngs(0)), tmp_path / "fine" / kind, base_model="tiny-lm")
    found = [gate_config_from_hf(read_config(folder)) for folder in resolve_gates("tiny-lm", ["*"])]
    assert tuple(found) == finer


def test_a_hub_id_is_downloaded_by_patterns(hub: Hub, tmp_path: Path):
    hub.answer = tmp_path
    assert resolve("owner/name", ("config.json", "*.safetensors"), revision="v2") == tmp_path
    assert hub.calls == [("owner/name", dict(revision="v2", allow_patterns=["config.json", "*.safetensors"]))]


def test_one_file_of_a_repository_is_downloaded_alone(hub: Hub, tmp_path: Path):
    hub.answer = tmp_path
    (tmp_path / "Q4").mkdir()
    (tmp_path / "Q4/model.gguf").touch()
    assert resolve("owner/name/Q4/model.gguf@v2", ("config.json",)) == tmp_path / "Q4/model.gguf"
    assert hub.calls == [("owner/name", dict(revision="v2", allow_patterns=["Q4/model.gguf"]))]
    with pytest.raises(
        FileNotFoundError, match=r"'owner/name' must hold the file 'other\.gguf'; it has none of that name"
    ):
        resolve("owner/name/other.gguf", ("config.json",))


def test_a_repository_of_gguf_files_needs_the_name_of_one(hub: Hub, tmp_path: Path):
    hub.answer = tmp_path / "snapshots" / "0123abc"
    hub.answer.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"In a repository of GGUF files, name one: owner/name/FILE\.gguf\."):
        load_base("owner/name-GGUF")


def test_models_and_gates_load_from_the_hub(hub: Hub, tmp_path: Path):
    hub.answer = write_base(tmp_path / "base", transformers_case("llama_llama3"))
    assert load_base("owner/model").config.family == "llama"
    hub.answer = write_gates(tmp_path / "gates", "prefill_llama_a")
    assert load_gates("owner/gates").config.gate_dim == 64
    assert [(repo, options["allow_patterns"]) for repo, options in hub.calls] == [
        ("owner/model", list(BASE_PATTERNS)),
        ("owner/gates", ["config.json", "attn_gate_weights.pth", "attn_gate_weights.safetensors"]),
    ]


ERRORS = {
    "no such model": (
        http(errors.RepositoryNotFoundError),
        FileNotFoundError,
        r"neither a folder 'owner/name' nor a model of that name on the hub\. Check the spelling; for a private model log in",
    ),
    "gated": (
        http(errors.GatedRepoError),
        PermissionError,
        r"open only to users who accepted its terms\. Accept them on https://huggingface\.co/owner/name, then log in",
    ),
    "no such revision": (
        http(errors.RevisionNotFoundError),
        FileNotFoundError,
        "'owner/name' has no 'v9'. Check the branch",
    ),
    "no connection": (
        errors.LocalEntryNotFoundError("x"),
        ConnectionError,
        r"'owner/name' is not a local folder, is not complete in the cache, and the hub can't be reached",
    ),
    "incomplete in the cache": (errors.IncompleteSnapshotError("x", "y"), ConnectionError, "not complete in the cache"),
    "offline": (errors.OfflineModeIsEnabled("x"), ConnectionError, "because HF_HUB_OFFLINE is set"),
    "not a valid id": (
        errors.HFValidationError("bad"),
        FileNotFoundError,
        r"is no valid hub id \(bad\)\. Check the path",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_the_hub_say_what_to_do(name: str, hub: Hub):
    hub.answer, error, message = ERRORS[name]
    with pytest.raises(error, match=message) as caught:
        resolve("owner/name", ["*"], revision="v9")
    assert caught.value.__cause__ is hub.answer


def test_offline_mode_is_honoured_by_the_real_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="can't be reached because HF_HUB_OFFLINE is set"):
        resolve("owner/name", ["*"])


@pytest.mark.parametrize("name", ["model", "a/b/c", "./a", "../a/b", "/a/b", "~x/b", "a/", "a\\b/c", "-a/b", ""])
def test_what_can_only_be_a_path_is_not_asked_for(name: str, hub: Hub):
    message = (
        r"There is no folder '.*', and a hub id has the form 'owner/name'\..*, or a name that is known here: tiny-lm, "
    )
    with pytest.raises(FileNotFoundError, match=message):
        resolve(name, ["*"])
    assert hub.calls == []


def test_a_file_is_no_folder(hub: Hub, tmp_path: Path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        NotADirectoryError,
        match=r"must be named by its folder or a \.gguf file; got the file .*Give the folder that holds it",
    ):
        resolve(tmp_path / "model.safetensors", ["*"])


def test_configurations_come_back(tmp_path: Path):
    (tmp_path / "config.json").write_text(config_text({"b": "ä", "a": [1, None]}))
    assert read_config(tmp_path) == {"a": [1, None], "b": "ä"}
    (tmp_path / "config.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="must hold JSON"):
        read_config(tmp_path)
