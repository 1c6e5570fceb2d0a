"""`seer-jax bench`: runs at tiny sizes, the work that is counted, what makes it fail, and what it refuses."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import block_sparse_attention, cases, sparse_decode_attention
from pallas_kernels.block_sparse_attention import xla
from pallas_kernels.block_sparse_attention.cases import Case
from pallas_kernels.cases import Heads, large_random_array
from pallas_kernels.devices import default_device
from seer_jax.bench import DecodeBench, PrefillBench, measure_decode
from seer_jax.bench import decode_attention as decode_bench
from seer_jax.bench import prefill_attention as attention_bench
from seer_jax.bench.configs import MODELS, ModelShape
from seer_jax.bench.decode import weight_bytes
from seer_jax.bench.decode_layer import DTYPE, repeated_layers, threshold_for
from seer_jax.bench.gradients import measured as gradient_bench
from seer_jax.bench.gradients.measured import GradientBench
from seer_jax.bench.harness import measurement
from seer_jax.bench.harness.clock import memory_rate
from seer_jax.bench.harness.sampled_check import AttentionCall
from seer_jax.bench.models import abstract_cache, random_model, read_bytes
from seer_jax.bench.prefill_attention import AttentionBench, aligned_cases, listed_flops, listed_share, odd_cases
from seer_jax.bench.selection import prefill_context
from seer_jax.bench.training import forward_flop
from seer_jax.commands.main import main
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig, QueryReduction
from seer_jax.gates.decode import DecodeGate
from seer_jax.gates.prefill import PrefillGate
from seer_jax.inference.memory import DeviceMemory, tree_bytes
from seer_jax.models.attention import prefill_attention
from seer_jax.selection.context import DecodeContext, PrefillContext
from seer_jax.selection.policies import Policy
from seer_jax.selection.rules import Threshold, TopK
from seer_jax.selection.scorers import SCORERS, Scorer, register
from tests.pallas_kernels.suites.comparison import listed_blocks
from tests.seer_jax.conftest import LLAMA, tiny_model

pytestmark = pytest.mark.usefixtures("compile_quickly")
Timed = list[Callable[..., Any]]
TINY, GPU = MODELS[ModelShape.TINY], MODELS[ModelShape.LLAMA_3_1_8B]
HEADS = Heads(4, 2, 64)
GATE = DecodeGateConfig()
FINER = DecodeGateConfig(query_reduction=QueryReduction.HEADS, k_pool_size=8)
RAGGED = Case("ragged", HEADS, 128, batch=2, density=0.5, lengths=(128, 70))
PREFILL = ["bench", "prefill", "--shape", "tiny", "--lengths", "128", "--densities", "0.3"]
DECODE = ["bench", "decode", "--shape", "tiny", "--lengths", "256", "--batches", "2"]
# Compiling ahead of time puts descriptions in the place of arrays, and shapes and dtypes stand for a cache.
shapes_stand_for_arrays = pytest.mark.usefixtures("unchecked")


def run(words: list[str], folder: Path) -> dict[tuple[str, str], dict]:
    """Runs a command that must succeed, with a file and a plot; returns the measurements by table and case."""
    output, plot = folder / "bench.json", folder / "bench.png"
    assert main([*words, "--output", str(output), "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    lines = json.loads(output.read_text())["measurements"]
    assert not any(m["failure"] for m in lines)
    return {(m["table"], m["case"]): m for m in lines}


@pytest.mark.slow
@shapes_stand_for_arrays
def test_prefill(two_milliseconds: Timed, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """All parts but the odd cases."""
    words = [*PREFILL, "--model-density", "0.3", "--only", "attention", "selection", "model", "--implementation", "xla"]
    found = run(words, tmp_path)
    text = capsys.readouterr().out
    for title in ("Attention kernel", "Gate and choice of blocks, one layer", "Whole model, time to first token"):
        assert f"\n{title}" in text
    assert "128, 64x64, own, 0.3" in text and "times faster: dense attention's" in text and "odd cases" not in text
    tables = [table for table, _ in found]
    assert [tables.count(name) for name in ("attention", "selection", "model")] == [3, 3, 2]
    dense, sparse = (found["model", f"128, {kind}"] for kind in ("dense", "0.3"))
    assert dense["settings"]["density"] is None and dense["results"]["density"] == 1 >= sparse["results"]["density"]
    for m in found.values():
        results = m["results"]
        assert results["attention_milliseconds"] == 2 if m["table"] == "selection" else results["speedup"] == 1
        assert m["table"] != "attention" or results["error"] < 5e-3
        assert m["table"] != "model" or (results["compile_seconds"] > 0 and results["planned_gib"] > 0)


@pytest.mark.slow
@shapes_stand_for_arrays
def test_a_model_reads_prompts_in_chunks_and_dense_attention_is_left_out(two_milliseconds: Timed, tmp_path: Path):
    words = [
        "bench",
        "prefill",
        "--shape",
        "tiny",
        "--lengths",
        "256",
        "--only",
        "model",
        "--chunk",
        "128",
        "--no-dense",
    ]
    assert main([*words, "--output", str(tmp_path / "bench.json")]) == 0
    (line,) = json.loads((tmp_path / "bench.json").read_text())["measurements"]
    assert line["case"] == "256, 0.1, chunks of 128" and line["settings"]["chunk"] == 128
    assert line["failure"] is None and line["results"]["milliseconds"] == 2 and line["results"]["speedup"] is None


@pytest.mark.slow
@shapes_stand_for_arrays
def test_skipping_is_measured_beside_none(two_milliseconds: Timed):
    settings: dict[str, Any] = dict(densities=(1.0,), only=("attention",), skip_thresholds=(1e-2,), peak=2.0)
    whole, skips = aligned_cases(PrefillBench(ModelShape.TINY, (450,), **settings))[2:4]
    assert [case.name for case in (whole, skips)] == ["450, 128x128, own, 1", "450, 128x128, own, 1, skip 0.01"]
    assert whole.skip_threshold is None and whole.peak == skips.peak == 2
    line = AttentionBench().measure(skips)
    assert line.failure is None and line.results["milliseconds"] == 2 and line.results["kept_error"] == 0
    assert (line.results["density"] or 1) < 1 and line.settings["skip_threshold"] == 1e-2


@pytest.mark.slow
@shapes_stand_for_arrays
def test_skipping_while_attending(two_milliseconds: Timed, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["bench", "prefill", "--shape", "tiny", "--lengths", "600", "--densities", "1", "--only", "attention"]
    asked = ["--skip-thresholds", "0", "1e-2", "--peak", "2", "--output", str(tmp_path / "bench.json")]
    assert main([*words, *asked]) == 0
    assert "600, 64x64, shared, 1, skip 0.01" in capsys.readouterr().out
    lines = json.loads((tmp_path / "bench.json").read_text())["measurements"]
    thresholds = [m["settings"]["skip_threshold"] for m in lines]
    assert thresholds == 3 * [None, 0, 1e-2] and not any(m["failure"] for m in lines)
    for m, threshold in zip(lines, thresholds, strict=True):
        results = m["results"]
        assert m["settings"]["peak"] == 2 and results["milliseconds"] == 2 and results["error"] < 5e-3
        assert results["density"] < 1 if threshold else results["density"] == 1
        assert results.get("kept_error") == (None if threshold is None else 0)


@shapes_stand_for_arrays
@pytest.mark.slow
def test_decode(two_milliseconds: Timed, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = run([*DECODE, "--densities", "0.5", "--tokens", "4"], tmp_path)
    text = capsys.readouterr().out
    for title in ("Attention kernel, new tokens", "Attention of one layer with gate", "Whole model, one new token"):
        assert f"\n{title}" in text
    assert "2 x 256, top 0.1" in text and "times floor: ms over floor ms" in text
    lines = {(table, case.removeprefix("2 x 256, ").split()[0]): m for (table, case), m in found.items()}
    assert list(lines) == [
        *(("decode kernel", rule) for rule in ("0.5", "dense")),
        *(("decode layer", rule) for rule in ("dense", "top", "threshold")),
        *(("decode model", rule) for rule in ("dense", "0.1")),
    ]
    results = {key: m["results"] for key, m in lines.items()}
    half, whole = results["decode kernel", "0.5"], results["decode kernel", "dense"]
    assert half["density"] == 0.5 and whole["density"] == 1 and max(half["error"], whole["error"]) < 5e-3
    # 2 rows, keys and values of 2 heads of 64 bfloat16 elements; a program of two layers' calls is said to take 2 ms.
    floor = 2 * 2 * 256 * 2 * 64 * 2 / memory_rate(default_device()) * 1e3
    assert whole["floor_milliseconds"] == pytest.approx(floor) and half["floor_milliseconds"] == pytest.approx(
        floor / 2
    )
    assert half["milliseconds"] == 1 and half["times_floor"] == pytest.approx(2 / floor) and half["speedup"] == 1
    assert results["decode layer", "dense"]["density"] == 1 > results["decode layer", "threshold"]["density"]
    assert results["decode layer", "top"]["density"] == 0.5 == results["decode model", "0.1"]["density"]
    share = 2 / TINY.num_layers  # of the gate's update, which is said to take 2 ms too
    for rule in ("dense", "top", "threshold"):
        layers, added = lines["decode layer", rule]["settings"]["layers"], 0 if rule == "dense" else share
        assert results["decode layer", rule]["milliseconds"] == 2 / layers + added
    for rule in ("dense", "0.1"):
        m = results["decode model", rule]
        assert m["milliseconds"] == 2 / 4 and m["tokens_per_second"] == 2 / (2e-3 / 4)
        assert m["compile_seconds"] > 0 and m["planned_gib"] > 0


@shapes_stand_for_arrays
@pytest.mark.slow
def test_ground_truth(two_milliseconds: Timed, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["bench", "ground-truth", "--shape", "tiny", "--lengths", "150", "--chunk", "64"]
    lines = {case: m for (_, case), m in run(words, tmp_path).items()}
    text = capsys.readouterr().out
    assert "\nDense attention with block scores" in text and "150, neither" in text and "times dense: ms over" in text
    scored = [f"{scores}{of}" for scores in ("blocks", "tokens", "both") for of in ("", " by mass")]
    assert list(lines) == [f"150, {name}" for name in (*scored, "neither")]
    assert [m["settings"]["chunk"] for m in lines.values()] == [150, 150, 64, 64, 64, 64, 150]
    for case, m in lines.items():
        results = m["results"]
        assert results["times_dense"] == 1 and results["extra_gib"] > 0 and results["error"] < 5e-3
        assert case == "150, neither" or results["scores_error"] < 1e-5


@pytest.mark.slow
@shapes_stand_for_arrays
def test_training(two_milliseconds: Timed, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["bench", "train", "--shape", "tiny", "--lengths", "256", "--batch-size", "2", "--kinds", "prefill", "both"]
    words += ["--finetune", "lora", "sparse-full", "--density", "0.5"]
    lines = {case: m["results"] for (_, case), m in run(words, tmp_path).items()}
    text = capsys.readouterr().out
    assert "\nDistillation, one step" in text and "256, both" in text and "of forward: the step's ms" in text
    assert list(lines) == ["256, prefill", "256, both", "256, lora", "256, sparse-full"]
    assert lines["256, both"]["decode_recall"] > 0 and lines["256, sparse-full"]["prefill_recall"] > 0
    for step in ("lora", "sparse-full"):
        results = lines.pop(f"256, {step}")
        assert results["tokens_per_second"] == 2 * 256 / 2e-3 and results["planned_gib"] > 0
    for results in lines.values():
        assert results["of_forward"] == 2 / 4  # a step of two rows is said to take 2 ms, and so is each row's forward
        assert results["tflops"] == pytest.approx(2 * forward_flop(TINY, 256) / 2e-3 / 1e12)
        assert results["recipe_hours"] == pytest.approx(500 * 16 * 65536 / (2 * 256) * 2e-3 / 3600)
        assert results["compile_seconds"] > 0 and results["planned_gib"] > 0 and results["prefill_loss"] > 0


@pytest.fixture
def latest_blocks() -> Iterator[str]:
    """The name of a scorer that no other file knows."""

    @register
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Latest(Scorer):
        """The latest blocks."""

        name = "latest"
        title = "latest"
        meaning = "the latest blocks"

        def prefill_scores(self, context: PrefillContext) -> Any:
            order = jnp.arange(context.num_key_blocks, dtype=jnp.float32)
            return jnp.broadcast_to(order, (context.batch, 1, context.num_rows, context.num_key_blocks))

        def decode_scores(self, context: DecodeContext) -> Any:
            return jnp.broadcast_to(jnp.arange(context.num_key_blocks, dtype=jnp.float32), context.shape)

    yield Latest.name
    del SCORERS[Latest.name]


@pytest.mark.slow
@shapes_stand_for_arrays
@pytest.mark.parametrize(
    ("words", "part", "kept"),
    [
        (["bench", "prefill", "--shape", "tiny", "--lengths", "512", "--only", "selection"], "selection", 15 / 36),
        (
            ["bench", "decode", "--shape", "tiny", "--lengths", "512", "--batches", "2", "--only", "layer"],
            "decode layer",
            2 / 8,
        ),
    ],
)
def test_a_scorer_of_ones_own_is_timed(
    words: list[str], part: str, kept: float, latest_blocks: str, two_milliseconds: Timed, tmp_path: Path
):
    output = tmp_path / "bench.json"
    assert main([*words, "--policies", f"budget:128:{latest_blocks}", "--output", str(output)]) == 0
    m = json.loads(output.read_text())["measurements"][-1]
    assert m["table"] == part and m["settings"]["rule"] == f"budget:128:{latest_blocks}"
    assert m["results"]["density"] == pytest.approx(kept) and m["results"]["milliseconds"] > 0


@pytest.mark.parametrize("policy", [Threshold(0.2), TopK(0.3)], ids=str)
def test_lists_that_are_timed_are_those_of_the_model(policy: Policy):
    gate = tiny_model().prefill_gate
    assert isinstance(gate, PrefillGate)
    gate = jax.tree.map(lambda x: x[0], gate)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 150, heads, LLAMA.head_dim)), jnp.float32) for heads in (4, 2))

    @jax.jit
    def both(gate: PrefillGate, q: jax.Array, k: jax.Array) -> Any:
        context = prefill_context(LLAMA, gate, q, k)
        return policy.blocks(policy.prepare(context)), prefill_attention(policy, context)[1]

    blocks, kept = both(gate, q, k)
    blocks.check(10)
    np.testing.assert_allclose(blocks.density().mean(), kept[0], rtol=1e-6)
    assert kept[0] < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "module", "operation", "message"),
    [
        ([*PREFILL, "--only", "attention"], attention_bench, block_sparse_attention, "attention, 128, 64x64, own, 0.3"),
        ([*DECODE, "--only", "kernel", "--densities", "0.5"], decode_bench, sparse_decode_attention, "decode kernel, 2 x 256, 0.5"),
    ],
)  # fmt: skip
def test_a_wrong_kernel_makes_the_command_fail(
    command: list[str],
    module: Any,
    operation: Callable[..., Any],
    message: str,
    two_milliseconds: Timed,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    def wrong(*arguments: Any, return_lse: bool = False, **settings: Any) -> Any:
        out, lse = operation(*arguments, **settings, return_lse=True)
        return (out, lse + 0.01) if return_lse else out

    monkeypatch.setattr(module, operation.__name__, wrong)
    attention_bench.compiled.cache_clear()
    assert main([*command, "--output", str(tmp_path / "bench.json")]) == 1
    attention_bench.compiled.cache_clear()
    captured = capsys.readouterr()
    assert f"seer-jax bench: {message}: lse errs by 1.00e-02" in captured.err
    assert f"{message.partition(', ')[2]} WRONG" in captured.out
    lines = json.loads((tmp_path / "bench.json").read_text())["measurements"]
    assert lines and not any("milliseconds" in m["results"] for m in lines)


def test_an_implementation_asked_for_by_name_must_be_able(capsys: pytest.CaptureFixture[str]):
    if jax.default_backend() == "cpu":
        words = [*PREFILL, "--only", "attention", "--implementation", "mosaic_gpu"]
        assert main(words) == 1
        assert "seer-jax bench: attention, 128, 64x64, own, 0.3: needs a GPU" in capsys.readouterr().err
        assert main([*words, "--variants"]) == 0


@pytest.mark.slow
@shapes_stand_for_arrays
def test_gradients_are_measured_beside_dense_ones(two_milliseconds: Timed):
    """At twice the time of the forward, which takes as long as everything here."""
    config = PrefillBench(ModelShape.TINY, (120,), densities=(0.5,), skip_thresholds=(0.1,), backward=True)
    bench = GradientBench("xla")
    lines = [bench.measure(case) for case in aligned_cases(config)[:1]]
    results = lines[0].results
    assert lines[0].failure is None and lines[0].case == "120, 64x64, own, 0.5" and len(two_milliseconds) == 3
    assert results["speedup"] == 1 and results["backward_over_forward"] == 0 and results["forward_milliseconds"] == 2
    assert all(0 < (results[f"{name}_error"] or 0) < 5e-3 for name in ("q", "k", "v", "plain"))
    listed = (results["density"] or 0) * 4 * 3  # of the 3 blocks of each head's causal map
    assert results["effective_tflops"] == pytest.approx(14 * 64 * 64 * 64 * listed / 2e-3 / 1e12)


@pytest.mark.slow
@shapes_stand_for_arrays
@pytest.mark.parametrize(("wrong", "name"), [(0, "q"), (1, "k"), (2, "v")])
def test_a_wrong_gradient_is_a_failure(two_milliseconds: Timed, monkeypatch: pytest.MonkeyPatch, wrong: int, name: str):
    def both(implementation: Any, density: float) -> Any:
        forward, gradients = right(implementation, density)

        def changed(*arguments: Any) -> list[jax.Array]:
            return [x * (1.05 if i == wrong else 1) for i, x in enumerate(gradients(*arguments))]

        return forward, changed

    right = gradient_bench.compiled
    monkeypatch.setattr(gradient_bench, "compiled", both)
    line = GradientBench().measure(RAGGED)
    assert (line.failure or "").startswith(f"the gradient of {name} errs by ")
    assert "milliseconds" not in line.results


@pytest.mark.slow
def test_a_sweep_times_dense_attention_once_per_shape(two_milliseconds: Timed):
    config = PrefillBench(ModelShape.TINY, (64,), densities=(0.5, 1.0))
    bench = AttentionBench("xla")
    lines = [bench.measure(case) for case in aligned_cases(config)]
    assert len(lines) == 6 and len(two_milliseconds) == 2 + 1  # a function for each density, and dense attention
    assert {m.results["density"] for m in lines if m.settings["density"] == 1} == {1.0}
    first = lines[0]
    assert first.case == "64, 64x64, own, 0.5" and first.failure is None and first.results["speedup"] == 1
    assert first.results["effective_tflops"] == pytest.approx(4 * 64 * 64 * 64 * 4 / 2e-3 / 1e12)
    assert first.settings["implementation"] == "xla" and first.settings["config"] is None


@pytest.mark.slow
def test_odd_cases_stand_beside_aligned_ones(two_milliseconds: Timed):
    unaligned, ragged, *_, chunk, _ = odd_cases(PrefillBench(ModelShape.TINY, (256,)))
    pairs, bench = [unaligned, ragged, chunk], AttentionBench()
    lines = [bench.pair(*pair) for pair in pairs]
    assert [m.case for m in lines] == [odd.name for odd, _ in pairs]
    for m in lines:
        assert m.failure is None
        ours, aligned = m.results["effective_tflops"], m.results["aligned_tflops"]
        assert ours and aligned and m.results["share_of_aligned"] == ours / aligned
    assert lines[-1].results["speedup"] is None and "no query offset" in (lines[-1].note or "")


@pytest.mark.parametrize("heads", [4, 68])
@pytest.mark.slow
def test_masks_of_a_trained_gate(heads: int, two_milliseconds: Timed):
    """Of the gate's last heads, repeated where it has fewer; each row keeps its own block among its best."""
    config = PrefillBench(ModelShape.TINY, (1024,), model_density=0.6)
    trained, random = odd_cases(config)[-1]
    trained, random = (dataclasses.replace(case, heads=Heads(heads, 2, 64)) for case in (trained, random))
    lists, others = (case.arguments(jax.random.key(0))["blocks"] for case in (trained, random))
    mask, b = np.asarray(lists.to_mask(16)), lists.block_size
    assert b == others.block_size == 64 and mask.shape == (1, heads, 16, 16) == others.to_mask(16).shape
    assert mask.diagonal(axis1=2, axis2=3).all() and not np.triu(mask, 1).any()
    assert len({m.tobytes() for m in mask[0]}) > heads / 4
    if heads > 64:
        np.testing.assert_array_equal(mask[0, :4], mask[0, 64:])
    else:
        line = AttentionBench("xla").pair(trained, random)
        assert line.failure is None and line.results["share_of_aligned"] is not None


@pytest.mark.slow
def test_every_variant_of_an_implementation(two_milliseconds: Timed, monkeypatch: pytest.MonkeyPatch):
    assert attention_bench.variants("xla") == attention_bench.variants(None) == {}
    plain, seen = xla.block_sparse_attention, []

    def with_config(*arguments: Any, config: str, **numbers: Any) -> Any:
        seen.append(config)
        return plain(*arguments, **numbers)

    monkeypatch.setattr(xla, "CONFIGS", {"wide": "w", "deep": "d"}, raising=False)
    monkeypatch.setattr(xla, "block_sparse_attention", with_config)
    skips = dataclasses.replace(RAGGED, skip_threshold=0.1)
    for choice, case in zip(attention_bench.variants("xla").items(), (RAGGED, skips), strict=True):
        line = AttentionBench("xla", choice).measure(case)
        assert line.failure is None and line.settings["config"] == choice[0]
    assert seen == ["w", "d"]


@pytest.mark.parametrize(
    "case",
    [
        Case("own", HEADS, 200, density=0.5),
        Case("shared", HEADS, 200, density=0.5, lists=2),
        Case("large", HEADS, 300, density=0.5, lists=1, block_size=128),
        RAGGED,
        Case("chunk", HEADS, 64, 256, density=0.5, query_offset=192),
    ],
    ids=lambda case: case.name,
)
def test_flops_are_those_of_listed_blocks(case: Case):
    """4 b^2 D for each pair of a query head and a block on its list; rows beyond a sequence count nothing."""
    arguments = case.arguments(jax.random.key(0))
    arguments.setdefault("lengths", jnp.full(case.batch, arguments["k"].shape[1], jnp.int32))
    call = AttentionCall(**arguments)
    blocks, b = call.blocks, case.block_size
    listed = listed_blocks(blocks, -(-call.k.shape[1] // b))
    count = 0
    for i, h in np.ndindex(len(call.q), call.q.shape[2]):
        rows = -(-max(0, int(call.lengths[i]) - int(call.query_offset)) // b)
        count += listed[i, h * listed.shape[1] // call.q.shape[2], :rows].sum()
    assert listed_flops(call) == 4 * b**2 * HEADS.head_dim * count
    first = int(call.query_offset) // b
    in_sight = (
        sum(first + row + 1 for row in range(blocks.counts.shape[-1])) * blocks.counts.size // blocks.counts.shape[-1]
    )
    assert listed_share(call) == pytest.approx(listed.sum() / in_sight)


@shapes_stand_for_arrays
def test_what_the_device_has_no_memory_for_is_a_note(two_milliseconds: Timed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measurement, "device_memory", lambda device: DeviceMemory(2**16, 0))
    lines = list(measure_decode(DecodeBench(ModelShape.TINY, (128,), batches=(3,))))
    assert len(lines) == 2 + 3 + 2 and not any(m.results or m.failure for m in lines)
    assert all(m.note and "3 x 128, " in m.note and "90% of the 0.0 GiB" in m.note for m in lines)


@shapes_stand_for_arrays
def test_bytes_that_a_new_token_reads():
    keys_and_values = 2 * 8 * 131072 * 8 * 128 * 2
    caches = decode_bench.Caches(DecodeBench(), 8, 131072)
    assert caches.read_bytes(None) == keys_and_values and caches.read_bytes(0.1) == keys_and_values * 204 / 2048
    layer = dataclasses.replace(GPU, num_layers=1)
    assert read_bytes(layer, 8, 131072, DTYPE, None, 1.0) == keys_and_values
    gate = (8 * 4 * 128 * 128 + 8 * 3 * 128 * 128 + 2 * 128) * 4 + 8 * 2048 * 8 * 128 * 2
    assert read_bytes(layer, 8, 131072, DTYPE, GATE, 0.1) == pytest.approx(keys_and_values / 10 + gate)
    assert read_bytes(GPU, 8, 131072, DTYPE, GATE, 1.0) == 32 * (keys_and_values + gate)
    keys, norms = 8 * 2048 * 8 * 128 * 2, 2 * 128 * 4  # a key per block
    finer = gate - norms + 7 * keys
    assert read_bytes(layer, 8, 131072, DTYPE, FINER, 0.1) == keys_and_values / 10 + finer
    model = nnx.eval_shape(lambda: random_model(GPU, DecodeGateConfig()))
    assert weight_bytes(model) == pytest.approx(15.0e9, rel=1e-3)


@pytest.mark.cpu
@shapes_stand_for_arrays
@pytest.mark.parametrize("kind", [GATE, FINER], ids=["release", "finer"])
def test_a_layer_that_is_timed_never_copies_its_cache(kind: DecodeGateConfig):
    config = dataclasses.replace(TINY, num_layers=3)
    cache = abstract_cache(config, 2, 8192, DTYPE, kind)
    gate = nnx.eval_shape(lambda: DecodeGate(kind, config, rngs=nnx.Rngs(0)))
    q = jax.ShapeDtypeStruct((2, 1, config.num_heads, config.head_dim), DTYPE)
    jax.config.update("jax_disable_most_optimizations", False)
    memory: Any = repeated_layers(config, TopK(0.1), 2).lower(cache, q, gate).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= tree_bytes(cache) > 20 * memory.temp_size_in_bytes


@pytest.mark.parametrize("num_blocks", [128, 2048])
def test_a_threshold_keeps_about_what_is_asked_for(num_blocks: int):
    logits = 3.0 * np.random.default_rng(1).standard_normal((64, num_blocks))
    scores = np.asarray(jax.nn.softmax(logits, axis=-1))
    assert (scores > threshold_for(0.1, num_blocks)).mean() == pytest.approx(0.1, rel=0.1)


def test_flop_of_a_forward():
    model = nnx.eval_shape(lambda: random_model(TINY))
    matrices = [x.size for x in jax.tree.leaves(model.layers) if x.ndim == 3]
    attention = TINY.num_layers * 4 * TINY.num_heads * TINY.head_dim * sum(range(1, 101))
    assert forward_flop(TINY, 100) == 2 * 100 * sum(matrices) + attention
    assert forward_flop(GPU, 65536) == pytest.approx(2.04e15, rel=1e-2)


def test_random_models_have_weights_of_the_right_size(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cases, "ELEMENTS_AT_ONCE", 2**15)  # several chunks each
    config = dataclasses.replace(TINY, vocab_size=1003)  # rows that are no multiple of a chunk
    model = random_model(config, PrefillGateConfig(), seed=3)
    assert model.dtype == jnp.bfloat16 and model.prefill_gate is not None
    np.testing.assert_array_equal(model.layers.input_layernorm[...], 1)
    mlp: Any = model.layers.mlp
    for weight in (model.embed_tokens, mlp.down_proj.weight, model.layers.self_attn.q_proj.weight):
        value = np.asarray(weight[...], np.float32)
        assert abs(value.std() * value.shape[-1] ** 0.5 - 1) < 0.05 and abs(value.mean()) < 0.01
        assert len(np.unique(value.reshape(-1, value.shape[-1])[:, :8], axis=0)) == value.size // value.shape[-1]
    expected: Any = nnx.eval_shape(lambda: type(model)(config, rngs=nnx.Rngs(0)))
    assert mlp.up_proj.weight.shape == expected.layers.mlp.up_proj.weight.shape


def test_a_large_array_is_drawn_in_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cases, "ELEMENTS_AT_ONCE", 1000)
    key = jax.random.key(0, impl="rbg")
    array = np.asarray(large_random_array(key, (7, 30, 16), "bfloat16", 2.0), np.float32)
    assert abs(array.std() / 2 - 1) < 0.05 and abs(array.mean()) < 0.1
    assert len(np.unique(array.reshape(-1, 16), axis=0)) == 7 * 30
