"""The distillation pass and the compiled step: what they compute, what they train, and how much memory they take."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pallas_kernels import attention_with_block_scores
from seer_jax.gates.configs import TrainedGates
from seer_jax.models.decoder import Transformer
from seer_jax.train import distillation, loss
from seer_jax.train.config import FinetuneConfig, OptimizerConfig, TargetStatistic
from seer_jax.train.data.batches import Batch
from seer_jax.train.data.packing import Packing, pack
from seer_jax.train.data.store import TokenStore
from seer_jax.train.distillation import PassReport, RowWeights, distillation_pass, prefill
from seer_jax.train.loss import decode_rows, prefill_rows, recall_stride, row_weights
from seer_jax.train.optimizer import make_optimizer, make_schedule
from seer_jax.train.step import make_step
from seer_jax.train.tasks import Distillation, LanguageModelling
from tests.train.tiny import BLOCK, CONFIG, DECODE, LENGTH, PREFILL, distill_config, make_model, make_rows

pytestmark = pytest.mark.usefixtures("compile_quickly")


@functools.cache
def model_with_gates():
    return make_model(gates=(PREFILL, DECODE))


def make_batch(rows: np.ndarray) -> Batch:
    tokens = jnp.asarray(rows, jnp.int32)
    return Batch(tokens, jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))


def weigh(batch: Batch) -> RowWeights:
    place = (batch.segment_ids, batch.positions)
    prefill = row_weights(prefill_rows(*place, block_size=BLOCK, skip=0.25))
    return RowWeights(prefill, row_weights(decode_rows(*place, block_size=BLOCK, skip=0.5)))


run = jax.jit(distillation_pass, static_argnames=("statistic", "decode_stride", "recall_density"))


def in_first_row(row: Sequence[np.ndarray]) -> Batch:
    """A batch of two rows, the second one empty."""
    return Batch(*(jnp.stack([jnp.asarray(x, jnp.int32), jnp.zeros(LENGTH, jnp.int32)]) for x in row))


@pytest.mark.slow
def test_packed_sequences_learn_as_they_would_alone():
    documents = [make_rows(3)[i, :n] for i, n in enumerate((50, 30, 20))]
    data = pack(
        TokenStore.from_documents(documents), Packing.BEST_FIT, row_length=LENGTH, block_size=BLOCK, min_length=1
    )
    assert len(data) == 1
    batch = in_first_row(data[0])
    weights, reports, start = weigh(batch), [], 0
    together = run(model_with_gates(), batch, weights)
    for document in documents:
        pad, blocks = (0, LENGTH - len(document)), -(-len(document) // BLOCK)
        alone = [np.pad(x, pad) for x in (document, np.ones(len(document)), np.arange(len(document)))]
        own = []
        for weight, size in zip(weights, (1, BLOCK), strict=True):
            assert weight is not None
            place = slice(start * size, (start + blocks) * size)
            own.append(jnp.zeros_like(weight).at[:, : blocks * size].set(weight[:, place]))
        reports.append(run(model_with_gates(), in_first_row(alone), RowWeights(*own)))
        start += blocks
    total = jax.tree.map(lambda *parts: sum(parts), *reports)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), together, total)


@pytest.mark.slow
def test_one_gate_or_both_from_one_pass():
    batch = make_batch(make_rows(2))
    both = run(model_with_gates(), batch, weigh(batch))
    for kind in ("prefill", "decode"):
        other = {"prefill": "decode", "decode": "prefill"}[kind]
        alone = run(model_with_gates(), batch, weigh(batch)._replace(**{other: None}))
        assert getattr(alone, other) is None
        ours, theirs = getattr(alone, kind), getattr(both, kind)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, theirs)


@pytest.mark.parametrize("target", TargetStatistic)
def test_both_gates_learn_the_target_that_the_settings_name(monkeypatch: pytest.MonkeyPatch, target: TargetStatistic):
    asked = []

    def record(*arguments, statistic: str, **settings):
        asked.append((statistic, settings.get("token_scores", False), settings["block_scores"]))
        return attention_with_block_scores(*arguments, statistic=statistic, **settings)

    monkeypatch.setattr(prefill, "attention_with_block_scores", record)
    for kind in (TrainedGates.BOTH, TrainedGates.PREFILL):
        task, trained, frozen = Distillation.start(model_with_gates(), distill_config(kind=kind, target=target))
        batch = make_batch(make_rows(2))
        jax.eval_shape(lambda task=task, x=(trained, frozen), b=batch: task.gradients(*x, b, task.weigh(b)))
    assert {(target, True, True), (target, False, True)} <= set(asked)
    assert {statistic for statistic, *_ in asked} == {target}


@pytest.mark.slow
@pytest.mark.parametrize(("kinds", "sizes"), [(("decode",), (10,)), (("prefill", "decode"), (2, 24))])
def test_chunks_of_queries_have_the_gradients_of_the_whole(monkeypatch: pytest.MonkeyPatch, kinds: tuple, sizes: tuple):
    """Two rows of 24 blocks, of which recall takes every third token: chunks of 1, 5 (the last one reaches back) and 12."""
    length = 24 * BLOCK
    documents = [row[:n] for row, n in zip(make_rows(4, length), (150, 80, 100, 300), strict=True)]
    data = pack(TokenStore.from_documents(documents), Packing.BEST_FIT, row_length=length, block_size=BLOCK)
    batch = Batch(*(jnp.stack(x) for x in zip(*(map(jnp.asarray, data[i]) for i in range(2)), strict=True)))
    weights = RowWeights(**{kind: x if kind in kinds else None for kind, x in weigh(batch)._asdict().items()})
    assert [len(np.unique(ids)) for ids in np.asarray(batch.segment_ids)] == [3, 3]  # two sequences and padding
    assert recall_stride(length) == 3
    reports = []
    for size in (2 * length, *(blocks * BLOCK for blocks in sizes)):
        monkeypatch.setattr(distillation, "QUERIES_AT_ONCE", size)
        reports.append(jax.jit(lambda *x: distillation_pass(*x))(model_with_gates(), batch, weights))
    whole, *chunked = reports
    for report in chunked:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), report, whole)
    assert all((getattr(whole, kind).recall_weight > 0).all() for kind in kinds)


@pytest.mark.slow
def test_a_stride_leaves_out_tokens_without_weight(monkeypatch: pytest.MonkeyPatch):
    batch = make_batch(make_rows(2))
    weights = weigh(batch)
    assert weights.decode is not None
    weights = weights._replace(decode=jnp.where(jnp.arange(LENGTH) % 4 == 0, weights.decode, 0))
    whole = run(model_with_gates(), batch, weights)
    for size in (2 * LENGTH, 6 * BLOCK):  # the last of three chunks of three blocks reaches back
        monkeypatch.setattr(distillation, "QUERIES_AT_ONCE", size)
        strided = jax.jit(lambda *x: distillation_pass(*x, decode_stride=4))(model_with_gates(), batch, weights)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), strided, whole)


@pytest.mark.slow
def test_memory_for_decode_gates_is_that_of_a_chunk(monkeypatch: pytest.MonkeyPatch):
    task, trained, frozen = Distillation.start(make_model(gates=(DECODE,)), distill_config(kind=TrainedGates.DECODE))
    length = 512 * BLOCK
    batch = Batch(*(jnp.zeros((1, length), jnp.int32) for _ in range(3)))
    scratch = []
    for at_once in (length, length // 16):
        monkeypatch.setattr(distillation, "QUERIES_AT_ONCE", at_once)
        gradients = jax.jit(lambda batch: task.gradients(trained, frozen, batch, task.weigh(batch))).lower(batch)
        memory = gradients.compile().memory_analysis()
        assert memory is not None
        scratch.append(memory.temp_size_in_bytes)
    targets = CONFIG.num_kv_heads * length * (length // BLOCK) * 4  # of one layer
    assert scratch[0] > 2 * targets and scratch[1] < targets


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("prefill",), ("prefill", "decode")], ids=str)
def test_block_rows_in_chunks_are_all_rows(kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    """With several sequences and padding, chunks that overlap, and recall of rows that chunks do not begin with."""
    tokens = make_rows(2)
    ids = np.where(np.arange(LENGTH) < 3 * BLOCK, 1, 2) * np.ones((2, 1), int)
    ids[1, -BLOCK - 3 :] = 0
    positions = np.where(ids == 2, np.arange(LENGTH) - 3 * BLOCK, np.arange(LENGTH))
    batch = Batch(*(jnp.asarray(x, jnp.int32) for x in (tokens, ids, positions)))
    weights = {kind: x if kind in kinds else None for kind, x in weigh(batch)._asdict().items()}
    monkeypatch.setattr(loss, "RECALL_ROWS", 3)

    def report() -> PassReport:
        return jax.jit(lambda *x: distillation_pass(*x))(model_with_gates(), batch, RowWeights(**weights))

    whole = report()
    monkeypatch.setattr(prefill, "SCORES_AT_ONCE", 3 * LENGTH // BLOCK)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), report(), whole)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_memory_for_prefill_gates_is_that_of_a_chunk():
    """Twice the tokens take twice the scratch, not four times: at 256k and 512k tokens, with many heads on a narrow model."""
    config = dataclasses.replace(
        CONFIG, hidden_size=32, intermediate_size=64, num_heads=16, num_kv_heads=1, head_dim=16
    )
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)).add_gate(PREFILL, rngs=nnx.Rngs(0)))
    scratch = []
    for blocks in (4096, 8192):
        rows: Any = jax.ShapeDtypeStruct((1, blocks * BLOCK), jnp.int32)
        weight: Any = jax.ShapeDtypeStruct((1, blocks), jnp.float32)
        lowered = jax.jit(distillation_pass).lower(model, Batch(rows, rows, rows), RowWeights(weight, None))
        plan: Any = lowered.compile().memory_analysis()
        scratch.append(plan.temp_size_in_bytes)
    assert scratch[1] < 2.2 * scratch[0]
    assert scratch[1] < config.num_heads * 8192**2 * 4 / 2  # targets of one layer


def test_decode_gates_learn_from_whole_blocks():
    batch = make_batch(make_rows(1)[:, :-3])
    with pytest.raises(ValueError, match=f"whole blocks of {BLOCK} tokens; got {LENGTH - 3} tokens"):
        distillation_pass(model_with_gates(), batch, weigh(batch)._replace(prefill=None))


def test_without_rows_in_the_loss_all_gradients_are_zero():
    batch = make_batch(make_rows(2))
    report = run(model_with_gates(), batch, jax.tree.map(jnp.zeros_like, weigh(batch)))
    assert all(not np.any(x) for x in jax.tree.leaves(report))


@pytest.mark.parametrize(
    ("gates", "weighted", "sizes"),
    [
        ((PREFILL, dataclasses.replace(DECODE, block_size=32)), ("prefill", "decode"), r"\[16, 32\]"),
        ((PREFILL,), ("prefill", "decode"), r"\[16, None\]"),
        ((PREFILL,), ("decode",), r"\[None\]"),
        ((PREFILL,), (), r"\[\]"),
    ],
)
def test_gates_that_do_not_fit_are_refused(gates, weighted, sizes):
    batch = make_batch(make_rows(1))
    weights = weigh(batch)._asdict()
    weights = RowWeights(**{kind: weights[kind] if kind in weighted else None for kind in weights})
    with pytest.raises(ValueError, match=rf"of one block size; got block sizes {sizes}"):
        distillation_pass(make_model(gates=gates), batch, weights)


OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=1)


def make_task(gates: TrainedGates | None, layers: int = 2):
    """(task, its weights, the rest, optimizer, schedule): distillation of gates, or fine-tuning."""
    optimizer = make_optimizer(OPTIMIZER, 10), make_schedule(OPTIMIZER, 10)
    model = make_model(layers=layers, gates=(PREFILL, DECODE))
    if gates is not None:
        return (*Distillation.start(model, distill_config(kind=gates)), *optimizer)
    return (*LanguageModelling.start(model, packed=True), *optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("gates", [TrainedGates.DECODE, None])
def test_accumulation_is_one_large_batch(gates):
    task, trained, frozen, optimizer, schedule = make_task(gates)
    documents = [row[:n] for row, n in zip(make_rows(6), (128, 90, 64, 128, 50, 40), strict=True)]
    store = TokenStore.from_documents(documents)
    data = pack(store, Packing.BEST_FIT, row_length=LENGTH, block_size=BLOCK)
    # Rows with unequal counts of tokens that the loss takes.
    batch = Batch(*(jnp.stack(x) for x in zip(*(map(jnp.asarray, data[i]) for i in range(4)), strict=True)))
    results = []
    for parts in (1, 4):
        step = make_step(task, optimizer, schedule, parts)
        copies = jax.tree.map(jnp.copy, trained)
        trained_now, _, metrics = step(copies, optimizer.init(copies), frozen, batch, jnp.int32(1))
        results.append((trained_now, metrics))
    # Adam turns the rounding of a vanishing gradient into a step of any size, so the gradient's norm is compared.
    for name, value in results[0][1].items():
        np.testing.assert_allclose(value, results[1][1][name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("gates", "names"),
    [
        (TrainedGates.PREFILL, {"prefill_gate"}),
        (TrainedGates.DECODE, {"decode_gate"}),
        (TrainedGates.BOTH, {"prefill_gate", "decode_gate"}),
    ],
)
def test_only_the_chosen_gates_have_optimizer_state(gates, names):
    model = make_model(gates=(PREFILL, DECODE))
    _, trained, frozen = Distillation.start(model, distill_config(kind=gates))
    assert set(trained) == names
    weights = sum(x.size for name in names for x in jax.tree.leaves(nnx.state(getattr(model, name))))
    state = make_optimizer(OPTIMIZER, 10).init(trained)
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 2 * weights
    assert sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim) == 8 * weights  # float32
    total = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    assert sum(x.size for x in jax.tree.leaves(frozen)) == total - weights


def test_finetuning_has_float32_masters_of_bfloat16_weights():
    model = make_model(gates=(PREFILL,), dtype=jnp.bfloat16)
    task, trained, frozen = LanguageModelling.start(model, packed=False)
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    assert "prefill_gate" not in trained
    merged = task.parts.merge(trained, frozen)
    assert merged.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(merged.prefill_gate)} == {jnp.dtype("float32")}


def scratch_bytes(layers: int) -> int:
    """Memory that one compiled distillation step needs beside its arguments and results."""
    task, trained, frozen, optimizer, schedule = make_task(TrainedGates.PREFILL, layers)
    state = optimizer.init(trained)
    batch = Batch(*(jnp.zeros((2, 4 * LENGTH), jnp.int32) for _ in range(3)))
    step = make_step(task, optimizer, schedule, 1)
    return step.lower(trained, state, frozen, batch, jnp.int32(0)).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_is_that_of_one_layer():
    few, many = scratch_bytes(2), scratch_bytes(10)
    gates = sum(x.nbytes for x in jax.tree.leaves(make_task(TrainedGates.PREFILL, layers=8)[1]))
    assert gates < few / 20  # of two layers, activations and all
    assert many - few <= 2 * gates  # eight layers more: the gradients of their gates


@pytest.mark.slow
def test_finetuning_keeps_one_hidden_state_per_layer():
    batch = make_batch(make_rows(2, 4 * LENGTH))

    def scratch_bytes(layers: int) -> int:
        task, trained, frozen, *_ = make_task(None, layers)
        gradients = jax.jit(task.gradients).lower(trained, frozen, batch, task.weigh(batch))
        memory = gradients.compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    hidden = batch.tokens.size * CONFIG.hidden_size * 4  # float32; the activations of a layer are 35 times that
    assert scratch_bytes(10) - scratch_bytes(2) == pytest.approx(8 * hidden, rel=0.1)


def test_schedule():
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, end_learning_rate=0.5, warmup_steps=4), 20)
    np.testing.assert_allclose(
        np.array([schedule(i) for i in (0, 2, 3, 4, 12, 20, 30)]), [0.5, 1.5, 2, 2, 1.25, 0.5, 0.5], rtol=1e-6
    )
    for warmup, first in ((0, 2.0), (1, 2.0), (2, 1.0)):
        schedule = make_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=warmup), 20)
        rates = np.array([schedule(step) for step in (0, 19, 20)])
        assert rates[0] == pytest.approx(first) and rates[1] > rates[2] == 0


def first_step(config: OptimizerConfig, weight: float, gradient: list[float]) -> np.ndarray:
    """Weights, all of the same value, after one step."""
    optimizer, weights = make_optimizer(config, 10), jnp.full(len(gradient), weight, jnp.float32)
    updates, _ = optimizer.update(jnp.array(gradient, jnp.float32), optimizer.init(weights), weights)
    return np.asarray(optax.apply_updates(weights, updates))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gate_has_its_own_learning_rate(clip: float | None):
    """Weight decay, by the same rate, included."""
    rates = OptimizerConfig(learning_rate=0.01, warmup_steps=0, clip_norm=clip, weight_decay=0.1)
    config = FinetuneConfig(optimizer=rates, initial_gates=("gate",), gate_learning_rate=0.5)
    optimizer = make_optimizer(config.optimizer, 10, gate_scale=config.gate_scale)
    weights = {name: {"weight": jnp.full(2, 3.0)} for name in ("layers", "prefill_gate")}
    gradients = jax.tree.map(jnp.ones_like, weights)
    updates: Any = optimizer.update(gradients, optimizer.init(weights), weights)[0]
    for name, rate in (("layers", 0.01), ("prefill_gate", 0.5)):
        np.testing.assert_allclose(updates[name]["weight"], -rate * (1 + 0.1 * 3), rtol=1e-4)


@pytest.mark.parametrize(("clip", "norm"), [(None, 50), (1.0, 1), (70.0, 50)])
def test_clipping(clip, norm):
    # Adam cancels a factor that is always there; beside a large eps it shows.
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, clip_norm=clip, eps=1e6)
    np.testing.assert_allclose(first_step(config, 0, [30, 40]), -np.array([0.6, 0.8]) * norm / 1e6, rtol=1e-3)


def test_weight_decay():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    np.testing.assert_allclose(first_step(config, 2, [0]), 2 - 0.1 * 0.5 * 2, rtol=1e-6)
