"""What a calibration aims at: a density, a loss, or a share of the attention mass."""

import dataclasses
import enum
import math


class Quantity(enum.StrEnum):
    """What is given; the rest is optimised."""

    DENSITY = "density"
    OVER = "over"
    KEPT_MASS = "kept_mass"


_DOMAINS = {
    Quantity.DENSITY: ("the share of the visible blocks to keep, must lie in (0, 1]", lambda x: 0 < x <= 1),
    Quantity.OVER: (
        "the share by which perplexity may exceed that of dense attention, must be above 0",
        lambda x: 0 < x < math.inf,
    ),
    Quantity.KEPT_MASS: ("the share of the attention mass to keep, must lie in (0, 1)", lambda x: 0 < x < 1),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A density that is to have the least loss, or a loss that is to be met at the least density.

    Attributes:
      quantity: see `Quantity`.
      value: `DENSITY`: share of the visible blocks, mean over rows, layers and heads. `OVER`: perplexity over that of dense attention,
        minus 1. `KEPT_MASS`: share of the attention mass in the kept blocks, mean over tokens, layers and heads.
    """

    quantity: Quantity
    value: float

    def __post_init__(self) -> None:
        meaning, inside = _DOMAINS[self.quantity]
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not inside(self.value):
            raise ValueError(f"`{self.quantity}`, {meaning}; got {self.value!r}.")

    def __str__(self) -> str:
        words = {Quantity.DENSITY: "{:.1%} of the blocks", Quantity.OVER: "{:+.2%} over dense"}
        return words.get(self.quantity, "{:.1%} of the attention mass").format(self.value)
