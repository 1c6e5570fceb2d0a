"""Memory of a fine-tuning step, from shapes: no weights are read, and no device of that size need be there."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from seer_jax.inference.memory import GIB, laid_out_bytes, tree_bytes
from seer_jax.lora import abstract_lora, adapted, place
from seer_jax.models.decoder import Transformer
from seer_jax.train.config import FinetuneConfig
from seer_jax.train.data.batches import Batch
from seer_jax.train.joint import JointTraining
from seer_jax.train.optimizer import make_optimizer, make_schedule
from seer_jax.train.step import make_step
from seer_jax.train.tasks import LanguageModelling


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What fine-tuning takes on its device, in bytes; printed as a table in GiB.

    Attributes:
      frozen: weights that do not train, in the dtype of the model.
      trained: weights that train, float32.
      moments: of the optimizer, float32.
      scratch: everything else that the compiler lays out for a step: gradients, hidden states between layers, activations of one layer.
        None: not compiled.
      available: what the device has for all of this; None: not told.

    >>> print(StepPlan(frozen=15 * 2**30, trained=2**28, moments=2**29, scratch=20 * 2**30, available=80 * 2**30))
    frozen weights          15.000 GiB
    trained weights          0.250 GiB
    moments                  0.500 GiB
    scratch                 20.000 GiB
    total                   35.750 GiB
    available               80.000 GiB
    """

    frozen: int
    trained: int
    moments: int
    scratch: int | None = None
    available: int | None = None

    @property
    def total(self) -> int:
        """All of it; without scratch where that is not known."""
        return self.frozen + self.trained + self.moments + (self.scratch or 0)

    def __str__(self) -> str:
        sizes = {
            "frozen weights": self.frozen,
            "trained weights": self.trained,
            "moments": self.moments,
            "scratch": self.scratch,
            "total": self.total,
        }
        if self.available is not None:
            sizes["available"] = self.available
            if self.total > self.available:
                sizes["missing"] = self.total - self.available
        return "\n".join(
            f"{name:<22}{' not compiled' if size is None else f'{size / GIB:8.3f} GiB'}" for name, size in sizes.items()
        )


def plan_finetuning(
    model: Transformer, config: FinetuneConfig, *, compiled: bool = True, available: int | None = None
) -> StepPlan:
    """The memory of a step of fine-tuning on one device.

    What a step takes besides its weights is that of a program compiled for the device that is here. On a CPU that program has no
    kernels for GPUs, and takes more than theirs.

    Args:
      model: of shapes; with a prefill gate, which trains along on its lists, or without one, and attention is dense.
      config: of the run: rows at once, their length, adapters, density and optimizer count.
      compiled: whether to compile the step.
      available: bytes of the device.

    Raises:
      ValueError: the settings of adapters do not fit the model.
    """
    model = nnx.merge(*nnx.split(model))
    if config.lora.rank and not adapted(model):
        for path, lora in abstract_lora(model, config.lora).items():
            place(model, path, lora)
    task, trained, frozen = _task(model, config)
    optimizer = make_optimizer(config.optimizer, config.steps, gate_scale=config.gate_scale)
    state = jax.eval_shape(optimizer.init, trained)
    scratch = None
    if compiled:
        rows: Any = jax.ShapeDtypeStruct((config.batch_size, config.sequence_length), jnp.int32)
        parts = config.batch_size // config.micro_batch_size
        step: Any = make_step(task, optimizer, make_schedule(config.optimizer, config.steps), parts)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        scratch = laid_out_bytes(step.lower(trained, state, frozen, Batch(rows, rows, rows), number).compile())
    return StepPlan(tree_bytes(frozen), tree_bytes(trained), tree_bytes(state), scratch, available)


def _task(model: Transformer, config: FinetuneConfig) -> tuple[Any, Any, Any]:
    if model.prefill_gate is None:
        return LanguageModelling.start(model, packed=False)
    return JointTraining.of(config, model)
