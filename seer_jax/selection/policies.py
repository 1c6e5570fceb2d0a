"""Sparsity policies: `policy.blocks(context)` is the one place where blocks are chosen.

A policy is a frozen dataclass and a JAX pytree, so it passes through `jax.jit` as an ordinary argument. Values that only
change numbers (a threshold) are leaves; values that change shapes (a density, a budget) are static.
"""

import abc
import dataclasses
import reprlib
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels import BlockIndices
from pallas_kernels.checks import check_block_size
from seer_jax.checks import is_placeholder
from seer_jax.selection.context import Context, PrefillContext
from seer_jax.selection.interfaces import LayerGate

SHORT = reprlib.Repr(maxlevel=2, maxlist=3, maxtuple=3)  # masks have many values
DEFAULT_BLOCK_SIZE = 64  # of a model without gates


class Policy(abc.ABC):
    """How blocks are chosen, in every layer of a model.

    `str(policy)` is the policy as a command line writes it.

    Attributes:
      name: as a command line writes it.
      skip: see `check_skip`; None for policies without it.
      is_dense: whether every block is read and computed in every layer.
      needs_gate: whether it works with a learned gate alone.
      reads_in_chunks: whether it can choose the blocks of a row while the rest of the prompt is still to come.
      expected_density: share of the blocks that the lists will hold, where that is known beforehand: a hint for kernels.
      per_head: names of the fields that may hold a value for each layer and head.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # each policy is a dataclass

    name: ClassVar[str] = "own"
    skip: float | Float[Array, ""] | None = None
    per_head: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def blocks(self, context: Context) -> BlockIndices | None:
        """The lists of key blocks that attention reads in one layer; None: every block.

        Args:
          context: of the layer; the policy is that of the layer too, see `of_layer`.
        """

    def __str__(self) -> str:
        return self.name

    @property
    def is_dense(self) -> bool:
        return False

    @property
    def needs_gate(self) -> bool:
        return False

    @property
    def reads_in_chunks(self) -> bool:
        return False

    @property
    def expected_density(self) -> float | None:
        return None

    def check_chunks(self) -> None:
        """Raises ValueError where prompts can't be read in chunks under the policy."""
        if not self.reads_in_chunks:
            raise ValueError(
                f"A policy for prompts that are read in chunks must choose a row's blocks by its own queries and the keys before it; got {self}, "
                "which looks at the whole prompt. Use another policy, or `generate` for one prompt without prefill_chunk."
            )

    def rows_alike(self, length: int, other: int, block_size: int) -> int:
        """How many of the first block rows choose alike in prompts of two lengths that share them; 0 where that is not known.

        Args:
          length, other: of the prompts, tokens.
          block_size: b.
        """
        del length, other, block_size
        return 0

    def tokens_per_block(self, gate: LayerGate | None) -> int:
        """b: the gate's where there is one, so that all scorers are compared at the same size."""
        return gate.config.block_size if gate is not None else DEFAULT_BLOCK_SIZE

    def dense_first_layers(self, gate: LayerGate | None) -> int:
        """How many of the first layers keep every block although the policy is sparse."""
        return getattr(gate.config, "start_layer", 0) if gate is not None else 0

    def prepare(self, context: PrefillContext) -> PrefillContext:
        """The context with what all chunks of query rows share."""
        return context

    def check(self, num_layers: int, gate: LayerGate | None, phase: str = "") -> None:
        """Checks the policy against a model.

        Args:
          num_layers: of the model.
          gate: of the model and of the phase; None: it has none.
          phase: "prefill" or "decode"; "": either.

        Raises:
          ValueError: it ranks by a gate that the model has not, does not work in the phase, or leaves none of its layers sparse.
        """
        if phase:
            self.check_phase(phase)
        if self.needs_gate and gate is None:
            raise ValueError(
                f"{self} ranks blocks by a learned gate, but the model has no {f'{phase} ' * bool(phase)}gate; "
                f"load one (gates=...), train one, or use the policy {Dense.name}."
            )
        if empty := [name for name in self.per_head if getattr(self, name) is None]:
            raise ValueError(f"{type(self).__name__}.{empty[0]} must be a number or an array; got None.")
        dense_layers = getattr(self, "dense_layers", 0)
        if dense_layers >= num_layers:
            raise ValueError(
                f"dense_layers must leave a sparse layer: below {num_layers}, the model's layers; got {dense_layers}. "
                f"Lower it, or use the policy {Dense.name}."
            )

    def check_phase(self, phase: str) -> None:
        """Raises ValueError where the policy does not work in a phase, "prefill" or "decode"."""
        if phase == "decode" and self.skip is not None:
            raise ValueError(
                f"A policy for decoding must have no skip, which works while prompts are read; got one in a {self.name} policy. "
                "Leave skip out, or use the policy for prompts alone (eval: --phases prefill)."
            )

    def stacked(self, num_layers: int, heads: int) -> "Policy":
        """The policy with every array that its fields hold as `[L, heads]` or `[L, 1]`; scalars stay.

        Args:
          num_layers: L.
          heads: H while prompts are read, K while tokens are decoded.

        Raises:
          ValueError: an array has another shape than [L], [L, heads], [heads] or [].
        """
        changes = {}
        for name in self.per_head:
            value = getattr(self, name)
            if jnp.ndim(value):
                changes[name] = _by_layer(f"{type(self).__name__}.{name}", value, num_layers, heads)
        return dataclasses.replace(self, **changes) if changes else self

    def of_layer(self, layer: jax.Array) -> "Policy":
        """The policy of one layer out of a stacked one."""
        changes = {name: getattr(self, name)[layer] for name in self.per_head if jnp.ndim(getattr(self, name))}
        return dataclasses.replace(self, **changes) if changes else self

    def padded(self, lists: "Lists", tokens: int) -> "Policy":
        """The policy for a program whose arrays have room for `tokens` tokens, although the lists of masks end before.

        Args:
          lists: whose masks the caller may have given.
          tokens: at least `lists.tokens`.

        Raises:
          ValueError: a mask has another shape than the lists.
        """
        del lists, tokens
        return self


class Lists(NamedTuple):
    """The lists of blocks of one phase of a request, in every layer.

    Fields:
      batch: B.
      heads: how many lists a row of the batch may have.
      tokens: of the padded prompts, or of the cache.
      per_row: whether there is a list for each block row of queries: while prompts are read.
    """

    batch: int
    heads: tuple[int, ...]
    tokens: int
    per_row: bool


def check_policy(name: str, policy: Any) -> None:
    """Raises ValueError where what is given as a policy is none."""
    if not isinstance(policy, Policy):
        raise ValueError(
            f"{name} must be a sparsity policy such as Dense() or Threshold(5e-4), or None; got {policy!r}. "
            "Text becomes one by seer_jax.parse_policy(text)."
        )


def check_skip(policy: Policy) -> None:
    """Checks a policy's `skip`: a number in [0, 1] or None.

    While prompts are read, attention leaves out the blocks whose largest weight is below `skip` times the largest weight in the
    blocks before (`skip_threshold` of `block_sparse_attention`). Those blocks do not count as kept. Decoding knows no such skip.

    Raises:
      ValueError: it is none.
    """
    name, value = f"{type(policy).__name__}.skip", policy.skip
    if value is None or is_placeholder(value):
        return
    if isinstance(value, bool) or not isinstance(value, int | float | np.number | jax.Array) or jnp.ndim(value):
        raise ValueError(f"{name} must be a number or None; got {value!r}.")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1]; got {value}.")


def _by_layer(name: str, value: Any, num_layers: int, heads: int) -> Array:
    """A value as [L, heads] or [L, 1]."""
    shape = jnp.shape(value)
    value = jnp.asarray(value, jnp.float32)
    by_layer, by_head = shape == (num_layers,), shape == (heads,)
    if by_layer and by_head and num_layers > 1:
        raise ValueError(
            f"{name} must say which axis it has, as the model has {num_layers} layers and as many heads; got shape {shape}. "
            f"Give [{num_layers}, 1] for one value per layer, or [1, {heads}] for one per head."
        )
    if by_layer:
        return value[:, None]
    if by_head or shape == (1, heads):
        return jnp.broadcast_to(value, (num_layers, heads))
    if shape in ((num_layers, heads), (num_layers, 1)):
        return value
    raise ValueError(
        f"{name} must be a number, [L] = [{num_layers}], [heads] = [{heads}] or [L, heads] = [{num_layers}, {heads}]; "
        f"got shape {shape}. A policy with values per layer and head, such as one from a file, fits the model that it was made for."
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense(Policy):
    """Every block.

    Attributes:
      skip: see `check_skip`. Prefill alone.
    """

    name = "dense"

    skip: float | Float[Array, ""] | None = None

    def __post_init__(self) -> None:
        check_skip(self)

    def __str__(self) -> str:
        return self.name if self.skip is None else f"{self.name},skip={self.skip}"

    @property
    def is_dense(self) -> bool:
        return self.skip is None

    @property
    def reads_in_chunks(self) -> bool:
        return True

    def rows_alike(self, length: int, other: int, block_size: int) -> int:
        return -(-min(length, other) // block_size)

    def blocks(self, context: Context) -> None:
        return None

    def dense_first_layers(self, gate: LayerGate | None) -> int:
        return 0  # one program for all layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given(Policy):
    """Masks of the caller's own, one per layer.

    Attributes:
      mask: prefill `[L, B, Hs, Tb, Sb]` with Hs in (1, K, H); decode `[L, B, K, Sb]`. True keeps a block. Causality is
        applied on top, and a row that would keep no block keeps its own. While decoding, layers before the gate's
        `start_layer` are dense whatever their mask says.
      block_size: b, tokens per block.
    """

    name = "given"

    mask: Bool[Array | np.ndarray, "L B ..."]
    block_size: int = dataclasses.field(default=DEFAULT_BLOCK_SIZE, metadata=dict(static=True))

    def __post_init__(self) -> None:
        check_block_size("Given", self.block_size)
        if not is_placeholder(self.mask) and not isinstance(self.mask, np.ndarray | jax.Array):
            raise ValueError(f"Given.mask must be a bool array; got {SHORT.repr(self.mask)}. Wrap it in jnp.asarray.")

    def tokens_per_block(self, gate: LayerGate | None) -> int:
        return self.block_size

    @property
    def reads_in_chunks(self) -> bool:
        return True

    def blocks(self, context: Context) -> BlockIndices:
        return context.of_mask(jnp.asarray(self.mask))

    def stacked(self, num_layers: int, heads: int) -> "Policy":
        if not hasattr(self.mask, "dtype"):  # JAX's trees may hold None and the like, policies that are used must not
            raise ValueError(f"Given.mask must be a bool array; got {self.mask!r}. Wrap it in jnp.asarray.")
        if jnp.ndim(self.mask) not in (4, 5) or self.mask.shape[0] != num_layers or self.mask.dtype != jnp.bool_:
            raise ValueError(
                f"Given.mask must be bool [L, B, Hs, Tb, Sb] (prefill) or [L, B, K, Sb] (decode) with L = {num_layers}; "
                f"got {self.mask.dtype} {jnp.shape(self.mask)}."
            )
        return dataclasses.replace(self, mask=jnp.asarray(self.mask))

    def of_layer(self, layer: jax.Array) -> "Policy":
        return dataclasses.replace(self, mask=self.mask[layer])

    def padded(self, lists: Lists, tokens: int) -> "Policy":
        before, after = (-(-size // self.block_size) for size in (lists.tokens, tokens))
        axes = 2 if lists.per_row else 1
        shape = jnp.shape(self.mask)
        if (
            len(shape) != 3 + axes
            or shape[1] != lists.batch
            or shape[2] not in lists.heads
            or set(shape[3:]) != {before}
        ):
            letters, phase = ("[L, B, Hs, Tb, Sb]", "prefill") if lists.per_row else ("[L, B, K, Sb]", "decode")
            heads = " or ".join(map(str, lists.heads))
            raise ValueError(
                f"Given.mask must be {letters} for {phase}, with {lists.batch} rows, {heads} lists and {before} blocks of "
                f"{self.block_size} tokens; got shape {shape}."
            )
        if before == after:
            return self
        pad = np.pad if isinstance(self.mask, np.ndarray) else jnp.pad
        return dataclasses.replace(self, mask=pad(self.mask, [(0, 0)] * 3 + [(0, after - before)] * axes))
