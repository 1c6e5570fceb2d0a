"""Settings of training runs: frozen dataclasses that check themselves, to and from YAML and JSON."""

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seer_jax.checks import check_at_least
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig, TrainedGates
from seer_jax.models.config import DType
from seer_jax.train.data.batches import DataConfig
from seer_jax.train.data.packing import Packing


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warmup from 0 and a cosine decay.

    Attributes:
      learning_rate: at the end of the warmup, > 0.
      end_learning_rate: at the last step.
      warmup_steps: optimizer steps, fewer than the run has.
      weight_decay: decoupled, >= 0.
      beta1, beta2, eps: of Adam.
      clip_norm: bound on the gradient's global norm; None: none.
    """

    learning_rate: float = 1e-3
    end_learning_rate: float = 0.0
    warmup_steps: int = 20
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or not 0 <= self.end_learning_rate <= self.learning_rate:
            raise ValueError(
                "Learning rates must satisfy 0 <= end_learning_rate <= learning_rate and learning_rate > 0; "
                f"got {self.end_learning_rate} and {self.learning_rate}."
            )
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError(
                f"warmup_steps and weight_decay must be at least 0; got {self.warmup_steps} and {self.weight_decay}."
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, or None for no clipping; got {self.clip_norm}.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings that distillation and fine-tuning share.

    Attributes:
      model: folder or hub id of the base model; tiny-lm is the bundled one.
      output: folder for checkpoints, metrics, tokens and trained gates; a run with the same folder and settings resumes where it
        stopped. None: nothing is written.
      data: training text.
      sequence_length: T, tokens per row.
      batch_size: rows per optimizer step.
      micro_batch_size: rows processed at once, a divisor of batch_size; the gradients of a step's parts are accumulated. More is
        faster, as far as memory allows.
      steps: optimizer steps.
      optimizer: see `OptimizerConfig`.
      precision: of the base model's arithmetic.
      seed: of the order of the data and of fresh weights.
      checkpoint_interval: steps from one checkpoint to the next.
      keep_checkpoints: older ones are deleted.
      log_interval: steps from one report to the next; metrics.jsonl has every step.
      tensorboard: whether to write TensorBoard files too, where tensorboardX is installed.
    """

    model: str = ""
    output: str | None = None
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    sequence_length: int = 65536
    batch_size: int = 16
    micro_batch_size: int = 1
    steps: int = 500
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    precision: DType = DType.BFLOAT16
    seed: int = 0
    checkpoint_interval: int = 50
    keep_checkpoints: int = 2
    log_interval: int = 10
    tensorboard: bool = True

    def __post_init__(self) -> None:
        check_at_least(1, self, "sequence_length", "batch_size", "micro_batch_size", "steps")
        check_at_least(1, self, "checkpoint_interval", "keep_checkpoints", "log_interval")
        check_at_least(0, self, "seed")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                "micro_batch_size must divide batch_size, so that a step's parts are equal; "
                f"got {self.micro_batch_size} and {self.batch_size}."
            )
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(
                f"The warmup must end before the run; got {self.optimizer.warmup_steps} warmup steps of {self.steps}. Set "
                "optimizer.warmup_steps."
            )

    @property
    def block_size(self) -> int:
        """Sequences start at its multiples."""
        return 1

    def defining(self) -> dict[str, Any]:
        """The settings that determine the results of a run: runs that agree in them make the same steps."""
        free = ("output", "checkpoint_interval", "keep_checkpoints", "log_interval", "tensorboard")
        return {name: value for name, value in to_dict(self).items() if name not in free}


@dataclasses.dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """Distillation of gates from a frozen model.

    Attributes:
      gates: which ones.
      prefill: configuration of the prefill gate, where it is distilled and the model has none yet.
      decode: configuration of the decode gate, likewise.
      prefill_skip: share of the block rows at the start of each sequence that the prefill loss leaves out.
      decode_skip: share of the tokens at the start of each sequence that the decode loss leaves out.
      recall_density: share of the visible blocks at which block recall is reported, see `loss.block_recall`.
    """

    gates: TrainedGates = TrainedGates.PREFILL
    prefill: PrefillGateConfig = dataclasses.field(default_factory=PrefillGateConfig)
    decode: DecodeGateConfig = dataclasses.field(default_factory=DecodeGateConfig)
    prefill_skip: float = 0.25
    decode_skip: float = 0.5
    recall_density: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prefill_skip", "decode_skip"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be a share in [0, 1) of each sequence; got {getattr(self, name)}.")
        if not 0 < self.recall_density <= 1:
            raise ValueError(f"recall_density must be a share in (0, 1]; got {self.recall_density}.")
        if self.gates is TrainedGates.BOTH and self.prefill.block_size != self.decode.block_size:
            raise ValueError(
                "Gates that are distilled in one pass must have one block size; "
                f"got {self.prefill.block_size} and {self.decode.block_size}. Set both (prefill.block_size and decode.block_size), or distil them one after the other."
            )
        if self.sequence_length % self.block_size or self.sequence_length < 2 * self.block_size:
            raise ValueError(
                f"sequence_length must be a multiple of the block size {self.block_size} and at least two blocks; "
                f"got {self.sequence_length}."
            )

    @property
    def block_size(self) -> int:
        """b of the gates."""
        return self.decode.block_size if self.gates is TrainedGates.DECODE else self.prefill.block_size

    @classmethod
    def prefill_recipe(cls, **changes: Any) -> "DistillConfig":
        """The authors' recipe for prefill gates: 500 steps of 16 x 64k tokens (SeerAttention, arXiv 2410.13276)."""
        return dataclasses.replace(cls(), **changes)

    @classmethod
    def decode_recipe(cls, **changes: Any) -> "DistillConfig":
        """The authors' recipe for decode gates: 800 steps of 16 x 32k packed tokens (SeerAttention-R, arXiv 2506.08889)."""
        recipe = cls(
            gates=TrainedGates.DECODE,
            data=DataConfig(packing=Packing.BEST_FIT),
            sequence_length=32768,
            steps=800,
            optimizer=OptimizerConfig(end_learning_rate=1e-5),
        )
        return dataclasses.replace(recipe, **changes)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """Training of all base weights by the plain language-model loss, with float32 master weights."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5))
    sequence_length: int = 32768


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON would give it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict[C](kind: type[C], values: Mapping[str, Any]) -> C:
    """A config from nested mappings, as `to_dict` or a YAML file gives them; settings that are left out keep their defaults.

    Raises:
      ValueError: a key is unknown or a value is of another type than its field.
    """
    return _parse(kind, values, kind.__name__)


def load_config[C](kind: type[C], path: str | Path) -> C:
    """A config from a .yaml, .yml or .json file."""
    path = Path(path)
    if path.suffix == ".json":
        values = json.loads(path.read_text())
    elif path.suffix in (".yaml", ".yml"):
        import yaml

        values = yaml.safe_load(path.read_text())
    else:
        raise ValueError(f"The name of a configuration file must end in .yaml, .yml or .json; got {path}.")
    return from_dict(kind, values or {})


def _parse(kind: Any, value: Any, place: str) -> Any:
    """`value` as an instance of the type `kind`, one of those that configs are made of."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        kind = next(a for a in arguments if a is not types.NoneType)
        return _parse(kind, value, place)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        fields = typing.get_type_hints(kind)
        names = [f.name for f in dataclasses.fields(kind)]
        if unknown := [str(k) for k in value if k not in names]:
            raise ValueError(f"Settings of {place} must be some of {', '.join(names)}; got {', '.join(unknown)}.")
        return kind(**{k: _parse(fields[k], v, f"{place}.{k}") for k, v in value.items()})
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_parse(arguments[0], v, f"{place}[{i}]") for i, v in enumerate(value))
    if isinstance(kind, type) and issubclass(kind, enum.StrEnum):
        if value in list(kind):
            return kind(value)
        raise ValueError(f"{place} must be one of {', '.join(kind)}; got {value!r}.")
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        return _float(value, place)  # YAML reads 1e-3, without a dot, as text
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{place} must be of type {getattr(kind, '__name__', kind)}; got {value!r}.")


def _float(value: int | str, place: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{place} must be a number; got {value!r}.") from None
