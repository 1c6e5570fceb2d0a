"""Sparsity policies: how many blocks a row keeps, and by what they are ranked.

A policy is a frozen dataclass and a JAX pytree, so it passes through `jax.jit` as an ordinary argument. Values that only
change numbers (a threshold) are leaves; values that change shapes (a density, a budget) are static.
"""

import dataclasses
import math

import jax
from jaxtyping import Array, Bool, Float

from seer_jax.checks import check_at_least


class Scorer:
    """What ranks the blocks. The learned gate is the default; the others are yardsticks for evaluation."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gate(Scorer):
    """The learned gate of the model."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Oracle(Scorer):
    """The true block maxima of the attention map: the best any gate could learn. Costs a dense pass."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SinkWindow(Scorer):
    """The first block, then the most recent ones (StreamingLLM, arXiv 2309.17453)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Random(Scorer):
    """Blocks at random.

    Attributes:
      seed: of the pseudo-random ranking.
    """

    seed: int = dataclasses.field(default=0, metadata=dict(static=True))


# By the names that a command line uses.
SCORERS: dict[str, Scorer] = {"gate": Gate(), "oracle": Oracle(), "window": SinkWindow(), "random": Random()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """Every block."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Threshold:
    """Blocks whose score after softmax is above a threshold.

    Attributes:
      threshold: in [0, 1); 0 keeps every block. A scalar, or an array `[H, 1, 1]` (prefill) or `[K, 1]` (decode) with one
        value per head.
      scorer: what ranks the blocks.
      dense_last_rows: the last block rows of a prompt, which hold its question, keep every block (`last_block_dense` of the
        release is 2). Prefill alone.
      dense_layers: the first layers, which keep every block in either phase; fewer than the model has. While decoding it is
        the larger of this and the gate's own `start_layer`.
    """

    threshold: float | Float[Array, "..."]
    scorer: Scorer = Gate()
    dense_last_rows: int = dataclasses.field(default=2, metadata=dict(static=True))
    dense_layers: int = dataclasses.field(default=0, metadata=dict(static=True))

    def __post_init__(self) -> None:
        check_at_least(0, self, "dense_last_rows", "dense_layers")
        if isinstance(self.threshold, (int, float)) and not 0 <= self.threshold < 1:
            raise ValueError(f"A threshold on softmax scores lies in [0, 1); got {self.threshold}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CumulativeMass:
    """The fewest best blocks of each row whose scores after softmax add up to a given share.

    Rows that spread their attention keep more blocks than rows that know where to look.

    Attributes:
      mass: in (0, 1]; 1 keeps every block. A scalar, or an array `[H, 1, 1]` (prefill) or `[K, 1]` (decode) with one value
        per head.
      scorer: what ranks the blocks.
      dense_last_rows, dense_layers: as in `Threshold`.
    """

    mass: float | Float[Array, "..."]
    scorer: Scorer = Gate()
    dense_last_rows: int = dataclasses.field(default=2, metadata=dict(static=True))
    dense_layers: int = dataclasses.field(default=0, metadata=dict(static=True))

    def __post_init__(self) -> None:
        check_at_least(0, self, "dense_last_rows", "dense_layers")
        if isinstance(self.mass, (int, float)) and not 0 < self.mass <= 1:
            raise ValueError(f"A share of the softmax scores lies in (0, 1]; got {self.mass}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK:
    """The best blocks of each row, so many that a given share of the causal map is kept.

    Prefill: with n blocks in a sequence (its own length, not what the batch is padded to) every row keeps its
    k = max(1, floor((1 - sqrt(1 - density)) n)) best; rows that have fewer keep all. `density` is then the share of the causal
    map (SeerAttention's `nz_ratio`). Decode: a row that sees n blocks keeps max(2, floor(density n)), the current and the first
    among them.

    Attributes:
      density: in (0, 1].
      scorer: what ranks the blocks.
      dense_last_rows, dense_layers: as in `Threshold`.
    """

    density: float = dataclasses.field(metadata=dict(static=True))
    scorer: Scorer = Gate()
    dense_last_rows: int = dataclasses.field(default=2, metadata=dict(static=True))
    dense_layers: int = dataclasses.field(default=0, metadata=dict(static=True))

    def __post_init__(self) -> None:
        check_at_least(0, self, "dense_last_rows", "dense_layers")
        if not 0 < self.density <= 1:
            raise ValueError(f"TopK takes the share of the causal map to keep, in (0, 1]; got {self.density}.")

    def blocks(self, num_blocks: int) -> int:
        """k for a sequence of `num_blocks` blocks."""
        return max(1, math.floor((1 - math.sqrt(1 - self.density)) * num_blocks))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenBudget:
    """At most floor(tokens / b) blocks in each row: the current one, the first one, then the best.

    Attributes:
      tokens: the budget, at least one block.
      scorer: what ranks the blocks.
      dense_layers: as in `Threshold`.
    """

    tokens: int = dataclasses.field(metadata=dict(static=True))
    scorer: Scorer = Gate()
    dense_layers: int = dataclasses.field(default=0, metadata=dict(static=True))

    def __post_init__(self) -> None:
        check_at_least(0, self, "dense_layers")
        if self.tokens < 1:
            raise ValueError(f"A token budget is positive; got {self.tokens}.")

    def blocks(self, block_size: int) -> int:
        """Blocks that fit the budget."""
        if self.tokens < block_size:
            raise ValueError(
                f"A token budget holds at least one block of {block_size} tokens; got {self.tokens}. Use {block_size} or more."
            )
        return self.tokens // block_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given:
    """Masks of the caller's own, one per layer.

    Attributes:
      mask: prefill `[L, B, Hs, Tb, Sb]` with Hs in (1, K, H); decode `[L, B, K, Sb]`. True keeps a block. Causality is
        applied on top, and a row that would keep no block keeps its own. While decoding, layers before the gate's
        `start_layer` are dense whatever their mask says.
      block_size: tokens per block.
    """

    mask: Bool[Array, "L B ..."]
    block_size: int = dataclasses.field(default=64, metadata=dict(static=True))


# These keep the best blocks by the ranking of their scorer.
RankingPolicy = Threshold | CumulativeMass | TopK | TokenBudget
Policy = Dense | Given | RankingPolicy


def ranks_by_gate(policy: Policy) -> bool:
    """Whether a policy works only with a learned gate."""
    return isinstance(policy, RankingPolicy) and isinstance(policy.scorer, Gate)
