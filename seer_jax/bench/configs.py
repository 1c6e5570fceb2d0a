"""What each `seer-jax bench` takes."""

import dataclasses
import enum
import math
from pathlib import Path
from typing import ClassVar, Literal, get_args

from pallas_kernels.backends import Implementation
from pallas_kernels.cases import Heads
from pallas_kernels.devices import default_device
from seer_jax.checks import check_at_least, check_seed, listed
from seer_jax.gates.configs import DecodeGateConfig, GateConfig, PrefillGateConfig, TrainedGates, changed_settings
from seer_jax.models.config import ModelConfig, RopeConfig, RopeKind
from seer_jax.selection.notation import parse_policy
from seer_jax.selection.rules import RankingPolicy

BLOCK = 64  # tokens


class ModelShape(enum.StrEnum):
    """Shapes of models to measure; tiny is for trying the command on a CPU."""

    LLAMA_3_1_8B = "llama-3.1-8b"
    LLAMA_3_2_1B = "llama-3.2-1b"
    LLAMA_3_2_3B = "llama-3.2-3b"
    QWEN3_32B = "qwen3-32b"
    LLAMA_3_1_70B = "llama-3.1-70b"
    TINY = "tiny"


class FinetuningStep(enum.StrEnum):
    """What a step of fine-tuning trains, and how attention works: densely, or sparsely on the lists of a gate that trains along."""

    FULL = "full"
    LORA = "lora"
    SPARSE_FULL = "sparse-full"
    SPARSE_LORA = "sparse-lora"

    @property
    def adapts(self) -> bool:
        """Whether adapters train, not the base weights."""
        return self in (FinetuningStep.LORA, FinetuningStep.SPARSE_LORA)

    @property
    def is_sparse(self) -> bool:
        """Whether a gate trains along."""
        return self in (FinetuningStep.SPARSE_FULL, FinetuningStep.SPARSE_LORA)


PrefillPart = Literal["attention", "cases", "selection", "model"]
DecodePart = Literal["kernel", "layer", "model"]
Scores = Literal["blocks", "tokens", "both", "neither"]
Statistic = Literal["max", "mass"]

_LLAMA_3_1_8B = ModelConfig(
    family="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope=RopeConfig(theta=5e5, kind=RopeKind.LLAMA3, factor=8.0, original_max_position=8192),
    max_position_embeddings=131072,
)
MODELS = {
    ModelShape.LLAMA_3_1_8B: _LLAMA_3_1_8B,
    ModelShape.LLAMA_3_2_1B: dataclasses.replace(
        _LLAMA_3_1_8B,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        head_dim=64,
        tie_word_embeddings=True,
        rope=dataclasses.replace(_LLAMA_3_1_8B.rope, factor=32.0),
    ),
    ModelShape.LLAMA_3_2_3B: dataclasses.replace(
        _LLAMA_3_1_8B,
        hidden_size=3072,
        intermediate_size=8192,
        num_layers=28,
        num_heads=24,
        tie_word_embeddings=True,
        rope=dataclasses.replace(_LLAMA_3_1_8B.rope, factor=32.0),
    ),
    ModelShape.QWEN3_32B: ModelConfig(
        family="qwen3",
        vocab_size=151936,
        hidden_size=5120,
        intermediate_size=25600,
        num_layers=64,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        qk_norm=True,
        rope=RopeConfig(theta=1e6, kind=RopeKind.YARN, factor=4.0, original_max_position=32768),
        max_position_embeddings=131072,
    ),
    ModelShape.LLAMA_3_1_70B: dataclasses.replace(
        _LLAMA_3_1_8B, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64
    ),
    ModelShape.TINY: ModelConfig(
        family="llama",
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
    ),
}


def gate_settings(*gates: GateConfig) -> dict[str, str]:
    """What a measurement says of its gates where they are not the default ones."""
    changed = "; ".join(filter(None, map(changed_settings, gates)))
    return {"gate_settings": changed} if changed else {}


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Settings of every bench.

    Attributes:
      shape: heads of the attention and size of the model.
      lengths: tokens of each sequence.
      seed: of weights, inputs and lists.
      output: file for the measurements (JSON); None: none is written.
      plot: file for a plot (.png, .svg or .pdf); None: none is drawn.
    """

    shape: ModelShape = ModelShape.LLAMA_3_1_8B
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    seed: int = 0
    output: Path | None = None
    plot: Path | None = None

    @property
    def model(self) -> ModelConfig:
        """The model of this shape."""
        return MODELS[self.shape]

    @property
    def heads(self) -> Heads:
        """H, K and D of its attention."""
        return Heads(self.model.num_heads, self.model.num_kv_heads, self.model.head_dim)

    def check_device(self) -> None:
        """Raises ValueError for a shape that a CPU is too slow for."""
        if self.shape is not ModelShape.TINY and default_device().platform == "cpu":
            raise ValueError(f"The shape {self.shape.value} must run on a GPU; got a CPU. Measure --shape tiny.")

    def _check_inputs(self, blocks: int, *, whole: bool = False) -> None:
        check_seed("seed", self.seed)
        if not self.lengths or any(n < blocks * BLOCK or (whole and n % BLOCK) for n in self.lengths):
            least = f"at least {blocks * BLOCK} tokens{f', whole blocks of {BLOCK}' if whole else ''}"
            raise ValueError(f"lengths must be {least}; got {listed(self.lengths)}.")


@dataclasses.dataclass(frozen=True)
class PolicyBench(BenchConfig):
    """Settings of benches that measure policies.

    Attributes:
      densities: shares of the blocks on the lists of the attention kernel.
      model_density: share of the blocks that gate, layer and model keep.
      policies: what chooses blocks in prefill's selection and decode's layer, such as topk:0.1:window; none: some of a gate.
      implementation: of the attention kernel; None: the best one here. Layer and model always take the best one.
    """

    phase: ClassVar[str]

    densities: tuple[float, ...] = (0.1,)
    model_density: float = 0.1
    policies: tuple[str, ...] = ()
    implementation: Implementation | None = None

    def rules(self) -> dict[str, RankingPolicy]:
        """The policies by their text.

        Raises:
          ValueError: one is no policy, or ranks no blocks, or not those of the phase.
        """
        rules = {}
        for text in self.policies:
            try:
                rules[text] = parse_policy(text)
            except ValueError as error:
                raise ValueError(f"policies must be policies; {error}") from error
            if not isinstance(rules[text], RankingPolicy):
                raise ValueError(f"policies must rank blocks, as topk:0.1 does; got {text}.")
            rules[text].check_phase(self.phase)
        return rules

    def _check_policies(self) -> None:
        for name, densities in (("densities", self.densities), ("model_density", (self.model_density,))):
            if wrong := [str(density) for density in densities if not 0 < density <= 1]:
                raise ValueError(f"{name} must lie in (0, 1]; got {', '.join(wrong)}.")
        self.rules()


@dataclasses.dataclass(frozen=True)
class PrefillBench(PolicyBench):
    """Measures block-sparse prefill on this machine: the attention kernel, the choice of blocks, and a whole model.

    Each result of the kernel is held against float32 before it is timed. The command fails if one is wrong.

    Attributes:
      gate: configuration of the gate, untrained, that chooses blocks in selection and model.
      only: parts to measure.
      variants: measure every configuration that the implementation offers.
      skip_thresholds: of the attention, in [0, 1]: listed blocks whose largest weight is below that share of the row's largest so far are
        skipped; each threshold is measured beside none.
      backward: measure the attention's gradients as well, forward and backward together, beside dense attention's.
      peak: of the attention's inputs; 0: queries and keys are standard normal vectors. Above, each is a quarter of one plus the peak times
        one that all of its block share: scores are about peak^2 times a standard normal number for each pair of blocks.
      chunk: tokens of the whole model's prompts that are read at a time; None: all.
      dense: whether the whole model is measured with dense attention too, beside which its speed is given.
    """

    phase = "prefill"

    gate: PrefillGateConfig = dataclasses.field(default_factory=PrefillGateConfig)
    densities: tuple[float, ...] = (0.02, 0.1, 0.2, 0.5, 1.0)
    only: tuple[PrefillPart, ...] = get_args(PrefillPart)
    variants: bool = False
    skip_thresholds: tuple[float, ...] = ()
    backward: bool = False
    peak: float = 0.0
    chunk: int | None = None
    dense: bool = True

    def __post_init__(self) -> None:
        self._check_inputs(1)
        self._check_policies()
        if self.chunk is not None and (self.chunk < 1 or self.chunk % self.gate.block_size):
            raise ValueError(
                f"chunk must be a multiple of {self.gate.block_size} tokens, whole blocks of the gate; got {self.chunk}."
            )
        for name, given in (("a `chunk` is given", self.chunk is not None), ("`dense` is off", not self.dense)):
            if given and "model" not in self.only:
                raise ValueError(f"only must name model where {name}; got none of it. Leave that out, or add model.")
        if not self.densities and "attention" in self.only:
            raise ValueError("densities must name some where the attention is measured; got none.")
        if self.plot is not None and "attention" not in self.only:
            raise ValueError("A plot must have the attention among the parts to measure; got no attention.")
        if self.variants and self.implementation is None:
            raise ValueError("variants must be those of a named implementation; got variants without implementation.")
        if wrong := [str(value) for value in self.skip_thresholds if not 0 <= value <= 1]:
            raise ValueError(f"skip_thresholds must lie in [0, 1]; got {', '.join(wrong)}.")
        if self.backward and "attention" not in self.only:
            raise ValueError(
                "only must name attention where backward is measured; got none of it. Leave backward out, or add attention."
            )
        if not 0 <= self.peak < math.inf:
            raise ValueError(f"peak must be a number of at least 0; got {self.peak}.")
        if (self.skip_thresholds or self.peak) and "attention" not in self.only:
            raise ValueError(
                "only must name attention where skip_thresholds or a peak are given; got none of it. Leave them out, or add attention."
            )


@dataclasses.dataclass(frozen=True)
class DecodeBench(PolicyBench):
    """Measures decoding on this machine: the attention kernel, a layer's attention with its gate, and a whole model.

    Each result of the kernel is held against float32 before it is timed. The command fails if one is wrong. What the device
    has no memory for is left out with a note. The newest token counts among the tokens of a sequence.

    Attributes:
      gate: configuration of the gate, untrained, that chooses blocks in layer and model.
      batches: numbers of sequences.
      only: parts to measure.
      tokens: new ones of each sequence that the model makes in one run.
    """

    phase = "decode"

    gate: DecodeGateConfig = dataclasses.field(default_factory=DecodeGateConfig)
    batches: tuple[int, ...] = (1, 8, 16)
    only: tuple[DecodePart, ...] = get_args(DecodePart)
    tokens: int = 16

    def __post_init__(self) -> None:
        self._check_inputs(2)
        self._check_policies()
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches must hold at least one sequence; got {listed(self.batches)}.")
        if not 1 <= self.tokens < min(self.lengths):
            raise ValueError(f"tokens must be 1 to {min(self.lengths) - 1}, part of the lengths; got {self.tokens}.")
        if not self.only:
            raise ValueError(
                f"only must name some of {', '.join(get_args(DecodePart))}; got none. Leave it out for all."
            )


@dataclasses.dataclass(frozen=True)
class GroundTruthBench(BenchConfig):
    """Measures dense attention with block scores, which the training of gates runs in each layer, beside dense attention alone.

    Each result is held against float32 before it is timed. The command fails if one is wrong.

    Attributes:
      wanted: scores to ask for: blocks (targets of a prefill gate), tokens (of a decode gate), both, or neither.
      statistics: what the scores are of: the largest weight of each block (max), its mass, or each in turn.
      chunk: queries that are taken at a time where token scores are asked for.
      implementation: of the operation; None: the best one here.
    """

    lengths: tuple[int, ...] = (8192, 32768, 65536, 131072)
    wanted: tuple[Scores, ...] = get_args(Scores)
    statistics: tuple[Statistic, ...] = get_args(Statistic)
    chunk: int = 8192
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        self._check_inputs(1)
        if self.chunk < BLOCK or self.chunk % BLOCK:
            raise ValueError(f"chunk must be a multiple of the {BLOCK} tokens of a block; got {self.chunk}.")
        for name, kinds in (("wanted", Scores), ("statistics", Statistic)):
            if not getattr(self, name):
                raise ValueError(
                    f"{name} must name some of {', '.join(get_args(kinds))}; got none. Leave it out for all."
                )


@dataclasses.dataclass(frozen=True)
class TrainBench(BenchConfig):
    """Measures a step of distillation, and of fine-tuning, on this machine, beside a dense forward of the same tokens.

    Attributes:
      kinds: which gates a step of distillation trains, one measurement each.
      finetune: steps of fine-tuning, one measurement each: of all weights (full) or adapters of rank 16 (lora), with dense attention, or sparse
        on the lists of a prefill gate that trains along.
      density: share of the blocks that sparse fine-tuning keeps, in (0, 1].
      batch_size: rows per step, worked off one at a time.
      prefill: configuration of the prefill gate.
      decode: configuration of the decode gate.
    """

    lengths: tuple[int, ...] = (65536, 131072)
    kinds: tuple[TrainedGates, ...] = tuple(TrainedGates)
    finetune: tuple[FinetuningStep, ...] = ()
    density: float = 0.1
    batch_size: int = 1
    prefill: PrefillGateConfig = dataclasses.field(default_factory=PrefillGateConfig)
    decode: DecodeGateConfig = dataclasses.field(default_factory=DecodeGateConfig)

    def __post_init__(self) -> None:
        self._check_inputs(2, whole=True)
        if not self.kinds and not self.finetune:
            raise ValueError(f"kinds must name some of {', '.join(TrainedGates)}, or `finetune` a step; got none.")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be a share in (0, 1]; got {self.density}.")
        check_at_least(1, self, "batch_size")
