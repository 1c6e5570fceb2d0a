"""Settings of the study."""

import dataclasses
from pathlib import Path

from seer_jax.checks import check_at_least, check_seed
from seer_jax.evaluate.levels import Phase
from seer_jax.models.config import DType
from seer_jax.settings import check_types
from seer_jax.smollm2.study.variants import BLOCK_SIZE, ORDER


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Distils and scores variants of gates, and keeps what it finds in the output folder as it comes.

    The same command goes on where it was stopped. OUTPUT/table.md and OUTPUT/table.json hold all variants that are there.

    Attributes:
      train: text that gates are trained on, as `seer-jax train --data.paths` takes it.
      held_out: UTF-8 file that they are scored on.
      output: folder with a folder for each variant.
      model: the base model, as `seer-jax train --model` takes it.
      only: names of variants; (): all of them.
      steps: optimizer steps of most variants.
      batch_size: rows per step.
      micro_batch_size: rows at once.
      length: tokens per row and window.
      decode_stride: every n-th token is in the loss of decode gates.
      windows: number of windows, spread over the text.
      thresholds: at which gates and baselines are scored.
      masses: cumulative masses, likewise.
      densities: of top-k, likewise.
      phases: what is scored.
      learning_rate: at the end of the warmup.
      dtype: of the base model; None: bfloat16, or float32 on a CPU.
      workers: measurements at a time; two compile side by side.
      seed: of the order of the data, of fresh weights and of mixed texts.
    """

    train: Path
    held_out: Path
    output: Path
    model: str = "smollm2"
    only: tuple[str, ...] = ()
    steps: int = 200
    batch_size: int = 8
    micro_batch_size: int = 1
    length: int = 8192
    decode_stride: int = 4
    windows: int = 10
    thresholds: tuple[float, ...] = (0.0015, 0.003, 0.006, 0.012, 0.024, 0.048)
    masses: tuple[float, ...] = (0.8, 0.9, 0.95)
    densities: tuple[float, ...] = (0.1, 0.2, 0.4)
    phases: tuple[Phase, ...] = tuple(Phase)
    learning_rate: float = 1e-3
    dtype: DType | None = None
    workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(1, self, "steps", "batch_size", "micro_batch_size", "decode_stride", "windows", "workers")
        check_seed("StudyConfig.seed", self.seed)
        if self.length % BLOCK_SIZE or self.length < 2 * BLOCK_SIZE:
            raise ValueError(
                f"length must be a multiple of the block size, {BLOCK_SIZE}, and at least two blocks; got {self.length}."
            )
        if unknown := [name for name in self.only if name not in ORDER]:
            raise ValueError(f"only must name variants: {', '.join(ORDER)}; got {', '.join(unknown)}.")
        if not self.phases or len(self.thresholds) < 2:
            raise ValueError(
                f"A study must score a phase at two thresholds at least; got {len(self.phases)} phases and {len(self.thresholds)} thresholds."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Variants to measure, in the order of the study."""
        return tuple(name for name in ORDER if not self.only or name in self.only)
