"""Gates to the Hugging Face hub, with a model card."""

import os
from pathlib import Path

from seer_jax.convert.gates import GateFormat, described_gate
from seer_jax.folders import check_is_gate
from seer_jax.gates.configs import PrefillGateConfig, changed_settings
from seer_jax.models.hub import is_hub_id, read_config, writing_errors

_CARD = """---
{front}library_name: seer-jax
tags:
- seer-attention
- sparse-attention
---

# {kind} gate for {base}

A learned gate {of} ({paper}): it predicts which blocks of {block_size} tokens matter to the attention of {base}
{phase}. The base model is unchanged and comes from its own repository.{finer}

    seer-jax generate --gates {repo} --prompt '...'

Recommended policy: {policy}.
"""


def push_gates(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Uploads a gate as one commit: `config.json`, its weights, and a model card.

    Args:
      folder: of one gate, as `save_gates` writes it. A README.md in it is the model card; otherwise one is made.
      repo: "owner/name", created if it does not exist.
      private: whether a new repository is private; None: as the owner's settings say.
      revision: branch to commit to; None: main.
      token: of a user who may write there; None: that of `hf auth login` or HF_TOKEN.

    Returns:
      The address of the commit.

    Raises:
      FileNotFoundError: the folder has no gate.
      ValueError: the repository's name is not "owner/name", or config.json describes no gate.
      PermissionError, ConnectionError: the user may not write there, or the hub can't be reached.
    """
    import huggingface_hub

    folder = Path(folder)
    check_is_gate(folder)
    if not is_hub_id(repo):
        raise ValueError(f"The repository of gates must be named 'owner/name'; got {repo!r}.")
    names = ["config.json", *(f.file_name for f in GateFormat if (folder / f.file_name).is_file())]
    readme = folder / "README.md"
    card = readme.read_bytes() if readme.is_file() else model_card(folder, repo).encode()
    add = huggingface_hub.CommitOperationAdd
    files = [add(name, str(folder / name)) for name in names] + [add("README.md", card)]
    with writing_errors(repo):
        api = huggingface_hub.HfApi(token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.create_commit(repo, files, commit_message="Upload gates", revision=revision)
    return str(done.commit_url)


def model_card(folder: Path, repo: str) -> str:
    """The model card of a gate, from its `config.json`."""
    hf = read_config(folder)
    gate = described_gate(hf)
    base = str(hf.get("base_model") or "its base model")
    prefill, finer = isinstance(gate.config, PrefillGateConfig), gate.config.finer_than_release()
    return _CARD.format(
        front=f"base_model: {base}\n" if is_hub_id(base) else "",
        kind="Prefill" if prefill else "Decode",
        base=base,
        of="that sees finer than those of SeerAttention" if finer else "of SeerAttention",
        finer=f"\nIts settings beside the defaults: {changed_settings(gate.config)}." if finer else "",
        paper="arXiv 2410.13276" if prefill else "SeerAttention-R, arXiv 2506.08889",
        block_size=gate.config.block_size,
        phase="while a prompt is read" if prefill else "while tokens are generated",
        repo=repo,
        policy="none" if gate.recommended is None else f"`{gate.recommended}`",
    )
