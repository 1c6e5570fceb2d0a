"""A model over the devices of several processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax import Threshold, TokenBudget, from_pretrained, generate
from seer_jax.convert import save_base, save_gates
from seer_jax.evaluate import score_windows
from tests.packaging.checkout import ROOT
from tests.seer_jax.conftest import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.cpu, pytest.mark.usefixtures("compile_quickly")]
SCRIPT = Path(__file__).with_name("one_of_two.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, prefill/ and decode/."""
    root, model = tmp_path_factory.mktemp("saved"), tiny_model()
    save_base(model, root / "base")
    for kind, gate in (("prefill", model.prefill_gate), ("decode", model.decode_gate)):
        assert gate is not None
        save_gates(gate, root / kind, base_model="base")
    return root


def run_two(mesh: str, folder: Path) -> list[dict]:
    """What the two processes print."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=2"
    settings = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = os.environ | settings | {"PYTHONPATH": str(ROOT)}
    commands = ([sys.executable, str(SCRIPT), str(i), str(port), mesh, str(folder)] for i in range(2))
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        results = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), [error for _, error in results]
    return [json.loads(out.splitlines()[-1]) for out, _ in results]


def test_each_process_reads_its_rows_and_makes_the_tokens_and_scores_of_one(folder: Path):
    first, second = run_two("fsdp=4", folder)
    tokens = np.arange(4 * 48).reshape(4, 48) % 61
    model = from_pretrained(folder / "base", [folder / "prefill", folder / "decode"], dtype=jnp.float32)
    made = generate(model, tokens, max_new_tokens=5, prefill=Threshold(0.1), decode=TokenBudget(32), eos=())
    assert first["tokens"] == second["tokens"] == np.asarray(made.tokens).tolist()
    scores = score_windows(model, jnp.asarray(tokens[:3]), TokenBudget(32))
    for one in (first, second):
        np.testing.assert_allclose(one["losses"], scores.nll, atol=1e-5)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert first["rows"][name] == second["rows"][name] == 32
