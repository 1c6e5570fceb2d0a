"""An engine over a mesh: heads and channels are split, rows are not."""

import logging
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from seer_jax import TokenBudget, TopK, Transformer, generate
from seer_jax.inference.engine import Engine, programs
from seer_jax.sharding import make_mesh, place
from tests.seer_jax.inference.engine.alone import llama, prompt

pytestmark = pytest.mark.usefixtures("compile_quickly")
POLICIES: dict[str, Any] = dict(prefill=TopK(0.3), decode=TokenBudget(32), prefill_chunk=64)
LENGTHS = (97, 16, 30, 64)


def on(mesh: str) -> Transformer:
    return place(llama(), make_mesh(mesh))


@pytest.mark.mesh
@pytest.mark.slow
def test_tokens_are_those_of_one_device(caplog: pytest.LogCaptureFixture):
    engine = Engine(on("tensor=2"), 2, 112, **POLICIES)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        made = [engine.submit(prompt(n), max_new_tokens=8, eos=()) for n in LENGTHS]
        results = [x.result() for x in made]
    assert not [m for m in caplog.messages if "Compiling" in m]
    for length, tokens in zip(LENGTHS, results, strict=True):
        alone = generate(llama(), [prompt(length)], max_new_tokens=8, eos=(), cache_capacity=128, **POLICIES)
        assert tokens == alone.rows()[0]


@pytest.mark.parametrize("mesh", ["data=2", "fsdp=2,tensor=2"])
def test_meshes_that_split_rows_are_refused(mesh: str):
    message = (
        "An engine's model must lie on a mesh that splits no rows, such as tensor=2, .* of 2 together. Use tensor alone"
    )
    with pytest.raises(NotImplementedError, match=message):
        Engine(on(mesh), 2, 112, **POLICIES)


@pytest.mark.usefixtures("unchecked")
def test_devices_of_several_processes_are_refused():
    """Each process would wait for the others in every exchange, and they get other requests."""
    devices = np.array([SimpleNamespace(process_index=i // 2) for i in range(4)])
    layout = SimpleNamespace(size=lambda *axes: 1, mesh=SimpleNamespace(devices=devices))
    with pytest.raises(
        NotImplementedError, match=r"one process, .* got 2 processes\. Use a mesh of one host's devices"
    ):
        programs._check_mesh(SimpleNamespace(layout=layout))  # pyright: ignore[reportArgumentType]
