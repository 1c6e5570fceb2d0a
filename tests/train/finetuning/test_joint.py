"""A model and its gate trained together: the gradients of both parts, and runs that learn and are written."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seer_jax import from_pretrained
from seer_jax.convert import load_gates, save_adapter, save_gates
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig, TrainedGates
from seer_jax.lora import LoraConfig, adapted, add_lora
from seer_jax.models.decoder import Transformer
from seer_jax.models.layers import BaseParam
from seer_jax.selection.policies import Dense
from seer_jax.selection.rules import Threshold, TopK
from seer_jax.sharding import make_mesh, place
from seer_jax.train import finetune, loss
from seer_jax.train.config import OptimizerConfig, TargetStatistic
from seer_jax.train.data.batches import Batch, DataConfig
from seer_jax.train.data.packing import Packing, pack
from seer_jax.train.data.store import TokenStore
from seer_jax.train.finetuning import prepare
from seer_jax.train.joint import JointTraining
from seer_jax.train.optimizer import make_optimizer, make_schedule
from seer_jax.train.step import initial_state, make_step
from seer_jax.train.tasks import Distillation, LanguageModelling
from tests.seer_jax.sharding.spread import unordered
from tests.train.runs import ignore, lines
from tests.train.tiny import BLOCK, DECODE, LENGTH, PREFILL, distill_config, finetune_config, make_model, make_rows

pytestmark = pytest.mark.usefixtures("compile_quickly")

RUN = finetune_config(
    steps=8, density=0.4, lora=LoraConfig(4, 8.0), optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
)


def batch() -> Batch:
    tokens = jnp.asarray(make_rows(4), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), tokens.shape)
    return Batch(tokens, jnp.ones_like(tokens), places)


def gradients_of(task: Any, trained: Any, frozen: Any) -> tuple[Any, Any]:
    return jax.jit(lambda *arguments: task.gradients(*arguments, task.weigh(arguments[2])))(trained, frozen, batch())


@pytest.mark.slow
def test_with_every_block_the_gradients_are_those_of_both_parts_alone():
    """The model's are those of dense attention, the gate's those of distillation on the same target."""
    model, target = make_model(gates=(PREFILL,)), TargetStatistic.MASS
    settings = finetune_config(initial_gates=("gate",), density=1.0, gate_loss_weight=3.0, target=target)
    ours, sums = gradients_of(*JointTraining.of(settings, model))
    base, language = gradients_of(*LanguageModelling.start(model, packed=False))
    gate, distilled = gradients_of(
        *Distillation.start(model, distill_config(kind=TrainedGates.PREFILL, prefill_skip=0.0, target=target))
    )
    expected = base | {"prefill_gate": jax.tree.map(lambda x: 3 * x, gate["prefill_gate"])}
    assert ours.keys() == expected.keys()
    for found, wanted in zip(*(jax.tree.leaves(dict(sorted(tree.items()))) for tree in (ours, expected)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5 * max(1.0, np.abs(wanted).max()))
    assert float(sums["lm_loss"]) == pytest.approx(float(language["loss"]), rel=1e-5)
    assert float(sums["prefill_loss"]) == pytest.approx(float(distilled["prefill_loss"]), rel=1e-5)


@pytest.mark.slow
def test_self_distillation_is_the_divergence_from_dense_attention_without_the_adapter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss, "LM_CHUNK", 48)  # the last chunk is padded
    model = add_lora(make_model(layers=1, gates=(PREFILL,)), LoraConfig(4, 8.0))
    for lora in adapted(model).values():
        lora.b.set_value(jnp.asarray(np.random.default_rng(1).normal(size=lora.b.shape) * 0.1, jnp.float32))
    task, trained, frozen = JointTraining.start(model, density=0.4, weight=1.0, distils=True)
    sums = jax.jit(lambda trained, frozen, batch: task.gradients(trained, frozen, batch, task.weigh(batch))[1])
    found = sums(trained, frozen, batch())
    p, q = (
        jax.nn.log_softmax(m(batch().tokens, sparsity=policy))[:, :-1]
        for m, policy in ((make_model(layers=1), Dense()), (model, TopK(0.4)))
    )
    assert float(found["kl_loss"]) == pytest.approx(float((jnp.exp(p) * (p - q)).sum(-1).mean()), rel=1e-4)


@pytest.mark.slow
def test_an_adapter_learns_what_sparse_attention_misses(tmp_path: Path):
    start = make_model(gates=(PREFILL,))
    assert start.prefill_gate is not None
    save_gates(start.prefill_gate, tmp_path / "gate", base_model="some/base")
    gates = (str(tmp_path / "gate"),)
    config = dataclasses.replace(
        RUN, steps=16, output=str(tmp_path / "run"), initial_gates=gates, distil=True, gate_loss_weight=0.1
    )
    rows = make_rows(config.batch_size)  # the same ones in every step
    result = finetune(config, model=make_model(), dataset=rows, progress=ignore)
    assert result.metrics["kl_loss"] < 0.85 * lines(tmp_path / "run")[0]["kl_loss"]
    assert result.adapter is not None and result.gates


@pytest.mark.slow
def test_a_model_and_its_gate_learn_from_scratch(tmp_path: Path):
    """Random weights in place of those of the named ones: sparse from the first step."""
    start = make_model(gates=(PREFILL,))
    assert start.prefill_gate is not None
    save_gates(start.prefill_gate, tmp_path / "gate", base_model="some/base")
    config = dataclasses.replace(
        RUN, lora=LoraConfig(), from_scratch=True, initial_gates=(str(tmp_path / "gate"),), batch_size=4
    )
    result = finetune(config, model=make_model(), dataset=make_rows(), progress=ignore)
    fresh = Transformer(start.config, dtype=jnp.float32, rngs=nnx.Rngs(config.seed))
    assert result.metrics["lm_loss"] < 0.95 * np.log(start.config.vocab_size)
    assert np.abs(result.model.embed_tokens[...] - start.embed_tokens[...]).max() > 0.5
    assert np.abs(result.model.embed_tokens[...] - fresh.embed_tokens[...]).max() < 0.2
    assert result.model.prefill_gate is not None
    assert np.abs(result.model.prefill_gate.linear_k[...] - start.prefill_gate.linear_k[...]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "distils"), [("data=2,tensor=2", True), ("fsdp=2,tensor=2", False)])
def test_steps_over_a_mesh_are_those_of_one_device(mesh: str, distils: bool):
    metrics = []
    for text in (None, mesh):
        model = make_model(gates=(PREFILL,))
        model = add_lora(model, RUN.lora) if distils else model
        model = model if text is None else place(model, make_mesh(text))
        task, trained, frozen = JointTraining.start(model, density=0.4, weight=1.0, distils=distils)
        optimizer, schedule = make_optimizer(RUN.optimizer, 10), make_schedule(RUN.optimizer, 10)
        state = initial_state(task.parts.layout, optimizer, trained)
        step: Any = make_step(task, optimizer, schedule, 1)
        program, found = step.lower(trained, state, frozen, batch(), jnp.int32(0)).compile(), {}
        assert not unordered(program)
        for number in range(2):
            trained, state, found = program(trained, state, frozen, batch(), jnp.int32(number))
        metrics.append({name: float(value) for name, value in found.items()})
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)


@pytest.mark.slow
def test_model_and_gate_learn_and_are_written_together(tmp_path: Path):
    start = make_model(gates=(PREFILL,))
    assert start.prefill_gate is not None
    save_gates(start.prefill_gate, tmp_path / "gate", base_model="some/base")
    config = dataclasses.replace(
        RUN, output=str(tmp_path / "run"), initial_gates=(str(tmp_path / "gate"),), yarn_factor=2.0
    )
    result = finetune(config, model=make_model(), dataset=make_rows(), progress=ignore)
    first, last = lines(tmp_path / "run")[0], result.metrics
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m, BaseParam)) for m in (result.model, start)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert last["lm_loss"] < first["lm_loss"] and last["prefill_loss"] < 0.95 * first["prefill_loss"]
    assert last["loss"] == pytest.approx(last["lm_loss"] + last["prefill_loss"], rel=1e-5)
    assert result.gates == (tmp_path / "run" / "prefill_gate",) and result.saved is not None
    again = from_pretrained(result.saved, tmp_path / "run", adapter=None, dtype="float32")
    assert again.config.rope == result.model.config.rope and again.prefill_gate is not None
    for ours, theirs in zip(
        jax.tree.leaves(again.prefill_gate), jax.tree.leaves(result.model.prefill_gate), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert np.abs(load_gates(tmp_path / "gate").linear_k[...] - again.prefill_gate.linear_k[...]).max() > 1e-3


def test_a_gate_is_of_the_model_with_its_adapter(tmp_path: Path):
    """What a run with YaRN wrote, adapter and gate, is trained further; thresholds from before are not recommended any more."""
    start = make_model(gates=(PREFILL,))
    save_adapter(add_lora(start.use_rope(start.config.with_yarn(2)), RUN.lora), tmp_path / "adapter", base_model="x/y")
    assert start.prefill_gate is not None
    start.prefill_gate.recommended = Threshold(0.01)
    save_gates(start.prefill_gate, tmp_path / "gate", base_model="some/base")
    places = dict(initial_adapter=str(tmp_path / "adapter"), initial_gates=(str(tmp_path / "gate"),))
    model = make_model()
    prepare(dataclasses.replace(RUN, **places), model)
    assert model.prefill_gate is not None
    assert model.config.rope == start.config.rope == model.prefill_gate.model.rope
    assert model.prefill_gate.recommended == TopK(RUN.density)


def test_another_gate_is_not_written_over(tmp_path: Path):
    gate = make_model(gates=(PREFILL,)).prefill_gate
    assert gate is not None
    save_gates(gate, tmp_path / "prefill_gate", base_model="some/base")
    config = dataclasses.replace(RUN, output=str(tmp_path), initial_gates=(str(tmp_path / "prefill_gate"),))
    with pytest.raises(
        FileExistsError, match=r"must not write over gates; .*/prefill_gate is there, without checkpoints"
    ):
        finetune(config, model=make_model(), dataset=make_rows(), progress=ignore)


def packed_rows() -> Any:
    documents = [row[:n] for row, n in zip(make_rows(3), (70, 30, 25), strict=True)]
    return pack(TokenStore.from_documents(documents), Packing.BEST_FIT, row_length=LENGTH, block_size=BLOCK)


REFUSED: list[tuple[dict[str, Any], Any, str]] = [
    (dict(density=0.0), None, r"FinetuneConfig\.density must be a share in \(0, 1\]; got 0"),
    (dict(gate_loss_weight=0.0), None, r"FinetuneConfig\.gate_loss_weight must be positive; got 0"),
    (
        dict(distil=True, lora=LoraConfig()),
        None,
        r"distil must come with initial_gates, .*, and lora\.rank, .* and 0\. Name",
    ),
    (
        dict(distil=True, yarn_factor=2.0),
        None,
        r"distil must start from the model that is its own teacher; .* yarn_factor=2\.0",
    ),
    (dict(from_scratch=True), None, r"from_scratch must train all weights; got lora\.rank=4, .* Leave them out"),
    (dict(gates=(DECODE,)), None, r"must hold one prefill gate; got a decode gate\. Distil one first"),
    (
        dict(gates=(PREFILL, PREFILL)),
        None,
        r"must hold one prefill gate; got the prefill gates .*/0 and .*/1\. Name one",
    ),
    (
        dict(sequence_length=LENGTH - 8),
        None,
        r"multiple of the gate's block size 16 and at least two blocks; got 120\. Set sequence_length=112",
    ),
    (dict(sequence_length=BLOCK), None, r"at least two blocks; got 16\. Set sequence_length=32"),
    ({}, packed_rows, r"must have rows of one sequence each; .* Set data\.packing=concatenate"),
]


def save_gate(gate: PrefillGateConfig | DecodeGateConfig, folder: Path) -> str:
    model = make_model(gates=(gate,))
    made = model.prefill_gate or model.decode_gate
    assert made is not None
    save_gates(made, folder, base_model="some/base")
    return str(folder)


def test_a_decode_gate_beside_the_prefill_gate_is_left_out(tmp_path: Path):
    """As in the output folder of a run that distilled both."""
    save_gate(PREFILL, tmp_path / "run" / "prefill_gate")
    save_gate(DECODE, tmp_path / "run" / "decode_gate")
    (tmp_path / "run" / "checkpoints").mkdir()
    model = make_model()
    prepare(dataclasses.replace(RUN, initial_gates=(str(tmp_path / "run"),)), model)
    assert model.prefill_gate is not None and model.decode_gate is None


@pytest.mark.parametrize(
    ("asked", "distilled", "trained"),
    [(None, "mass", "mass"), (TargetStatistic.MAX, "mass", "max"), (None, None, "max"), (None, "median", "max")],
)
def test_a_gate_keeps_the_target_that_it_was_distilled_on(
    asked: TargetStatistic | None, distilled: str | None, trained: str, tmp_path: Path
):
    model = make_model(gates=(PREFILL,))
    assert model.prefill_gate is not None
    training = None if distilled is None else {"target": distilled}
    save_gates(model.prefill_gate, tmp_path, base_model="some/base", training=training)
    config = prepare(dataclasses.replace(RUN, initial_gates=(str(tmp_path),), target=asked), model := make_model())
    assert config.target == trained == JointTraining.of(config, model)[0].statistic
    assert model.prefill_gate is not None and model.prefill_gate.distilled_on == trained


def test_text_is_not_packed_for_nothing(tmp_path: Path):
    """Rows of several sequences are refused before the text is read."""
    config = dataclasses.replace(
        RUN, model="no/such", initial_gates=(save_gate(PREFILL, tmp_path),), data=DataConfig(packing=Packing.BEST_FIT)
    )
    with pytest.raises(
        ValueError, match=r"rows of one sequence each; got data\.packing=best_fit\. Set data\.packing=conc"
    ):
        finetune(config)


@pytest.mark.parametrize(("changes", "rows", "message"), REFUSED)
def test_what_cannot_be_trained_together(changes: dict[str, Any], rows: Any, message: str, tmp_path: Path):
    gates = changes.get("gates", (PREFILL,))
    places = [save_gate(gate, tmp_path / str(number)) for number, gate in enumerate(gates)]
    settings = {name: value for name, value in changes.items() if name != "gates"}
    with pytest.raises(ValueError, match=message):
        config = dataclasses.replace(RUN, initial_gates=tuple(places), **settings)
        finetune(config, model=make_model(), dataset=make_rows() if rows is None else rows(), progress=ignore)
