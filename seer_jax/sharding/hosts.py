"""How the processes of one program find each other, on one host or on many: SLURM, Open MPI or plain environment variables."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Mapping
from typing import Any

import jax

COORDINATOR, COUNT, NUMBER = PLAIN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
_OPEN_MPI_4 = "OMPI_MCA_orte_hnp_uri"  # names the first host; later releases have none
SECONDS_TO_JOIN = 300
SECONDS_SILENT = 60  # after which a process that no longer gives signs of life is taken for dead


def join_processes(*, timeout: int = SECONDS_TO_JOIN, silent: int = SECONDS_SILENT) -> None:
    """Joins the other processes of this program, where a launcher has started several; otherwise does nothing.

    Processes that srun (SLURM) or mpirun (Open MPI) have started know of each other. Others are told by three environment variables:
    JAX_COORDINATOR_ADDRESS, host:port of process 0, JAX_NUM_PROCESSES and JAX_PROCESS_ID. From then on `jax.devices()` are those of all
    processes. A launcher's process that is alone on its host has all of the host's GPUs, otherwise each has one. Processes that are told by
    variables have all of them: where several share a host, JAX_LOCAL_DEVICE_IDS says which GPUs each has.

    Args:
      timeout: seconds to wait for the other processes; where they are not found in that time, the process says so and exits, as JAX
        would leave it no other way.
      silent: seconds without a sign of life after which a process is taken for dead, and JAX ends the others.

    Raises:
      ValueError: a variable is missing or wrong.
      ConnectionError: the processes cannot be joined.
    """
    found = launched(os.environ)
    if found is None or jax.distributed.is_initialized():
        return
    address = found.get("coordinator_address") or os.environ.get(COORDINATOR)
    if found.get("process_id") == 0:
        _check_port(found["coordinator_address"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    deadline = threading.Timer(timeout, _give_up, (found, address, timeout))
    deadline.daemon = True
    deadline.start()
    try:
        jax.distributed.initialize(**found, initialization_timeout=2 * timeout, heartbeat_timeout_seconds=silent)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConnectionError(
            f"The {found['num_processes']} processes of a program must find each other; JAX says: {reason}. Install or set what it names."
        ) from error
    finally:
        deadline.cancel()
    with contextlib.suppress(ValueError):  # outside of the main thread
        for number, handler in handlers.items():  # JAX has put its own in place of that of SIGTERM
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _check_port(address: str) -> None:
    """Raises ConnectionError where another program has the port on which process 0 is to be found: JAX would crash."""
    port = int(address.rpartition(":")[2])
    try:
        with socket.create_server(("", port)):
            pass
    except OSError as error:
        raise ConnectionError(
            f"The port in {COORDINATOR} must be free on the host of process 0; got {address} ({error.strerror}). Choose another port."
        ) from error


def _give_up(found: Mapping[str, Any], address: str | None, timeout: int) -> None:
    own = found.get("process_id", os.environ.get("SLURM_PROCID", os.environ.get(_OPEN_MPI[1], "")))
    line = (
        f"The {found['num_processes']} processes of a program must find each other; process {own} has waited {timeout} s for the others at "
        f"{address or 'the first host'}. Check that all were started, and that each host can reach it.\n"
    )
    os.write(2, line.encode())
    os._exit(1)


def launched(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What an environment says to `jax.distributed.initialize`; None: it tells of one process alone.

    Raises:
      ValueError: a variable is missing or wrong.
    """
    if COUNT in environment or NUMBER in environment:
        return _plain(environment)
    if _number(environment, "SLURM_NTASKS") > 1 and _SLURM[1] in environment:  # a step that srun has started
        _check_all(environment, "srun", _SLURM)
        alone = environment["SLURM_NTASKS"] == environment.get("SLURM_STEP_NUM_NODES")
        return _with_devices(environment, alone, int(environment["SLURM_NTASKS"]))
    if _number(environment, _OPEN_MPI[0]) > 1:
        _check_all(environment, "mpirun", _OPEN_MPI)
        alone = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
        if _OPEN_MPI_4 in environment:
            return _with_devices(environment, alone, int(environment[_OPEN_MPI[0]]))
        if COORDINATOR not in environment:
            raise ValueError(
                f"Processes that mpirun has started must know process 0; the environment lacks {COORDINATOR}, which Open MPI 5 does not tell. "
                f"Pass it on: mpirun -x {COORDINATOR}=HOST:PORT, the first host and a free port."
            )
        named = {COUNT: environment[_OPEN_MPI[0]], NUMBER: environment[_OPEN_MPI[1]]}
        local = {} if alone else {"local_device_ids": [int(environment[_OPEN_MPI[2]])]}
        return {**(_plain({**environment, **named}) or {}), **local}
    if COORDINATOR in environment:
        return _plain(environment)
    return None


def _plain(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """From the three variables."""
    _check_all(environment, "several processes", PLAIN)
    address, count, number = (environment[name] for name in PLAIN)
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise ValueError(
            f"{COORDINATOR} must be the host and port of process 0; got {address!r}. Write for example node1:1234."
        )
    if not (count.isdecimal() and int(count) > 0):
        raise ValueError(
            f"{COUNT} must be the number of processes, 1 or more; got {count!r}. Set it alike for all of them."
        )
    if not (number.isdecimal() and int(number) < int(count)):
        raise ValueError(
            f"{NUMBER} must lie in [0, {int(count) - 1}], for {count} processes ({COUNT}); got {number!r}. Number the processes from 0."
        )
    if count == "1":
        return None
    named = dict(coordinator_address=address, num_processes=int(count), process_id=int(number))
    return named | {"cluster_detection_method": "deactivate"}


def _with_devices(environment: Mapping[str, str], alone: bool, count: int) -> dict[str, Any]:
    """What JAX finds out by itself, but for the GPUs of a process: it would take one, also where the process is alone on its host, or
    where the launcher shows each process its own."""
    shown = environment.get("CUDA_VISIBLE_DEVICES", "").count(",") + 1 if environment.get("CUDA_VISIBLE_DEVICES") else 0
    every = alone or shown == 1
    if "JAX_LOCAL_DEVICE_IDS" in environment or not every:
        return {"num_processes": count}
    return {"num_processes": count, "local_device_ids": []}  # no choice among those that the process sees


def _check_all(environment: Mapping[str, str], launcher: str, names: tuple[str, ...]) -> None:
    if missing := [name for name in names if not environment.get(name)]:
        raise ValueError(
            f"The environment of {launcher} must have {', '.join(names)}; it lacks {', '.join(missing)}. Set {'it' if len(missing) == 1 else 'them'}, "
            "or unset the others to run one process."
        )


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else 0
