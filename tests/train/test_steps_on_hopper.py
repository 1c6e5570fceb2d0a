"""Steps of every task are lowered for Hopper GPUs with this library's kernels: differentiated, in loops over layers, rematerialized."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest

from pallas_kernels.devices import assume_hopper
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig, TrainedGates
from seer_jax.lora import LoraConfig, add_lora
from seer_jax.models.decoder import Transformer
from seer_jax.train.config import TargetStatistic
from seer_jax.train.data.batches import Batch
from seer_jax.train.joint import JointTraining
from seer_jax.train.optimizer import make_optimizer, make_schedule
from seer_jax.train.step import initial_state, make_step
from seer_jax.train.tasks import Distillation, LanguageModelling
from tests.train.tiny import CONFIG, distill_config, finetune_config, make_model

LENGTH = 512
MODEL = dataclasses.replace(CONFIG, hidden_size=64, head_dim=64)
GATES = PrefillGateConfig(gate_dim=16), DecodeGateConfig(gate_dim=16)


def distilling(kind: TrainedGates) -> Any:
    settings = distill_config(kind=kind, target=TargetStatistic.MASS, sequence_length=LENGTH)
    return lambda model: Distillation.start(model, settings)


ADAPTER = LoraConfig(4, 8.0)


def fine_tuning(*, adapted: bool = False, **settings: Any) -> Any:
    def start(model: Transformer) -> Any:
        if adapted:
            add_lora(model, ADAPTER)
        if not settings:
            return LanguageModelling.start(model, packed=not adapted)
        model.decode_gate = None
        return JointTraining.of(finetune_config(density=0.3, sequence_length=LENGTH, **settings), model)

    return start


# What is trained, and how many of the library's kernels the program has at least.
TASKS = {
    **{f"{kind} gates": (distilling(kind), 1) for kind in TrainedGates},
    "all weights": (fine_tuning(), 0),
    "adapter": (fine_tuning(adapted=True), 0),
    "all weights and gate": (fine_tuning(initial_gates=("gate",)), 4),
    "adapter and gate": (fine_tuning(adapted=True, initial_gates=("gate",), target=TargetStatistic.MASS), 4),
    "adapter, from dense attention": (fine_tuning(adapted=True, initial_gates=("gate",), lora=ADAPTER, distil=True), 4),
}


QUICK = ("all weights and gate",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TASKS]
)
def test_a_step_is_lowered(name: str):
    start, fewest = TASKS[name]
    task, trained, frozen = start(make_model(gates=GATES, dtype=jnp.bfloat16, model=MODEL))
    config = finetune_config()
    optimizer = make_optimizer(config.optimizer, 10)
    step = make_step(task, optimizer, make_schedule(config.optimizer, 10), 2)
    tokens = jnp.ones((2, LENGTH), jnp.int32)
    with assume_hopper():
        state = initial_state(task.parts.layout, optimizer, trained)
        traced = step.trace(trained, state, frozen, Batch(tokens, tokens, tokens), jnp.int32(0))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") >= fewest
