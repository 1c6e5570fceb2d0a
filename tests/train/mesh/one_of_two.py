"""Run as a program by each of two processes, which train together: `python -m tests.train.mesh.one_of_two FOLDER MESH STEPS EVENT [WHOSE]`.

The event, TERM, KILL or error, meets one of them after its second report of a step; the environment says which process this one is. At the
end it prints the number of rows that it has read. With finetune, all weights train, and the model is written to FOLDER/base.
"""

import dataclasses
import os
import signal
import sys

import jax

from seer_jax.convert import save_base
from seer_jax.sharding.hosts import join_processes
from seer_jax.train import StepReport, distill, finetune
from seer_jax.train.data.packing import PackedDataset, PackedRow
from tests.train.runs import RUN
from tests.train.tiny import finetune_config, make_model, make_rows


def main(folder: str, mesh: str, steps: str, event: str, whose: str = "1") -> None:
    join_processes(silent=10)
    rows: list[int] = []
    read = PackedDataset.__getitem__

    def noted(self: PackedDataset, index: int) -> PackedRow:
        rows.append(index)
        return read(self, index)

    PackedDataset.__getitem__ = noted
    seen: list[int] = []

    def progress(report: StepReport) -> None:
        seen.append(report.step)
        if len(seen) == 2 and jax.process_index() == int(whose):
            if event == "error":
                raise ValueError("this process is broken.")
            if event in ("TERM", "KILL"):
                os.kill(os.getpid(), signal.Signals[f"SIG{event}"])

    if event == "finetune":
        config = finetune_config(steps=int(steps), mesh=mesh, output=folder)
        result = finetune(config, model=make_model(), dataset=make_rows(), progress=progress)
        save_base(result.model, f"{folder}/base")
        return
    config = dataclasses.replace(RUN, output=folder, mesh=mesh, steps=int(steps), checkpoint_interval=3)
    distill(config, model=make_model(), dataset=make_rows(), progress=progress)
    print(len(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
