"""Whole windows in one pass against decoding token by token."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.devices import assume_hopper
from seer_jax import parse_policy
from seer_jax.evaluate import score_windows
from seer_jax.evaluate import window as window_module
from seer_jax.evaluate.window import AtOnce, decode_window
from seer_jax.models.decoder import Transformer
from seer_jax.selection.rules import CumulativeMass, TopK
from seer_jax.selection.scorers import SCORERS, LearnedGate, Oracle
from tests.seer_jax.conftest import LLAMA, tiny_model

pytestmark = pytest.mark.usefixtures("compile_quickly")

# The last block is ragged, and so are the last chunk of queries and the last tile of keys.
LENGTH, CHUNK, TILE = 150, 64, 128
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, LENGTH)), jnp.int32)


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "ON_CPUS", AtOnce(CHUNK, 2**25, TILE))


@jax.jit
def step(model: Transformer, token: Any, cache: Any, policy: Any) -> Any:
    return model.decode(token, cache, sparsity=policy)


def slow(policy: str) -> Any:
    return pytest.param(policy, "cpu", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("policy", "platform"),
    [
        ("mass:0.6", "cpu"),
        pytest.param("topk:0.3:oracle,dense_layers=1", "gpu", marks=pytest.mark.slow),
        *map(slow, ["dense", "threshold:0.25", "budget:32", "mass:0.6:oracle", "threshold:0.3:random"]),
        *map(
            slow,
            [
                "budget:32:window",
                "topk:0.4:quest",
                "mass:0.6:subblock",
                "mass:0.6:oracle-mass",
            ],
        ),
    ],
)
def test_a_pass_over_windows_is_decoding_token_by_token(policy: str, platform: str, monkeypatch: pytest.MonkeyPatch):
    """From an empty cache on: the same losses, and in each layer the same share of the blocks for each token, in chunks for any device."""
    monkeypatch.setattr(window_module, "default_device", lambda: SimpleNamespace(platform=platform))
    assert AtOnce.here().tokens == {"cpu": CHUNK, "gpu": 1024}[platform]
    model, of = tiny_model(), parse_policy(policy)
    scores, kept = jax.jit(lambda *x: (score_windows(*x), decode_window(*x).kept))(model, TOKENS, of)
    cache, losses, shares = model.make_cache(*TOKENS.shape), [], []
    for token, target in zip(TOKENS[:, :-1].T, TOKENS[:, 1:].T, strict=True):
        logits, cache, share = step(model, token, cache, of)
        losses.append(-jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], 1)[:, 0])
        shares.append(share)
    np.testing.assert_allclose(scores.nll, np.stack(losses, 1), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(kept[..., :-1], np.stack(shares, 2), rtol=1e-6)
    visible = np.arange(LENGTH) // 16 + 1
    expected = (np.asarray(kept).mean(0) * visible).sum(-1) / visible.sum()
    np.testing.assert_allclose(scores.kept, expected, rtol=1e-5)
    assert policy == "dense" or (expected < 0.9).all()


@pytest.mark.slow
def test_observed_contexts_are_those_of_the_tokens():
    """Scores of every token, row and layer, taken beside dense attention: those of the token decoded last of a shorter window."""
    model = tiny_model()

    def observe(context: Any) -> Any:
        return LearnedGate().decode_scores(context)[0], Oracle().decode_scores(context)[0], context.position[0]

    whole = decode_window(model, TOKENS, observe=observe)
    gate, oracle, position = whole.observed
    assert gate.shape == oracle.shape == (2, 2, LENGTH, 2, 10) and (whole.kept == 1).all()
    np.testing.assert_array_equal(position, np.broadcast_to(np.arange(LENGTH), (2, 2, LENGTH)))
    np.testing.assert_allclose(jnp.exp(oracle).max(-1) <= 1 + 1e-6, True)
    shorter = decode_window(model, TOKENS[:1, :40], observe=observe).observed
    for long, short in zip((gate, oracle), shorter, strict=False):
        blocks = 40 // 16  # completed ones of the last token
        np.testing.assert_allclose(long[:, 0, 39, :, :blocks], short[:, 0, 39, :, :blocks], rtol=1e-4, atol=1e-5)


QUICK = "gate", "quest"
SCORING = [
    pytest.param(kind, id=name, marks=() if name in QUICK else pytest.mark.slow)
    for name, kind in SCORERS.items()
    if "decode" in kind.phases()
]


@pytest.mark.parametrize("scorer", SCORING)
def test_a_pass_chooses_by_the_kernel_on_gpus(scorer: Any):
    """Whatever scores: all tokens of a chunk are lists of one call, whose CTAs take four lists each, and keys are pooled once."""
    with assume_hopper():
        run = jax.jit(lambda model, tokens: decode_window(model, tokens, CumulativeMass(0.6, scorer())))
        text = run.trace(tiny_model(), TOKENS).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.slow
def test_memory_is_linear_in_the_window():
    """No T x T array: 8192 tokens of a model with 9 heads need less than one such array of float32."""
    config = dataclasses.replace(LLAMA, num_heads=9, num_kv_heads=3, head_dim=64, hidden_size=576)
    model = nnx.eval_shape(lambda: tiny_model(config, block_size=64))
    tokens = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    needs: Any = jax.jit(score_windows).lower(model, tokens, TopK(0.1)).compile().memory_analysis()
    assert needs.temp_size_in_bytes < 8192**2 * 4 * 9 / 4
