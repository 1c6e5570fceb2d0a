"""The release's own inputs and outputs (tests/golden), through conversion and the public model.

Bounds: logits, scores and masks as the release computed them in float32 on a GPU. Training goldens are in tests/train.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from seer_jax.convert import load_base, load_gates, recommended_policy
from seer_jax.models.attention import decode_attention, prefill_attention
from seer_jax.models.cache import Cache
from seer_jax.models.decoder import Transformer
from seer_jax.models.decoder.stack import LayerContext
from seer_jax.models.rope import rotate
from seer_jax.selection.context import DecodeContext
from seer_jax.selection.policies import Dense, Given, Policy
from seer_jax.selection.rules import Threshold, TokenBudget
from seer_jax.selection.scorers import LearnedGate

GOLDEN = Path(__file__).parent.parent / "golden"


class Golden:
    """One golden file: its arrays, and the model that it describes."""

    def __init__(self, name: str, folder: Path):
        with safe_open(GOLDEN / f"{name}.safetensors", "np") as file:
            config = file.metadata()["config"]
            self.arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no dict
        base = {k.removeprefix("base."): v for k, v in self.arrays.items() if k.startswith("base.")}
        (folder / "gates").mkdir(parents=True)
        for place in (folder, folder / "gates"):
            (place / "config.json").write_text(config)
        save_file(base, folder / "model.safetensors")
        weights = (GOLDEN / f"{name}.attn_gate_weights.pth").read_bytes()
        (folder / "gates" / "attn_gate_weights.pth").write_bytes(weights)
        self.hf = json.loads(config)
        self.gates = folder / "gates"
        self.model = load_base(folder, dtype=jnp.float32)
        self.model.attach(load_gates(folder / "gates", self.model.config))

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[f"io.{key}"]


@pytest.fixture(scope="module")
def prefill(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden("prefill_llama_a", tmp_path_factory.mktemp("prefill"))


@pytest.fixture(scope="module")
def decode(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden("decode_qwen3_a", tmp_path_factory.mktemp("decode"))


def relative(a: jax.Array, b: np.ndarray) -> float:
    """||a - b|| / ||b||; NaN fails every comparison."""
    return float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))


@jax.jit
def logits_of(model: Transformer, ids: jax.Array, policy: Policy) -> jax.Array:
    return model(ids, sparsity=policy)


def released_masks(golden: Golden) -> Given:
    return Given(jnp.stack([golden[f"sparse.block_mask.{i}"] for i in range(2)]))


def test_dense_prefill_logits(prefill: Golden):
    ours = logits_of(prefill.model, jnp.asarray(prefill["input_ids"]), Dense())
    assert relative(ours[:, prefill["logit_positions"]], prefill["dense.logits"]) < 1e-5


def test_sparse_prefill_logits_with_the_masks_of_the_release(prefill: Golden):
    ours = logits_of(prefill.model, jnp.asarray(prefill["input_ids"]), released_masks(prefill))
    assert relative(ours[:, prefill["logit_positions"]], prefill["sparse.logits"]) < 1e-5


def test_gate_scores_and_masks(prefill: Golden):
    """Scores of each layer, given the release's masks below it; and the masks its threshold makes of them.

    The release does not keep the diagonal: its masks are compared without ours.
    """
    model, ids = prefill.model, jnp.asarray(prefill["input_ids"])
    given, tokens = released_masks(prefill), ids.shape[1]

    def attend(layer: LayerContext, state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        context = model.prefill_context(layer, q, k, v, jnp.full(1, tokens))
        visible = jnp.tril(jnp.ones((13, 13), bool))
        logits = jnp.where(visible, LearnedGate().prefill_scores(context), -jnp.inf)
        out, _ = prefill_attention(layer.policy, context)
        return out, state, jax.nn.softmax(logits, axis=-1)

    segments = model.segments(given, model.prefill_gate, model.config.num_heads)
    _, _, scores = jax.jit(lambda ids: model.scan(ids, attend, segments=segments))(ids)
    policy = recommended_policy(prefill.gates)
    assert policy == Threshold(0.05, dense_last_rows=2)
    last_rows = np.tril(np.ones((13, 13), bool))[-2:]
    for layer in range(2):
        assert relative(scores[layer], prefill[f"sparse.gate_score.{layer}"]) < 2e-5
        mask = np.array(scores[layer] > 0.05)
        mask[..., -2:, :] = last_rows
        np.testing.assert_array_equal(mask, prefill[f"sparse.block_mask.{layer}"])


def test_threshold_prefill_keeps_what_the_release_keeps_and_the_diagonal(prefill: Golden):
    """In the first layer, where both see the same scores, the kept share is that of the release's mask with the diagonal."""
    expected = prefill["sparse.block_mask.0"] | np.eye(13, dtype=bool)
    ids = jnp.asarray(prefill["input_ids"])
    _, kept = jax.jit(lambda m, x: m.hidden_states(x, sparsity=Threshold(0.05)))(prefill.model, ids)
    np.testing.assert_allclose(kept[0], expected.sum() / (4 * 91), rtol=1e-6)


def test_decode_logits_with_the_masks_of_the_release(decode: Golden):
    """A dense prompt of 710 tokens, then 30 given tokens one at a time; the release's kernel adds block 0 to its masks."""
    model, ids, prompt = decode.model, jnp.asarray(decode["decode.input_ids"]), int(decode["decode.prompt_length"][0])
    step = jax.jit(lambda m, t, c, p: m.decode(t, c, sparsity=p)[:2])
    logits, cache, _ = jax.jit(lambda m, t, c: m.prefill(t, None, c))(model, ids[:, :prompt], model.make_cache(1, 768))
    expected = decode["decode.logits"]
    assert relative(logits, expected[0]) < 1e-5
    masks = decode["decode.block_mask"] | (np.arange(12) == 0)
    for i in range(30):
        logits, cache = step(model, ids[:, prompt + i], cache, Given(jnp.asarray(masks[i])))
        assert relative(logits, expected[i + 1]) < 1e-5


def test_decode_scores_rank_blocks_as_the_release_does(decode: Golden):
    """The release keeps the floor(m / b) best of all blocks, the current one ranked with a score of 0, and the current one."""
    model, ids, prompt = decode.model, jnp.asarray(decode["decode.input_ids"]), int(decode["decode.prompt_length"][0])
    assert recommended_policy(decode.gates) == TokenBudget(256)
    masks = decode["decode.block_mask"]

    @jax.jit
    def step(model: Transformer, token: jax.Array, cache: Cache, given: Given) -> tuple[Cache, jax.Array]:
        """One token through the layers under given masks; returns the gate logits of each layer too."""

        def attend(layer: LayerContext, cache: Cache, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
            q_rotated, k_rotated = rotate(q, k, cache.lengths[:, None], model.config.rope)
            cache = cache.append(layer.index, k_rotated[:, 0], v[:, 0])
            view = cache.view(layer.index)
            context = DecodeContext(
                q=q, q_rotated=q_rotated, cache=view, layer=layer.index, block_size=64, gate=layer.decode_gate
            )
            out, _ = decode_attention(layer.policy, context)
            return out, cache, (LearnedGate().decode_scores(context), k[:, 0])

        segments = model.segments(given, model.decode_gate, model.config.num_kv_heads)
        _, cache, (scores, keys) = model.scan(token[:, None], attend, cache, segments=segments)
        return cache.finish_step(model.decode_gate, keys), scores

    _, cache, _ = jax.jit(lambda m, t, c: m.prefill(t, None, c))(model, ids[:, :prompt], model.make_cache(1, 768))
    for i in range(30):
        given = Given(jnp.asarray(masks[i] | (np.arange(12) == 0)))
        cache, scores = step(model, ids[:, prompt + i], cache, given)
        current = (prompt + i) // 64
        ranked = np.array(scores)
        ranked[..., current] = 0
        best = np.argsort(-ranked, axis=-1, kind="stable")[..., :4]
        mask = np.zeros(ranked.shape, bool)
        np.put_along_axis(mask, best, True, axis=-1)
        mask[..., current] = True
        np.testing.assert_array_equal(mask, masks[i])
