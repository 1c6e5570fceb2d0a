"""`seer-jax bench`: runs at tiny sizes on a CPU, its tables and pictures, what makes it fail, and what it refuses."""

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from pallas_kernels import attention_with_block_scores, block_sparse_attention, sparse_decode_attention
from pallas_kernels import bench as kernels_bench
from pallas_kernels import cases as shapes
from pallas_kernels.bench import Measurement, Timing
from pallas_kernels.block_ground_truth import bench as ground_truth_bench
from pallas_kernels.block_ground_truth.bench import Wanted
from pallas_kernels.block_sparse_attention import bench as attention_bench
from pallas_kernels.cases import Heads
from pallas_kernels.sparse_decode import bench as decode_kernel
from seer_jax.bench import (
    DecodeBench,
    PrefillBench,
    TrainBench,
    decode_layer,
    decode_model,
    measure_decode,
    measure_prefill,
)
from seer_jax.bench import decode as decode_bench
from seer_jax.bench import models as models_bench
from seer_jax.bench import selection as selection_bench
from seer_jax.bench import training as training_bench
from seer_jax.bench.gate_masks import trained_cases
from seer_jax.bench.models import CONFIGS, Shape, heads_of, random_model
from seer_jax.bench.plots import plot_decode, plot_prefill
from seer_jax.bench.selection import chosen_blocks
from seer_jax.bench.table import beside_each_other, print_measurements
from seer_jax.bench.training import forward_flop
from seer_jax.commands import main as cli
from seer_jax.gates.configs import DecodeGateConfig
from seer_jax.gates.decode import DecodeGate
from seer_jax.gates.prefill import PrefillGate
from seer_jax.inference.memory import tree_bytes
from seer_jax.models.attention import prefill_attention
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.rules import Threshold, TopK
from tests.seer_jax.conftest import LLAMA, tiny_model

pytestmark = pytest.mark.usefixtures("compile_quickly")
TINY = ["bench", "prefill", "--shape", "tiny", "--lengths", "128", "--densities", "0.3"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions run once, and are said to take 2 ms."""

    def fixed(function: Callable[..., Any], *arguments: Any) -> Timing:
        jax.block_until_ready(function(*arguments))
        return Timing(2.0, 0.1, 3)

    timed = (attention_bench, ground_truth_bench, models_bench, selection_bench, training_bench)
    for module in (*timed, kernels_bench, decode_layer, decode_model):
        monkeypatch.setattr(module, "time_calls", fixed)
    monkeypatch.setattr(kernels_bench, "memory_rate", lambda: 1e9)
    monkeypatch.setattr(decode_kernel, "memory_rate", lambda: 1e9)
    monkeypatch.setattr(decode_layer, "memory_rate", lambda: 1e9)
    monkeypatch.setattr(decode_bench, "memory_rate", lambda: 1e9)


@pytest.mark.usefixtures("unchecked")  # compiling ahead of time puts descriptions in the place of arrays
def test_a_whole_run(clock: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """All parts but the odd cases, which tests of the kernels run."""
    output, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    words = [*TINY, "--only", "attention", "selection", "model", "--implementation", "xla"]
    assert cli.main([*words, "--output", str(output), "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    for title in ("Attention kernel", "Gate and choice of blocks, one layer", "Whole model, time to first token"):
        assert f"\n{title}" in text
    assert "128, 64x64, own, 0.3" in text and "times faster: dense attention's" in text and "odd cases" not in text
    assert plot.read_bytes().startswith(b"\x89PNG")

    report = json.loads(output.read_text())
    lines = {
        name: [m for m in report["measurements"] if m["table"] == name] for name in ("attention", "selection", "model")
    }
    assert {name: len(found) for name, found in lines.items()} == {"attention": 3, "selection": 3, "model": 2}
    assert not any(m["failure"] for m in report["measurements"])
    dense, sparse = lines["model"]
    assert (
        dense["settings"]["density"] is None and dense["results"]["density"] == 1 and sparse["results"]["density"] <= 1
    )
    assert all(m["results"]["compile_seconds"] > 0 and m["results"]["planned_gib"] > 0 for m in lines["model"])
    assert all(m["results"]["error"] < 5e-3 and m["results"]["speedup"] == 1 for m in lines["attention"])


@pytest.mark.parametrize("heads", [4, 68])
@pytest.mark.slow
def test_masks_of_a_trained_gate(heads: int, clock: None):
    """Of the gate's last heads, repeated where it has fewer; each row keeps its own block among its best."""
    (trained, random), *_ = pairs = trained_cases(Heads(heads, 2, 64), 1024, 0.6)
    lists, others = (case.arguments(jax.random.key(0))["blocks"] for case in (trained, random))
    mask, b = np.asarray(lists.to_mask(16)), lists.block_size
    assert b == others.block_size == 64 and mask.shape == (1, heads, 16, 16) == others.to_mask(16).shape
    assert mask.diagonal(axis1=2, axis2=3).all() and not np.triu(mask, 1).any()
    assert len({m.tobytes() for m in mask[0]}) > heads / 4
    if heads > 64:
        np.testing.assert_array_equal(mask[0, :4], mask[0, 64:])
    else:
        (line,) = attention_bench.Bench("xla").pairs(pairs)
        assert line.failure is None and line.results["share_of_aligned"] is not None


def test_a_wrong_kernel_makes_the_command_fail(
    clock: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def wrong(*_: Any) -> Callable[..., Any]:
        def run(**arguments: Any) -> Any:
            out, lse = block_sparse_attention(**arguments, return_lse=True)
            return out, lse + 0.01

        return run

    monkeypatch.setattr(attention_bench, "compiled", wrong)
    assert cli.main([*TINY, "--only", "attention"]) == 1
    captured = capsys.readouterr()
    assert "seer-jax bench: attention, 128, 64x64, own, 0.3: lse errs by 1.00e-02" in captured.err
    assert "128, 64x64, own, 0.3 WRONG" in captured.out


@pytest.mark.usefixtures("unchecked")  # see above
@pytest.mark.slow
def test_ground_truth(clock: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "bench.json"
    words = ["bench", "ground-truth", "--shape", "tiny", "--lengths", "150", "--chunk", "64", "--output", str(output)]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "\nDense attention with block scores" in text and "150, neither" in text and "times dense: ms over" in text
    lines = {m["case"]: m for m in json.loads(output.read_text())["measurements"]}
    assert list(lines) == [f"150, {name}" for name in ("blocks", "tokens", "both", "neither")]
    assert [m["settings"]["chunk"] for m in lines.values()] == [150, 64, 64, 150]
    for m in lines.values():
        assert not m["failure"] and m["results"]["times_dense"] == 1 and m["results"]["extra_gib"] > 0
        assert m["results"]["error"] < 5e-3 and m["results"]["scores_error"] < 1e-5


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("output", "the output errs by"),
        ("lse", "lse errs by"),
        ("block_scores", "scores err by"),
        ("token_scores", "scores err by"),
    ],
)
def test_a_wrong_ground_truth_is_found(clock: None, monkeypatch: pytest.MonkeyPatch, name: str, message: str):
    def wrong(*arguments: Any, **settings: Any) -> Any:
        result = attention_with_block_scores(*arguments, **settings)
        return result._replace(**{name: 1.01 * getattr(result, name)})

    monkeypatch.setattr(ground_truth_bench, "attention_with_block_scores", wrong)
    heads = heads_of(CONFIGS[Shape.TINY])
    (line,) = ground_truth_bench.Bench().sweep(ground_truth_bench.sweep(heads, (128,), [Wanted.BOTH]))
    assert message in (line.failure or "")


def test_an_implementation_asked_for_by_name_must_be_able(capsys: pytest.CaptureFixture[str]):
    if jax.default_backend() == "cpu":
        words = [*TINY, "--only", "attention", "--implementation", "mosaic_gpu"]
        assert cli.main(words) == 1
        assert "seer-jax bench: attention, 128, 64x64, own, 0.3: needs a GPU" in capsys.readouterr().err
        assert cli.main([*words, "--variants"]) == 0


DECODE = ["bench", "decode", "--shape", "tiny", "--lengths", "256", "--batches", "2"]


@pytest.mark.usefixtures("unchecked")  # see above
@pytest.mark.slow
def test_decode(clock: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    assert cli.main([*DECODE, "--densities", "0.5", "--tokens", "4", "--output", str(output), "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    for title in ("Attention kernel, new tokens", "Attention of one layer with gate", "Whole model, one new token"):
        assert f"\n{title}" in text
    assert "2 x 256, top 0.1" in text and "times floor: ms over floor ms" in text
    assert plot.read_bytes().startswith(b"\x89PNG")

    lines = json.loads(output.read_text())["measurements"]
    found = {(m["table"], m["case"].removeprefix("2 x 256, ").split()[0]): m["results"] for m in lines}
    assert list(found) == [
        *(("decode kernel", rule) for rule in ("0.5", "dense")),
        *(("decode layer", rule) for rule in ("dense", "top", "threshold")),
        *(("decode model", rule) for rule in ("dense", "0.1")),
    ]
    assert not any(m["failure"] or m["note"] for m in lines)
    half, whole = found["decode kernel", "0.5"], found["decode kernel", "dense"]
    assert half["density"] == 0.5 and whole["density"] == 1 and max(half["error"], whole["error"]) < 5e-3
    # 2 rows, keys and values of 2 heads of 64 bfloat16 numbers; a program of two layers' calls is said to take 2 ms.
    assert whole["floor_milliseconds"] == 2 * 2 * 256 * 2 * 64 * 2 / 1e9 * 1e3 == 2 * half["floor_milliseconds"]
    assert half["milliseconds"] == 1 and half["times_floor"] == 1 / half["floor_milliseconds"] and half["speedup"] == 1
    assert found["decode layer", "dense"]["density"] == 1 > found["decode layer", "threshold"]["density"]
    assert found["decode layer", "top"]["density"] == 0.5 == found["decode model", "0.1"]["density"]
    share = 2 / CONFIGS[Shape.TINY].num_layers  # of the gate's update, which is said to take 2 ms too
    for m in (m for m in lines if m["table"] == "decode layer"):
        added = 0 if m["settings"]["rule"] == "dense" else share
        assert m["results"]["milliseconds"] == 2 / m["settings"]["layers"] + added
    for rule in ("dense", "0.1"):
        results = found["decode model", rule]
        assert results["milliseconds"] == 2 / 4 and results["tokens_per_second"] == 2 / (2e-3 / 4)
        assert results["compile_seconds"] > 0 and results["planned_gib"] > 0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out, lse: (out * 1.02, lse), "the output errs by"),
        (lambda out, lse: (out, lse + 2e-4), "lse errs by 2"),
        (lambda out, lse: (out.at[1, 3, 0].set(jnp.nan), lse), "all others finite"),
    ],
)
def test_a_wrong_new_token_is_found(
    change: Callable, message: str, clock: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def wrong(*arguments: Any, return_lse: bool = False, **settings: Any) -> Any:
        return change(*sparse_decode_attention(*arguments, **settings, return_lse=True))

    monkeypatch.setattr(decode_kernel, "sparse_decode_attention", wrong)
    assert cli.main([*DECODE, "--only", "kernel", "--densities", "0.5"]) == 1
    captured = capsys.readouterr()
    assert "seer-jax bench: decode kernel, 2 x 256, 0.5:" in captured.err and message in captured.err
    assert "2 x 256, dense WRONG" in captured.out


@pytest.mark.usefixtures("unchecked")  # shapes and dtypes stand for a cache
def test_what_the_device_has_no_memory_for_is_a_note(clock: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels_bench, "memory_limit", lambda: 2**16)
    lines = list(measure_decode(DecodeBench(Shape.TINY, batches=(3,), lengths=(128,))))
    assert len(lines) == 2 + 3 + 2 and not any(m.results or m.failure for m in lines)
    assert all("3 x 128 needs" in m.note and "90% of the 0.0 GiB" in m.note for m in lines if m.note) and lines[0].note


@pytest.mark.usefixtures("unchecked")  # shapes and dtypes stand for a cache
def test_bytes_that_a_new_token_reads():
    config = CONFIGS[Shape.LLAMA_3_1_8B]
    keys_and_values = 2 * 8 * 131072 * 8 * 128 * 2
    shape = decode_kernel.Shape(heads_of(config), 8, 131072)
    assert shape.read_bytes(None) == keys_and_values and shape.read_bytes(0.1) == keys_and_values * 204 / 2048
    dense, sparse = (decode_layer.Step(config, policy, 8, 131072) for policy in (Dense(), TopK(0.1)))
    assert dense.read_bytes(1.0) == keys_and_values
    gate = (8 * 4 * 128 * 128 + 8 * 3 * 128 * 128 + 2 * 128) * 4
    assert sparse.read_bytes(0.1) == pytest.approx(keys_and_values / 10 + 8 * 2048 * 8 * 128 * 2 + gate)
    model = nnx.eval_shape(lambda: random_model(config, gates=(DecodeGateConfig(),)))
    assert decode_model.read_bytes(model, 8, 131072, None) == pytest.approx(15.0e9 + 32 * keys_and_values, rel=1e-3)
    more = decode_model.read_bytes(model, 8, 131072, 1.0) - decode_model.read_bytes(model, 8, 131072, None)
    assert more == 32 * (8 * 2048 * 8 * 128 * 2 + gate)


@pytest.mark.cpu
@pytest.mark.usefixtures("unchecked")
def test_a_layer_that_is_timed_never_copies_its_cache():
    config = dataclasses.replace(CONFIGS[Shape.TINY], num_layers=3)
    step = decode_layer.Step(config, TopK(0.1), 2, 8192)
    cache = models_bench.abstract_cache(config, 2, 8192, jnp.bfloat16, step.gate)
    gate = nnx.eval_shape(lambda: DecodeGate(decode_layer.GATE, config, rngs=nnx.Rngs(0)))
    q = jax.ShapeDtypeStruct((2, 1, config.num_heads, config.head_dim), jnp.bfloat16)
    program = decode_layer.repeated_layers(step, 2).lower(q, cache, gate)
    memory: Any = program.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= tree_bytes(cache) > 20 * memory.temp_size_in_bytes


@pytest.mark.parametrize("num_blocks", [128, 2048])
def test_a_threshold_keeps_about_what_is_asked_for(num_blocks: int):
    logits = 3.0 * np.random.default_rng(1).standard_normal((64, num_blocks))
    scores = np.asarray(jax.nn.softmax(logits, axis=-1))
    assert (scores > decode_layer.threshold_for(0.1, num_blocks)).mean() == pytest.approx(0.1, rel=0.1)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(lengths=(256, 64)), r"two blocks of 64 tokens; got \(256, 64\)"),
        (dict(batches=()), r"one sequence; got \(\)"),
        (dict(batches=(1, 0)), r"one sequence; got \(1, 0\)"),
        (dict(densities=(0.0,)), "got 0.0"),
        (dict(model_density=2.0), "got 2.0"),
        (dict(lengths=(128,), tokens=128), "1 to 127 of them; got tokens=128"),
        (dict(only=()), "some of kernel, layer, model; got none"),
    ],
)
def test_decoding_that_makes_no_sense_is_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DecodeBench(**settings)


@pytest.mark.usefixtures("unchecked")
def test_training(clock: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "bench.json"
    words = ["bench", "train", "--shape", "tiny", "--lengths", "256", "--batch-size", "2", "--gates", "prefill", "both"]
    assert cli.main([*words, "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "\nDistillation, one step" in text and "256, both" in text and "of forward: the step's ms" in text
    lines = json.loads(output.read_text())["measurements"]
    assert [m["case"] for m in lines] == ["256, prefill", "256, both"] and not any(m["failure"] for m in lines)
    for m in lines:
        results, tokens = m["results"], 2 * 256
        assert results["of_forward"] == 2 / (
            2 * 2
        )  # a step of two rows takes 2 ms here, and so does each row's forward
        assert results["tflops"] == pytest.approx(2 * forward_flop(CONFIGS[Shape.TINY], 256) / 2e-3 / 1e12)
        assert results["recipe_hours"] == pytest.approx(500 * 16 * 65536 / tokens * 2e-3 / 3600)
        assert results["compile_seconds"] > 0 and results["planned_gib"] > 0 and results["prefill_loss"] > 0
    assert lines[1]["results"]["decode_recall"] > 0


def test_flop_of_a_forward():
    config = CONFIGS[Shape.TINY]
    matrices = [x.size for x in jax.tree.leaves(nnx.eval_shape(lambda: random_model(config)).layers) if x.ndim == 3]
    attention = config.num_layers * 4 * config.num_heads * config.head_dim * sum(range(1, 101))
    assert forward_flop(config, 100) == 2 * 100 * sum(matrices) + attention
    assert forward_flop(CONFIGS[Shape.LLAMA_3_1_8B], 65536) == pytest.approx(2.04e15, rel=1e-2)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(lengths=(256, 100)), r"whole blocks of 64 tokens, two at least; got \(256, 100\)"),
        (dict(lengths=(64,)), "two at least; got"),
        (dict(gates=()), r"some gates on one row at least; got gates \(\)"),
        (dict(batch_size=0), "batch_size=0"),
    ],
)
def test_steps_that_make_no_sense_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        TrainBench(**settings)


REFUSED = [
    (dict(lengths=()), "one block of 64 tokens; got ()"),
    (dict(lengths=(8192, 32)), r"got \(8192, 32\)"),
    (dict(densities=(0.1, 1.5)), r"\(0, 1\]; got 1.5"),
    (dict(model_density=0.0), "got 0.0"),
    (dict(densities=()), "at given densities; got none"),
    (dict(plot=Path("x.png"), only=("model",)), "got no attention"),
    (dict(variants=True), "variants without implementation"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_settings_that_make_no_sense_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        PrefillBench(**settings)


def test_a_cpu_is_not_asked_for_gpu_sizes():
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match=r"llama-3\.1-8b is for GPUs; on a CPU measure --shape tiny"):
            next(measure_prefill(PrefillBench()))
        with pytest.raises(ValueError, match="for GPUs"):
            next(measure_decode(DecodeBench()))


def test_the_command_line(capsys: pytest.CaptureFixture[str]):
    for words, code, text in (
        (["bench", "prefill", "--help"], 0, "usage: seer-jax bench prefill"),
        (["bench", "--help"], 0, "{prefill,decode,ground-truth,train}"),
        (["bench", "train", "--help"], 0, "usage: seer-jax bench train"),
        (["bench", "ground-truth", "--help"], 0, "usage: seer-jax bench ground-truth"),
        (["bench", "decode", "--help"], 0, "usage: seer-jax bench decode"),
        (["bench", "decode", "--lengths", "3"], 2, "at least two blocks"),
        (["bench", "cooking"], 2, "invalid choice: 'cooking'"),
        (["bench"], 2, "required: what"),
        (["bench", "prefill", "--lengths", "3"], 2, "at least one block"),
        (["bench", "ground-truth", "--lengths", "3"], 2, "at least one block"),
        (["bench", "ground-truth", "--chunk", "100"], 2, "a multiple of the 64 tokens"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        captured = capsys.readouterr()
        assert end.value.code == code and text in " ".join((captured.out + captured.err).replace("│", " ").split())


@pytest.mark.parametrize("policy", [Threshold(0.2), TopK(0.3)], ids=str)
def test_chosen_blocks_are_those_of_the_model(policy: Policy):
    gate = tiny_model().prefill_gate
    assert isinstance(gate, PrefillGate)
    gate = jax.tree.map(lambda x: x[0], gate)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 150, heads, LLAMA.head_dim)), jnp.float32) for heads in (4, 2))
    blocks = chosen_blocks(policy, gate, q, k, LLAMA)
    blocks.check(10)
    _, _, kept = prefill_attention(policy, gate, jnp.int32(0), q, k, k, jnp.full(1, 150, jnp.int32), LLAMA)
    np.testing.assert_allclose(blocks.density().mean(), kept[0], rtol=1e-6)
    assert kept[0] < 1


def test_random_models_have_weights_of_the_right_size(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shapes, "ELEMENTS_AT_ONCE", 2**15)  # several chunks each
    config = dataclasses.replace(CONFIGS[Shape.TINY], vocab_size=1003)  # rows that are no multiple of a chunk
    model = random_model(config, seed=3)
    assert model.dtype == jnp.bfloat16 and model.prefill_gate is not None
    np.testing.assert_array_equal(model.layers.input_layernorm[...], 1)
    for weight in (model.embed_tokens, model.layers.mlp.down_proj.weight, model.layers.self_attn.q_proj.weight):
        value = np.asarray(weight[...], np.float32)
        assert abs(value.std() * value.shape[-1] ** 0.5 - 1) < 0.05 and abs(value.mean()) < 0.01
        assert len(np.unique(value.reshape(-1, value.shape[-1])[:, :8], axis=0)) == value.size // value.shape[-1]
    expected = nnx.eval_shape(lambda: type(model)(config, rngs=nnx.Rngs(0)))
    assert model.layers.mlp.up_proj.weight.shape == expected.layers.mlp.up_proj.weight.shape


def line(table: str, milliseconds: float, **settings: Any) -> Measurement:
    return Measurement(table, f"{table} case", settings, dict(milliseconds=milliseconds))


def test_lines_that_belong_together_stand_beside_each_other():
    lines = [
        line("attention", 3.0, num_queries=64, density=0.1),
        line("attention", 5.0, num_queries=64, density=0.1),  # other lists
        line("selection", 1.0, length=64, density=0.1),
        line("selection", 1.0, length=128, density=0.1),
        line("model", 8.0, length=64, density=None),
        line("model", 2.0, length=64, density=0.1),
        line("decode model", 9.0, batch=1, length=64, density=None),
        line("decode model", 3.0, batch=1, length=64, density=0.1),
        line("decode model", 3.0, batch=8, length=64, density=0.1),
    ]
    found = [m.results for m in beside_each_other(lines)]
    assert found[2]["attention_milliseconds"] == 3 and found[3]["attention_milliseconds"] is None
    assert found[4]["speedup"] == 1 and found[5]["speedup"] == 4
    assert found[6]["speedup"] == 1 and found[7]["speedup"] == 3 and found[8]["speedup"] is None


def test_what_does_not_apply_is_a_dash():
    console = Console(file=io.StringIO(), width=100)
    print_measurements(
        console, [dataclasses.replace(line("model", 2.0, length=64, density=None), note="no memory is told")]
    )
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    row = next(x for x in text.splitlines() if x.startswith("model case"))
    assert row.split() == ["model", "case", "-", "2", "1.00", "-", "-", "-"]
    assert "-: no memory is told" in text


def test_a_picture_needs_something_to_compare_with(tmp_path: Path):
    with pytest.raises(ValueError, match="got none to draw"):
        plot_prefill(tmp_path / "x.png", [line("attention", 1.0)])
    with pytest.raises(ValueError, match="got none to draw"):
        plot_decode(tmp_path / "x.png", [line("decode model", 1.0, batch=1, length=64, density=0.1)])
