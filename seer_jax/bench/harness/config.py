"""What every `seer-jax bench` takes: the shape of a model, lengths, a seed, and where results go."""

import dataclasses
import enum
from pathlib import Path

from pallas_kernels.cases import Heads
from seer_jax.bench.harness.memory import default_device
from seer_jax.models.config import ModelConfig, RopeConfig, RopeKind

BLOCK = 64  # tokens


class ModelShape(enum.StrEnum):
    """Shapes of models to measure; tiny is for trying the command on a CPU."""

    LLAMA_3_1_8B = "llama-3.1-8b"
    TINY = "tiny"

    @property
    def config(self) -> ModelConfig:
        """The model of this shape."""
        return _CONFIGS[self]


_CONFIGS = {
    ModelShape.LLAMA_3_1_8B: ModelConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope=RopeConfig(theta=5e5, kind=RopeKind.LLAMA3, factor=8.0, original_max_position=8192),
        max_position_embeddings=131072,
    ),
    ModelShape.TINY: ModelConfig(
        family="llama",
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
    ),
}


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Settings of every bench.

    Attributes:
      shape: heads of the attention and size of the model.
      lengths: tokens of each sequence.
      seed: of weights, inputs and lists.
      output: file for the measurements (JSON); None: none is written.
      plot: file for a plot (PNG); None: none is drawn.
    """

    shape: ModelShape = ModelShape.LLAMA_3_1_8B
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    seed: int = 0
    output: Path | None = None
    plot: Path | None = None

    @property
    def heads(self) -> Heads:
        """H, K and D of the attention."""
        model = self.shape.config
        return Heads(model.num_heads, model.num_kv_heads, model.head_dim)

    def check_lengths(self, blocks: int, *, whole: bool = False) -> None:
        """Raises ValueError unless every length has that many blocks, `whole` ones where that is asked."""
        if not self.lengths or any(n < blocks * BLOCK or (whole and n % BLOCK) for n in self.lengths):
            least = "one block" if blocks == 1 else "two blocks"
            raise ValueError(
                f"lengths must be at least {blocks * BLOCK} tokens, {least}{', and whole blocks' if whole else ''}; "
                f"got {self.lengths}."
            )

    def check_device(self) -> None:
        """Raises ValueError for a shape that the device is too slow for."""
        if self.shape is not ModelShape.TINY and default_device().platform == "cpu":
            raise ValueError(
                f"The shape {self.shape.value} must run on a GPU; got a CPU. Measure --shape {ModelShape.TINY.value}."
            )


def check_densities(*densities: float) -> None:
    """Raises ValueError unless each is a share of blocks."""
    for density in densities:
        if not 0 < density <= 1:
            raise ValueError(f"Densities must lie in (0, 1]; got {density}.")
