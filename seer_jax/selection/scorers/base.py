"""What every scorer is, and the registry of those that exist."""

from typing import Any, ClassVar

from jaxtyping import Array, Bool, Float32

from seer_jax.selection.context import Context, DecodeContext, PrefillContext

PHASES = ("prefill", "decode")


class Scorer:
    """Gives each key block a score; a rule turns scores into lists.

    A scorer is one frozen dataclass, registered as a JAX pytree and with `register`. It defines `prefill_scores`, `decode_scores` or
    both; one that defines a single one of them works in that phase alone. The registry feeds the choices and the help of the
    command line, the tables and the JSON of the evaluation.

    Attributes:
      name: as a command line writes it.
      title: as tables show it.
      meaning: one line for legends.
      needs_gate: whether it works with a learned gate alone.
      by_default: whether a comparison that names no methods measures it.
      reads_in_chunks: whether the scores of a block row depend on its own queries and on keys up to its end alone, keys after RoPE or the
        gate's, so that prompts can be read in chunks. Not where a scorer looks at the last queries of the prompt.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    meaning: ClassVar[str]
    needs_gate: ClassVar[bool] = False
    by_default: ClassVar[bool] = True
    reads_in_chunks: ClassVar[bool] = False

    @classmethod
    def phases(cls) -> tuple[str, ...]:
        """The phases that it defines scores for: "prefill", "decode" or both."""
        return tuple(
            phase for phase in PHASES if getattr(cls, f"{phase}_scores") is not getattr(Scorer, f"{phase}_scores")
        )

    @classmethod
    def check_phase(cls, phase: str) -> None:
        """Raises ValueError where the scorer has no scores for the phase."""
        if phase not in cls.phases():
            others = ", ".join(name for name, kind in SCORERS.items() if phase in kind.phases())
            raise ValueError(
                f"A {phase} policy must rank blocks by a scorer for {phase}; got {cls.name}, which is for "
                f"{' and '.join(cls.phases()) or 'no phase'} alone. Use one of {others}."
            )

    def check_block_size(self, block_size: int) -> None:
        """Raises ValueError where the scorer's settings do not fit blocks of so many tokens."""
        del block_size  # most fit any

    def prepare(self, context: PrefillContext) -> Any:
        """What the scorer makes of the keys of a layer and the last queries of its prompts, a pytree that all chunks of query rows
        share (`context.prepared`).

        Args:
          context: with all queries of the pass, before they are cut into chunks.
        """
        del context
        return None

    def keep(self, context: Context) -> Bool[Array, "..."] | None:
        """Blocks that the method keeps whatever their scores, besides each row's own; None: none.

        Rules add them to what they choose. Those with a fixed number of blocks (`TokenBudget`, and `TopK` while decoding) take
        them before others and stay within that number.

        Returns:
          A mask that broadcasts to the shape of the scores; at decode of blocks up to the token's own.
        """
        del context
        return None

    def prefill_scores(self, context: PrefillContext) -> Float32[Array, "B Hs Tb Sb"]:
        """Scores before softmax of a prompt's block rows, for Hs of {1, K, H} lists.

        Entries at or above `context.visible` are not read and may hold anything.
        """
        del context
        self.check_phase("prefill")
        raise NotImplementedError

    def decode_scores(self, context: DecodeContext) -> Float32[Array, "B K Sb"]:
        """Scores before softmax for the newest token of each row.

        Entries from the token's own block on are not read and may hold anything. Keys behind `context.position` are not those of
        the row and must change nothing.
        """
        del context
        self.check_phase("decode")
        raise NotImplementedError


SCORERS: dict[str, type[Scorer]] = {}


def register[S: type[Scorer]](kind: S) -> S:
    """Class decorator: makes a scorer known by its name.

    Raises:
      ValueError: another scorer has the name, or the class defines no scores.
    """
    known = SCORERS.get(kind.name)
    if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(
            f"A scorer's name must be its own; got {kind.name!r}, which is {known.__qualname__}. Choose another name."
        )
    if not kind.phases():
        raise ValueError(f"A scorer must define prefill_scores or decode_scores; got {kind.__qualname__} with neither.")
    SCORERS[kind.name] = kind
    return kind
