"""`seer-jax bench prefill`: block-sparse prefill from the attention kernel to the whole model."""

import dataclasses
import enum
from collections.abc import Iterator
from pathlib import Path

from pallas_kernels.backends import Implementation
from pallas_kernels.bench import Measurement, variants
from pallas_kernels.block_sparse_attention.bench import PACKAGE, Bench, odd_cases, sweep
from seer_jax.bench.gate_masks import LENGTH as TRAINED_LENGTH
from seer_jax.bench.gate_masks import trained_cases
from seer_jax.bench.models import CONFIGS, Shape, check_device, first_token, heads_of
from seer_jax.bench.report import report
from seer_jax.bench.selection import measure_selection

ODD_LENGTH = 32768


class Part(enum.StrEnum):
    """What is measured."""

    ATTENTION = "attention"
    CASES = "cases"
    SELECTION = "selection"
    MODEL = "model"


@dataclasses.dataclass(frozen=True)
class PrefillBench:
    """Measures block-sparse prefill on this machine: the attention kernel, the choice of blocks, and a whole model.

    Each result of the kernel is held against float32 before it is timed. The command fails if one is wrong.

    Attributes:
      shape: heads of the attention and size of the model.
      lengths: prompt lengths, tokens.
      densities: shares of the earlier blocks that random masks keep, for the attention.
      model_density: share of the causal map that gate and model keep.
      only: parts to measure.
      implementation: of the attention kernel; None: the best one here. The model always takes the best one.
      variants: measure every configuration that the implementation offers.
      seed: of weights, inputs and masks.
      output: file for the measurements (JSON); None: none is written.
      plot: file for a picture (PNG); None: none is drawn.
    """

    shape: Shape = Shape.LLAMA_3_1_8B
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    densities: tuple[float, ...] = (0.02, 0.1, 0.2, 0.5, 1.0)
    model_density: float = 0.1
    only: tuple[Part, ...] = tuple(Part)
    implementation: Implementation | None = None
    variants: bool = False
    seed: int = 0
    output: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 64:
            raise ValueError(f"lengths are at least one block of 64 tokens; got {self.lengths}.")
        for density in (*self.densities, self.model_density):
            if not 0 < density <= 1:
                raise ValueError(f"Densities lie in (0, 1]; got {density}.")
        if not self.densities and Part.ATTENTION in self.only:
            raise ValueError("The attention is measured at given densities; got none.")
        if self.plot is not None and Part.ATTENTION not in self.only:
            raise ValueError(
                "The picture shows the attention, which is not among the parts to measure; got no attention."
            )
        if self.variants and self.implementation is None:
            raise ValueError("variants are those of a named implementation; got variants without implementation.")


def measure_prefill(config: PrefillBench) -> Iterator[Measurement]:
    """The measurements, each as soon as it is there.

    Raises:
      ValueError: a shape that this device is too slow for, or an implementation that does not exist.
    """
    check_device(config.shape)
    model = CONFIGS[config.shape]
    heads = heads_of(model)
    if {Part.ATTENTION, Part.CASES} & set(config.only):
        offered = variants(PACKAGE, config.implementation) if config.variants else {}
        for choice in offered.items() or (None,):
            bench = Bench(config.implementation, choice, config.seed)
            if Part.ATTENTION in config.only:
                yield from bench.sweep(sweep(heads, config.lengths, config.densities))
            if Part.CASES in config.only:
                longest = max(config.lengths)
                yield from bench.pairs(odd_cases(heads, min(ODD_LENGTH, longest)))
                yield from bench.pairs(trained_cases(heads, min(TRAINED_LENGTH, longest), config.model_density))
    if Part.SELECTION in config.only:
        yield from measure_selection(model, config.lengths, config.model_density, seed=config.seed)
    if Part.MODEL in config.only:
        yield from first_token(config.shape, config.lengths, (config.model_density,), seed=config.seed)


def bench_prefill(config: PrefillBench) -> list[Measurement]:
    """Prints the tables, writes file and picture if they are asked for, and returns the measurements.

    Raises:
      ImportError: a picture is asked for and matplotlib is not installed.
      ValueError: see `measure_prefill`.
    """
    if config.plot is not None:
        from seer_jax.bench.plots import check_matplotlib

        check_matplotlib()
    console, measurements = report(measure_prefill(config), config.output)
    if config.plot is not None:
        from seer_jax.bench.plots import plot_prefill

        console.print(f"Drawn: {plot_prefill(config.plot, measurements)}", highlight=False, soft_wrap=True)
    return measurements
