"""Kernels of SeerAttention: functions of arrays that need JAX alone, without the rest of seer-jax.

Letters: B batch, T query tokens, S key tokens, H query heads, K key/value heads, G = H/K, D head dim, b block size in tokens,
Tb = ceil(T/b), Sb = ceil(S/b), N width of the block lists.
"""

import pallas_kernels.devices  # noqa: F401 - before any program is compiled, see there
from pallas_kernels.block_ground_truth.api import AttentionWithScores, attention_with_block_scores
from pallas_kernels.block_pooling.api import pool_blocks
from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from pallas_kernels.blocks import BlockIndices
from pallas_kernels.gate_scores.api import score_blocks
from pallas_kernels.gate_selection.api import select_blocks
from pallas_kernels.sparse_decode.api import sparse_decode_attention
from pallas_kernels.stacked_linear.api import stacked_linear
from pallas_kernels.sub_block_scores.api import score_sub_blocks

__all__ = [
    "AttentionWithScores",
    "BlockIndices",
    "attention_with_block_scores",
    "block_sparse_attention",
    "pool_blocks",
    "score_blocks",
    "score_sub_blocks",
    "select_blocks",
    "sparse_decode_attention",
    "stacked_linear",
]
