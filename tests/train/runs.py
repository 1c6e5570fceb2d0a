"""Short runs, and what tests look at in their folders. One in a process of its own, to be killed: `python -m tests.train.runs FOLDER`."""

import dataclasses
import json
import signal
import sys
from pathlib import Path

import numpy as np

from seer_jax.gates.configs import TrainedGates
from seer_jax.gates.decode import DecodeGate
from seer_jax.gates.prefill import PrefillGate
from seer_jax.train import StepReport, TrainResult, distill
from seer_jax.train.loop.metrics import read_metrics
from tests.train.tiny import distill_config, make_model, make_rows

RUN = distill_config(kind=TrainedGates.DECODE, steps=10, checkpoint_interval=1)


def ignore(_: StepReport) -> None:
    """Shows nothing."""


def keys_of(gate: PrefillGate | DecodeGate | None) -> np.ndarray:
    """A copy of the gate's key projection."""
    assert gate is not None
    return np.array(gate.linear_k[...])


def lines(folder: Path) -> list[dict]:
    """What the run's metrics must be bit for bit, however often it was stopped."""
    return [
        {k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_metrics(folder / "metrics.jsonl")
    ]


def run_to(folder: Path, *, progress=ignore, **changes) -> TrainResult:
    """The run of `RUN` in a folder, with changed settings."""
    config = dataclasses.replace(RUN, output=str(folder), **changes)
    return distill(config, model=make_model(), dataset=make_rows(), progress=progress)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run but its lock."""
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "run.lock"}


def raising(number: int, error: BaseException | signal.Signals):
    """A progress function that fails, or is interrupted by a signal, at a step."""

    def progress(report: StepReport) -> None:
        if report.step == number:
            if isinstance(error, signal.Signals):
                signal.raise_signal(error)
            else:
                raise error

    return progress


if __name__ == "__main__":
    distill(dataclasses.replace(RUN, output=sys.argv[1]), model=make_model(), dataset=make_rows())
    (Path(sys.argv[1]) / "done.json").write_text(json.dumps(RUN.steps))
