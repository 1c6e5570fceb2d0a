"""Losses, targets and gradients against those of the authors' release, and against its own rounding of the targets."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import attention_with_block_scores
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig
from seer_jax.models.decoder.stack import LayerContext
from seer_jax.models.rope import rotate
from seer_jax.train.data.batches import Batch
from seer_jax.train.data.packing import PackedRow
from seer_jax.train.distillation import (
    RowWeights,
    distillation_pass,
    packed_decode_keys,
    packed_decode_logits,
)
from seer_jax.train.distillation.prefill import packed_prefill_logits
from seer_jax.train.loss import decode_rows, prefill_rows, row_kl, row_weights
from tests.train.golden_models import DECODE_NAMES, load_golden, relative_error

BLOCK = 64


class Case:
    """A golden model with its gate and batch, and what one pass through it gives; each compiles for seconds."""

    def __init__(self, name, gate, batch, skip):
        self.model, self.arrays = load_golden(name, gate)
        self.kind = "prefill" if isinstance(gate, PrefillGateConfig) else "decode"
        self.gate, self.batch, self.skip = getattr(self.model, f"{self.kind}_gate"), batch(self.arrays), skip

    def layer_gate(self, layer):
        return jax.tree.map(lambda w: w[layer], self.gate)

    @functools.cached_property
    def weights(self):
        rows = (prefill_rows if self.kind == "prefill" else decode_rows)(
            self.batch.segment_ids, self.batch.positions, block_size=BLOCK, skip=self.skip
        )
        if self.kind == "prefill":
            return row_weights(rows)
        # The release takes the mean over each sequence, then over the two sequences.
        return (
            row_weights(rows & (self.batch.segment_ids == 1)) + row_weights(rows & (self.batch.segment_ids == 2))
        ) / 2

    @functools.cached_property
    def report(self):
        weights = RowWeights(**{"prefill": None, "decode": None, self.kind: self.weights})
        return getattr(jax.jit(distillation_pass)(self.model, self.batch, weights), self.kind)

    @functools.cached_property
    def inputs(self):
        """Queries and keys before and after RoPE, and the targets, of all layers."""
        ids, positions = self.batch.segment_ids, self.batch.positions

        def attend(context: LayerContext, state, q, k, v):
            q_rotated, k_rotated = rotate(q, k, positions, self.model.config.rope)
            settings = {"block_size": BLOCK, "segment_ids": ids, "token_scores": True}
            scored = attention_with_block_scores(q_rotated, k_rotated, v, **settings)
            target = scored.block_scores if self.kind == "prefill" else scored.token_scores
            return scored.output, state, (q, k, q_rotated, k_rotated, target)

        return jax.jit(lambda model: model.scan(self.batch.tokens, attend)[2])(self.model)


def one_sequence(arrays):
    tokens = jnp.asarray(arrays["io.train.input_ids"], jnp.int32)
    return Batch(tokens, jnp.ones_like(tokens), jnp.arange(tokens.shape[1])[None])


def packed_sequences(arrays):
    """300 and 500 tokens in one row, the second sequence at a block boundary."""
    row = PackedRow(*np.zeros((3, 1, 832), np.int32))
    for segment, (first, start, length) in enumerate([(0, 0, 300), (300, 320, 500)], start=1):
        place = (0, slice(start, start + length))
        row.tokens[place] = arrays["io.train.input_ids"][0, first : first + length]
        row.segment_ids[place] = segment
        row.positions[place] = np.arange(length)
    return Batch.of(row)


@pytest.fixture(scope="module")
def prefill():
    gate = PrefillGateConfig(block_size=BLOCK, gate_dim=64)
    return Case("prefill_llama_a", gate, one_sequence, skip=0.25)


@pytest.fixture(scope="module")
def decode():
    gate = DecodeGateConfig(block_size=BLOCK, gate_dim=64)
    return Case("decode_qwen3_a", gate, packed_sequences, skip=0.5)


def test_prefill_loss(prefill):
    # The release averages over the columns too, twelve of them.
    assert abs(prefill.report.loss.sum() / 12 / prefill.arrays["io.train.mask_loss"][0] - 1) < 1e-3


def test_decode_loss(decode):
    assert decode.arrays["io.train.seq_lengths"].tolist() == [[300, 500]]
    # ceil(500 / 64) = 8 columns, for both sequences.
    assert abs(decode.report.loss.sum() / 8 / decode.arrays["io.train.gate_loss"][0] - 1) < 1e-3


@pytest.mark.parametrize("layer", [0, 1])
def test_prefill_targets_and_scores(prefill, layer):
    q, k, _, _, target = (x[layer] for x in prefill.inputs)
    assert relative_error(target[:, :, 3:], prefill.arrays[f"io.train.ground_truth.{layer}"]) < 2e-2
    batch, theirs = prefill.batch, prefill.arrays[f"io.train.log_prob.{layer}"]
    logits = packed_prefill_logits(prefill.layer_gate(layer), q, k, batch.positions, batch.segment_ids)
    seen = np.asarray(logits[:, :, 3:] > -jnp.inf)
    np.testing.assert_array_equal(seen, theirs > -1e4)  # the release masks with large negative numbers
    assert relative_error(jax.nn.log_softmax(logits, axis=-1)[:, :, 3:][seen], theirs[seen]) < 1e-4


@pytest.mark.parametrize("layer", [0, 1])
def test_prefill_gradient(prefill, layer):
    theirs = prefill.arrays[f"io.train.grad.model.layers.{layer}.self_attn.attn_gate.mask_linear_k.weight"]
    assert relative_error(prefill.report.gradient.linear_k[...][layer] / 12, theirs) < 1e-2  # their targets are rounded
    # With their targets nothing is left but float32 rounding.
    q, k, *_ = (x[layer] for x in prefill.inputs)
    target, batch = jnp.asarray(prefill.arrays[f"io.train.ground_truth.{layer}"]), prefill.batch

    def loss_of(gate):
        logits = packed_prefill_logits(gate, q, k, batch.positions, batch.segment_ids)
        return row_kl(target, logits[:, :, 3:]).mean() / 12

    assert relative_error(jax.jit(jax.grad(loss_of))(prefill.layer_gate(layer)).linear_k[...], theirs) < 1e-3


def rounded_targets(q, k, segment_ids):
    """Decode targets as the release's kernel makes them: row maxima, probabilities, sum and quotient in bfloat16."""

    def rounded(x):
        return x.astype(ml_dtypes.bfloat16).astype(np.float32)

    q, k, ids = np.asarray(q)[0], np.asarray(k)[0], np.asarray(segment_ids)[0]
    length, heads, dim = q.shape
    group = heads // k.shape[1]
    scores = np.einsum("thd,shd->hts", q, np.repeat(k, group, axis=1)) * dim**-0.5
    t = np.arange(length)
    own = (ids[:, None] == ids) & (ids > 0)
    scores = np.where(own & (t[:, None] >= t), scores, -np.inf)
    top = np.where(ids > 0, scores.max(-1), 0)[..., None]
    total = np.exp(scores - top).sum(-1, keepdims=True)
    blocks = scores.reshape(heads, length, -1, BLOCK).max(-1)
    shares = rounded(np.exp(rounded(blocks) - top) / np.where(total > 0, total, 1))
    shares = shares.reshape(-1, group, length, shares.shape[-1]).max(1)
    earlier = own[:, ::BLOCK] & (t[::BLOCK] // BLOCK < t[:, None] // BLOCK)
    shares = np.where(earlier, shares, 0)
    return jnp.asarray(rounded(shares / rounded(shares.sum(-1, keepdims=True) + 1e-9)))[None]


@pytest.mark.parametrize("layer", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_decode_gradient(decode, layer):
    q, k, q_rotated, k_rotated, exact = (x[layer] for x in decode.inputs)
    target, batch = rounded_targets(q_rotated, k_rotated, decode.batch.segment_ids), decode.batch
    assert relative_error(exact, target) < 2e-2

    weights = decode.weights  # a cached property: computed inside jit it would keep a tracer

    def loss_of(gate):
        keys = packed_decode_keys(gate, k, batch.positions, batch.segment_ids)
        logits = packed_decode_logits(gate, q, keys, batch.positions, batch.segment_ids)
        return (row_kl(target, logits).mean(1) * weights).sum() / 8

    gradient = jax.jit(jax.grad(loss_of))(decode.layer_gate(layer))
    for ours, name in DECODE_NAMES.items():
        theirs = decode.arrays[f"io.train.grad.model.layers.{layer}.self_attn.attn_gate.{name}.weight"]
        assert relative_error(getattr(decode.report.gradient, ours)[...][layer] / 8, theirs) < 1e-2
        assert relative_error(getattr(gradient, ours)[...], theirs) < 1e-3
