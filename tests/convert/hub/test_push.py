"""Gates go to the hub as one commit; its client is stubbed, the network is never touched."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from seer_jax import from_pretrained, load_tokenizer, tiny_lm
from seer_jax.commands import main as cli
from seer_jax.convert import load_base, load_gates, push_gates
from seer_jax.convert.gate_config import gate_config_to_hf, without_gate_keys
from seer_jax.convert.push import model_card
from seer_jax.gates.configs import DecodeGateConfig, QueryReduction
from seer_jax.models.hub import named_gates
from tests.convert.hub.test_hub import http

GATES = named_gates("tiny-lm-release")


class Api:
    """Stands for huggingface_hub.HfApi and notes what it is asked for."""

    calls: list[tuple[str, Any, dict[str, Any]]]
    error: Exception | None = None

    def __init__(self, token: Any = None):
        self.calls.append(("token", token, {}))

    def create_repo(self, repo: str, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(("create", repo, options))

    def create_commit(self, repo: str, operations: list[Any], **options: Any) -> Any:
        files = {x.path_in_repo: x.path_or_fileobj for x in operations}
        self.calls.append(("commit", repo, options | {"files": files}))
        return type("Commit", (), {"commit_url": f"https://huggingface.co/{repo}/commit/1"})


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[Api]:
    stub = type("Stub", (Api,), {"calls": []})
    monkeypatch.setattr(huggingface_hub, "HfApi", stub)
    return stub


def test_a_gate_is_pushed_as_one_commit(api: type[Api]):
    url = push_gates(GATES["decode"], "owner/gates", private=True, revision="v2", token="secret")
    assert url == "https://huggingface.co/owner/gates/commit/1"
    token, create, (_, repo, commit) = api.calls
    assert token[1] == "secret" and create == ("create", "owner/gates", dict(private=True, exist_ok=True))
    assert repo == "owner/gates" and commit["revision"] == "v2"
    files = commit["files"]
    assert list(files) == ["config.json", "attn_gate_weights.safetensors", "README.md"]
    assert files["config.json"] == str(GATES["decode"] / "config.json")
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: seer-jax\n") and "# Decode gate for tiny-lm" in card
    assert (
        "seer-jax generate --gates owner/gates --prompt" in card and "Recommended policy: `threshold:[8 x 2]`." in card
    )


def test_a_card_says_how_a_gate_sees_finer(tmp_path: Path):
    hf = json.loads((GATES["decode"] / "config.json").read_text())
    hf = without_gate_keys(hf) | gate_config_to_hf(
        DecodeGateConfig(query_reduction=QueryReduction.HEADS, k_pool_size=8)
    )
    (tmp_path / "config.json").write_text(json.dumps(hf))
    card = model_card(tmp_path, "owner/gates")
    assert "A learned gate that sees finer than those of SeerAttention (SeerAttention-R, arXiv 2506.08889)" in card
    assert "\nIts settings beside the defaults: query_reduction=Qheads, k_pool_size=8.\n" in card


def test_a_card_names_a_base_on_the_hub_and_gives_way_to_ones_own(api: type[Api], tmp_path: Path):
    for name in ("config.json", "attn_gate_weights.safetensors"):
        (tmp_path / name).write_bytes((GATES["prefill"] / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"base_model": "owner/base"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    push_gates(tmp_path, "owner/gates")
    card = api.calls[-1][2]["files"]["README.md"].decode()
    assert card.startswith("---\nbase_model: owner/base\n") and "# Prefill gate for owner/base" in card
    (tmp_path / "README.md").write_text("mine")
    push_gates(tmp_path, "owner/gates")
    assert api.calls[-1][2]["files"]["README.md"] == b"mine"


ERRORS = [
    (
        http(errors.HfHubHTTPError),
        PermissionError,
        r"'owner/gates' must be .* may write to; the hub says: from the hub\.",
    ),
    (errors.LocalTokenNotFoundError("no token"), PermissionError, r"no token\. Log in with a token that can write"),
    (errors.OfflineModeIsEnabled("offline"), ConnectionError, r"can't be reached to write 'owner/gates' \(offline\)"),
    (errors.HTTPError("no route"), ConnectionError, r"\(no route\)"),  # pyright: ignore[reportPrivateImportUsage]
]


@pytest.mark.parametrize(("error", "kind", "message"), ERRORS)
def test_what_the_hub_refuses_is_told(error: Exception, kind: type[Exception], message: str, api: type[Api]):
    api.error = error
    with pytest.raises(kind, match=message):
        push_gates(GATES["decode"], "owner/gates")


def test_only_gates_are_pushed_and_only_to_repositories(api: type[Api], tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="has neither but base weights"):
        push_gates(tiny_lm.path(), "owner/gates")
    with pytest.raises(ValueError, match="must be named 'owner/name'; got 'gates'"):
        push_gates(GATES["decode"], "gates")
    assert api.calls == []


def test_convert_pushes_what_it_wrote(api: type[Api], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["convert", "--gates", str(GATES["decode"]), "--output", str(tmp_path / "out"), "--format", "pth"]
    assert cli.main([*words, "--push-to-hub", "here"]) == 2
    assert "--push-to-hub must name a repository, owner/name; got 'here'." in capsys.readouterr().err
    assert cli.main([*words, "--push-to-hub", "owner/gates"]) == 0
    assert capsys.readouterr().out.endswith("attn_gate_weights.pth\nhttps://huggingface.co/owner/gates/commit/1\n")
    assert api.calls[-1][2]["files"]["attn_gate_weights.pth"] == str(tmp_path / "out" / "attn_gate_weights.pth")


def test_revision_token_and_cache_reach_every_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A name's own revision is that of this name; the setting is the base model's alone."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(repo: str, *, allow_patterns: list[str], **options: Any) -> str:
        calls.append((repo, options))
        return str(GATES["decode"] if repo.endswith("gates") else tiny_lm.path())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub: dict[str, Any] = dict(revision="v1", token="secret", cache_dir=tmp_path)
    from_pretrained("owner/base", ["owner/gates@v3"], abstract=True, **hub)
    from_pretrained("owner/base@v2", "owner/gates", abstract=True)
    load_tokenizer("owner/base", **hub)
    load_base("owner/base", **hub)
    load_gates("owner/gates", **hub)
    assert calls == [
        ("owner/base", hub),
        ("owner/gates", hub | {"revision": "v3"}),
        ("owner/base", {"revision": "v2"}),
        ("owner/gates", {}),
        *[(name, hub) for name in ("owner/base", "owner/base", "owner/gates")],
    ]
    with pytest.raises(ValueError, match=r"revision must be given once; got 'owner/base@v2' and revision='v1'"):
        load_tokenizer("owner/base@v2", revision="v1")
