"""LoRA adapters: low-rank additions to the linear maps of a model, to train in place of its weights, and to merge into them."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from seer_jax.checks import check_at_least, check_positive
from seer_jax.models.decoder import Transformer
from seer_jax.models.layers import BaseParam, Linear, Lora
from seer_jax.settings import check_types

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """LoRA (arXiv 2106.09685): W + alpha / rank * B A in place of W, with A `[rank, in]` and B `[out, rank]`.

    Attributes:
      rank: of the adapters; 0: none, and all base weights train.
      alpha: the adapters are scaled by alpha / rank, > 0.
      targets: names of the linear maps that get one, in every layer.
    """

    rank: int = 0
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(0, self, "rank")
        check_positive(self, "alpha")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"LoraConfig.targets must name linear maps, each once; got {list(self.targets)}.")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


def linears_of(model: Transformer) -> dict[str, Linear]:
    """The linear maps of the layers, by path within a layer such as "self_attn.q_proj", in the order of `TARGETS`."""
    parts = {"self_attn": model.layers.self_attn, "mlp": model.layers.mlp}
    found = {
        f"{part}.{name}": value
        for part, module in parts.items()
        for name, value in vars(module).items()
        if isinstance(value, Linear)
    }
    order = {name: number for number, name in enumerate(TARGETS)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0].rpartition(".")[2], len(order))))


def adapted(model: Transformer) -> dict[str, Lora]:
    """The adapter that a model carries, by path of its linear maps within a layer; empty where it has none."""
    return {path: linear.lora for path, linear in linears_of(model).items() if linear.lora is not None}


def lora_config(model: Transformer) -> LoraConfig | None:
    """Rank, alpha and targets of the adapter that a model carries; None where it has none."""
    loras = {path.rpartition(".")[2]: lora for path, lora in adapted(model).items()}
    if not loras:
        return None
    (rank, scale), *_ = {(lora.a.shape[-2], lora.scale) for lora in loras.values()}
    return LoraConfig(rank, float(f"{rank * scale:.12g}"), tuple(loras))


def add_lora(model: Transformer, config: LoraConfig, *, seed: int = 0) -> Transformer:
    """Gives a model a fresh adapter, which adds zero: A is uniform in +-1 / sqrt(in), as in PEFT, and B is zero.

    Raises:
      ValueError: a target is no linear map of the model, it carries an adapter already, or the rank is 0.
    """
    rng = np.random.default_rng(seed)
    for path, linear in _targets(model, config):
        layers, outputs, inputs = linear.weight.shape
        a = rng.uniform(-1, 1, (layers, config.rank, inputs)).astype(np.float32) * np.float32(inputs**-0.5)
        b = np.zeros((layers, outputs, config.rank), np.float32)
        place(model, path, Lora(jnp.asarray(a), jnp.asarray(b), config.scale))
    return model


def abstract_lora(model: Transformer, config: LoraConfig) -> dict[str, Lora]:
    """An adapter with shapes in place of weights, by path of the linear map that it belongs to.

    Raises:
      ValueError: see `add_lora`.
    """

    def make(linear: Linear) -> Lora:
        layers, outputs, inputs = linear.weight.shape
        a, b = ((layers, config.rank, inputs), (layers, outputs, config.rank))
        return nnx.eval_shape(lambda: Lora(jnp.zeros(a), jnp.zeros(b), config.scale))

    return {path: make(linear) for path, linear in _targets(model, config)}


def place(model: Transformer, path: str, lora: Lora) -> None:
    """Attaches the adapter of one linear map, on a mesh split as the map's weight is."""
    if model.layout is not None:
        for name in ("a", "b"):
            weight = getattr(lora, name)
            sharding = model.layout.sharding(f"layers.{path}.lora.{name}", weight[...])
            weight.set_value(jax.device_put(weight[...], sharding))
    linears_of(model)[path].lora = lora


def merge_lora(model: Transformer) -> Transformer:
    """The model with W + alpha / rank * B A in place of the adapted weights W, in their dtype; the model itself where it has no adapter.

    The given model is not changed. The sums are float32, and rounded once.
    """
    if not adapted(model):
        return model
    graph, state = nnx.split(model)
    merged = nnx.merge(graph, state)
    merged.layout = model.layout
    linears = linears_of(merged)
    for path, lora in adapted(merged).items():
        linear = linears[path]
        weight = linear.weight[...]
        add = jax.jit(_merged, static_argnums=3, out_shardings=weight.sharding)
        linear.weight = BaseParam(add(weight, lora.a[...], lora.b[...], lora.scale))
        del linear.lora
    return merged


def _merged(
    weight: Float[Array, "L out in"], a: Float[Array, "L r in"], b: Float[Array, "L out r"], scale: float
) -> Float[Array, "L out in"]:
    """One layer at a time, so that a float32 copy of one exists at once."""

    def of_layer(arrays: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        weight, a, b = arrays
        product = jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
        return (weight.astype(jnp.float32) + scale * product).astype(weight.dtype)

    return jax.lax.map(of_layer, (weight, a, b))


def _targets(model: Transformer, config: LoraConfig) -> Iterator[tuple[str, Linear]]:
    """The linear maps that a new adapter is for.

    Raises:
      ValueError: see `add_lora`.
    """
    linears = linears_of(model)
    names = {path.rpartition(".")[2]: path for path in linears}
    if unknown := [target for target in config.targets if target not in names]:
        raise ValueError(
            f"The targets of LoRA must be linear maps of the model's layers: {', '.join(names)}; got {', '.join(unknown)}. Name "
            "some of these, or none for all."
        )
    if not config.rank:
        raise ValueError("An adapter must have a rank of at least 1; got LoraConfig.rank=0. Set rank=16, for example.")
    if adapted(model):
        raise ValueError("A model must carry one adapter at most; it has one. Merge it first: merge_lora(model).")
    for target in config.targets:
        yield names[target], linears[names[target]]
