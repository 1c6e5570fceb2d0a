"""Training: distillation of gates, and fine-tuning of all weights or of LoRA adapters by the language-model loss."""

from seer_jax.gates.configs import TrainedGates
from seer_jax.lora import LoraConfig
from seer_jax.train.api import distill, finetune
from seer_jax.train.config import (
    DistillConfig,
    FinetuneConfig,
    OptimizerConfig,
    TargetStatistic,
    from_dict,
    load_config,
    to_dict,
)
from seer_jax.train.data.batches import DataConfig, load_dataset
from seer_jax.train.data.packing import PackedDataset, Packing, pack
from seer_jax.train.loop.progress import ConsoleProgress, StepReport
from seer_jax.train.loop.run import TrainResult

__all__ = [
    "ConsoleProgress",
    "DataConfig",
    "DistillConfig",
    "FinetuneConfig",
    "LoraConfig",
    "OptimizerConfig",
    "PackedDataset",
    "Packing",
    "StepReport",
    "TargetStatistic",
    "TrainResult",
    "TrainedGates",
    "distill",
    "finetune",
    "from_dict",
    "load_config",
    "load_dataset",
    "pack",
    "to_dict",
]
