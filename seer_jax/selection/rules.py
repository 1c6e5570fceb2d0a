"""Rules: from scores to lists of blocks. Each is a policy that keeps the best blocks by the ranking of its scorer."""

import abc
import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from pallas_kernels import BlockIndices
from seer_jax.checks import is_placeholder, whole_number
from seer_jax.selection.context import Context, DecodeContext, PrefillContext
from seer_jax.selection.interfaces import LayerGate
from seer_jax.selection.policies import SHORT, Policy, check_skip
from seer_jax.selection.scorers import LearnedGate, Scorer

Scores = Float32[Array, "B Hs Tb Sb"] | Float32[Array, "B K Sb"]


class RankingPolicy(Policy):
    """Base of the rules.

    Attributes:
      name: as a command line writes it.
      value: name of the field that says how much is kept.
      metavar: what stands for its value in help texts.
      scorer: what ranks the blocks.
      dense_layers: the first layers, which keep every block in either phase; fewer than the model has. While decoding it is
        the larger of this and the gate's own `start_layer`.
      skip: see `policies.check_skip`. Prefill alone, in the layers that `dense_layers` does not make dense.
    """

    name: ClassVar[str]
    value: ClassVar[str]
    metavar: ClassVar[str]
    scorer: Scorer
    dense_layers: int

    @abc.abstractmethod
    def select(self, scores: Scores, context: Context) -> BlockIndices:
        """The lists that the rule makes of scores before softmax."""

    def kept(self, context: Context) -> Bool[Array, "..."]:
        """Blocks that are kept whatever their scores: each row's own, those of the dense last rows, and those that the scorer's method
        always keeps."""
        keep, always = context.keep(getattr(self, "dense_last_rows", 0)), self.scorer.keep(context)
        return keep if always is None else keep | always

    def preferred(self, scores: Scores, context: Context) -> Scores:
        """Scores by which a fixed number of blocks first takes those that the scorer's method always keeps."""
        always = self.scorer.keep(context)
        return scores if always is None else jnp.where(always, jnp.finfo(jnp.float32).max, scores)

    def check(self, num_layers: int, gate: LayerGate | None, phase: str = "") -> None:
        super().check(num_layers, gate, phase)
        self.scorer.check_block_size(self.tokens_per_block(gate))

    def check_phase(self, phase: str) -> None:
        super().check_phase(phase)
        self.scorer.check_phase(phase)

    def _check_settings(self) -> None:
        """Checks what the rules share: the scorer and the numbers of layers and rows."""
        name = type(self).__name__
        for setting in ("dense_last_rows", "dense_layers"):
            if hasattr(self, setting):
                whole_number(f"{name}.{setting}", getattr(self, setting), "an integer of at least 0", least=0)
        if isinstance(self.scorer, type) or (not isinstance(self.scorer, Scorer) and not is_placeholder(self.scorer)):
            raise ValueError(f"{name}.scorer must be a scorer such as LearnedGate() or Oracle(); got {self.scorer!r}.")
        check_skip(self)

    def blocks(self, context: Context) -> BlockIndices:
        with jax.named_scope("scores"):
            if isinstance(context, PrefillContext):
                scores = self.scorer.prefill_scores(context)
            else:
                scores = self.scorer.decode_scores(context)
        with jax.named_scope("select"):
            return self.select(scores, context)

    def __str__(self) -> str:
        """As a command line writes the policy; values per layer and head are written as their shape."""
        value, scorer = getattr(self, self.value), self.scorer
        written = f"[{' x '.join(map(str, jnp.shape(value)))}]" if jnp.ndim(value) else value
        name = "" if scorer.name == LearnedGate.name else f":{scorer.name}"
        settings = [(owner, setting) for owner in (self, scorer) for setting in settings_of(type(owner))]
        changed = [(setting, getattr(owner, setting)) for owner, setting in settings if _is_changed(owner, setting)]
        return f"{self.name}:{written}{name}" + "".join(f",{setting}={now}" for setting, now in changed)

    @property
    def needs_gate(self) -> bool:
        return self.scorer.needs_gate

    @property
    def reads_in_chunks(self) -> bool:
        return self.scorer.reads_in_chunks

    def rows_alike(self, length: int, other: int, block_size: int) -> int:
        if not self.reads_in_chunks:
            return 0
        last = (min(length, other) - 1) // block_size
        return max(0, last + 1 - getattr(self, "dense_last_rows", 0))

    def prepare(self, context: PrefillContext) -> PrefillContext:
        with jax.named_scope("prepare_keys"):
            return dataclasses.replace(context, prepared=self.scorer.prepare(context))

    def dense_first_layers(self, gate: LayerGate | None) -> int:
        return max(super().dense_first_layers(gate), self.dense_layers)


def settings_of(kind: Any) -> list[str]:
    """Fields of a rule or a scorer that are written by name, where they differ from their default."""
    names = [field.name for field in reversed(dataclasses.fields(kind))]
    return [name for name in names if name not in (getattr(kind, "value", ""), "scorer")]


def _is_changed(owner: Any, name: str) -> bool:
    (default,) = (field.default for field in dataclasses.fields(owner) if field.name == name)
    value = getattr(owner, name)
    return bool(np.ndim(value)) or value != default


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Threshold(RankingPolicy):
    """Blocks whose score after softmax is above a threshold.

    Attributes:
      threshold: in [0, 1); 0 keeps every block. A number, or an array `[L]`, `[heads]` or `[L, heads]` with one value per layer
        and head: H heads while prompts are read, K while tokens are decoded.
      scorer: what ranks the blocks.
      dense_last_rows: the last block rows of a prompt, which hold its question, keep every block (`last_block_dense` of the
        release is 2). Prefill alone.
      dense_layers, skip: see `RankingPolicy`.
    """

    name = "threshold"
    value = "threshold"
    metavar = "P"
    per_head = ("threshold",)

    threshold: float | Float[Array | np.ndarray, "..."]
    scorer: Scorer = LearnedGate()
    dense_last_rows: int = dataclasses.field(default=2, metadata=dict(static=True))
    dense_layers: int = dataclasses.field(default=0, metadata=dict(static=True))
    skip: float | Float[Array, ""] | None = None

    def __post_init__(self) -> None:
        self._check_settings()
        _check_values(self, lambda x: (x >= 0) & (x < 1), "lie in [0, 1)")

    def select(self, scores: Scores, context: Context) -> BlockIndices:
        scores, threshold = context.per_head(scores, self.threshold)
        return context.select(scores, threshold=threshold, keep=self.kept(context))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CumulativeMass(RankingPolicy):
    """The smallest set of top blocks of each row whose scores after softmax sum to at least `mass`.

    Rows that spread their attention keep more blocks than rows that concentrate it.

    Attributes:
      mass: in (0, 1]; 1 keeps every block. A number or an array, as in `Threshold`.
      scorer, dense_last_rows, dense_layers, skip: as in `Threshold`.
    """

    name = "mass"
    value = "mass"
    metavar = "P"
    per_head = ("mass",)

    mass: float | Float[Array | np.ndarray, "..."]
    scorer: Scorer = LearnedGate()
    dense_last_rows: int = dataclasses.field(default=2, metadata=dict(static=True))
    dense_layers: int = dataclasses.field(default=0, metadata=dict(static=True))
    skip: float | Float[Array, ""] | None = None

    def __post_init__(self) -> None:
        self._check_settings()
        _check_values(self, lambda x: (x > 0) & (x <= 1), "lie in (0, 1]")

    def select(self, scores: Scores, context: Context) -> BlockIndices:
        scores, mass = context.per_head(scores, self.mass)
        return context.select(scores, mass=mass, keep=self.kept(context))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK(RankingPolicy):
    """The k best blocks of each row, with k from the share of the causal map that is to be kept.

    Prefill: with n blocks in a sequence (its own length, not what the batch is padded to) every row keeps its
    k = max(1, floor((1 - sqrt(1 - density)) n)) best; rows that have fewer keep all. `density` is then the share of the causal
    map (SeerAttention's `nz_ratio`). Decode: a row that sees n blocks keeps max(2, floor(density n)), the current and the first
    among them.

    Attributes:
      density: in (0, 1].
      scorer, dense_last_rows, dense_layers, skip: as in `Threshold`.
    """

    name = "topk"
    value = "density"
    metavar = "DENSITY"

    density: float = dataclasses.field(metadata=dict(static=True))
    scorer: Scorer = LearnedGate()
    dense_last_rows: int = dataclasses.field(default=2, metadata=dict(static=True))
    dense_layers: int = dataclasses.field(default=0, metadata=dict(static=True))
    skip: float | Float[Array, ""] | None = None

    def __post_init__(self) -> None:
        self._check_settings()
        known = isinstance(self.density, int | float | np.integer | np.floating) and not isinstance(self.density, bool)
        if not known or not 0 < self.density <= 1:
            raise ValueError(
                f"TopK.density, the share of the causal map to keep, must lie in (0, 1]; got {self.density!r}."
            )

    @property
    def expected_density(self) -> float:
        return self.density

    def blocks_per_row(self, num_blocks: int) -> int:
        """k of a prompt of `num_blocks` blocks."""
        return max(1, _floor((1 - math.sqrt(1 - self.density)) * num_blocks))

    def rows_alike(self, length: int, other: int, block_size: int) -> int:
        alike = len({self.blocks_per_row(-(-n // block_size)) for n in (length, other)}) == 1
        return super().rows_alike(length, other, block_size) if alike else 0

    def blocks_per_token(self, num_blocks: int) -> int:
        """How many of `num_blocks` visible blocks a new token keeps."""
        return min(max(2, _floor(self.density * num_blocks)), num_blocks)

    def select(self, scores: Scores, context: Context) -> BlockIndices:
        total = context.num_key_blocks
        if isinstance(context, DecodeContext):
            by_length = [self.blocks_per_token(n) for n in range(1, total + 1)]
            wanted = jnp.asarray(by_length, jnp.int32)[context.current]
            keep, scores = context.keep(self.dense_last_rows), self.preferred(scores, context)
            return context.select(scores, max_blocks=wanted, keep=keep, width=by_length[-1])
        # As many as a sequence's own length asks for, whatever the batch is padded to.
        counts = jnp.asarray([self.blocks_per_row(n) for n in range(1, total + 1)])
        return context.select(scores, top_k=counts[context.last], keep=self.kept(context))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenBudget(RankingPolicy):
    """At most floor(tokens / b) blocks in each row: the current one, the first one, then the best.

    Attributes:
      tokens: the budget, at least one block.
      scorer, dense_layers, skip: as in `Threshold`.
    """

    name = "budget"
    value = "tokens"
    metavar = "TOKENS"

    tokens: int = dataclasses.field(metadata=dict(static=True))
    scorer: Scorer = LearnedGate()
    dense_layers: int = dataclasses.field(default=0, metadata=dict(static=True))
    skip: float | Float[Array, ""] | None = None

    def __post_init__(self) -> None:
        self._check_settings()
        whole_number("TokenBudget.tokens", self.tokens)

    def check(self, num_layers: int, gate: LayerGate | None, phase: str = "") -> None:
        super().check(num_layers, gate, phase)
        self.blocks_per_row(self.tokens_per_block(gate))

    def blocks_per_row(self, block_size: int) -> int:
        """Blocks that fit the budget."""
        if self.tokens < block_size:
            raise ValueError(
                f"A token budget must hold at least one block of {block_size} tokens; got {self.tokens}. "
                f"Use {block_size} or more."
            )
        return self.tokens // block_size

    def select(self, scores: Scores, context: Context) -> BlockIndices:
        most = self.blocks_per_row(context.block_size)
        keep = context.sink_and_own if most > 1 else context.own  # a budget of one block is for the current one
        return context.select(self.preferred(scores, context), max_blocks=most, keep=keep)


RULES: dict[str, type[RankingPolicy]] = {rule.name: rule for rule in (Threshold, CumulativeMass, TopK, TokenBudget)}


def _floor(x: float) -> int:
    """The floor of a product with a decimal fraction: 0.29 * 100, which is 28.999999999999996 in binary, is 29."""
    return math.floor(round(x, 9))


def _check_values(policy: RankingPolicy, inside: Any, must: str) -> None:
    """Checks the values of a field where they are known: inside JAX's transformations they are tracers or placeholders."""
    value, name = getattr(policy, policy.value), f"{type(policy).__name__}.{policy.value}"
    if is_placeholder(value):
        return
    if not isinstance(value, int | float | np.ndarray | np.generic | jax.Array) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number or an array; got {SHORT.repr(value)}. Wrap it in jnp.asarray.")
    dtype = np.asarray(value).dtype
    if dtype.kind not in "iu" and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must hold real numbers; got {dtype} {jnp.shape(value)}.")
    values = np.asarray(value)
    if (wrong := values[~inside(values)]).size:
        raise ValueError(f"{name} must {must}; got {wrong.flat[0]}.")
