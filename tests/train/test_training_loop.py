"""Whole runs: they learn, stop, go on, refuse what does not fit, and leave behind what they should."""

import contextlib
import dataclasses
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from seer_jax.convert import load_gates
from seer_jax.gates.configs import HeadJoin, Join, QueryReduction, TrainedGates
from seer_jax.selection.rules import CumulativeMass
from seer_jax.train import ConsoleProgress, StepReport, distill, finetune
from seer_jax.train.config import OptimizerConfig
from seer_jax.train.data.batches import DataConfig
from seer_jax.train.data.packing import Packing, pack
from seer_jax.train.data.store import TokenStore
from seer_jax.train.loop.metrics import MetricsLog, read_metrics
from seer_jax.train.loop.session import open_session
from seer_jax.train.loop.stopping import StopSignals
from tests.train.runs import RUN, contents, ignore, keys_of, lines, raising, run_to
from tests.train.tiny import DECODE, LENGTH, PREFILL, distill_config, finetune_config, make_model, make_rows

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("compile_quickly")


FINER = {
    "small pools": (
        dataclasses.replace(PREFILL, q_pool_size=4, k_pool_size=4),
        dataclasses.replace(DECODE, query_reduction=QueryReduction.HEADS, k_pool_size=4),
    ),
    "largest share": (
        dataclasses.replace(PREFILL, k_pool_size=8, join=Join.MAX, gate_dim=8),
        dataclasses.replace(DECODE, query_reduction=QueryReduction.HEADS, heads=HeadJoin.MAX),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small pools", "largest share"])
def test_gates_that_see_inside_blocks_learn_and_are_saved(name: str, tmp_path: Path):
    prefill, decode = FINER[name]
    config = distill_config(prefill=prefill, decode=decode, output=str(tmp_path / "run"), log_interval=1)
    result = distill(config, model=make_model(), dataset=make_rows(), progress=ignore)
    metrics = lines(tmp_path / "run")
    for kind in ("prefill", "decode"):
        assert metrics[-1][f"{kind}_loss"] < 0.9 * metrics[0][f"{kind}_loss"]
    assert metrics[-1]["decode_recall"] > metrics[0]["decode_recall"]
    for place, gate in zip(result.gates, (prefill, decode), strict=True):
        assert load_gates(place).config == gate


def test_gates_learn_and_the_base_stays(undisturbed):
    folder, result = undisturbed
    model = make_model()
    metrics = lines(folder)
    assert [m["step"] for m in metrics] == list(range(1, RUN.steps + 1))
    assert metrics[-1]["decode_loss"] < 0.8 * metrics[0]["decode_loss"]
    assert metrics[-1]["decode_recall"] > metrics[0]["decode_recall"]
    assert metrics[-1]["tokens"] == RUN.steps * RUN.batch_size * LENGTH
    assert metrics[-1]["epoch"] == pytest.approx(RUN.steps * RUN.batch_size / 12, abs=1e-4)
    assert metrics[-1] == {name: metrics[-1][name] for name in ("step", "tokens", "epoch")} | result.metrics
    assert result.model.decode_gate.config == DECODE and model.decode_gate is None
    base = nnx.state(model)
    ours = nnx.state(result.model)
    del ours["decode_gate"]
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(ours), nnx.to_pure_dict(base))
    assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir()) == [RUN.steps - 1, RUN.steps]
    assert json.loads((folder / "config.json").read_text())["steps"] == RUN.steps


def test_finished_run_has_nothing_left_to_do(undisturbed):
    folder, result = undisturbed
    (
        folder / "decode_gate" / "attn_gate_weights.safetensors"
    ).unlink()  # as if it had been killed before the gates were written
    again = run_to(folder)
    assert again.step == RUN.steps and again.metrics == {} and again.gates == result.gates
    np.testing.assert_array_equal(keys_of(again.model.decode_gate), keys_of(result.model.decode_gate))
    np.testing.assert_array_equal(keys_of(load_gates(folder / "decode_gate")), keys_of(result.model.decode_gate))


@pytest.mark.slow
def test_trained_gates_are_written_and_no_others(undisturbed, tmp_path):
    folder, result = undisturbed
    assert result.gates == (folder / "decode_gate",)
    saved = load_gates(folder / "decode_gate", result.model.config)
    jax.tree.map(np.testing.assert_array_equal, saved, result.model.decode_gate)
    model = make_model(gates=(PREFILL, DECODE))
    assert model.decode_gate is not None
    model.decode_gate.recommended = CumulativeMass(0.9)
    short = {"steps": 1, "optimizer": OptimizerConfig(warmup_steps=0), "model": "some/base"}
    for gates, names in ((TrainedGates.DECODE, ["decode_gate"]), (TrainedGates.BOTH, ["prefill_gate", "decode_gate"])):
        config = distill_config(kind=gates, output=str(tmp_path / gates), **short)
        result = distill(config, model=model, dataset=make_rows(), progress=ignore)
        assert result.gates == tuple(tmp_path / gates / name for name in names)
        assert {p.name for p in (tmp_path / gates).iterdir() if p.name.endswith("_gate")} == set(names)
        assert load_gates(tmp_path / gates / "decode_gate").recommended == CumulativeMass(0.9)
        assert json.loads((tmp_path / gates / "decode_gate" / "config.json").read_text())["base_model"] == "some/base"


def kill_when(condition, folder: Path) -> bool:
    """Starts the run in a process of its own and kills it when `condition()` holds; False if it ended before."""
    log = (folder.parent / f"{folder.name}.log").open("ab")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.train.runs", folder],
        cwd=ROOT,
        # Four programs, each run for a moment.
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_ENABLE_COMPILATION_CACHE": "0"},
        stderr=log,
        stdout=log,
    )
    try:
        while process.poll() is None:
            if condition():
                process.kill()
                break
            time.sleep(0.001)
        return process.wait(timeout=60) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
        log.close()


@pytest.mark.timeout(600)  # four processes; each compiles anew, since programs read from a cache may round differently
@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_bit_for_bit(tmp_path):
    folder, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"

    def saving() -> bool:
        checkpoints = folder / "checkpoints"
        return len(read_metrics(folder / "metrics.jsonl")) > 2 and any("tmp" in p.name for p in checkpoints.iterdir())

    def later(delay: float = random.Random(0).random() / 5) -> bool:
        done = len(read_metrics(folder / "metrics.jsonl")) > RUN.steps // 2
        return done and (time.sleep(delay) or True)

    assert kill_when(saving, folder), (tmp_path / "killed.log").read_text()
    assert kill_when(later, folder), (tmp_path / "killed.log").read_text()
    assert not kill_when(lambda: False, folder), (tmp_path / "killed.log").read_text()
    assert not kill_when(lambda: False, undisturbed), (tmp_path / "undisturbed.log").read_text()
    assert lines(folder) == lines(undisturbed)
    assert json.loads((folder / "done.json").read_text()) == RUN.steps


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (signal.SIGTERM, SystemExit),
        pytest.param(signal.SIGINT, KeyboardInterrupt, marks=pytest.mark.slow),
        pytest.param(RuntimeError("broken"), RuntimeError, marks=pytest.mark.slow),
    ],
)
def test_stopped_run_goes_on_bit_for_bit(undisturbed, tmp_path, capsys, error, raised):
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(raised) as stopped:
        run_to(tmp_path, progress=raising(4, error), checkpoint_interval=100)
    saved = [p.name for p in (tmp_path / "checkpoints").iterdir()]
    if raised is RuntimeError:
        assert saved == []
    else:
        done = len(lines(tmp_path))
        assert saved == [str(done)] and 4 <= done <= 7  # the steps under way are finished, and no more
        said = (
            f"Stopped after step {done}; the checkpoint of step {done} is kept; started again, the run resumes there."
        )
        told = [*getattr(stopped.value, "__notes__", ()), *capsys.readouterr().err.splitlines()]
        assert told.count(said) == 1
        gate = json.loads((tmp_path / "decode_gate" / "config.json").read_text())
        assert gate["seer_jax_training"] == {"step": done, "steps": RUN.steps, "finished": False, "target": "max"}
        load_gates(tmp_path / "decode_gate", make_model().config)
    if raised is SystemExit:
        assert stopped.value.code == 143
    assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    run_to(tmp_path)
    assert lines(tmp_path) == lines(undisturbed[0])


def test_a_stop_is_not_lost_where_its_exception_is():
    """Libraries may drop what a signal's handler raises while they compile."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    with (
        contextlib.ExitStack() as restore,
        pytest.raises(KeyboardInterrupt),
        open_session(RUN, ignore) as session,
        StopSignals(session) as stop,
        stop.at_once(),
        contextlib.suppress(KeyboardInterrupt),
    ):
        restore.callback(signal.signal, signal.SIGINT, before)
        signal.raise_signal(signal.SIGINT)


def test_a_run_without_text_does_not_load_its_model(tmp_path):
    config = dataclasses.replace(RUN, model="/absent", output=str(tmp_path / "run"))
    for data, message in ((DataConfig(), "needs text; got none"), (DataConfig(paths=("/absent",)), "must exist")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            distill(dataclasses.replace(config, data=data))
    assert not (tmp_path / "run").exists()


def test_without_output_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        distill(RUN, model=make_model(), dataset=make_rows(), progress=raising(2, signal.SIGTERM))
    assert "without an output folder nothing is kept" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_settings_that_change_no_number_may_change(undisturbed, tmp_path):
    run_to(tmp_path, progress=ignore, checkpoint_interval=3, keep_checkpoints=5, log_interval=1)
    assert lines(tmp_path) == lines(undisturbed[0])
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [3, 6, 9, 10]


def test_nan_stops_before_a_checkpoint_is_lost(tmp_path):
    steep = OptimizerConfig(learning_rate=1e38, warmup_steps=3, clip_norm=None)
    with pytest.raises(
        FloatingPointError, match=r"must be finite; got .* = (nan|inf).* at step (\d+)\..*lower the learning rate"
    ) as error:
        run_to(tmp_path, optimizer=steep, checkpoint_interval=1, keep_checkpoints=20)
    failed = int(str(error.value).split(" at step ")[1].split(".")[0])
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, failed))
    assert max(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == failed - 1


def test_nan_in_the_base_model():
    model = make_model()
    model.layers.self_attn.o_proj.weight[...] *= jnp.nan
    with pytest.raises(FloatingPointError, match=r"loss = nan.* at step 1\. Check the base model for NaN weights"):
        distill(RUN, model=model, dataset=make_rows(), progress=ignore)


WRONG_INPUTS = [
    ({"config": RUN, "model": None}, r"needs a base model; got model=''\. Set `model`"),
    ({"dataset": make_rows(length=64)}, r"must have sequence_length=128 tokens, .* got rows of 64"),
    ({"dataset": make_rows() + 30}, r"Tokens must lie in \[0, 32\), the model's vocabulary; got 30 .. 61"),
    ({"dataset": make_rows() - 1}, r"Tokens must lie in \[0, 32\), .* got -1"),
    ({"dataset": make_rows()[0]}, r"integers \[N, T\] .* got int64 \(128,\)"),
    ({"config": distill_config(sequence_length=16384)}, r"at most the model's context of 8192 tokens; got 16384"),
    (
        {"config": distill_config(), "model": make_model(gates=(dataclasses.replace(DECODE, block_size=32),))},
        r"must have one block size.*got block sizes \[16, 32\] and sequence_length=128",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_INPUTS)
def test_wrong_inputs(changes, message):
    with pytest.raises(ValueError, match=message):
        distill(**{"config": RUN, "model": make_model(), "dataset": make_rows(), "progress": ignore} | changes)


def test_rows_packed_for_smaller_blocks_are_refused():
    store = TokenStore.from_documents([np.zeros(40), np.zeros(40)])
    data = pack(store, Packing.BEST_FIT, row_length=LENGTH, block_size=8)
    with pytest.raises(ValueError, match=r"sequences at multiples of 16; got rows of 128 and multiples of 8"):
        distill(RUN, model=make_model(), dataset=data, progress=ignore)


@pytest.mark.slow
def test_text_from_files_and_the_token_cache(tmp_path, monkeypatch, capsys):
    class Letters:
        fingerprint = "letters"

        def __init__(self, model, chat_template):
            assert model == "some/model"

        def encode(self, documents):
            return [[ord(c) - 97 for c in d] for d in documents]

    monkeypatch.setattr("seer_jax.train.data.batches.ModelTokenizer", Letters)
    (tmp_path / "text.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 50)
    data = DataConfig(paths=(str(tmp_path / "text.txt"),))
    config = dataclasses.replace(RUN, model="some/model", data=data, output=str(tmp_path / "out"))
    first = distill(config, model=make_model(), progress=ignore)
    assert len(first.dataset) == 10 and first.dataset.report.dropped_tokens == 20
    (tmp_path / "text.txt").write_text("changed")
    assert distill(config, model=make_model()).step == RUN.steps  # reads what the first run kept
    assert f"{tmp_path}/text.txt changed since this run began; it goes on with the text" in capsys.readouterr().out
    (tmp_path / "other.txt").write_text("zyxwvutsrqponmlkjihgfedcba" * 50)
    other = dataclasses.replace(config, data=DataConfig(paths=(str(tmp_path / "other.txt"),)))
    before = contents(tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"^`data\.paths`: this run was started with .*text\.txt'\]; got .*other\.txt'\]"
    ):
        distill(other, model=make_model(), progress=ignore)
    assert contents(tmp_path / "out") == before


@pytest.mark.slow
def test_finetuning_overfits(tmp_path):
    rows = np.random.default_rng(0).integers(0, 32, (4, LENGTH))
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=5)
    config = finetune_config(steps=80, optimizer=optimizer, output=str(tmp_path), checkpoint_interval=40)
    model = make_model(gates=(PREFILL,))
    before = nnx.to_pure_dict(jax.tree.map(np.array, nnx.state(model)))
    result = finetune(config, model=model, dataset=rows, progress=ignore)
    assert result.metrics["loss"] < 0.1 < 3 < lines(tmp_path)[0]["loss"]
    logits = jax.jit(lambda model: model(jnp.asarray(rows)))(result.model)
    assert (np.argmax(logits[:, :-1], -1) == rows[:, 1:]).mean() > 0.97
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), before)
    np.testing.assert_array_equal(keys_of(result.model.prefill_gate), keys_of(model.prefill_gate))
    again = finetune(config, model=model, dataset=rows, progress=ignore)
    np.testing.assert_array_equal(again.model.norm[...], result.model.norm[...])


def test_finetuning_loss_is_that_of_each_sequence_alone():
    documents = [make_rows()[i, :n] for i, n in enumerate((70, 30, 25))]
    data = pack(TokenStore.from_documents(documents), Packing.BEST_FIT, row_length=LENGTH, block_size=1)
    assert len(data) == 1
    config = finetune_config(batch_size=1, micro_batch_size=1, steps=1, optimizer=OptimizerConfig(warmup_steps=0))
    model = make_model()
    loss = finetune(config, model=model, dataset=data, progress=ignore).metrics["loss"]
    tokens, lengths = np.zeros((3, 70), np.int32), np.array([70, 30, 25])
    for row, document in zip(tokens, documents, strict=True):
        row[: len(document)] = document
    logits = jax.jit(lambda model: model(jnp.asarray(tokens), jnp.asarray(lengths)))(model)
    log_probability = jax.nn.log_softmax(logits)[:, :-1]
    nll = -np.take_along_axis(np.asarray(log_probability), tokens[:, 1:, None], -1)[..., 0]
    counts = np.arange(1, 70) < lengths[:, None]
    assert loss == pytest.approx(nll[counts].mean(), rel=1e-5)


def test_metrics_file_after_a_kill(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 0.1}\n[1]\n{"ste\n\n{"step": 2, "loss": 0.2}\n{"step": 3, "loss": 0.3}\n{"step": 4, "lo'
    )
    log = MetricsLog(tmp_path, step=2, tensorboard=False)
    log.write(3, {"loss": 0.30000001192092896})
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.30000001192092896),
    ]
    assert not (tmp_path / "tensorboard").exists()
    assert "metrics.jsonl: 3 damaged lines are left out." in capsys.readouterr().err


@pytest.mark.parametrize("installed", [True, False])
def test_tensorboard(tmp_path, monkeypatch, installed):
    if not installed:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    log = MetricsLog(tmp_path, step=0, tensorboard=True)
    log.write(1, {"decode_loss": 0.5})
    log.close()
    events = [p.read_bytes() for p in tmp_path.glob("tensorboard/*")]
    assert len(events) == installed and all(b"decode_loss" in e for e in events)


def test_default_progress_tells_of_data_and_resumption(undisturbed, capsys):
    config = dataclasses.replace(RUN, output=str(undisturbed[0]))
    distill(config, model=make_model(), dataset=make_rows())
    told = capsys.readouterr().out
    assert "Training data: 12 documents, 1,536 tokens -> 12 rows" in told and "Resuming after step 10." in told


def test_a_run_says_what_it_does_from_its_first_second(capsys):
    distill(dataclasses.replace(RUN, data=DataConfig(held_out_rows=3)), model=make_model(), dataset=make_rows())
    told = capsys.readouterr().out
    order = [
        "Training data: 12 documents",
        "Compiling the training step ...",
        "Compiled in",
        "Training ...",
        "step 10/10  loss",
    ]
    places = [told.index(text) for text in order]
    assert places == sorted(places) and "held-out loss" in told and "epoch 4.44" in told


REPORT = StepReport(5, 20, {"loss": 1.25, "prefill_recall": 0.5, "decode_recall": 0.75}, 12345.6, 3725.2, 1.5)


def test_progress_in_lines():
    file = io.StringIO()
    progress = ConsoleProgress(interval=5, console=Console(file=file, width=40))
    for step in (4, 5, 19, 20):
        progress(dataclasses.replace(REPORT, step=step))
    progress.close()
    rest = "/20  loss 1.2500  prefill recall 0.500  decode recall 0.750  12,346 tokens/s  epoch 1.50  1:02:05 left\n"
    assert file.getvalue() == f"step 5{rest}step 20{rest}"


@pytest.mark.parametrize("width", [40, 80, 160])
def test_progress_on_a_terminal(width):
    file = io.StringIO()
    progress = ConsoleProgress(interval=5, console=Console(file=file, force_terminal=True, width=width))
    held_out = REPORT.metrics | {"held_out_loss": 1.5}
    progress(dataclasses.replace(REPORT, metrics=held_out))
    progress.note("a [line]")
    progress.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n").replace("\n", " ")
    for part in (
        "a [line]",
        "5/20",
        "epoch 1.50",
        "loss 1.2500",
        "held-out loss 1.5000",
        "prefill recall 0.500",
        "12,346 tokens/s",
    ):
        assert part in " ".join(shown.split()), part
    assert "0:00:00" in shown or "-:--:--" in shown  # time left
