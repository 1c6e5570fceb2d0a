"""A short run in a process of its own, to be killed: `python -m tests.train.killable_run FOLDER`."""

import dataclasses
import json
import sys
from pathlib import Path

from seer_jax.gates.configs import TrainedGates
from seer_jax.train import distill
from tests.train.tiny import distill_config, make_model, make_rows

CONFIG = distill_config(gates=TrainedGates.DECODE, steps=10, checkpoint_interval=1)


if __name__ == "__main__":
    config = dataclasses.replace(CONFIG, output=sys.argv[1])
    distill(config, model=make_model(), dataset=make_rows())
    (Path(sys.argv[1]) / "done.json").write_text(json.dumps(CONFIG.steps))
