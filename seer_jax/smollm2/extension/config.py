"""Settings and stages of the extension of a model's context."""

import dataclasses
import enum
from pathlib import Path

from seer_jax import smollm2
from seer_jax.checks import check_at_least, check_positive, check_seed
from seer_jax.models.config import DType
from seer_jax.models.hub import NAMED, named_gates
from seer_jax.settings import check_types

BLOCK_SIZE = 64
GATE_DIM = 64


class Stage(enum.StrEnum):
    """What is done, one after the other; each goes on where it was stopped."""

    YARN = "yarn"
    GATES = "gates"
    JOINT = "joint"
    DISTIL = "distil"
    CALIBRATE = "calibrate"
    SCORE = "score"
    SCRATCH = "scratch"


MEANINGS = {
    Stage.YARN: "fine-tunes the model with YaRN and dense attention",
    Stage.GATES: "distils gates of that model",
    Stage.JOINT: "fine-tunes the model with YaRN and a gate, which was distilled before, attention sparse on its lists",
    Stage.DISTIL: "self-distils an adapter of the model of `yarn` with the gates of `gates`",
    Stage.CALIBRATE: "chooses thresholds per layer and head of every gate that is there, by density",
    Stage.SCORE: "measures perplexity and pass keys of every model that is there, and writes results.json and table.md",
    Stage.SCRATCH: "trains tiny-lm's shape from random weights for a short run, dense and sparse",
}
# `distil` and `scratch` are answers to further questions.
USUAL = (Stage.YARN, Stage.GATES, Stage.JOINT, Stage.CALIBRATE, Stage.SCORE)


@dataclasses.dataclass(frozen=True)
class ExtensionConfig:
    """Extends a model's context by YaRN, with gates before, after and along with it, and measures what each loses under sparse attention.

    The same command goes on where it was stopped. OUTPUT/results.json and OUTPUT/table.md hold what is there.

    Attributes:
      train: text to train on, as `seer-jax train --data.paths` takes it.
      held_out: UTF-8 file to measure on.
      output: folder with a folder for each stage.
      stage: stages to run, in their own order; (): all that the table needs.
      model: the base model, as `seer-jax train --model` takes it.
      gate: folder of a prefill gate of the base model, which `joint` trains along; None: that which goes with the name of the model.
      factor: by how much YaRN stretches the context.
      length: tokens per row and window.
      batch_size: rows per step.
      micro_batch_size: rows at once.
      steps: optimizer steps of `yarn` and `joint`.
      gate_steps: of `gates`; None: as many as `steps`.
      distil_steps: of `distil`.
      learning_rate: of `yarn`, and of the weights in `joint`.
      gate_learning_rate: of gates.
      density: share of the blocks that attention keeps in `joint` and `distil`.
      densities: shares of the blocks at which gates are scored, by top-k and by calibrated thresholds.
      windows: number of windows for perplexity, spread over the held-out text.
      calibration_windows: number of further windows, to calibrate on.
      passkeys: number of pass-key prompts.
      scratch_length, scratch_batch_size, scratch_steps, scratch_density: of `scratch`.
      checkpoint_interval: steps from one checkpoint to the next; None: a fifth of a stage's.
      dtype: of the base model; None: bfloat16, or float32 on a CPU.
      workers: measurements at a time; two compile side by side.
      seed: of the order of the data, of fresh weights and of pass keys.
    """

    train: Path
    held_out: Path
    output: Path
    stage: tuple[Stage, ...] = ()
    model: str = smollm2.NAME
    gate: str | None = None
    factor: float = 4.0
    length: int = 32768
    batch_size: int = 8
    micro_batch_size: int = 1
    steps: int = 60
    gate_steps: int | None = None
    distil_steps: int = 50
    learning_rate: float = 5e-5
    gate_learning_rate: float = 1e-3
    density: float = 0.1
    densities: tuple[float, ...] = (0.5, 0.4, 0.3, 0.2, 0.1)
    windows: int = 8
    calibration_windows: int = 2
    passkeys: int = 9
    scratch_length: int = 2048
    scratch_batch_size: int = 64
    scratch_steps: int = 300
    scratch_density: float = 0.25
    checkpoint_interval: int | None = None
    dtype: DType | None = None
    workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        counts = (
            "batch_size",
            "micro_batch_size",
            "steps",
            "distil_steps",
            "windows",
            "calibration_windows",
            "workers",
        )
        given = [name for name in ("gate_steps", "checkpoint_interval") if getattr(self, name) is not None]
        check_at_least(1, self, *counts, *given, "scratch_batch_size", "scratch_steps")
        check_at_least(0, self, "passkeys")
        check_positive(self, "learning_rate", "gate_learning_rate")
        check_seed("ExtensionConfig.seed", self.seed)
        for name in ("length", "scratch_length"):
            if (length := getattr(self, name)) % BLOCK_SIZE or length < 2 * BLOCK_SIZE:
                raise ValueError(
                    f"{name} must be a multiple of the block size, {BLOCK_SIZE}, and at least two blocks; got {length}."
                )
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size must divide batch_size; got {self.micro_batch_size} and {self.batch_size}."
            )
        if not self.factor > 1:
            raise ValueError(f"factor must be above 1, by how much YaRN stretches the context; got {self.factor}.")
        for name in ("density", "scratch_density"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be a share in (0, 1); got {getattr(self, name)}.")
        if not self.densities or not all(0 < density < 1 for density in self.densities):
            raise ValueError(f"densities must be shares in (0, 1), at least one; got {self.densities}.")
        if self.gate is None and self.model not in NAMED:
            raise ValueError(
                f"gate must be a prefill gate of {self.model}; got none. Distil one first: seer-jax train."
            )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Stages to run, in their order."""
        return tuple(stage for stage in Stage if stage in (self.stage or USUAL))

    @property
    def initial_gate(self) -> str:
        """Folder of the gate that `joint` starts from.

        Raises:
          FileNotFoundError: the model's name has no prefill gate in this version.
        """
        if self.gate is not None:
            return self.gate
        gates = named_gates(f"{self.model}-release")
        if "prefill" not in gates:
            raise FileNotFoundError(f"There is no prefill gate for {self.model!r} in this version. Give `gate`.")
        return str(gates["prefill"])
