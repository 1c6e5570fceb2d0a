"""The planted retrieval model through the whole path: Hugging Face folder, conversion, prefill and decode, dense and sparse."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seer_jax.convert import load_base
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig
from seer_jax.models.decoder import Transformer
from seer_jax.selection.policies import Dense
from seer_jax.selection.rules import Threshold, TokenBudget
from seer_jax.selection.scorers import Oracle, SinkWindow
from tests.seer_jax import planted

PAIRS = 8
CASES = [(512, 16), (4096, 64)]  # tokens, block size

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planted")
    planted.write(path)
    return path


def model_with_blocks(folder: Path, block_size: int) -> Transformer:
    """The gates are untrained: they only say how large a block is."""
    model = load_base(folder, dtype=jnp.float32)
    model.add_gate(PrefillGateConfig(block_size=block_size), rngs=nnx.Rngs(0))
    return model.add_gate(DecodeGateConfig(block_size=block_size), rngs=nnx.Rngs(1))


@pytest.mark.parametrize(("length", "block_size"), CASES)
def test_prefill_recalls_every_pair_with_the_blocks_of_the_oracle(folder: Path, length: int, block_size: int):
    model = model_with_blocks(folder, block_size)
    tokens, asked = planted.prompts(2, length, PAIRS, block_size, seed=length)

    @jax.jit
    def run(model: Transformer, tokens: jax.Array, policy) -> tuple[jax.Array, jax.Array]:
        hidden, kept = model.hidden_states(tokens, sparsity=policy)
        return model.logits(hidden[:, asked]).argmax(-1), kept

    def recall(policy) -> tuple[float, float]:
        found, kept = run(model, jnp.asarray(tokens), policy)
        return float((found == tokens[:, asked + 1]).mean()), float(kept.mean())

    assert recall(Dense())[0] == 1
    found, density = recall(Threshold(0.25, Oracle(), dense_last_rows=0))
    assert found == 1
    assert 0.03 < density < 0.1
    assert recall(TokenBudget(3 * block_size, SinkWindow()))[0] < 0.5


@pytest.mark.parametrize(("length", "block_size"), CASES)
def test_decode_recalls_every_pair_with_the_blocks_of_the_oracle(folder: Path, length: int, block_size: int):
    model = model_with_blocks(folder, block_size)
    tokens, asked = planted.prompts(2, length, PAIRS, 2, seed=length + 1)
    start = asked[0]
    step = jax.jit(lambda model, tokens, cache, policy: model.decode(tokens, cache, sparsity=policy))
    _, prompt, _ = jax.jit(lambda m, t, c: m.prefill(t, None, c))(
        model, jnp.asarray(tokens[:, :start]), model.make_cache(2, length)
    )

    def recall(policy) -> tuple[float, float]:
        cache, right, density = prompt, [], []
        for t in range(start, length):
            logits, cache, kept = step(model, jnp.asarray(tokens[:, t]), cache, policy)
            density.append(kept.mean())
            if t in asked:
                right.append(np.asarray(logits.argmax(-1)) == tokens[:, t + 1])
        return float(np.mean(right)), float(np.mean(density))

    assert recall(Dense())[0] == 1
    found, density = recall(TokenBudget(3 * block_size, Oracle()))
    assert found == 1
    assert density < 0.1
    assert recall(TokenBudget(3 * block_size, SinkWindow()))[0] < 0.5
