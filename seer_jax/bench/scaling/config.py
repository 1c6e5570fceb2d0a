"""What `seer-jax bench scaling` takes."""

import dataclasses
import math
from typing import Literal, get_args

from jax.sharding import Mesh

from seer_jax.bench.configs import BLOCK, BenchConfig
from seer_jax.checks import check_at_least
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig, TrainedGates
from seer_jax.sharding.mesh import check_mesh, make_mesh
from seer_jax.sharding.table import DATA, FSDP

ScalingPart = Literal["prefill", "decode", "train", "finetune"]


@dataclasses.dataclass(frozen=True)
class ScalingBench(BenchConfig):
    """Measures a model over 1 to n devices of a mesh: prefill, decoding, and steps of training.

    All numbers of devices do the same work: rows are split over data and fsdp, heads over tensor. Results are held against those of one
    device; the command fails if they are not the same up to rounding. A mesh of one device (tensor=1) is measured beside no mesh, both
    in turns.

    Attributes:
      mesh: the largest mesh, such as tensor=2 or data=-1 (all devices). Where a single axis is larger than 1, meshes of 2, 4, 8 ...
        devices come before it.
      lengths: tokens of prompts, and of the caches of sequences that decode; the newest token counts among them.
      train_lengths: tokens of the rows that a training step takes.
      rows: prompts at once, and rows of a training step; None: the devices along data and fsdp.
      batch: sequences that decode at once.
      density: share of the blocks that sparse prefill and decoding keep; both are measured beside dense ones.
      kind: which gates a step of distillation trains.
      alone: whether to measure one device without a mesh too; the smallest mesh is compared with otherwise.
      only: parts to measure; finetune, a step that trains all weights, is measured where it is named.
      tokens: new ones of each sequence that a run of decoding makes.
      repetitions: of each measurement, of which the median counts.
    """

    lengths: tuple[int, ...] = (32768, 131072)
    mesh: str = "tensor=-1"
    train_lengths: tuple[int, ...] = (65536,)
    rows: int | None = None
    batch: int = 8
    density: float = 0.1
    kind: TrainedGates = TrainedGates.BOTH
    alone: bool = True
    only: tuple[ScalingPart, ...] = ("prefill", "decode", "train")
    tokens: int = 16
    repetitions: int = 5

    def __post_init__(self) -> None:
        self._check_inputs(2, whole=True)
        check_mesh(self.mesh)
        if wrong := [n for n in self.train_lengths if n < 2 * BLOCK or n % BLOCK]:
            raise ValueError(f"train_lengths must be whole blocks of {BLOCK}, at least 2; got {wrong[0]}.")
        check_at_least(1, self, "batch", "tokens", *(() if self.rows is None else ("rows",)))
        check_at_least(3, self, "repetitions")
        if self.tokens >= min(self.lengths):
            raise ValueError(f"tokens must be below the lengths, of which they are part; got {self.tokens}.")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1]; got {self.density}.")
        if not self.only:
            raise ValueError(f"only must name some of {', '.join(get_args(ScalingPart))}; got none. Leave it out.")

    def meshes(self) -> list[Mesh]:
        """The meshes to measure, the smallest first.

        Raises:
          ValueError: the text is no mesh, there are too few devices, or they can't have equally many rows.
        """
        whole = make_mesh(self.mesh)
        large = [axis for axis, size in whole.shape.items() if size > 1]
        sizes = [2**i for i in range(1, math.ceil(math.log2(whole.size)))] if len(large) == 1 else []
        meshes = [*(make_mesh(f"{large[0]}={size}") for size in sizes), whole]
        counts = {"batch": self.batch, **({} if self.rows is None else {"rows": self.rows})}
        for mesh in meshes:
            split = mesh.shape[DATA] * mesh.shape[FSDP]
            for name, count in counts.items():
                if count % split:
                    raise ValueError(
                        f"{name} must be a multiple of the {split} devices along data and fsdp; got {count}. Set {name}={-(-count // split) * split}."
                    )
        return meshes

    @property
    def gates(self) -> tuple[PrefillGateConfig, DecodeGateConfig]:
        """Untrained, of default settings."""
        return PrefillGateConfig(), DecodeGateConfig()

    def rows_on(self, mesh: Mesh) -> int:
        """Rows of prompts and of training steps, where `mesh` is the largest one."""
        return self.rows or mesh.shape[DATA] * mesh.shape[FSDP]
