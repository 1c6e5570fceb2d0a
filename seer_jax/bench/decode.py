"""`seer-jax bench decode`: new tokens against a long cache, from the attention kernel to the whole model."""

import dataclasses
import enum
from collections.abc import Iterator
from pathlib import Path

from pallas_kernels.backends import Implementation
from pallas_kernels.bench import Measurement, memory_rate
from pallas_kernels.sparse_decode.bench import Bench
from seer_jax.bench.decode_layer import measure_layer
from seer_jax.bench.decode_model import new_tokens
from seer_jax.bench.models import CONFIGS, Shape, check_device, heads_of
from seer_jax.bench.report import report


class Part(enum.StrEnum):
    """What is measured."""

    KERNEL = "kernel"
    LAYER = "layer"
    MODEL = "model"


@dataclasses.dataclass(frozen=True)
class DecodeBench:
    """Measures decoding on this machine: the attention kernel, a layer's attention with its gate, and a whole model.

    Each result of the kernel is held against float32 before it is timed. The command fails if one is wrong. What the device
    has no memory for is left out with a note.

    Attributes:
      shape: heads of the attention and size of the model.
      batches: numbers of sequences.
      lengths: tokens of each sequence, the newest included.
      densities: shares of the blocks on the kernel's lists.
      model_density: share of the blocks that layer and model keep.
      only: parts to measure.
      tokens: new ones of each sequence that the model makes in one run.
      implementation: of the attention kernel; None: the best one here. Layer and model always take the best one.
      seed: of weights, caches and lists.
      output: file for the measurements (JSON); None: none is written.
      plot: file for a picture (PNG); None: none is drawn.
    """

    shape: Shape = Shape.LLAMA_3_1_8B
    batches: tuple[int, ...] = (1, 8, 16)
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    densities: tuple[float, ...] = (0.1,)
    model_density: float = 0.1
    only: tuple[Part, ...] = tuple(Part)
    tokens: int = 16
    implementation: Implementation | None = None
    seed: int = 0
    output: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 128:
            raise ValueError(f"lengths are at least two blocks of 64 tokens; got {self.lengths}.")
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches hold at least one sequence; got {self.batches}.")
        for density in (*self.densities, self.model_density):
            if not 0 < density <= 1:
                raise ValueError(f"Densities lie in (0, 1]; got {density}.")
        if not 1 <= self.tokens < min(self.lengths):
            raise ValueError(
                f"New tokens are part of the lengths, 1 to {min(self.lengths) - 1} of them; got tokens={self.tokens}."
            )
        if not self.only:
            raise ValueError(f"only names parts to measure, some of {', '.join(Part)}; got none. Leave it out for all.")


def measure_decode(config: DecodeBench) -> Iterator[Measurement]:
    """The measurements, each as soon as it is there.

    Raises:
      ValueError: a shape that this device is too slow for, or an implementation that does not exist.
    """
    check_device(config.shape)
    memory_rate()  # while there is memory for it
    model, sizes = CONFIGS[config.shape], (config.batches, config.lengths)
    if Part.KERNEL in config.only:
        yield from Bench(config.implementation, config.seed).sweep(heads_of(model), *sizes, config.densities)
    if Part.LAYER in config.only:
        yield from measure_layer(model, *sizes, config.model_density, seed=config.seed)
    if Part.MODEL in config.only:
        yield from new_tokens(config.shape, *sizes, config.model_density, config.tokens, seed=config.seed)


def bench_decode(config: DecodeBench) -> list[Measurement]:
    """Prints the tables, writes file and picture if they are asked for, and returns the measurements.

    Raises:
      ImportError: a picture is asked for and matplotlib is not installed.
      ValueError: see `measure_decode`.
    """
    if config.plot is not None:
        from seer_jax.bench.plots import check_matplotlib

        check_matplotlib()
    console, measurements = report(measure_decode(config), config.output)
    if config.plot is not None:
        from seer_jax.bench.plots import plot_decode

        console.print(f"Drawn: {plot_decode(config.plot, measurements)}", highlight=False, soft_wrap=True)
    return measurements
