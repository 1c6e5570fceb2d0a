"""The variants of the study by name: settings of both gates, target, text and steps; and what is tried without any training."""

import dataclasses
import enum

from seer_jax.gates.configs import (
    DecodeGateConfig,
    HeadJoin,
    Join,
    Pool,
    PrefillGateConfig,
    QueryReduction,
)

BLOCK_SIZE = 64
GATE_DIM = 64
BASELINES = "baselines"


class Text(enum.StrEnum):
    """What gates are trained on, see `texts.py`."""

    DOCUMENTATION = "documentation"
    CODE = "code"
    PASS_KEYS = "pass-keys"


class Selection(enum.StrEnum):
    """What becomes of the lists of trained gates, see `selections.py`."""

    SHARED_LAYERS = "shared-layers"
    LOCAL_HEADS = "local-heads"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A prefill gate and a decode gate that are distilled in one run.

    Attributes:
      name: of the folder and in tables.
      meaning: what it changes.
      prefill, decode: settings of the gates.
      target: what they learn to predict, "max" or "mass".
      text: what they are trained on.
      times: steps, as a multiple of the study's.
      top_k: whether top-k is measured too.
    """

    name: str
    meaning: str
    prefill: PrefillGateConfig
    decode: DecodeGateConfig
    target: str = "mass"
    text: Text = Text.DOCUMENTATION
    times: int = 1
    top_k: bool = False


@dataclasses.dataclass(frozen=True)
class Untrained:
    """The gates of a variant, used in another way without further training.

    Attributes:
      name, meaning: as those of a variant.
      of: the variant whose gates they are.
      selection: what becomes of their lists.
    """

    name: str
    meaning: str
    of: str
    selection: Selection


def _prefill(q_pool: int, k_pool: int, *, join: Join = Join.SUM, **settings: object) -> PrefillGateConfig:
    """A prefill gate with pools of q_pool and k_pool tokens."""
    joined = {} if k_pool == BLOCK_SIZE else {"join": join}
    sizes = {"block_size": BLOCK_SIZE, "gate_dim": GATE_DIM, "q_pool_size": q_pool, "k_pool_size": k_pool}
    return PrefillGateConfig(**{**sizes, **joined, **settings})  # pyright: ignore[reportArgumentType]


def _decode(k_pool: int, *, join: Join = Join.SUM, **settings: object) -> DecodeGateConfig:
    """A decode gate with a query per query head and keys of k_pool tokens; the largest share of keys goes with that of heads."""
    joined = {} if k_pool == BLOCK_SIZE else {"join": join}
    heads = HeadJoin.MAX if join is Join.MAX else HeadJoin.MEAN
    own = {"query_reduction": QueryReduction.HEADS, "heads": heads}
    sizes = {"block_size": BLOCK_SIZE, "gate_dim": GATE_DIM, "k_pool_size": k_pool}
    return DecodeGateConfig(**{**sizes, **own, **joined, **settings})  # pyright: ignore[reportArgumentType]


def _pools(q_pool: int, k_pool: int, decode_pool: int, join: Join) -> Variant:
    """Pools of one size: shares summed over keys, targets by mass; or the largest share, targets by largest weight."""
    target = "mass" if join is Join.SUM else "max"
    return Variant(
        f"p{q_pool}x{k_pool}-d{decode_pool}-{target}",
        f"prefill: pools of {q_pool} queries and {k_pool} keys; decode: a query per head, pools of {decode_pool} keys; joined by {join}",
        _prefill(q_pool, k_pool, join=join),
        _decode(decode_pool, join=join),
        target,
    )


def _release(target: str) -> Variant:
    """The kinds of SeerAttention and SeerAttention-R."""
    gates = (
        PrefillGateConfig(block_size=BLOCK_SIZE, gate_dim=GATE_DIM),
        DecodeGateConfig(block_size=BLOCK_SIZE, gate_dim=GATE_DIM),
    )
    return Variant(f"release-{target}", "the release's kinds", *gates, target, top_k=True)


_FINE = _pools(16, 8, 8, Join.SUM)
# Query and key pools of the prefill gate, and key pools of the decode gate.
_POOLS = ((64, 16, 64), (32, 16, 32), (16, 16, 16), (16, 8, 8), (8, 8, 4))
_FIRST = (
    _release("max"),
    _pools(16, 16, 16, Join.SUM),
    _FINE,
    _pools(16, 16, 16, Join.MAX),
    _release("mass"),
)


def _changed(name: str, meaning: str, **changes: object) -> Variant:
    """`_FINE` with other settings."""
    return dataclasses.replace(_FINE, name=name, meaning=f"{_FINE.name} {meaning}", **changes)  # pyright: ignore[reportArgumentType]


# The first few answer the main questions: kind, target and size of pools.
VARIANTS: dict[str, Variant | Untrained] = {
    variant.name: variant
    for variant in (
        *_FIRST,
        *(_pools(*sizes, join) for join in Join for sizes in _POOLS),
        Variant(
            "two-linear-qproj",
            "pools of 16; prefill: keys of key heads; decode: one query of the group",
            _prefill(16, 16, force_double=True),
            _decode(16, query_reduction=QueryReduction.PROJ, heads=HeadJoin.MEAN),
        ),
        Variant(
            "query-pools",
            "p16x8-d4-mass with the largest, smallest and mean of query pools, and keys of key heads",
            _prefill(16, 8, q_pooling=tuple(Pool)),
            _decode(4),
        ),
        *(
            Variant(
                f"dim{dim}",
                f"p16x16-d16-mass with {dim} channels",
                _prefill(16, 16, gate_dim=dim),
                _decode(16, gate_dim=dim),
            )
            for dim in (32, 16)
        ),
        Variant(
            "tokens-dim16",
            "a key of 16 channels for each token, pools of 16 queries",
            _prefill(16, 1, gate_dim=16, k_pooling=(Pool.AVG,)),
            _decode(1, gate_dim=16, k_pooling=(Pool.AVG,)),
        ),
        _changed("norm", "with RMSNorm in the decode gate", decode=_decode(8, use_qk_norm=True)),
        _changed("steps-x3", "trained three times as long", times=3),
        _changed("with-code", "trained on documentation and code", text=Text.CODE),
        _changed("with-pass-keys", "trained on documentation with pass keys in it", text=Text.PASS_KEYS),
        Untrained(
            "shared-layers",
            f"{_FINE.name}; every second layer reads the lists of the layer before",
            _FINE.name,
            Selection.SHARED_LAYERS,
        ),
        Untrained(
            "local-heads",
            f"{_FINE.name}; heads that attend to the first and the latest blocks read those",
            _FINE.name,
            Selection.LOCAL_HEADS,
        ),
    )
}
# As they are measured: the baselines after those that answer the main questions.
ORDER = (*list(VARIANTS)[:4], BASELINES, *list(VARIANTS)[4:])
