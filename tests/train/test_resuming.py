"""Runs that go on: from damaged checkpoints, with more or fewer steps, from given gates; and folders that are refused."""

import contextlib
import dataclasses
import functools
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from seer_jax.convert import load_gates, save_base, save_gates
from seer_jax.folder_lock import locked
from seer_jax.gates.configs import TrainedGates
from seer_jax.inference.memory import DeviceMemory
from seer_jax.models.hub import read_config
from seer_jax.train import DistillConfig, FinetuneConfig, distill
from seer_jax.train.api import _attach_gates
from seer_jax.train.config import TargetStatistic, TrainConfig, renewed
from seer_jax.train.data.batches import DataConfig
from seer_jax.train.loop.resuming import check_resumed
from seer_jax.train.optimizer import make_schedule
from tests.train.runs import RUN, contents, ignore, keys_of, lines, raising, run_to
from tests.train.tiny import DECODE, PREFILL, make_model, make_rows

pytestmark = pytest.mark.usefixtures("compile_quickly")


def other_runs():
    changed = functools.partial(dataclasses.replace, RUN)
    optimizer = dataclasses.replace(RUN.optimizer, learning_rate=0.5)
    yield (
        {"config": changed(seed=1)},
        r"^`seed`: this run was started with 0; got 1\. Restore seed=0 to go on with the run in .*, or give another `output` for a new run",
    )
    yield (
        {"config": changed(optimizer=optimizer)},
        r"^`optimizer\.learning_rate`: .* with 0\.01; got 0\.5\. Restore optimizer\.learning_rate=0\.01 to go on",
    )
    yield {"config": changed(data=DataConfig(paths=("/x",)))}, r"^`data\.paths`: .* with \[\]; got \['/x'\]"
    yield (
        {"config": changed(steps=8)},
        r"^`steps` must be at least the 10 that this run has done, of 10; got 8\. Set steps=10 or more",
    )
    yield (
        {"config": changed(kind=TrainedGates.PREFILL)},
        r"^`kind`: this run was started with 'decode'; got 'prefill'\. Restore kind=decode to go on",
    )
    yield (
        {"model": make_model(layers=3)},
        r"^base model: num_layers was 2 when this run was started; got 3\. Restore it to go on",
    )
    yield {"dataset": make_rows() + 0 * make_rows()[::-1]}, None
    yield (
        {"dataset": make_rows(rows=11)},
        r"^training data: digest was .*; training data: rows was 12 when this run was started; got 11",
    )


@pytest.mark.parametrize(("changes", "message"), list(other_runs()))
def test_checkpoints_of_another_run_are_refused(undisturbed, changes, message):
    folder, _ = undisturbed
    settings = {"config": RUN, "model": make_model(), "dataset": make_rows(), "progress": ignore} | changes
    settings["config"] = dataclasses.replace(settings["config"], output=str(folder))
    if message is None:
        assert distill(**settings).step == RUN.steps
        return
    before = contents(folder)
    with pytest.raises(ValueError, match=message):
        distill(**settings)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("kinds", "foreign"),
    [((FinetuneConfig, DistillConfig), "kind, .*prefill"), ((DistillConfig, FinetuneConfig), "yarn_factor, lora")],
)
def test_a_folder_belongs_to_one_kind_of_training(kinds: tuple[type[TrainConfig], type[TrainConfig]], foreign: str):
    ours, theirs = kinds
    found = {"config": renewed(theirs().defining(), ours)}
    with pytest.raises(
        ValueError, match=rf"that in runs/x is another kind of training, .* lacks: {foreign}.*\. Give another `output`"
    ):
        check_resumed({"config": ours().defining()}, found, step=1, folder=Path("runs/x"))


def test_settings_of_earlier_versions_go_on(undisturbed):
    """Their names have changed, and some are new since."""
    ours = RUN.defining()
    old = {name: value for name, value in ours.items() if name not in ("dtype", "kind", "initial_gates", "target")}
    old |= {"precision": ours["dtype"], "gates": ours["kind"]}
    old["data"] = {name: value for name, value in ours["data"].items() if name != "held_out_rows"}
    assert renewed(old, DistillConfig) == ours
    folder, _ = undisturbed
    theirs = {"config": renewed(old | {"gates": "both"}, DistillConfig)}
    with pytest.raises(ValueError, match=r"^`kind`: this run was started with 'both'; got 'decode'"):
        check_resumed({"config": ours}, theirs, step=1, folder=folder)
    by_mass, theirs = (
        dataclasses.replace(RUN, target=TargetStatistic.MASS).defining(),
        {"config": renewed(old, DistillConfig)},
    )
    with pytest.raises(
        ValueError, match=r"^`target`: this run was started with 'max'; got 'mass'\. Restore target=max"
    ):
        check_resumed({"config": by_mass}, theirs, step=1, folder=folder)


def test_weights_that_do_not_train_must_stay_as_they_were(tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    save_base(make_model(), base)
    config = dataclasses.replace(RUN, model=str(base), output=str(run), steps=3)
    distill(config, dataset=make_rows(), progress=ignore)
    before = contents(run)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(
        ValueError,
        match=r"^weights that do not train: base model was '\w+' when this run was started; got '\w+'\. Restore",
    ):
        distill(config, dataset=make_rows(), progress=ignore)
    assert contents(run) == before


@pytest.fixture
def finished(undisturbed, tmp_path):
    """A copy of the folder of a finished run, with its checkpoints of steps 9 and 10."""
    return Path(shutil.copytree(undisturbed[0], tmp_path / "finished"))


@pytest.mark.slow
def test_a_run_is_extended(finished, undisturbed, capsys):
    result = run_to(finished, steps=14, progress=None)
    assert result.step == 14 and [line["step"] for line in lines(finished)] == list(range(1, 15))
    assert lines(finished)[:10] == lines(undisturbed[0])
    schedule = make_schedule(RUN.optimizer, 14)
    rates = [line["learning_rate"] for line in lines(finished)[10:]]
    np.testing.assert_allclose(rates, np.array([schedule(step) for step in range(10, 14)]), rtol=1e-6)
    said = capsys.readouterr().out
    assert (
        "The run was to have 10 steps, and now has 14. From step 11 on, the learning rate is that of a run of 14 steps"
        in said
    )


def test_a_run_is_shortened(undisturbed, tmp_path):
    with pytest.raises(SystemExit):
        run_to(tmp_path, progress=raising(3, signal.SIGTERM))
    done = lines(tmp_path)[-1]["step"]
    assert run_to(tmp_path, steps=done).step == done
    gate = json.loads((tmp_path / "decode_gate" / "config.json").read_text())
    assert gate["seer_jax_training"] == {"step": done, "steps": done, "finished": True, "target": "max"}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGES = {
    "a flipped bit": (lambda folder: flip(largest(folder)), r"is not what was written"),
    "a cut file": (lambda folder: largest(folder).write_bytes(b""), r"is not what was written"),
    "a missing file": (lambda folder: largest(folder).unlink(), r"is missing"),
    "no checksums, a broken file": (
        lambda folder: [(folder / "checksums.json").unlink(), largest(folder / "optimizer").write_bytes(b"x")],
        r".",
    ),
    "broken checksums": (lambda folder: (folder / "checksums.json").write_text("{"), r"Expecting"),
}


# Orbax leaves coroutines behind where an array cannot be read; they are collected within the test that meets them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(name, marks=() if "flipped" in name or "broken file" in name else pytest.mark.slow)
        for name in DAMAGES
    ],
)
def test_a_damaged_checkpoint_is_passed_over(finished, undisturbed, capsys, damage):
    change, reason = DAMAGES[damage]
    change(finished / "checkpoints" / "10")
    result = run_to(finished)
    err = capsys.readouterr().err
    assert re.search(
        rf"^The checkpoint of step 10 is damaged \(.*{reason}.*\); going on from that of step 9\.$", err, re.MULTILINE
    )
    assert result.step == 10 and lines(finished) == lines(undisturbed[0])
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["10", "9"]
    assert (finished / "damaged_checkpoints" / "10").is_dir()
    np.testing.assert_array_equal(
        keys_of(load_gates(finished / "decode_gate")), keys_of(undisturbed[1].model.decode_gate)
    )
    gc.collect()


def test_where_all_checkpoints_are_damaged_nothing_is_lost(finished):
    for step in ("9", "10"):
        flip(largest(finished / "checkpoints" / step))
    before = contents(finished)
    with pytest.raises(
        ValueError, match=r"must be readable; all are damaged: .* is not what was written\. Restore them"
    ) as error:
        run_to(finished)
    assert "\n" not in str(error.value) and contents(finished) == before


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    with locked(tmp_path):
        before = contents(tmp_path)
        message = rf"one run at a time; process {os.getpid()} on .* is using {tmp_path}\. Wait for its end, or"
        with pytest.raises(BlockingIOError, match=message):
            run_to(tmp_path)
        assert contents(tmp_path) == before
    program = "import os, pathlib, sys\nfrom seer_jax.folder_lock import locked\nwith locked(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == -signal.SIGKILL
    with locked(tmp_path):
        pass  # the lock of a killed process is gone


def test_gates_of_another_run_are_not_written_over(finished):
    shutil.rmtree(finished / "checkpoints")
    before = contents(finished)
    with pytest.raises(
        FileExistsError, match=r"must not write over gates; .*decode_gate is there, without checkpoints"
    ):
        run_to(finished)
    assert contents(finished) == before


def test_a_gate_of_the_model_is_trained_further(undisturbed):
    _, first = undisturbed
    config = dataclasses.replace(RUN, optimizer=dataclasses.replace(RUN.optimizer, learning_rate=1e-6))
    before = keys_of(first.model.decode_gate)
    second = distill(config, model=first.model, dataset=make_rows(), progress=ignore)
    np.testing.assert_allclose(keys_of(second.model.decode_gate), before, atol=1e-4)
    np.testing.assert_array_equal(keys_of(first.model.decode_gate), before)


def test_training_starts_from_given_gates_and_keeps_their_target(undisturbed, tmp_path):
    _, first = undisturbed
    start, output = tmp_path / "start", tmp_path / "run"
    save_gates(first.model.decode_gate, start, base_model="some/base", training={"target": "mass"})
    slow = dataclasses.replace(RUN.optimizer, learning_rate=1e-6)
    config = dataclasses.replace(RUN, optimizer=slow, initial_gates=(str(start),), output=str(output))
    result = distill(config, model=make_model(), dataset=make_rows(), progress=ignore)
    np.testing.assert_allclose(keys_of(result.model.decode_gate), keys_of(first.model.decode_gate), atol=1e-4)
    assert read_config(output / "decode_gate")["seer_jax_training"]["target"] == "mass"


@pytest.mark.parametrize(
    ("asked", "distilled", "trained"),
    [
        (None, ("mass", "mass"), "mass"),
        (None, ("mass", None), "mass"),
        (None, (None, None), "max"),
        ("max", ("mass", "max"), "max"),
        (
            None,
            ("mass", "max"),
            r"must have one target; got \w+ \(\w+ gate\) and \w+ \(\w+ gate\)\. Choose one \(target, --target\)",
        ),
    ],
)
def test_the_target_of_given_gates_is_kept_unless_another_is_named(tmp_path, asked, distilled, trained):
    gates = make_model(gates=(PREFILL, DECODE))
    for gate, target in zip((gates.prefill_gate, gates.decode_gate), distilled, strict=True):
        assert gate is not None
        training = None if target is None else {"target": target}
        save_gates(gate, tmp_path / type(gate).__name__, base_model="some/base", training=training)
    config = dataclasses.replace(
        RUN,
        kind=TrainedGates.BOTH,
        target=asked and TargetStatistic(asked),
        initial_gates=tuple(map(str, tmp_path.iterdir())),
    )
    refused = trained not in list(TargetStatistic)
    with pytest.raises(ValueError, match=trained) if refused else contextlib.nullcontext():
        settled, _ = _attach_gates(config, model := make_model())
        of_gates = {gate.distilled_on for gate in (model.prefill_gate, model.decode_gate) if gate is not None}
        assert {settled.target} == of_gates == {trained}


def test_gates_of_a_given_model_keep_their_target():
    model = make_model(gates=(DECODE,))
    assert model.decode_gate is not None
    model.decode_gate.distilled_on = "mass"
    settled, _ = _attach_gates(RUN, model)
    assert settled.target == TargetStatistic.MASS


WRONG_STARTS = [
    (
        {"kind": TrainedGates.PREFILL},
        {},
        r"must be gates that are trained \(kind=prefill\); .* holds a decode gate\. Leave it out, or set kind",
    ),
    ({}, {"gates": (DECODE,)}, r"must hold one decode gate for a model without any; .*decode_gate is a second one"),
    (
        {"decode": dataclasses.replace(DECODE, use_rope=False)},
        {},
        r"must be those of its initial gate, .*/decode_gate: decode\.use_rope=True; got False\. Set them so, or leave out",
    ),
    ({"initial_gates": ("/nowhere",)}, {}, r"There is no folder '/nowhere'"),
]


@pytest.mark.parametrize(("settings", "model", "message"), WRONG_STARTS)
def test_gates_that_training_cannot_start_from(undisturbed, settings, model, message):
    config = dataclasses.replace(RUN, **{"initial_gates": (str(undisturbed[0] / "decode_gate"),)} | settings)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        distill(config, model=make_model(**model), dataset=make_rows(), progress=ignore)


@pytest.mark.parametrize("place", ["api._load_model", "api._read_dataset", "loop.run._compile"])
def test_an_interrupt_before_the_first_step_says_what_is_kept(tmp_path, monkeypatch, capsys, place):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"seer_jax.train.{place}", interrupted)
    with pytest.raises(KeyboardInterrupt) as stop:
        run_to(tmp_path)
    (note,) = stop.value.__notes__
    assert re.fullmatch(
        r"Stopped while \w.*; no checkpoint was written yet; started again, the run begins anew\.", note
    )
    assert "Stopped" not in capsys.readouterr().err  # what ends the process says it


def refused_by_tensorstore(*_: object, **__: object) -> None:
    raise ValueError('RESOURCE_EXHAUSTED: Error writing local file "x": No space left on device')


CHECKPOINT = "seer_jax.train.loop.checkpoint"
FULL_DISKS = {
    "no room for a checkpoint": (
        (f"{CHECKPOINT}._SLACK", 1 << 62),
        r"must be able to write its files; .*/run took none while training \(No space left on device\)\. Kept: the gates of step 1\. Free space, and give another `output`",
        ["decode_gate"],
    ),
    "a file that TensorStore cannot write": (
        ("orbax.checkpoint.CheckpointManager.save", refused_by_tensorstore),
        r"Kept: the gates of step 1\.",
        ["decode_gate"],
    ),
    "no room for gates": (
        ("seer_jax.train.api.save_gates", refused_by_tensorstore),
        r"Kept: the checkpoint of step 1\. Free space, and start the run again to resume there\.",
        ["checkpoints/1"],
    ),
}


@pytest.mark.parametrize("case", FULL_DISKS)
def test_a_full_disk_is_one_line_and_keeps_what_it_can(tmp_path, monkeypatch, capsys, case):
    patch, message, kept = FULL_DISKS[case]
    monkeypatch.setattr(*patch)
    with pytest.raises(OSError, match=message) as error:
        run_to(tmp_path / "run")
    assert "\n" not in str(error.value) and not capsys.readouterr().err
    places = ("decode_gate", *(f"checkpoints/{p.name}" for p in (tmp_path / "run" / "checkpoints").iterdir()))
    assert [place for place in places if (tmp_path / "run" / place).exists()] == kept


def test_a_run_that_is_refused_leaves_no_threads(tmp_path):
    before = set(threading.enumerate())
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"held_out_rows must leave rows to train on"):
        run_to(tmp_path, data=DataConfig(held_out_rows=12))
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("place", ["api._load_model", "api._read_dataset", "loop.run._compile"])
def test_a_device_without_memory_is_one_line(tmp_path, monkeypatch, place):
    def full(*_: object) -> None:
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes.\nBuffers: ..."
        )

    monkeypatch.setattr(f"seer_jax.train.{place}", full)
    message = r"micro_batch_size \(now 4\) or sequence_length \(now 128\); .* XLA_PYTHON_CLIENT_MEM_FRACTION=0\.95"
    with pytest.raises(MemoryError, match=message) as error:
        run_to(tmp_path)
    assert "\n" not in str(error.value)


def test_a_step_is_held_against_the_device_before_it_runs(monkeypatch):
    monkeypatch.setattr("seer_jax.train.loop.run.device_memory", lambda device: DeviceMemory(limit=10, in_use=4))
    with pytest.raises(
        MemoryError, match=r"it needs 0\.\d+ GiB beside weights and data, and 0\.000 GiB are free\. Lower"
    ):
        distill(RUN, model=make_model(), dataset=make_rows(), progress=ignore)
