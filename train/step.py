"""One compiled optimizer step, the same for all tasks."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float32, Int

from seer_jax.models.decoder import Transformer
from seer_jax.train.data.batches import Batch

# Weights by name, nested as the model is: {"decode_gate": {"linear_k": array}}.
Weights = dict[str, Any]
# An nnx.State with all other weights.
FrozenWeights = Any
# Values that add up over the parts of a batch.
Sums = dict[str, Float32[Array, ""]]


@dataclasses.dataclass(frozen=True)
class ModelParts:
    """How to merge a model from the weights that train and the rest; holds no weights itself.

    Only the trained weights get gradients and optimizer state. Both parts pass through `jax.jit` as arguments: weights that a compiled
    function closes over would become constants of the program.
    """

    graph: Any
    template: Any

    @classmethod
    def split(
        cls, model: Transformer, trains: Callable[[tuple, nnx.Variable], bool]
    ) -> tuple["ModelParts", Weights, FrozenWeights]:
        """Splits a model into (how to merge it, weights for which `trains(path, variable)` is true, all others)."""
        graph, trained, frozen = nnx.split(model, trains, ...)
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trained)
        return cls(graph, template), nnx.to_pure_dict(trained), frozen

    def merge(self, trained: Weights, frozen: FrozenWeights) -> Transformer:
        """The model, with its weights in the dtypes that it had when it was split."""
        state = jax.tree.map(lambda x: x, self.template)
        nnx.replace_by_pure_dict(state, trained)
        state = jax.tree.map(lambda weight, like: weight.astype(like.dtype), state, self.template)
        return nnx.merge(self.graph, state, frozen)


@runtime_checkable
class Task(Protocol):
    """What is trained, and by which loss."""

    @property
    def parts(self) -> ModelParts:
        """The model's parts."""
        ...

    def weigh(self, batch: Batch) -> Any:
        """Weights of the rows in the loss, over the whole batch; leaves `[B, ...]`."""
        ...

    def gradients(self, trained: Weights, frozen: FrozenWeights, batch: Batch, weights: Any) -> tuple[Weights, Sums]:
        """Gradients of the loss of some rows of the batch, and what is needed for its metrics."""
        ...

    def metrics(self, sums: Sums) -> dict[str, Float32[Array, ""]]:
        """Metrics to report, `loss` among them."""
        ...


Step = Callable[
    [Weights, Any, FrozenWeights, Batch, Int[Array, ""]], tuple[Weights, Any, dict[str, Float32[Array, ""]]]
]


def make_step(task: Task, optimizer: optax.GradientTransformation, schedule: optax.Schedule, parts: int) -> Step:
    """`step(trained, optimizer_state, frozen, batch, number) -> (trained, optimizer_state, metrics)`.

    The first two arguments are donated: their memory holds the results.

    Args:
      task: what to train.
      optimizer: see `make_optimizer`.
      schedule: learning rate by step, for the metrics.
      parts: number of equal parts of the batch that are processed one after the other.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained: Weights, state: Any, frozen: FrozenWeights, batch: Batch, number: jax.Array) -> tuple:
        gradients_of = functools.partial(task.gradients, trained, frozen)
        gradients, sums = _accumulate(gradients_of, (batch, task.weigh(batch)), parts)
        updates, state = optimizer.update(gradients, state, trained)
        metrics = task.metrics(sums)
        metrics |= {"grad_norm": optax.tree.norm(gradients), "learning_rate": jnp.float32(schedule(number))}
        return optax.apply_updates(trained, updates), state, metrics

    return step


Evaluation = Callable[[Weights, FrozenWeights, Batch], dict[str, Float32[Array, ""]]]


def make_evaluation(task: Task, parts: int) -> Evaluation:
    """`evaluate(trained, frozen, batch) -> metrics`: those of a step, without its update."""

    @jax.jit
    def evaluate(trained: Weights, frozen: FrozenWeights, batch: Batch) -> dict[str, Float32[Array, ""]]:
        def sums(*part: Any) -> Sums:
            return task.gradients(trained, frozen, *part)[1]  # the compiler leaves the gradients out

        return task.metrics(_accumulate(sums, (batch, task.weigh(batch)), parts))

    return evaluate


def _accumulate(function: Callable, arguments: Any, parts: int) -> Any:
    """Sum of `function` over equal parts of its arguments' leading axis."""
    if parts == 1:
        return function(*arguments)
    arguments = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), arguments)

    def body(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*part)), None

    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], arguments))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(body, zeros, arguments)[0]
