"""One compiled optimizer step, the same for all tasks."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float32, Int

from seer_jax.models.decoder import Transformer
from seer_jax.sharding.layout import Layout, weights_of
from seer_jax.sharding.shard import Shard
from seer_jax.train.data.batches import Batch
from seer_jax.train.over_mesh import summed_over_mesh

# Weights by name, nested as the model is: {"decode_gate": {"linear_k": array}}.
Weights = dict[str, Any]
# An nnx.State with all other weights.
FrozenWeights = Any
# Values that add up over the parts of a batch.
Sums = dict[str, Float32[Array, ""]]


@dataclasses.dataclass(frozen=True)
class ModelParts:
    """How to merge a model from the weights that train and the rest; holds no weights itself.

    `layout` says how the model lies on a mesh; None: it is not spread.

    Only the trained weights get gradients and optimizer state. Both parts pass through `jax.jit` as arguments: weights that a compiled
    function closes over would become constants of the program.
    """

    graph: Any
    template: Any
    layout: Layout | None = None

    @classmethod
    def split(
        cls, model: Transformer, trains: Callable[[tuple, nnx.Variable], bool]
    ) -> tuple["ModelParts", Weights, FrozenWeights]:
        """Splits a model into (how to merge it, weights for which `trains(path, variable)` is true, all others)."""
        graph, trained, frozen = nnx.split(model, trains, ...)
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trained)
        return cls(graph, template, model.layout), nnx.to_pure_dict(trained), frozen

    def merge(self, trained: Weights, frozen: FrozenWeights, shard: Shard | None = None) -> Transformer:
        """The model, with its weights in the dtypes that it had when it was split.

        Args:
          trained, frozen: its weights, inside `jax.shard_map` those of one device.
          shard: of that device, whose part is made.
        """
        state = jax.tree.map(lambda x: x, self.template)
        nnx.replace_by_pure_dict(state, trained)
        state = jax.tree.map(lambda weight, like: weight.astype(like.dtype), state, self.template)
        model = nnx.merge(self.graph, state, frozen)
        if shard is None:
            return model
        leaves, structure = weights_of(model)
        return shard.model(structure, leaves)


@runtime_checkable
class Task(Protocol):
    """What is trained, and by which loss."""

    @property
    def parts(self) -> ModelParts:
        """The model's parts."""
        ...

    def weigh(self, batch: Batch, shard: Shard | None = None) -> Any:
        """Weights of the rows in the loss, over the whole batch, of which a device of a mesh has some rows; leaves `[B, ...]`."""
        ...

    def gradients(
        self, trained: Weights, frozen: FrozenWeights, batch: Batch, weights: Any, shard: Shard | None = None
    ) -> tuple[Weights, Sums]:
        """Gradients of the loss of some rows of the batch, and what is needed for its metrics. Of a device of a mesh: what it adds to
        them."""
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
      parts: number of equal parts of the batch, on a mesh of each device's rows of it, that are processed one after the other.
    """
    layout = task.parts.layout

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained: Weights, state: Any, frozen: FrozenWeights, batch: Batch, number: jax.Array) -> tuple:
        gradients, sums = _gradients(task, trained, frozen, batch, parts)
        updates, state = optimizer.update(gradients, state, trained)
        metrics = task.metrics(sums)
        metrics |= {"grad_norm": optax.tree.norm(gradients), "learning_rate": jnp.float32(schedule(number))}
        trained = cast(Weights, optax.apply_updates(trained, updates))
        if layout is not None:  # where they were, so that the next step takes them as they are
            shardings = shardings_of(layout, trained), state_shardings(layout, optimizer, trained, state)
            trained, state = jax.lax.with_sharding_constraint((trained, state), shardings)
            metrics = layout.replicated(metrics)
        return trained, state, metrics

    return step


Evaluation = Callable[[Weights, FrozenWeights, Batch], dict[str, Float32[Array, ""]]]


def make_evaluation(task: Task, parts: int) -> Evaluation:
    """`evaluate(trained, frozen, batch) -> metrics`: those of a step, without its update."""

    @jax.jit
    def evaluate(trained: Weights, frozen: FrozenWeights, batch: Batch) -> dict[str, Float32[Array, ""]]:
        return task.metrics(_gradients(task, trained, frozen, batch, parts, with_gradients=False)[1])

    return evaluate


def initial_state(layout: Layout | None, optimizer: optax.GradientTransformation, trained: Weights) -> Any:
    """The state of an optimizer before its first step; on a mesh each moment lies as its weight does."""
    if layout is None:
        return optimizer.init(trained)
    abstract = jax.eval_shape(optimizer.init, trained)
    return jax.jit(optimizer.init, out_shardings=state_shardings(layout, optimizer, trained, abstract))(trained)


def shardings_of(layout: Layout, weights: Weights) -> Weights:
    """Where weights by name lie."""
    leaves, structure = weights_of(weights)
    return jax.tree.unflatten(structure, [layout.sharding(path, x) for path, x in leaves])


def state_shardings(layout: Layout, optimizer: optax.GradientTransformation, trained: Weights, state: Any) -> Any:
    """Where the state of an optimizer lies: moments as their weights, everything else on every device."""
    everywhere = jax.sharding.NamedSharding(layout.mesh, jax.sharding.PartitionSpec())
    return optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        state,
        shardings_of(layout, trained),
        transform_non_params=lambda _: everywhere,
    )


def _gradients(
    task: Task, trained: Weights, frozen: FrozenWeights, batch: Batch, parts: int, *, with_gradients: bool = True
) -> tuple[Weights, Sums]:
    """Gradients of a batch, or {} in their place, and the sums for its metrics."""

    def of_rows(trained: Weights, frozen: FrozenWeights, batch: Batch, shard: Shard | None = None) -> tuple:
        def of_part(batch: Batch, weights: Any) -> tuple[Weights, Sums]:
            gradients, sums = task.gradients(trained, frozen, batch, weights, shard)
            return (gradients if with_gradients else {}), sums  # the compiler leaves out what is not used

        weights = task.weigh(batch, shard)
        if shard is not None:  # devices exchange the counts of rows before anything of the layers
            batch, weights = shard.after(batch, weights)
        return _accumulate(of_part, (batch, weights), parts)

    if task.parts.layout is None:
        return of_rows(trained, frozen, batch)
    return summed_over_mesh(of_rows, task.parts.layout, trained, frozen, batch, with_gradients=with_gradients)


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
