"""`seer-jax bench ground-truth`: dense attention with the scores that gates are trained on."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from pallas_kernels.backends import Implementation
from pallas_kernels.bench import Measurement
from pallas_kernels.block_ground_truth.bench import Bench, Wanted, sweep
from seer_jax.bench.models import CONFIGS, Shape, check_device, heads_of
from seer_jax.bench.report import report


@dataclasses.dataclass(frozen=True)
class GroundTruthBench:
    """Measures dense attention with block scores, what the training of gates runs in each layer, beside dense attention alone.

    Each result is held against float32 before it is timed. The command fails if one is wrong.

    Attributes:
      shape: heads of the attention.
      lengths: tokens of a sequence.
      wanted: scores to ask for: blocks (targets of a prefill gate), tokens (of a decode gate), both, or neither.
      chunk: queries that are taken at a time where token scores are asked for.
      implementation: of the operation; None: the best one here.
      seed: of the inputs.
      output: file for the measurements (JSON); None: none is written.
    """

    shape: Shape = Shape.LLAMA_3_1_8B
    lengths: tuple[int, ...] = (8192, 32768, 65536, 131072)
    wanted: tuple[Wanted, ...] = tuple(Wanted)
    chunk: int = 8192
    implementation: Implementation | None = None
    seed: int = 0
    output: Path | None = None

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 64:
            raise ValueError(f"lengths are at least one block of 64 tokens; got {self.lengths}.")
        if self.chunk < 64 or self.chunk % 64:
            raise ValueError(f"chunk is a multiple of the 64 tokens of a block; got {self.chunk}.")


def measure_ground_truth(config: GroundTruthBench) -> Iterator[Measurement]:
    """The measurements, each as soon as it is there.

    Raises:
      ValueError: a shape that this device is too slow for, or an implementation that does not exist.
    """
    check_device(config.shape)
    cases = sweep(heads_of(CONFIGS[config.shape]), config.lengths, config.wanted)
    yield from Bench(config.implementation, config.chunk, config.seed).sweep(cases)


def bench_ground_truth(config: GroundTruthBench) -> list[Measurement]:
    """Prints the table, writes the file if one is asked for, and returns the measurements.

    Raises:
      ValueError: see `measure_ground_truth`.
    """
    return report(measure_ground_truth(config), config.output)[1]
