"""Fine-tuning of all weights and of adapters: losses fall, stopped runs go on exactly, and what is written is the trained model."""

import contextlib
import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seer_jax import from_pretrained
from seer_jax.convert import save_adapter
from seer_jax.lora import LoraConfig, adapted, add_lora, linears_of, merge_lora
from seer_jax.models.decoder import Transformer
from seer_jax.models.layers import BaseParam, GateParam, LoraParam
from seer_jax.train import FinetuneConfig, TrainResult, finetune
from seer_jax.train.config import OptimizerConfig, TargetStatistic
from seer_jax.train.finetuning import prepare, write
from tests.train.runs import ignore, lines, raising
from tests.train.tiny import CONFIG, DECODE, LENGTH, finetune_config, make_model, make_rows

pytestmark = pytest.mark.usefixtures("compile_quickly")

SMALL = dataclasses.replace(CONFIG, max_position_embeddings=LENGTH // 2)
# Learning rates at which a dozen steps show.
RUN = finetune_config(
    steps=10, yarn_factor=2.0, checkpoint_interval=5, optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2)
)
LORA = LoraConfig(4, 8.0)
KINDS = {
    "all weights": RUN,
    "adapters": dataclasses.replace(
        RUN, lora=LORA, optimizer=OptimizerConfig(learning_rate=2e-2, warmup_steps=2), micro_batch_size=2
    ),
}


def base_of(config: FinetuneConfig) -> Transformer:
    """The model to train: of bfloat16 where adapters do, whose weights are float32 all the same."""
    return make_model(model=SMALL, gates=(DECODE,), dtype=jnp.bfloat16 if config.adapts else jnp.float32)


def run_to(folder: Path | None, config: FinetuneConfig, progress: Any = ignore, **changes: Any) -> TrainResult:
    config = dataclasses.replace(config, output=None if folder is None else str(folder), **changes)
    return finetune(config, model=base_of(config), dataset=make_rows(), progress=progress)


@pytest.fixture(scope="module", params=KINDS)
def finetuned(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    compile_quickly: None,
) -> tuple[str, Path, TrainResult]:
    """(kind, folder, result) of a run beyond the context of its model, by YaRN."""
    folder = tmp_path_factory.mktemp("finetuned")
    return request.param, folder, run_to(folder, KINDS[request.param])


@pytest.mark.slow
def test_the_loss_falls_and_what_does_not_train_stays(finetuned: tuple[str, Path, TrainResult]):
    kind, folder, result = finetuned
    metrics, before = lines(folder), base_of(KINDS[kind])
    assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"]
    equal = {
        kept: all(
            bool((a == b).all()) and a.dtype == b.dtype
            for a, b in zip(*(jax.tree.leaves(nnx.state(m, kept)) for m in (result.model, before)), strict=True)
        )
        for kept in (BaseParam, GateParam)
    }
    assert equal == {BaseParam: kind == "adapters", GateParam: True}
    trained = jax.tree.leaves(nnx.state(result.model, LoraParam))
    assert len(trained) == (14 if kind == "adapters" else 0)
    assert all(x.dtype == jnp.float32 and np.abs(x).max() > 1e-3 for x in trained)


@pytest.mark.slow
def test_the_model_is_written_with_its_rope(finetuned: tuple[str, Path, TrainResult]):
    kind, folder, result = finetuned
    assert result.saved == folder / "model" and result.adapter == (folder / "adapter" if kind == "adapters" else None)
    saved = from_pretrained(folder / "model", dtype=result.model.dtype)
    assert saved.config == result.model.config and saved.config.context == LENGTH
    expected = merge_lora(result.model)
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m, BaseParam)) for m in (saved, expected)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    if result.adapter is not None:
        again = from_pretrained(folder / "model", adapter=result.adapter)
        jax.tree.map(np.testing.assert_array_equal, *(nnx.to_pure_dict(nnx.state(m, LoraParam)) for m in (again, result.model)))  # fmt: skip
        assert json.loads((result.adapter / "adapter_config.json").read_text())["r"] == LORA.rank


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(finetuned: tuple[str, Path, TrainResult], tmp_path: Path):
    kind, folder, result = finetuned
    with pytest.raises(SystemExit):
        run_to(tmp_path, KINDS[kind], raising(3, signal.SIGTERM))
    done = lines(tmp_path)[-1]["step"]
    assert 3 <= done < RUN.steps and (tmp_path / ("adapter" if kind == "adapters" else "model")).is_dir()
    again = run_to(tmp_path, KINDS[kind])
    assert lines(tmp_path) == lines(folder)
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m)) for m in (again.model, result.model)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_an_adapter_is_trained_further(tmp_path: Path):
    model = add_lora(make_model(model=SMALL), LORA, seed=5)
    save_adapter(model, tmp_path / "adapter", base_model="some/base")
    short = dict(steps=1, lora=LoraConfig(), optimizer=OptimizerConfig(learning_rate=1e-9, warmup_steps=0))
    result = run_to(None, KINDS["adapters"], initial_adapter=str(tmp_path / "adapter"), **short)
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m, LoraParam)) for m in (result.model, model)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(("steps", "written"), [(5, True), (4, False)])
def test_a_model_that_is_there_keeps_up_with_its_adapter(steps: int, written: bool, tmp_path: Path):
    """As in a run that had ended, and got more steps."""
    model = add_lora(make_model(), LORA)
    config = dataclasses.replace(KINDS["adapters"], output=str(tmp_path), steps=5)
    write(config, None, None, model, steps)
    assert (tmp_path / "model").is_dir() == written
    lora = adapted(model)["mlp.up_proj"]
    lora.b.set_value(jnp.ones_like(lora.b[...]))
    write(dataclasses.replace(config, steps=9), None, None, model, 7)
    assert (tmp_path / "model").is_dir() == written
    if written:
        saved = from_pretrained(tmp_path / "model", dtype="float32")
        ours, theirs = (linears_of(m)["mlp.up_proj"].weight[...] for m in (saved, merge_lora(model)))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_a_run_does_not_take_another_adapter_for_a_damaged_checkpoint(tmp_path: Path):
    """An adapter that is named by its folder alone, whose rank has changed since."""
    config = dataclasses.replace(RUN, sequence_length=16, yarn_factor=None, steps=3, output=str(tmp_path / "run"))
    for rank, remedy in (
        (4, None),
        (2, r"initial weights: adapter\.rank was 4 when this run was started; got 2\. Restore it"),
    ):
        model = add_lora(make_model(layers=1), LoraConfig(rank, 8.0, ("q_proj",)))
        with contextlib.nullcontext() if remedy is None else pytest.raises(ValueError, match=remedy):
            finetune(config, model=model, dataset=make_rows(length=16), progress=ignore)
    assert not (tmp_path / "run" / "damaged_checkpoints").exists()


REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(yarn_factor=None), r"at most the model's context of 64 tokens; got 128\. Lower it, or stretch .* yarn_factor=2"),
    (dict(yarn_factor=1.5), r"at most the model's context of 96 tokens; got 128\. Lower it, or take a model"),
    (dict(yarn_factor=1.0), r"yarn_factor must be a number above 1, or None for RoPE as it is; got 1\.0"),
    (dict(yarn_factor=1e9), r"YaRN factor must leave a context below 2\*\*31 tokens; got 1000000000\.0, times 64 tokens\. Lower"),
    (dict(sequence_length=1), r"sequence_length must be at least 2; got 1"),
    (dict(lora=LoraConfig(4, targets=("wq",))), r"linear maps of the model's layers: .*; got wq"),
    (dict(lora=LoraConfig(0, targets=("q_proj",))), r"lora\.rank must be at least 1 .*; got 0, with which all weights train\. Set lora\.rank=16"),
    (dict(density=0.5), r"`density` must come with the prefill gate .*; got 0\.5 and no initial_gates\. Name a gate"),
    (dict(gate_learning_rate=1e-3, target=TargetStatistic.MASS), r"`target`, `gate_learning_rate` must come with .*; got mass, 0\.001"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_finetuned(changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        run_to(tmp_path / "run", RUN, **changes)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("carried", [True, False])
def test_an_adapter_keeps_its_settings(carried: bool, tmp_path: Path):
    """Of the model, or of a folder."""
    model = add_lora(make_model(model=SMALL), LoraConfig(4, 8.0, ("q_proj", "v_proj")))
    save_adapter(model, tmp_path / "adapter", base_model="some/base")
    config = dataclasses.replace(
        RUN, lora=LoraConfig(2, 8.0), initial_adapter=None if carried else str(tmp_path / "adapter")
    )
    with pytest.raises(
        ValueError, match=r"its own: lora\.rank=4, lora\.targets=q_proj v_proj; got 2, q_proj k_proj .*\. Set them so\."
    ):
        prepare(config, model if carried else make_model(model=SMALL))


def test_another_model_is_not_written_over(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"must not write over a model; .*/model is there, without checkpoints"):
        run_to(tmp_path, RUN)
