"""Scores of the learned gates."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float32

from seer_jax.selection.context import DecodeContext, PrefillContext
from seer_jax.selection.scorers.base import Scorer, register


@register
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LearnedGate(Scorer):
    """Logits of the model's gate (SeerAttention, arXiv 2410.13276; SeerAttention-R, arXiv 2506.08889)."""

    name = "gate"
    title = "learned gate"
    meaning = "the distilled gates"
    reads_in_chunks = True
    needs_gate = True

    def prepare(self, context: PrefillContext) -> Any:
        if context.gate_keys is not None:
            return context.gate_keys
        assert context.k is not None
        return context.required_gate.keys(context.k, context.key_positions, context.valid_keys)

    def prefill_scores(self, context: PrefillContext) -> Float32[Array, "B H Tb Sb"]:
        gate = context.required_gate
        keys = self.prepare(context) if context.prepared is None else context.prepared
        positions, valid = context.positions, context.valid_queries
        queries = gate.queries(context.q, positions, valid)
        return gate.logits(queries, keys, row_offset=context.first_row, seen=gate.seen(positions, valid))

    def decode_scores(self, context: DecodeContext) -> Float32[Array, "B K Sb"]:
        gate, (keys, row) = context.required_gate, context.cache.gate_key_rows
        queries = gate.queries(context.q, context.position[:, None])
        completed = (context.position // context.block_size)[:, None]
        return gate.logits(queries, keys, completed=completed, first_row=row)[:, :, 0, : context.num_key_blocks]
