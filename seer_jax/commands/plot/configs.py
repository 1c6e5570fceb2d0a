"""What each `seer-jax plot` takes."""

import dataclasses
from pathlib import Path

from seer_jax.checks import check_at_least
from seer_jax.commands.arguments import ModelOptions
from seer_jax.evaluate.levels import Phase
from seer_jax.models.config import DType
from seer_jax.outputs import PAGE_FORMAT
from seer_jax.selection.policies import Policy
from seer_jax.selection.rules import RankingPolicy
from seer_jax.settings import check_types

SCORES = "scores.json"


@dataclasses.dataclass(frozen=True)
class LossPlot:
    """Draws perplexity over dense against the share of the blocks that is kept, for each method of one or several evaluations.

    Attributes:
      scores: scores.json of `seer-jax eval`, or the folders that hold them. Files of the same model and text share their panels.
      output: file to draw: .png, .svg or .pdf.
      methods: names of the methods to draw; none: all.
      rules: names of the rules to draw, such as topk; none: all.
    """

    scores: tuple[Path, ...]
    output: Path
    methods: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_types(self)
        if not self.scores:
            raise ValueError("scores must name at least one file; got none.")

    @property
    def score_files(self) -> list[Path]:
        """The files, also where their folders are named."""
        return [path / SCORES if path.is_dir() else path for path in self.scores]


@dataclasses.dataclass(frozen=True)
class SpeedPlot(LossPlot):
    """Draws times faster than dense against perplexity over dense: each level's time is that of a benchmark at its share of the blocks.

    Attributes:
      bench: JSON files that `seer-jax bench prefill` and `bench decode` wrote (--output), with several --densities.
      length: tokens of the sequences that were timed; None: the most.
    """

    bench: tuple[Path, ...] = ()
    length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.bench:
            raise ValueError("bench must name at least one file; got none.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPlot(ModelOptions):
    """What is common to plots of a model on a text.

    Attributes:
      output: file to write.
      model: folder or hub id of the base model; tiny-lm is the bundled one. None: the base model that the gates name, otherwise tiny-lm.
      gates: folders or hub ids of one prefill gate, one decode gate, or both; tiny-lm and smollm2 stand for both gates of
        these models, tiny-lm-release and smollm2-release for those of the release's kinds.
      text: UTF-8 file; None: Python source code that the bundled model was not trained on.
      length: tokens of the text, from its start.
      phases: prefill, decode or both. None: both; in a picture of maps, which has room for one, that of the policy that is given, or of
        the gate, otherwise prefill.
      prefill: policy for prompts. None: what the prefill gate recommends, otherwise topk:0.1, by the oracle where there is no gate.
      decode: policy for new tokens; None: as for prompts.
      dtype: dtype of the base model's weights and arithmetic; None: bfloat16, or float32 on a CPU.
      beyond_context: allow more tokens than the model's context.
    """

    output: Path
    model: str | None = None
    gates: tuple[str, ...] = ()
    text: Path | None = None
    length: int = 2048
    phases: tuple[Phase, ...] | None = None
    prefill: Policy | None = None
    decode: Policy | None = None
    dtype: DType | None = None
    beyond_context: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        super().__post_init__()
        check_at_least(2, self, "length")
        if self.phases == ():
            raise ValueError("phases must name at least one; got none. Leave it out for the usual ones.")
        for phase in Phase:
            policy = getattr(self, phase.value)
            if policy is not None and not isinstance(policy, RankingPolicy):
                raise ValueError(f"{phase.value} must rank blocks, as topk:0.1 does; got {policy}.")
            if policy is not None:
                policy.check_phase(phase.value)
                if phase not in self.shown:
                    raise ValueError(
                        f"{phase} must be left out where {' and '.join(self.shown)} is drawn alone; got {policy}. Name its phase: `phases` {phase}."
                    )

    @property
    def is_open(self) -> bool:
        """Whether the model's gates may decide which phase is drawn."""
        return False

    @property
    def named(self) -> tuple[Phase, ...]:
        """The phases that a policy is given for."""
        return tuple(phase for phase in Phase if getattr(self, phase.value) is not None)

    @property
    def shown(self) -> tuple[Phase, ...]:
        """The phases, each once."""
        return tuple(Phase) if self.phases is None else tuple(dict.fromkeys(self.phases))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensityPlot(TextPlot):
    """Draws which share of the blocks each layer and head keeps, and thresholds that a policy has per layer and head."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapsPlot(TextPlot):
    """Draws block maps: the true attention by blocks, the scorer's prediction, and the blocks that are kept.

    As .html, one page without further files to browse all layers and heads; as .png, .svg or .pdf, some heads of one phase.

    Attributes:
      heads: heads of a picture as LAYER.HEAD, such as 3.0 (while decoding key/value heads); none: four that look far.
    """

    heads: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := [head for head in self.heads if not all(part.isdecimal() for part in _parts(head))]:
            raise ValueError(f"heads must be written LAYER.HEAD, such as 3.0; got {wrong[0]}.")
        if not self.is_page and len(self.shown) > 1:
            raise ValueError(
                f"phases must be one in a picture; got {' and '.join(self.shown)}. Name one, or an output that ends in {PAGE_FORMAT}."
            )
        if self.is_page and self.heads:
            raise ValueError(f"heads must come with a picture, as a page has all of them; got {', '.join(self.heads)}.")

    @property
    def is_page(self) -> bool:
        """Whether an HTML page is asked for."""
        return self.output.suffix == PAGE_FORMAT

    @property
    def shown(self) -> tuple[Phase, ...]:
        return (self.named or (Phase.PREFILL,)) if self.phases is None and not self.is_page else super().shown

    @property
    def is_open(self) -> bool:
        return self.phases is None and not self.is_page and not self.named

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The heads as (layer, head)."""
        return [(int(layer), int(head)) for layer, head in map(_parts, self.heads)]


def _parts(head: str) -> tuple[str, str]:
    layer, _, number = head.partition(".")
    return layer, number
