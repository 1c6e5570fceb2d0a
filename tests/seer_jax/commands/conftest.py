"""A tiny model on disk, shared by the tests of this folder."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from seer_jax import tiny_lm
from seer_jax.convert import save_base, save_gates
from seer_jax.selection.rules import TokenBudget, TopK
from tests.seer_jax.conftest import LLAMA, tiny_model


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ with the bundled tokenizer and a chat template, prefill/ and decode/ gates, each with a recommended policy, and plain/, the
    decode gate without one."""
    root = tmp_path_factory.mktemp("saved")
    model = tiny_model(dataclasses.replace(LLAMA, vocab_size=4096, eos_token_ids=(0,)))
    save_base(model, root / "base")
    shutil.copy(tiny_lm.path() / "tokenizer.json", root / "base")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (root / "base" / "tokenizer_config.json").write_text(json.dumps(dict(chat_template=template)))
    recommended = dict(prefill=TopK(0.4), decode=TokenBudget(32))
    for kind, policy in recommended.items():
        gate = getattr(model, f"{kind}_gate")
        save_gates(gate, root / kind, base_model="base", policy=policy)
    gate = model.decode_gate
    assert gate is not None
    save_gates(gate, root / "plain", base_model="base")
    return root
