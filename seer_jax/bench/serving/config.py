"""What `seer-jax bench serving` takes."""

import dataclasses
import math

from seer_jax.bench.configs import BenchConfig
from seer_jax.checks import check_at_least, check_seed, listed
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.rules import TopK


@dataclasses.dataclass(frozen=True)
class ServingBench(BenchConfig):
    """Measures requests to an engine: all slots at work (continuous batching), beside one request after the other.

    Each request's prompt has half to all of one of the lengths, and it asks for half to all of the new tokens, by the seed. Both ways get the same requests at the
    same times. Time to first token counts from the time at which a request was to come.

    Attributes:
      lengths: tokens of the longest prompts of each kind.
      requests: how many.
      rate: requests per second, at random times (a Poisson process); 0: all at once.
      new_tokens: most new tokens of a request.
      slots: of the engines to measure.
      decode_steps: new tokens of each row in a step of the engine.
      chunk: tokens of a prompt that are read at a time; None: as the engine chooses.
      density: share of the blocks that reading and decoding keep; 1: dense.
      prefill, decode: configurations of the gates, untrained.
    """

    lengths: tuple[int, ...] = (8192, 32768)
    requests: int = 32
    rate: float = 0.0
    new_tokens: int = 256
    slots: tuple[int, ...] = (8,)
    decode_steps: int = 8
    chunk: int | None = None
    density: float = 0.1
    prefill: PrefillGateConfig = dataclasses.field(default_factory=PrefillGateConfig)
    decode: DecodeGateConfig = dataclasses.field(default_factory=DecodeGateConfig)

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"lengths must be at least 2 tokens; got {listed(self.lengths)}.")
        check_at_least(1, self, "requests", "new_tokens", "decode_steps")
        block = math.lcm(self.prefill.block_size, self.decode.block_size)
        if self.chunk is not None and (self.chunk < 1 or self.chunk % block):
            raise ValueError(
                f"chunk must be a multiple of {block} tokens, whole blocks of the gates; got {self.chunk}."
            )
        if not self.slots or min(self.slots) < 2:
            raise ValueError(
                f"slots must be at least 2, which one after the other is measured beside; got {listed(self.slots)}."
            )
        if not 0 <= self.rate < math.inf:
            raise ValueError(f"rate must be a number of at least 0 requests per second; got {self.rate}.")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1]; got {self.density}.")
        if self.plot is not None:
            raise ValueError(
                "plot must be left out of bench serving, which draws none; got one. Use --output for a file."
            )

    @property
    def capacity(self) -> int:
        """Tokens that a slot must have room for."""
        return max(self.lengths) + self.new_tokens

    @property
    def policy(self) -> Policy:
        """Policy of both phases."""
        return Dense() if self.density == 1 else TopK(self.density)
