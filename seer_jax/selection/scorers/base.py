"""What every scorer is, and the registry of those that exist."""

import abc
from typing import Any, ClassVar

from jaxtyping import Array, Float32

from seer_jax.selection.context import DecodeContext, PrefillContext


class Scorer(abc.ABC):
    """Gives each key block a score; a rule turns scores into lists.

    A scorer is one frozen dataclass, registered as a JAX pytree and with `register`. The registry feeds the choices and the help of the
    command line, the tables and the JSON of the evaluation.

    Attributes:
      name: as a command line writes it.
      title: as tables show it.
      meaning: one line for legends.
      needs_gate: whether it works with a learned gate alone.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    meaning: ClassVar[str]
    needs_gate: ClassVar[bool] = False

    def prepare(self, context: PrefillContext) -> Any:
        """What the scorer makes of the keys of a layer, a pytree that all chunks of query rows share (`context.prepared`)."""
        del context
        return None

    @abc.abstractmethod
    def prefill_scores(self, context: PrefillContext) -> Float32[Array, "B Hs Tb Sb"]:
        """Scores before softmax of a prompt's block rows, for Hs of {1, K, H} lists.

        Entries at or above `context.visible` are not read and may hold anything.
        """

    @abc.abstractmethod
    def decode_scores(self, context: DecodeContext) -> Float32[Array, "B K Sb"]:
        """Scores before softmax for the newest token of each row.

        Entries from the token's own block on are not read and may hold anything.
        """


SCORERS: dict[str, type[Scorer]] = {}


def register[S: type[Scorer]](kind: S) -> S:
    """Class decorator: makes a scorer known by its name.

    Raises:
      ValueError: another scorer has the name.
    """
    known = SCORERS.get(kind.name)
    if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(
            f"A scorer's name must be its own; got {kind.name!r}, which is {known.__qualname__}. Choose another name."
        )
    SCORERS[kind.name] = kind
    return kind
