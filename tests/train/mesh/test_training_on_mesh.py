"""Training over a mesh of four or two devices makes the steps of one device, exchanges sums once a step, and goes on over other meshes."""

import contextlib
import dataclasses
import functools
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import precision
from seer_jax.convert import load_gates
from seer_jax.gates.configs import QueryReduction, TrainedGates
from seer_jax.lora import LoraConfig, add_lora
from seer_jax.sharding import make_mesh, place
from seer_jax.train import DistillConfig, distill, finetune
from seer_jax.train.config import OptimizerConfig
from seer_jax.train.data.batches import Batch, DataConfig, DataPosition
from seer_jax.train.data.packing import Packing, pack
from seer_jax.train.data.store import TokenStore
from seer_jax.train.loop.checkpoint import Checkpoints, RunState
from seer_jax.train.optimizer import make_optimizer, make_schedule
from seer_jax.train.step import Weights, initial_state, make_step
from seer_jax.train.tasks import Distillation, LanguageModelling
from tests.seer_jax.sharding.spread import collectives, unordered
from tests.train.runs import ignore, lines, raising
from tests.train.tiny import (
    BLOCK,
    CONFIG,
    DECODE,
    LENGTH,
    PREFILL,
    distill_config,
    finetune_config,
    make_model,
    make_rows,
)

pytestmark = [pytest.mark.mesh, pytest.mark.usefixtures("compile_quickly")]


@pytest.fixture(scope="module", autouse=True)
def exact_gradients() -> Iterator[None]:
    """A GPU takes gradients of gates in TF32 where it holds TENSOR_CORE_ROWS vectors: one device may, where each of two does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "TENSOR_CORE_ROWS", sys.maxsize)
        yield


FINER = (
    dataclasses.replace(PREFILL, q_pool_size=4, k_pool_size=8, force_double=True),
    dataclasses.replace(DECODE, query_reduction=QueryReduction.HEADS, k_pool_size=4),
)
BIASED = dataclasses.replace(CONFIG, qkv_bias=True, o_bias=True, mlp_bias=True, tie_word_embeddings=True)
# What is trained: gates of a kind, both with pools smaller than blocks, all weights, or adapters. They take turns with the axes; the runs
# that go on over another mesh, below, have both gates over fsdp and all weights over data and tensor.
CASES = [
    ("prefill", "data=2,tensor=2"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("both", "tensor=4"),
            ("all weights", "fsdp=4"),
            ("adapters", "fsdp=2,tensor=2"),
        )
    ),
    *(
        pytest.param(*case, marks=(pytest.mark.mesh(2), pytest.mark.gpu))
        for case in (("decode", "data=2"), ("finer", "tensor=2"), ("all weights", "fsdp=2"))
    ),
]
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=1)


@functools.cache
def packed_batch() -> Batch:
    """Four rows with unequal counts of tokens in the loss, so that the mean over devices is not that over rows."""
    documents = [row[:n] for row, n in zip(make_rows(6), (128, 90, 64, 128, 50, 40), strict=True)]
    data = pack(TokenStore.from_documents(documents), Packing.BEST_FIT, row_length=LENGTH, block_size=BLOCK)
    return Batch(*(jnp.stack(x) for x in zip(*(map(jnp.asarray, data[i]) for i in range(4)), strict=True)))


@dataclasses.dataclass(frozen=True)
class Made:
    """Metrics of each step, the trained weights after them and before, and the program."""

    metrics: list[dict[str, float]]
    weights: Weights
    before: Weights
    program: jax.stages.Compiled


@functools.cache
def three_steps(kind: str, text: str | None, parts: int = 1) -> Made:
    gates, fine_tuned = FINER if kind == "finer" else (PREFILL, DECODE), kind in ("all weights", "adapters")
    model = make_model(gates=gates, model=BIASED if fine_tuned else CONFIG)
    if kind == "adapters":
        add_lora(model, LoraConfig(4, 40.0))  # gradients of a norm above 1
    model = model if text is None else place(model, make_mesh(text))
    if fine_tuned:
        task, trained, frozen = LanguageModelling.start(model, packed=True)
    else:
        task, trained, frozen = Distillation.start(
            model, distill_config(kind=TrainedGates("both" if kind == "finer" else kind))
        )
    optimizer, schedule = make_optimizer(OPTIMIZER, 10), make_schedule(OPTIMIZER, 10)
    state = initial_state(task.parts.layout, optimizer, trained)
    before = jax.tree.map(np.asarray, trained)
    arguments = (trained, state, frozen, packed_batch(), jnp.int32(0))
    program = make_step(task, optimizer, schedule, parts).lower(*arguments).compile()
    metrics = []
    for number in range(3):
        trained, state, found = program(trained, state, frozen, packed_batch(), jnp.int32(number))
        metrics.append({name: float(value) for name, value in found.items()})
    return Made(metrics, jax.tree.map(np.asarray, trained), before, program)


@pytest.mark.filterwarnings("ignore:4 devices of the mesh axis tensor share 2 key/value heads:RuntimeWarning")
@pytest.mark.parametrize(("kind", "text"), CASES)
def test_steps_are_those_of_one_device(kind: str, text: str):
    alone, spread = three_steps(kind, None), three_steps(kind, text, parts=1 if text == "fsdp=4" else 2)
    assert not unordered(spread.program)
    assert min(step["grad_norm"] for step in alone.metrics) > 1  # so that each is clipped, by the norm of the whole
    for ours, theirs in zip(spread.metrics, alone.metrics, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    for ours, theirs in zip(jax.tree.leaves(spread.weights), jax.tree.leaves(alone.weights), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


def test_sums_are_exchanged_once_a_step():
    """Of two parts of each device's rows, and two layers: the layers exchange their own two sums, and nothing of the gates."""
    found = collectives(three_steps("prefill", "data=2,tensor=2", parts=2).program)
    assert found.keys() == {"all-reduce"}
    gate = three_steps("prefill", None).weights["prefill_gate"]["linear_k"].shape
    of_heads = f"f32[{CONFIG.num_layers},{CONFIG.num_heads // 2},{gate[2]},{gate[3]}]"
    of_layers = f"f32[1,{LENGTH},{CONFIG.hidden_size}]"  # the embedding's and a layer's two
    others = [shape for shape in found["all-reduce"] if shape not in (of_heads, of_layers)]
    assert found["all-reduce"].count(of_heads) == 1 and found["all-reduce"].count(of_layers) == 3
    assert set(others) <= {"s32[]", "f32[]"}


@pytest.mark.slow
def test_fine_tuning_scatters_the_gradients_of_gathered_weights():
    """Over fsdp each weight is gathered twice, for the forward and the backward pass, and its gradient scattered once."""
    found = collectives(three_steps("all weights", "fsdp=4").program)
    of_layer = f"f32[{CONFIG.hidden_size},{CONFIG.num_heads * CONFIG.head_dim}]"  # o_proj
    assert found["all-gather"].count(of_layer) == 2
    assert found["reduce-scatter"].count(of_layer.replace("32,", "8,")) == 1
    assert not any(shape == f"f32[{CONFIG.num_layers},{of_layer[4:]}" for shapes in found.values() for shape in shapes)


def test_weights_and_moments_of_fine_tuning_are_split_alike():
    model = place(make_model(), make_mesh("fsdp=2,tensor=2"))
    task, trained, _ = LanguageModelling.start(model, packed=False)
    optimizer = make_optimizer(OPTIMIZER, 10)
    (moments,) = (
        s
        for s in jax.tree.leaves(initial_state(task.parts.layout, optimizer, trained), is_leaf=is_moments)
        if is_moments(s)
    )
    for tree in (trained, moments.mu, moments.nu):
        weight = tree["layers"]["mlp"]["up_proj"]["weight"]
        assert weight.shape == (2, 32, 32) and {s.data.shape for s in weight.addressable_shards} == {(2, 8, 32)}
        assert weight.dtype == jnp.float32


def is_moments(x: Any) -> bool:
    return hasattr(x, "mu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": "dat=2"}, r"A mesh must be written as axes with sizes, .* got 'dat=2'"),
        ({"mesh": "data=0"}, r"whole number of devices, or -1 .* got 'data=0'"),
        ({"mesh": "data=8"}, r"A mesh must fit the 4 devices .* got 'data=8'"),
        ({"mesh": "tensor=3"}, r"The 4 query heads of the model must be divisible by the mesh axis tensor"),
        ({"mesh": "data=2,fsdp=2", "batch_size": 6, "micro_batch_size": 1}, r"batch_size must be a multiple of the 4 devices along .* got 6\. Set batch_size=8"),
    ],
)  # fmt: skip
def test_meshes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        distill(
            distill_config(output=str(tmp_path / "run"), **changes),
            model=make_model(),
            dataset=make_rows(),
            progress=ignore,
        )
    assert not (tmp_path / "run" / "checkpoints").exists()


TOPOLOGIES = [("fsdp=4", "tensor=4"), ("data=2,tensor=2", None), (None, "data=2,fsdp=2")]


def state_on(text: str | None) -> RunState:
    """The state of fine-tuning before its first step."""
    model = make_model() if text is None else place(make_model(), make_mesh(text))
    task, trained, _ = LanguageModelling.start(model, packed=False)
    state = initial_state(task.parts.layout, make_optimizer(OPTIMIZER, 10), trained)
    return RunState(3, trained, state, DataPosition(1, 2), tokens=5)


@pytest.mark.filterwarnings("ignore:4 devices of the mesh axis tensor share 2 key/value heads:RuntimeWarning")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        *TOPOLOGIES[:2],
        pytest.param(*TOPOLOGIES[2], marks=pytest.mark.slow),
        pytest.param("fsdp=2", None, marks=(pytest.mark.mesh(2), pytest.mark.gpu)),
    ],
)
def test_checkpoints_are_restored_on_another_mesh(before: str | None, after: str | None, tmp_path: Path):
    saved, like = state_on(before), state_on(after)
    # Values that say where each came from.
    saved = dataclasses.replace(saved, trained=jax.tree.map(lambda x: x + 1, saved.trained))
    for state in (saved, dataclasses.replace(like, step=0)):
        with contextlib.closing(Checkpoints(tmp_path, keep=2, say=print)) as checkpoints:
            if state is saved:
                checkpoints.save(state, {})
            else:
                found = checkpoints.restore(state)
    assert (found.step, found.position, found.tokens) == (3, DataPosition(1, 2), 5)
    trees = [(state.trained, state.optimizer) for state in (found, saved, like)]
    for ours, theirs, wanted in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
        assert ours.sharding.is_equivalent_to(wanted.sharding, ours.ndim)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:4 devices of the mesh axis tensor share 2 key/value heads:RuntimeWarning")
@pytest.mark.parametrize(
    ("config", "before", "after"),
    [
        (distill_config(steps=8), *TOPOLOGIES[0]),
        (finetune_config(steps=8), *TOPOLOGIES[1]),
        pytest.param(finetune_config(steps=8), "fsdp=2", None, marks=(pytest.mark.mesh(2), pytest.mark.gpu)),
    ],
    ids=["distill", "finetune", "finetune, of two devices"],
)
def test_a_run_goes_on_over_another_mesh(config: Any, before: str | None, after: str | None, tmp_path: Path):
    """Stopped over one mesh, finished over another: the metrics of each step are those of one device, the held-out rows' among them."""
    changes = dict(data=DataConfig(held_out_rows=3), micro_batch_size=2, checkpoint_interval=4)
    config = dataclasses.replace(config, **changes)
    train: Any = distill if isinstance(config, DistillConfig) else finetune

    def run(name: str, mesh: str | None, progress: Any = ignore) -> None:
        train(dataclasses.replace(config, mesh=mesh, output=str(tmp_path / name)), model=make_model(), dataset=make_rows(), progress=progress)  # fmt: skip

    run("alone", None)
    with pytest.raises(SystemExit):
        run("moved", before, raising(1, signal.SIGTERM))
    done = lines(tmp_path / "moved")[-1]["step"]
    assert 0 < done < 8
    run("moved", after)
    for ours, theirs in zip(lines(tmp_path / "moved"), lines(tmp_path / "alone"), strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
def test_trained_gates_are_written_whole(tmp_path: Path):
    config = distill_config(
        steps=2, mesh="data=2,tensor=2", output=str(tmp_path), optimizer=OptimizerConfig(warmup_steps=0)
    )
    result = distill(config, model=make_model(), dataset=make_rows(), progress=ignore)
    assert result.model.layout is not None
    for name, folder in zip(("prefill_gate", "decode_gate"), result.gates, strict=True):
        saved, ours = load_gates(folder, result.model.config), getattr(result.model, name)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), saved, ours)
