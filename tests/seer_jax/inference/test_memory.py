"""The memory plan against what is there: sizes of arrays, limits of a device, and one compilation for plan and run."""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from seer_jax import MemoryPlan, Transformer, plan_memory, stream
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig
from seer_jax.inference import memory
from seer_jax.inference.generate import generate
from seer_jax.inference.host_memory import host_memory
from seer_jax.inference.sampling import Greedy, Sample
from seer_jax.models.families import config_from_hf
from seer_jax.selection.rules import Threshold, TokenBudget, TopK
from seer_jax.selection.scorers import SinkWindow
from tests.seer_jax.conftest import LLAMA, tiny_model

# Shapes stand for arrays.
pytestmark = [pytest.mark.usefixtures("compile_quickly"), pytest.mark.usefixtures("unchecked")]

ROWS, WIDTH, NEW = 3, 41, 6
TOKENS = np.random.default_rng(0).integers(0, LLAMA.vocab_size, (ROWS, WIDTH))
SPARSE: dict[str, Any] = dict(prefill=TokenBudget(32), decode=TokenBudget(32))


device_memory = memory.device_memory  # before the other tests are kept from asking


@functools.cache
def llama() -> Transformer:
    return tiny_model()


def run(model: Transformer | None = None, **changes: Any) -> None:
    generate(model or llama(), TOKENS, **dict(SPARSE, max_new_tokens=NEW) | changes)


def run_stream(model: Transformer | None = None, **changes: Any) -> None:
    list(stream(model or llama(), TOKENS, **dict(SPARSE, max_new_tokens=NEW) | changes))


def plan(model: Transformer | None = None, **changes: Any) -> MemoryPlan:
    return plan_memory(model or llama(), ROWS, WIDTH, **dict(SPARSE, max_new_tokens=NEW) | changes)


def set_limit(monkeypatch: pytest.MonkeyPatch, limit: int, others: int = 0) -> None:
    """Of a device that holds the model and `others` bytes."""
    told = memory.DeviceMemory(limit, memory.tree_bytes(llama()) + others)
    monkeypatch.setattr(memory, "device_memory", lambda device: told)


@pytest.mark.parametrize(
    ("changes", "capacity", "with_gate"),
    [
        ({}, 128, True),
        (dict(max_new_tokens=1), 64, True),
        (dict(max_new_tokens=65), 192, True),
        (dict(cache_capacity=100), 112, True),
        (dict(decode=TokenBudget(32, SinkWindow())), 128, False),
    ],
    ids=str,
)
def test_a_plan_adds_up_the_arrays(changes: dict[str, Any], capacity: int, with_gate: bool):
    model = llama()
    made = plan(compiled=False, available=2**40, **changes)
    cache = model.make_cache(ROWS, capacity)
    assert made.cache == sum(x.nbytes for x in cache.token_arrays)
    assert made.gate_cache == (sum(x.nbytes for x in cache.gate_arrays) if with_gate else 0)
    assert made.gates == sum(x.nbytes for x in jax.tree.leaves((model.prefill_gate, model.decode_gate)))
    assert made.weights == sum(x.nbytes for x in jax.tree.leaves(model)) - made.gates
    assert made.scratch is None and made.available == 2**40
    assert made.total == made.weights + made.gates + made.cache + made.gate_cache
    assert plan(nnx.eval_shape(tiny_model), compiled=False, available=2**40, **changes) == made


@pytest.mark.parametrize(("size", "share"), [(None, 1 / 256), (16, 1 / 64), (8, 1 / 32)])
def test_keys_of_smaller_pools_take_their_share_of_the_cache(size: int | None, share: float):
    """m_k C channels of a block and head beside 2 b D of keys and values, and one pool of each head beside that."""
    config = dataclasses.replace(LLAMA, head_dim=128)
    gate = DecodeGateConfig(gate_dim=64, k_pool_size=size)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)).add_gate(gate, rngs=nnx.Rngs(1)))
    made = plan_memory(model, 1, 1000, max_new_tokens=8, cache_capacity=2048, decode=TopK(0.1), compiled=False)
    pools = config.num_layers * config.num_kv_heads * 3 * 128 * 4
    assert made.gate_cache == made.cache * share + pools


def test_a_whole_size_is_planned_without_memory():
    """Llama-3.1-8B at 128k tokens: 15 GiB of weights and 16 GiB of keys and values, as everyone's arithmetic has it. Sizes are rounded up by
    an eighth at most where prompts are read at once, by a quarter where they are read in chunks."""
    hf = dict(model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
              num_key_value_heads=8, vocab_size=128256, rope_theta=5e5, rms_norm_eps=1e-5, max_position_embeddings=131072)  # fmt: skip

    def build() -> Transformer:
        model = Transformer(config_from_hf(hf), rngs=nnx.Rngs(0))
        model.add_gate(PrefillGateConfig(), rngs=nnx.Rngs(1))
        return model.add_gate(DecodeGateConfig(), rngs=nnx.Rngs(2))

    sizes: dict[str, Any] = dict(prefill=TopK(0.1), decode=TokenBudget(4096), compiled=False, available=80 * 2**30)
    made = plan_memory(nnx.eval_shape(build), 1, 130048, max_new_tokens=1024, cache_capacity=131072, **sizes)
    assert made.cache == 16 * 2**30
    chunked, whole = (
        plan_memory(nnx.eval_shape(build), 1, 130048, max_new_tokens=1024, prefill_chunk=chunk, **sizes)
        for chunk in (None, 0)
    )
    assert chunked.cache == 16 * 2**30 and whole.cache == 16 * 2**30 * (131072 + 1024) // 131072
    assert chunked.gate_cache - made.gate_cache == 0 < made.gate_cache - whole.gate_cache
    assert made.weights == pytest.approx(8.03e9 * 2, rel=0.001)
    assert made.missing == 0
    assert plan_memory(nnx.eval_shape(build), 5, 130048, max_new_tokens=1024, **sizes).missing > 0


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_scratch_is_what_the_compiler_lays_out(streamed: bool):
    """More rows and longer prompts take more of it, and it holds at least one layer's activations."""
    sizes: dict[str, Any] = dict(streamed=streamed, decode=TokenBudget(32))
    small, wide = (plan_memory(llama(), rows, 512, max_new_tokens=NEW, **sizes).scratch for rows in (1, 4))
    assert small is not None and wide is not None
    activations = 512 * LLAMA.hidden_size * 4
    assert activations < small < wide - 3 * activations


DRAWN: dict[str, Any] = dict(prefill=Threshold(0.1), decode=Threshold(0.2), sampling=Sample(0.5))
COMPILED = [
    pytest.param(SPARSE, False, id="budget"),
    pytest.param(DRAWN, True, id="threshold, drawn, put on a device", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("changes", "committed"), COMPILED)
@pytest.mark.parametrize("streamed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_plan_compiles_what_then_runs(
    streamed: bool, changes: dict[str, Any], committed: bool, caplog: pytest.LogCaptureFixture
):
    """Once each; a size that no other test has, so that it is compiled here."""
    model = jax.device_put(llama(), jax.devices()[0]) if committed else llama()
    sizes: dict[str, Any] = changes | dict(max_new_tokens=65 + 64 * committed)

    def compiled() -> list[str]:
        texts = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return [
            name for name in ("_run", "_start", "_continue") for t in texts if f"XLA compilation of jit({name})" in t
        ]

    with jax.log_compiles(), caplog.at_level("WARNING"):
        plan(model, streamed=streamed, **sizes)
        assert compiled() == (["_start", "_continue"] if streamed else ["_run"])
        key = jax.random.key(0) if "sampling" in sizes else None
        (run_stream if streamed else run)(model, **sizes, key=key)
        assert compiled() == []


@pytest.mark.parametrize("function", [pytest.param(run, marks=pytest.mark.slow), run_stream])
def test_what_does_not_fit_is_refused_before_it_is_allocated(function: Any, monkeypatch: pytest.MonkeyPatch):
    needed = plan(streamed=function is run_stream)
    assert needed.scratch
    module, started = sys.modules["seer_jax.inference.generate"], []
    for name in ("_run", "_start"):
        program = getattr(module, name)
        # As the program, it can be lowered; as a function, it tells that it was called.
        monkeypatch.setattr(module, name, Recorded(program, started))
    set_limit(monkeypatch, needed.total)
    function()
    assert started
    started.clear()
    for limit, others, text in (
        (needed.total - 1, 0, "scratch 0"),
        (needed.total, 1, "scratch 0"),
        (needed.total - needed.scratch - 1, 0, r"keys of gates 0.0\d\d\)"),
    ):
        set_limit(monkeypatch, limit, others)
        with pytest.raises(
            MemoryError, match=rf"must fit in device memory: needs .* GiB \(weights 0.*{text}.*fewer rows"
        ):
            function()
    assert not started


class Recorded:
    def __init__(self, program: Any, calls: list):
        self.lower, self.program, self.calls = program.lower, program, calls

    def __call__(self, *args: Any) -> Any:
        self.calls.append(args)
        return self.program(*args)


def test_a_stream_tells_at_once_that_its_cache_does_not_fit(monkeypatch: pytest.MonkeyPatch):
    set_limit(monkeypatch, plan(compiled=False).total - 1)
    with pytest.raises(MemoryError):
        stream(llama(), TOKENS, max_new_tokens=NEW, **SPARSE)


@pytest.mark.slow
def test_a_call_like_an_earlier_one_only_looks_up_its_plan(monkeypatch: pytest.MonkeyPatch):
    lookups = sys.modules["seer_jax.inference.generate"]._compiled_plan.cache_info
    set_limit(monkeypatch, 2**40)
    run()
    before = lookups()
    run()
    run(tiny_model(seed=8))
    assert (lookups().misses, lookups().hits) == (before.misses, before.hits + 2)


def test_a_limit_is_told_by_the_one_device_of_a_model(monkeypatch: pytest.MonkeyPatch):
    class Device:
        platform = "gpu"

        def __init__(self, stats: dict[str, int] | None):
            self.memory_stats = lambda: stats

    assert device_memory(Device(None)) is None and device_memory(Device({})) is None
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert device_memory(Device(dict(bytes_limit=12, bytes_in_use=4))) == (12, 4, 4)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")
    assert device_memory(Device(dict(bytes_limit=12))) == (12, 0, 12)
    own = memory.tree_bytes(llama())
    set_limit(monkeypatch, own + 100, others=30)
    assert memory.available_memory(llama()) == (own + 100, 30, 0)
    # None of a model of shapes is on the device: all that is in use there is in its way.
    told = memory.available_memory(nnx.eval_shape(tiny_model))
    assert told is not None and told.free == 70
    assert plan(available=own).available == own


def write_host(folder: Path, files: dict[str, str]) -> tuple[Path, Path]:
    """A host's files on processes and control groups, by path."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "proc", folder / "cgroup"


MEMINFO = {"proc/meminfo": "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    400 kB\n"}
NEW_GROUP = {"proc/self/cgroup": "0::/job/step\n"}
OLD_GROUP = {"proc/self/cgroup": "3:cpu:/\n2:memory:/job\n"}
KIB = 1024
HOSTS = [
    ({}, None),
    ({"proc/meminfo": "MemTotal: many kB\n"}, None),
    (MEMINFO, (1000 * KIB, 600 * KIB)),
    # What only caches files is free; a group above sets the limit.
    (
        MEMINFO
        | NEW_GROUP
        | {
            "cgroup/job/step/memory.max": "max\n",
            "cgroup/job/memory.max": "200000\n",
            "cgroup/job/memory.current": "150000\n",
            "cgroup/job/memory.stat": "anon 10\ninactive_file 100000\n",
        },
        (200000, 50000),
    ),
    # As a container sees it: its own group is the root.
    (
        MEMINFO
        | OLD_GROUP
        | {
            "cgroup/memory/memory.limit_in_bytes": "300000\n",
            "cgroup/memory/memory.usage_in_bytes": "150000\n",
            "cgroup/memory/memory.stat": "total_inactive_file 0\n",
        },
        (300000, 150000),
    ),
    (
        MEMINFO
        | OLD_GROUP
        | {
            "cgroup/memory/job/memory.limit_in_bytes": "9223372036854771712\n",
            "cgroup/memory/job/memory.usage_in_bytes": "150000\n",
            "cgroup/memory/job/memory.stat": "total_inactive_file 0\n",
        },
        (1000 * KIB, 600 * KIB),
    ),
]


@pytest.mark.parametrize(("files", "told"), HOSTS)
def test_a_host_tells_what_its_limits_leave(files: dict[str, str], told: tuple[int, int] | None, tmp_path: Path):
    assert host_memory(*write_host(tmp_path, files)) == told


@pytest.mark.cpu
def test_a_cpu_tells_the_memory_of_its_host():
    told = device_memory(jax.devices()[0])
    assert told is not None and 0 < told.in_use < told.limit and told.held_back == 0


@pytest.mark.parametrize(
    ("total", "told"),
    [(75, None), (95, "JAX leaves 25.0 GiB of it alone: set .*XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"), (97, None)],
)
def test_a_refusal_names_the_setting_that_frees_enough(total: int, told: str | None):
    plan = MemoryPlan(weights=total * 2**30, gates=0, cache=0, gate_cache=0, available=75 * 2**30, held_back=25 * 2**30)
    if not plan.missing:
        plan.check()
        return
    with pytest.raises(MemoryError, match=told or r"free other memory of the device\.$"):
        plan.check()


@pytest.mark.gpu
def test_a_gpu_tells_its_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "device_memory", device_memory)
    before = device_memory(jax.devices()[0])
    assert before is not None and 0 <= before.in_use < before.limit
    run()
    run_stream()
    most = (before.limit - before.in_use) // (2 * 2 * 2 * 16 * 4)  # slots that the keys and values of two layers leave
    with pytest.raises(MemoryError, match="fewer rows"):
        run(cache_capacity=most)
    after = device_memory(jax.devices()[0])
    assert after is not None and after.in_use - before.in_use < 2**20


BAD = [
    (dict(max_new_tokens=0), "max_new_tokens must be an integer of at least 1; got 0"),
    (dict(batch=0), "batch must be an integer of at least 1; got 0"),
    (dict(prompt_width=0), "prompt_width must be an integer of at least 1; got 0"),
    (dict(prompt_width=2.0), "prompt_width must be an integer of at least 1; got 2.0"),
    (dict(prompt_width=8187), r"context of 8192 tokens; got 8187 \+ 6"),
    (dict(cache_capacity=45), "46 tokens; got cache_capacity=45"),
    (dict(prefill="dense"), "prefill must be a sparsity policy.*got 'dense'"),
    (dict(sampling="greedy"), "sampling must be .*got 'greedy'"),
    (dict(decode=Threshold(0.1)), "the model has no decode gate"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_sizes_are_refused(change: dict[str, Any], message: str):
    sizes: dict[str, Any] = dict(batch=ROWS, prompt_width=WIDTH, max_new_tokens=NEW, sampling=Greedy()) | change
    with pytest.raises(ValueError, match=message):
        plan_memory(tiny_model(gates=False), **sizes)
