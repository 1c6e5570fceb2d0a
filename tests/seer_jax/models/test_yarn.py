"""A context stretched by YaRN: what transformers computes, and a config.json that it reads."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax.convert import load_base, save_base
from seer_jax.models.config import ModelConfig, RopeConfig, RopeKind
from tests.golden.data import transformers_case, write_base
from tests.train.tiny import CONFIG, DECODE, PREFILL, make_model

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.mark.parametrize("name", ["qwen2_yarn", "qwen3_biases_yarn"])
def test_a_stretched_model_computes_what_transformers_computes(name: str, exact_products: None, tmp_path: Path):
    """The goldens were made with YaRN of factor 4 over a context of 16 tokens; here a model without becomes that one, and is read back."""
    from transformers import AutoConfig

    golden = transformers_case(name)
    plain = dict(rope_parameters=dict(rope_type="default", rope_theta=1e6), max_position_embeddings=16)
    model = load_base(write_base(tmp_path / "plain", golden, **plain), dtype=jnp.float32)
    model.use_rope(model.config.with_yarn(4))
    save_base(model, tmp_path / "stretched")
    again = load_base(tmp_path / "stretched", dtype=jnp.float32)
    assert again.config == model.config and again.config.context == 64
    logits = jax.jit(lambda model: model(jnp.asarray(golden.io["input_ids"])))(again)
    np.testing.assert_allclose(logits[:, golden.io["positions"]], golden.io["logits"], atol=2e-5)
    read: Any = AutoConfig.from_pretrained(tmp_path / "stretched")
    expected = dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=16)
    assert expected == {key: read.rope_parameters[key] for key in expected} and read.max_position_embeddings == 64


def test_gates_follow_the_positions_of_a_stretched_model():
    model = make_model(gates=(PREFILL, DECODE))
    model.use_rope(model.config.with_yarn(4))
    assert model.prefill_gate is not None and model.decode_gate is not None
    assert model.config.rope == model.prefill_gate.model.rope == model.decode_gate.model.rope
    model.attach(model.prefill_gate, model.decode_gate)


LLAMA3 = RopeConfig(kind=RopeKind.LLAMA3, factor=8)
REFUSED: list[tuple[ModelConfig, float, str]] = [
    (CONFIG, 1.0, r"YaRN factor must be a number above 1; got 1\.0"),
    (CONFIG, float("nan"), r"YaRN factor must be a number above 1; got nan"),
    (dataclasses.replace(CONFIG, rope=LLAMA3), 4.0, r"not scaled; got one of type 'llama3', whose context is 8192 tokens\. Leave out"),
    (CONFIG.with_yarn(4), 4.0, r"not scaled; got one of type 'yarn', whose context is 32768 tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "factor", "message"), REFUSED)
def test_what_cannot_be_stretched(config: ModelConfig, factor: float, message: str):
    with pytest.raises(ValueError, match=message):
        config.with_yarn(factor)
