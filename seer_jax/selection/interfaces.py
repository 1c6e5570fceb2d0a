"""What a choice of blocks needs of gates and caches, whose modules build on this one."""

import abc
from typing import Any

from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import BlockIndices


class LayerGate:
    """A learned gate, its weights those of one layer.

    Attributes:
      config: with `block_size`, and with `start_layer` where the gate asks for dense first layers.
    """

    config: Any

    # Further arguments differ between the phases: see PrefillGate and DecodeGate.

    def queries(
        self, q: Float[Array, "B T H D"], positions: Int[Array, "#B T"], *_: Any
    ) -> Float32[Array, "B n heads C"]:
        """The gate's queries; q before RoPE."""
        raise NotImplementedError

    def keys(
        self, k: Float[Array, "B S K D"], positions: Int[Array, "#B S"], *_: Any
    ) -> Float32[Array, "B Sw heads C"]:
        """The gate's compressed keys, one or several per block; k before RoPE."""
        raise NotImplementedError

    def seen(self, places: Int[Array, "#B T"], *_: Any) -> Int[Array, "#B Tu 2"]:
        """The keys [first, end) that each query of a prefill gate sees."""
        raise NotImplementedError

    def logits(self, queries: Array, keys: Array, **_: Any) -> Float32[Array, "B heads n Sb"]:
        """Scores of key blocks before softmax."""
        raise NotImplementedError


class LayerCache(abc.ABC):
    """What one layer may read of a cache while a token is decoded."""

    @property
    @abc.abstractmethod
    def capacity(self) -> int:
        """S: tokens that each row has room for."""

    @property
    @abc.abstractmethod
    def num_kv_heads(self) -> int:
        """K."""

    @property
    @abc.abstractmethod
    def lengths(self) -> Int[Array, "B"]:
        """Tokens of each row, without the one that this step appended."""

    @property
    @abc.abstractmethod
    def keys(self) -> Float[Array, "B S K D"]:
        """Keys after RoPE, a copy of the layer's part: for scorers that look at every key."""

    @property
    @abc.abstractmethod
    def gate_key_rows(self) -> tuple[Float[Array, "P Sw K C"], Int[Array, ""]]:
        """The decode gate's compressed keys of all layers, and the number of this layer's first row, so that its B rows can be read in
        place; raises ValueError where the cache keeps none."""

    @property
    @abc.abstractmethod
    def prefill_gate_keys(self) -> Float32[Array, "B Sw heads C"] | None:
        """The prefill gate's compressed keys; None where they are not kept."""

    @abc.abstractmethod
    def attend(self, q: Float[Array, "B H D"], blocks: BlockIndices | None) -> Float[Array, "B H D"]:
        """Attention of the token that this step appended; q after RoPE, blocks None: every key."""
