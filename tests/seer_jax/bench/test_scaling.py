"""`seer-jax bench scaling`: what it counts, what makes it fail, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from seer_jax.bench.configs import MODELS, ModelShape
from seer_jax.bench.harness import measurement
from seer_jax.bench.models import abstract_model, random_cache, random_model
from seer_jax.bench.scaling import ScalingBench, cases, measure, measure_scaling
from seer_jax.bench.scaling.cases import agreement, error_against
from seer_jax.commands.main import main
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig
from seer_jax.inference.memory import DeviceMemory, tree_bytes
from seer_jax.sharding import Layout, make_mesh, place

# Compiling ahead of time puts descriptions in the place of arrays, and shapes stand for models and caches.
pytestmark = [pytest.mark.mesh, pytest.mark.usefixtures("compile_quickly"), pytest.mark.usefixtures("unchecked")]
Timed = list[Callable[..., Any]]
TINY: dict[str, Any] = dict(shape=ModelShape.TINY, lengths=(128,), train_lengths=(128,), batch=2, tokens=3)
WORDS = ["bench", "scaling", "--shape", "tiny", "--lengths", "128", "--train-lengths", "128", "--batch", "2", "--tokens", "3"]  # fmt: skip


NAMES = {
    "prefill": ["prefill {} x 128, dense", "prefill {} x 128, 0.1"],
    "decode": ["decode 4 x 128, dense", "decode 4 x 128, 0.1"],
    "train": ["distil both {} x 128"],
    "finetune": ["finetune {} x 128"],
}


def run(words: list[str], output: Path) -> dict[str, dict]:
    assert main([*WORDS, *words, "--output", str(output)]) == 0
    lines = json.loads(output.read_text())["measurements"]
    assert not any(m["failure"] for m in lines)
    return {m["case"]: m for m in lines}


@pytest.mark.slow
@pytest.mark.parametrize("only", [["decode"], ["prefill", "train", "finetune"]], ids=str)
def test_a_mesh_of_one_beside_none(
    only: list[str], two_milliseconds: Timed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    found = run(["--mesh", "tensor=1", "--only", *only], tmp_path / "bench.json")
    assert "\nA mesh of one device beside no mesh, in turns" in capsys.readouterr().out
    assert list(found) == [name.format(1).replace("4 x", "2 x") for part in only for name in NAMES[part]]
    for case, m in found.items():
        results, steps = m["results"], 3 if case.startswith("decode") else 1
        assert m["table"] == "mesh of one" and results["over_percent"] == 0 == results["spread_percent"]
        assert results["milliseconds"] == results["alone_milliseconds"] == 2 / steps
        assert results["error"] == 0 and results["planned_gib"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("meshes", "rows", "parts"),
    [
        (["tensor=2"], 1, ["prefill", "decode", "train", "finetune"]),
        (["data=2", "data=4"], 4, ["prefill"]),
    ],
)
def test_parts_over_meshes(
    meshes: list[str],
    rows: int,
    parts: list[str],
    two_milliseconds: Timed,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    words = ["--mesh", meshes[-1], "--batch", "4", "--only", *parts, "--plot", str(tmp_path / "scaling.png")]
    found = run(words, tmp_path / "bench.json")
    assert "\nOver the devices of a mesh" in capsys.readouterr().out and (tmp_path / "scaling.png").exists()
    names = [name.format(rows) for part in parts for name in NAMES[part]]
    assert list(found) == [f"{text}: {name}" for text in ("1 device", *meshes) for name in names]
    for case, m in found.items():
        results, devices = m["results"], m["settings"]["devices"]
        steps = 3 if "decode" in case else 1
        assert results["milliseconds"] == 2 / steps and results["steps_per_second"] == 500 * steps
        assert results["tokens_per_second"] == 500 * (4 * 3 if "decode" in case else rows * 128)
        assert results["speedup"] == 1 and results["efficiency"] == 1 / devices
        sparse_prefill = "prefill" in case and "0.1" in case
        assert ("error" in results) == (devices > 1) and results.get("lists") == (
            1 if devices > 1 and sparse_prefill else None
        )


def test_nothing_is_run_that_there_is_no_memory_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measurement, "device_memory", lambda device: DeviceMemory(2**16, 0))
    for alone, devices in ((True, [1, 1, 2, 2]), (False, [2, 2])):
        lines = list(measure_scaling(ScalingBench(**TINY, mesh="data=2", only=("decode",), alone=alone)))
        assert [m.settings["devices"] for m in lines] == devices
        assert all("JAX may use here" in (m.note or "") and not m.results for m in lines)


@pytest.mark.slow
def test_what_one_device_has_no_memory_for_is_left_out(two_milliseconds: Timed, monkeypatch: pytest.MonkeyPatch):
    """The weights alone: half of them fit."""
    model = abstract_model(MODELS[ModelShape.TINY], PrefillGateConfig(), DecodeGateConfig())
    monkeypatch.setattr(measurement, "device_memory", lambda device: DeviceMemory(tree_bytes(model), 0))
    config = ScalingBench(**TINY, mesh="fsdp=2", only=("decode",))
    lines = list(measure_scaling(config))
    assert [m.settings["devices"] for m in lines] == [1, 1, 2, 2]
    assert all("JAX may use here" in (m.note or "") and not m.results for m in lines[:2])
    for m in lines[2:]:
        assert "beside 2 devices, the fewest that ran it" in (m.note or "")
        assert m.results["efficiency"] == m.results["speedup"] == 1 and "error" not in m.results


@pytest.mark.slow
def test_results_that_differ_are_a_failure(two_milliseconds: Timed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "error_against", lambda ours, theirs: 0.3)
    *_, last = measure_scaling(ScalingBench(**TINY, mesh="tensor=1", only=("decode",)))
    text = "results must be those of one device; they differ by 3.0e-01, of which 0.2 is allowed"
    assert last.failure == text


def test_lists_that_differ_are_a_failure():
    unused: Any = None
    case = cases.Case("prefill", unused, 128, {})
    first, lists = {"logits": np.ones((1, 4))}, np.ones((2, 1, 1, 10, 10), bool)
    others = lists.copy()
    others[0, ..., :5] = False
    results, failure = measure.compared(case, (first, others), (first, lists))
    assert results == {"error": 0, "lists": 0.5, "lists_of_all_layers": 0.75}
    assert failure == "lists must be those of one device; 50.0% of the first layer's blocks agree, 97% must"
    assert measure.compared(case, (first, lists), (first, lists))[1] is None


def test_errors_are_relative():
    logits = np.array([[3.0, 4.0]])
    assert error_against({"logits": 1.1 * logits, "kept": logits}, {"logits": logits}) == pytest.approx(0.1)
    theirs = {"loss": np.array(2.0), "decode_loss": np.array(0.0), "grad_norm": np.array(1.0)}
    ours = {"loss": np.array(2.1), "decode_loss": np.array(0.2), "grad_norm": np.array(9.0)}
    assert error_against(ours, theirs) == pytest.approx(0.1)
    assert agreement(np.array([1, 1, 0], bool), np.array([1, 0, 1], bool)) == pytest.approx(1 / 3)


def test_random_contents_are_the_same_on_a_mesh():
    config = MODELS[ModelShape.TINY]
    layout = Layout.of(make_mesh("fsdp=2,tensor=2"), config)
    gates = PrefillGateConfig(), DecodeGateConfig()
    pairs = [
        [random_model(config, *gates, layout=where) for where in (None, layout)],
        [random_cache(config, 2, 128, "bfloat16", gates[1], layout=where) for where in (None, layout)],
    ]
    for alone, spread in pairs:
        leaves = [jax.tree.leaves(x) for x in (alone, spread)]
        for theirs, ours in zip(*leaves, strict=True):
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
        assert any(not x.is_fully_replicated for x in leaves[1])


def test_meshes_double_along_their_axis():
    def sizes(mesh: str, **settings: Any) -> list[int]:
        return [m.size for m in ScalingBench(**TINY | settings, mesh=mesh).meshes()]

    assert sizes("tensor=4") == [2, 4] and sizes("data=3", batch=6) == [2, 3] and sizes("tensor=1") == [1]
    assert sizes("data=2,tensor=2") == [4] and sizes("fsdp=-1", batch=4) == [2, 4]


BAD = [
    (
        dict(mesh="data=2", batch=3),
        r"batch must be a multiple of the 2 devices along data and fsdp; got 3\. Set batch=4",
    ),
    (dict(mesh="data=2", rows=1), r"rows must be a multiple of the 2 devices .*; got 1\. Set rows=2"),
    (dict(mesh="tensor=64"), "must fit the 4 devices"),
    (dict(mesh="tensor"), "must be written as axes with sizes"),
    (dict(lengths=(100,)), "lengths must be at least 128 tokens, whole blocks of 64; got 100"),
    (dict(train_lengths=(64,)), "train_lengths must be whole blocks of 64, at least 2; got 64"),
    (dict(tokens=128), "tokens must be below the lengths"),
    (dict(density=0.0), r"density must lie in \(0, 1\]; got 0"),
    (dict(only=()), "only must name some of prefill, decode, train, finetune; got none"),
    (dict(batch=0), "batch must be"),
    (dict(repetitions=2), "repetitions must be"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ScalingBench(**TINY | change).meshes()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["prefill", "decode", "train"])
def test_a_mesh_of_one_device_has_the_program_without_a_mesh(part: Any):
    """As many copies and as much memory: what it costs is not the devices' time."""
    config = ScalingBench(**TINY, mesh="tensor=1", only=(part,))
    alone = random_model(config.model, *config.gates)
    models = alone, place(alone, make_mesh("tensor=1"))
    for case in cases.all_cases(config, make_mesh("tensor=1")):
        found = []
        for model in models:
            program = case.make(model).lower().compile()
            memory: Any = program.memory_analysis()
            sizes = memory.temp_size_in_bytes, memory.alias_size_in_bytes, memory.output_size_in_bytes
            found.append((*sizes, (program.as_text() or "").count(" copy(")))
        assert found[0] == found[1]
