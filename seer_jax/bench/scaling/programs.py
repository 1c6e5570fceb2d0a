"""Programs that are run on one device and on meshes, with the same inputs on each."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seer_jax.bench.models import random_cache
from seer_jax.bench.training import distillation_step, finetuning_step
from seer_jax.gates.configs import TrainedGates
from seer_jax.inference.memory import GIB, laid_out_bytes
from seer_jax.models.cache import Cache
from seer_jax.models.decoder import Transformer
from seer_jax.selection.policies import Policy


@dataclasses.dataclass(eq=False)
class Program:
    """function(carried, *arguments) -> (carried, outputs) with its arguments; a call gives what it carries to the next one.

    Attributes:
      first: outputs of the first call, on the host, by name; what meshes are compared by.
      planned_gib: what the compiler lays out for a call on each device, arguments included.
    """

    function: Callable[..., tuple[Any, Any]]
    carried: Any
    arguments: tuple
    first: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    planned_gib: float | None = None

    def lower(self) -> jax.stages.Lowered:
        return jax.jit(self.function, donate_argnums=0).lower(self.carried, *self.arguments)

    def start(self, compiled: jax.stages.Compiled) -> None:
        """Makes the first call."""
        memory = compiled.memory_analysis()
        if memory is not None:
            self.planned_gib = (memory.argument_size_in_bytes + (laid_out_bytes(compiled) or 0)) / GIB
        self.function = compiled
        self.first = {name: np.asarray(x) for name, x in self().items()}

    def __call__(self) -> dict[str, jax.Array]:
        self.carried, outputs = self.function(self.carried, *self.arguments)
        return outputs


def prefill_program(model: Transformer, rows: int, length: int, policy: Policy, seed: int) -> Program:
    """Reads prompts; its outputs are the logits after them."""

    def run(cache: Cache, model: Transformer, tokens: jax.Array) -> tuple[Cache, dict[str, jax.Array]]:
        logits, cache, kept = model.prefill(tokens, None, cache, sparsity=policy)
        return cache, {"logits": logits, "kept": kept}

    tokens = random_tokens(model, rows, length, seed)
    return Program(run, model.empty_cache(rows, length, None), (model, tokens))


def decode_program(model: Transformer, batch: int, length: int, new: int, policy: Policy, seed: int) -> Program:
    """Decodes `new` given tokens of each sequence, the last of which fills the cache; its outputs are the mean logits."""
    gate = None if model.decode_gate is None or not policy.needs_gate else model.decode_gate.config

    def run(cache: Cache, model: Transformer, tokens: jax.Array) -> tuple[Cache, dict[str, jax.Array]]:
        def step(number: Any, carry: tuple) -> tuple:
            cache, logits, kept = carry
            last, cache, share = model.decode(tokens[:, number], cache, sparsity=policy)
            return cache, logits + last / new, kept + share / new

        cache = cache.with_lengths(jnp.full(batch, length - new, jnp.int32))
        start = cache, jnp.zeros((batch, model.config.vocab_size)), jnp.zeros((model.config.num_layers, batch))
        cache, logits, kept = jax.lax.fori_loop(0, new, step, start)
        return cache, {"logits": logits, "kept": kept}

    cache = random_cache(model.config, batch, length, model.dtype, gate, seed=seed, layout=model.layout)
    return Program(run, cache, (model, random_tokens(model, batch, new, seed)))


def distillation_program(model: Transformer, rows: int, length: int, kind: TrainedGates, seed: int) -> Program:
    """A step of distillation; its outputs are losses and block recall."""
    return Program(*distillation_step(model, kind, np.asarray(random_tokens(model, rows, length, seed))))


def finetuning_program(model: Transformer, rows: int, length: int, seed: int) -> Program:
    """A step that trains all weights; its output is the loss."""
    return Program(*finetuning_step(model, np.asarray(random_tokens(model, rows, length, seed))))


def random_tokens(model: Transformer, rows: int, length: int, seed: int) -> jax.Array:
    """Tokens [rows, length], on a mesh those of every device."""
    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, (rows, length)).astype(np.int32)
    if model.layout is None:
        return jnp.asarray(tokens)
    return jax.device_put(tokens, jax.sharding.NamedSharding(model.layout.mesh, jax.sharding.PartitionSpec()))
