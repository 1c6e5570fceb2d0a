"""What is measured on each mesh, and whether its results are those of one device."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from seer_jax.bench.models import abstract_cache
from seer_jax.bench.scaling.config import ScalingBench
from seer_jax.bench.scaling.programs import (
    Program,
    decode_program,
    distillation_program,
    finetuning_program,
    prefill_program,
    random_tokens,
)
from seer_jax.inference.memory import tree_bytes
from seer_jax.models.attention import prefill_attention
from seer_jax.models.decoder import Transformer
from seer_jax.models.decoder.stack import LayerContext, Segment
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.rules import TopK
from seer_jax.sharding.table import ROWS, TENSOR

# Sums over devices are rounded otherwise than one device's: in bfloat16 that moves logits by a few per cent over many layers. A head or row
# on the wrong device moves them by as much as they are.
LOGITS_BOUND = 0.2
LOSS_BOUND = 0.02
LISTS_BOUND = 0.97  # share of the first layer's listed blocks that agree; scores of near blocks change places
LIST_TOKENS = 4096
ADAM_BYTES = 12  # of a weight that is trained: float32, and two moments


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to run on each mesh.

    Attributes:
      name: of the case.
      make: makes the program for a model.
      tokens: that a call reads or makes.
      settings: what is run, by numbers.
      steps: that a call makes.
      cache_bytes: of all devices together, beside the weights.
      bound: see `error_against`.
      trains: whether all weights are trained.
      policy, list_tokens: sparse prefill: what chooses blocks, and tokens of the prompt whose lists are compared.
    """

    name: str
    make: Callable[[Transformer], Program]
    tokens: int
    settings: Mapping[str, Any]
    steps: int = 1
    cache_bytes: int = 0
    bound: float = LOGITS_BOUND
    trains: bool = False
    policy: Policy | None = None
    list_tokens: int = 0

    def needed_bytes(self, weights: int, devices: int) -> float:
        """About what each device needs: its weights, what trains them, and its part of the cache."""
        return weights * (1 + ADAM_BYTES / 2 * self.trains) + self.cache_bytes / devices


def all_cases(config: ScalingBench, mesh: Mesh) -> Iterator[Case]:
    """The cases of a benchmark whose largest mesh is `mesh`."""
    rows = config.rows_on(mesh)
    makes = {
        "prefill": _prefill_case,
        "decode": _decode_case,
        "train": _distillation_case,
        "finetune": _finetuning_case,
    }
    for part in config.only:
        if part in ("prefill", "decode"):
            policies: tuple[Policy, ...] = Dense(), TopK(config.density)
            yield from (makes[part](config, rows, n, policy) for n in sorted(config.lengths) for policy in policies)
        else:
            yield from (makes[part](config, rows, n) for n in sorted(config.train_lengths))


def _prefill_case(config: ScalingBench, rows: int, length: int, policy: Policy) -> Case:
    sparse = policy.expected_density is not None
    return Case(
        f"prefill {rows} x {length}, {_kept(policy)}",
        _bind(prefill_program, rows, length, policy, config.seed),
        tokens=rows * length,
        settings=dict(part="prefill", rows=rows, length=length, density=policy.expected_density),
        cache_bytes=tree_bytes(abstract_cache(config.model, rows, length, jnp.bfloat16, None)),
        policy=policy if sparse else None,
        list_tokens=min(length, LIST_TOKENS),
    )


def _decode_case(config: ScalingBench, rows: int, length: int, policy: Policy) -> Case:
    del rows
    batch, new, gate = config.batch, config.tokens, config.gates[1] if policy.needs_gate else None
    return Case(
        f"decode {batch} x {length}, {_kept(policy)}",
        _bind(decode_program, batch, length, new, policy, config.seed),
        tokens=batch * new,
        settings=dict(part="decode", rows=batch, length=length, density=policy.expected_density),
        steps=new,
        cache_bytes=tree_bytes(abstract_cache(config.model, batch, length, jnp.bfloat16, gate)),
    )


def _distillation_case(config: ScalingBench, rows: int, length: int) -> Case:
    make = _bind(distillation_program, rows, length, config.kind, config.seed)
    settings = dict(part="train", rows=rows, length=length, density=None)
    return Case(f"distil {config.kind.value} {rows} x {length}", make, rows * length, settings, bound=LOSS_BOUND)


def _finetuning_case(config: ScalingBench, rows: int, length: int) -> Case:
    make = _bind(finetuning_program, rows, length, config.seed)
    settings = dict(part="finetune", rows=rows, length=length, density=None)
    return Case(f"finetune {rows} x {length}", make, rows * length, settings, bound=LOSS_BOUND, trains=True)


def _kept(policy: Policy) -> str:
    return "dense" if policy.expected_density is None else f"{policy.expected_density:g}"


def _bind(make: Callable[..., Program], *arguments: Any) -> Callable[[Transformer], Program]:
    return lambda model: make(model, *arguments)


def error_against(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """How far outputs are from those of one device: of logits the root of the mean square of the difference over that of theirs; of losses,
    where there are no logits, the largest difference over their sum."""
    if "logits" in theirs:
        a, b = (x["logits"].astype(np.float64) for x in (ours, theirs))
        return float(np.sqrt(((a - b) ** 2).mean() / (b**2).mean()))
    names = [name for name in theirs if "loss" in name]
    return max(float(abs(ours[name] - theirs[name])) for name in names) / abs(float(theirs["loss"]))


def listed_blocks(model: Transformer, tokens: int, policy: Policy, rows: int, seed: int) -> np.ndarray:
    """Which blocks every head of every layer lists for random prompts, bool [L, B, H, Tb, Sb]."""

    def run(model: Transformer, segments: list[Segment], tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array]:
        def attend(layer: LayerContext, state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
            context = layer.policy.prepare(model.prefill_context(layer, q, k, v, lengths))
            blocks = layer.policy.blocks(context)
            assert blocks is not None
            mask = blocks.to_mask(context.num_key_blocks)
            return (
                prefill_attention(layer.policy, context)[0],
                state,
                jnp.repeat(mask, q.shape[2] // mask.shape[1], axis=1),
            )

        return (model.scan(tokens, attend, segments=segments)[2],)

    ids = random_tokens(model, rows, tokens, seed)
    segments = model.segments(policy, model.prefill_gate, model.config.num_heads, "prefill")
    results = (P(None, ROWS, TENSOR),)
    read = jax.jit(lambda model, ids: model.spread(run, results, segments, *model.check(ids, None)))
    return np.asarray(read(model, ids)[0])


def agreement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of the blocks on either of two lists that are on both."""
    return float((ours & theirs).sum() / max((ours | theirs).sum(), 1))
