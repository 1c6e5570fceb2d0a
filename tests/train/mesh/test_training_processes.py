"""Two processes over localhost train as one does, stop together, and end together where one fails."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seer_jax.convert import load_base
from seer_jax.sharding.hosts import COORDINATOR, COUNT, NUMBER, join_processes, launched
from seer_jax.train import finetune
from tests.packaging.checkout import ROOT
from tests.train.runs import RUN, ignore, lines, run_to
from tests.train.tiny import finetune_config, make_model, make_rows

SLURM = dict(SLURM_JOB_ID="7", SLURM_STEP_NODELIST="n[1-2]", SLURM_NTASKS="4", SLURM_PROCID="1", SLURM_LOCALID="1")
OPEN_MPI = dict(
    OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_LOCAL_RANK="0", OMPI_COMM_WORLD_LOCAL_SIZE="1"
)
PLAIN = {COORDINATOR: "n1:1234", COUNT: "2", NUMBER: "1"}
JOINED = dict(coordinator_address="n1:1234", num_processes=2, process_id=1, cluster_detection_method="deactivate")
EVERY_GPU: dict[str, Any] = dict(local_device_ids=[])


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (PLAIN, JOINED),
        (PLAIN | {COUNT: "1", NUMBER: "0"}, None),
        (SLURM, dict(num_processes=4)),
        (SLURM | {"SLURM_STEP_NUM_NODES": "4"}, dict(num_processes=4) | EVERY_GPU),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, dict(num_processes=4) | EVERY_GPU),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, dict(num_processes=4)),
        (SLURM | {"SLURM_STEP_NUM_NODES": "4", "JAX_LOCAL_DEVICE_IDS": "0"}, dict(num_processes=4)),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),  # a batch script, which srun has not started
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:99"}, dict(num_processes=2) | EVERY_GPU),
        (OPEN_MPI | {COORDINATOR: "n1:1234"}, JOINED),
        (OPEN_MPI | {COORDINATOR: "n1:1234", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, JOINED | dict(local_device_ids=[0])),
    ],
)  # fmt: skip
def test_what_launchers_tell(environment: dict[str, str], found: dict[str, Any] | None):
    assert launched(environment) == found


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({COORDINATOR: "n1:1"}, f"must have .*; it lacks {COUNT}, {NUMBER}. Set them, or unset the others to run one process"),
        ({COUNT: "2", NUMBER: "1"}, f"it lacks {COORDINATOR}. Set it,"),
        (PLAIN | {COORDINATOR: "n1"}, "JAX_COORDINATOR_ADDRESS must be the host and port of process 0; got 'n1'. Write for example node1:1234"),
        (PLAIN | {COUNT: "two"}, "JAX_NUM_PROCESSES must be the number of processes, 1 or more; got 'two'"),
        (PLAIN | {NUMBER: "2"}, r"JAX_PROCESS_ID must lie in \[0, 1\], for 2 processes .*; got '2'"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_PROCID"}, "The environment of srun must have .*; it lacks SLURM_PROCID"),
        (OPEN_MPI, "lacks JAX_COORDINATOR_ADDRESS, which Open MPI 5 does not tell. Pass it on: mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT"),
    ],
)  # fmt: skip
def test_what_a_launcher_leaves_out_is_named(environment: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        launched(environment)


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        for name, value in (PLAIN | {COORDINATOR: address, NUMBER: "0"}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            ConnectionError, match=rf"must be free on the host of process 0; got {address} .*Choose another port"
        ):
            join_processes()


TOGETHER = """
import jax, sys, time
from seer_jax.sharding import hosts, processes

processes._SECONDS_TO_END = 0.2
hosts.join_processes()
number = jax.process_index()
print([jax.device_count(), *processes.exchange({"number": number})], flush=True)
with processes.first_alone(), open(sys.argv[1], "a") as file:
    time.sleep(0.2 * (number == 0))
    file.write(f"{number}")
with processes.ending_together():
    if number == 1:
        raise ValueError("this process is broken.")
    time.sleep(60)  # as if it waited for the other one
"""


@pytest.mark.cpu
def test_processes_agree_wait_and_end_together(tmp_path: Path):
    told = both("-c", TOGETHER, str(tmp_path / "order"))
    assert [code for code, *_ in told] == [1, 1], told
    for _, out, _ in told:
        assert out.splitlines()[-1] == "[4, {'number': 0}, {'number': 1}]"
    assert (tmp_path / "order").read_text() == "01"
    assert "ValueError: this process is broken." in told[1][2]
    assert re.search(
        r"Process 0 ends, as process 1 on \S+ has ended \(ValueError: this process is broken\.\)\.", told[0][2]
    )


def run_two(folder: Path, mesh: str, steps: int, event: str = "none", whose: int = 1) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of each of the two processes."""
    return both("-m", "tests.train.mesh.one_of_two", str(folder), mesh, str(steps), event, str(whose))


def both(*words: str) -> list[tuple[int, str, str]]:
    """What two processes of Python come to, which find each other by the environment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    settings = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=os.environ | settings | {COORDINATOR: address, COUNT: "2", NUMBER: str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        told = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, told, strict=True)]


@pytest.mark.slow
@pytest.mark.cpu
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("compile_quickly")
def test_two_processes_stop_are_killed_and_go_on_as_one(undisturbed: tuple[Path, Any], tmp_path: Path):
    """One gets SIGTERM, then, over another mesh, one is killed; a single process finishes the run."""
    folder, steps = tmp_path / "run", RUN.steps
    (first, _, said), (second, _, _) = run_two(folder, "data=2,tensor=2", steps, "TERM")
    assert (first, second) == (143, 143), said
    stopped = max(int(place.name) for place in (folder / "checkpoints").iterdir())
    assert f"Stopped after step {stopped}; the checkpoint of step {stopped} is kept" in said
    assert lines(folder)[-1]["step"] == stopped < steps
    killed = [code for code, *_ in run_two(folder, "fsdp=4", steps, "KILL", whose=1)]
    assert killed[1] == -signal.SIGKILL and killed[0] != 0
    run_to(folder)
    for ours, theirs in zip(lines(folder), lines(undisturbed[0]), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
@pytest.mark.cpu
@pytest.mark.usefixtures("compile_quickly")
def test_each_process_reads_its_rows(undisturbed: tuple[Path, Any], tmp_path: Path):
    """Two of the four rows of a batch; the steps are those of one process that reads all."""
    (code, rows, said), (_, others, _) = run_two(tmp_path / "run", "data=2,tensor=2", RUN.steps)
    assert code == 0, said
    assert [text.splitlines()[-1] for text in (rows, others)] == [str(RUN.steps * RUN.batch_size // 2)] * 2
    for ours, theirs in zip(lines(tmp_path / "run"), lines(undisturbed[0]), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert (tmp_path / "run" / "decode_gate" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.cpu
@pytest.mark.usefixtures("compile_quickly")
def test_a_model_that_two_processes_fine_tune_is_written_whole(tmp_path: Path):
    told = run_two(tmp_path / "run", "fsdp=2,tensor=2", 3, "finetune")
    assert [code for code, *_ in told] == [0, 0], told
    expected = finetune(finetune_config(steps=3), model=make_model(), dataset=make_rows(), progress=ignore).model
    saved = load_base(tmp_path / "run" / "base", dtype=jnp.float32)
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m)) for m in (saved, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.cpu
def test_the_error_of_one_process_ends_both(tmp_path: Path):
    """That of the first one; where processes end together, above, it is the other."""
    told = run_two(tmp_path / "run", "data=4", 1000, "error", whose=0)
    assert [code for code, *_ in told] == [1, 1]
    assert "ValueError: this process is broken." in told[0][2]
    assert re.search(r"process 0 on \S+ has ended \(ValueError: this process is broken\.\)", told[1][2])


@pytest.mark.slow
@pytest.mark.cpu
def test_a_run_ends_where_its_first_process_is_killed(tmp_path: Path):
    first, second = run_two(tmp_path / "run", "data=4", 1000, "KILL", whose=0)
    assert first[0] == -signal.SIGKILL and second[0] != 0
