"""Draw evaluations, benchmarks and block maps: plot loss|speed|density|maps."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from seer_jax import tiny_lm
from seer_jax.checks import check_at_least
from seer_jax.commands.arguments import PROGRAM, ExitCode, HubOptions, model_of, parse
from seer_jax.commands.errors.usage import UsageError, UsageParser, one_of
from seer_jax.commands.stages import Stages
from seer_jax.evaluate.comparison import check_context
from seer_jax.evaluate.levels import Phase, gates_by_phase
from seer_jax.inference.memory import GIB, available_memory, tree_bytes
from seer_jax.models.config import DType
from seer_jax.models.decoder import Transformer
from seer_jax.models.pretrained import from_pretrained, load_tokenizer
from seer_jax.outputs import PAGE_FORMAT, check_plot_file
from seer_jax.plots.density import HeadValues, plot_densities, policy_values
from seer_jax.plots.loss import plot_loss
from seer_jax.plots.map_figure import plot_block_maps
from seer_jax.plots.maps import BlockMaps, block_maps, decode_block_maps, far_sighted_heads
from seer_jax.plots.page import PagePhase, write_page
from seer_jax.plots.score_files import read_experiments
from seer_jax.plots.speed import plot_speed, read_timings
from seer_jax.selection.policies import Policy
from seer_jax.selection.rules import RankingPolicy, TopK
from seer_jax.selection.scorers import LearnedGate, Oracle
from seer_jax.settings import check_types
from seer_jax.text_files import read_text

SCORES = "scores.json"
DRAWN_HEADS = 4
DENSITY = 0.1  # where neither the user nor a gate names a policy


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
class TextPlot(HubOptions):
    """What is common to plots of a model on a text.

    Attributes:
      output: file to write.
      model: folder or hub id of the base model; tiny-lm is the bundled one. None: the base model that the gates name, otherwise tiny-lm.
      gates: folders or hub ids of one prefill gate, one decode gate, or both; tiny-lm stands for both gates of the bundled model.
      text: UTF-8 file; None: Python source code that the bundled model was not trained on.
      length: tokens of the text, from its start.
      phases: prefill, decode or both. None: both; in a picture of maps, which has room for one, prefill.
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
        check_at_least(2, self, "length")
        if self.phases == ():
            raise ValueError("phases must name at least one; got none. Leave it out for the usual ones.")
        for phase in Phase:
            policy = getattr(self, phase.value)
            if policy is not None and not isinstance(policy, RankingPolicy):
                raise ValueError(f"{phase.value} must rank blocks, as topk:0.1 does; got {policy}.")

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
                f"phases of a picture must be one; got {' and '.join(self.shown)}. Name one, or an output that ends in {PAGE_FORMAT}."
            )
        if self.is_page and self.heads:
            raise ValueError(f"heads must come with a picture, as a page has all of them; got {', '.join(self.heads)}.")

    @property
    def is_page(self) -> bool:
        """Whether an HTML page is asked for."""
        return self.output.suffix == PAGE_FORMAT

    @property
    def shown(self) -> tuple[Phase, ...]:
        return (Phase.PREFILL,) if self.phases is None and not self.is_page else super().shown

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The heads as (layer, head)."""
        return [(int(layer), int(head)) for layer, head in map(_parts, self.heads)]


def _parts(head: str) -> tuple[str, str]:
    layer, _, number = head.partition(".")
    return layer, number


def run(words: list[str]) -> int:
    parser = UsageParser(f"{PROGRAM} plot", description=__doc__)
    summaries = "; ".join(f"{name}: {summary}" for name, (_, _, summary) in PLOTS.items())
    parser.add_argument("what", metavar="{" + ",".join(PLOTS) + "}", help=summaries)
    what = parser.parse_args(words[:1]).what
    if what not in PLOTS:
        raise UsageError(one_of("what to draw", list(PLOTS), what))
    kind, draw, _ = PLOTS[what]
    stages = Stages(Console())
    draw(parse(kind, f"plot {what}", words[1:]), stages)
    return ExitCode.OK


def draw_loss(config: LossPlot, stages: Stages) -> None:
    """`seer-jax plot loss`."""
    check_plot_file(config.output, setting="output")
    experiments = read_experiments(config.score_files)
    plot_loss(config.output, experiments, methods=config.methods, rules=config.rules)
    stages.say(f"Drawn: {config.output}")


def draw_speed(config: SpeedPlot, stages: Stages) -> None:
    """`seer-jax plot speed`."""
    check_plot_file(config.output, setting="output")
    experiments, timings = read_experiments(config.score_files), read_timings(config.bench, length=config.length)
    plot_speed(config.output, experiments, timings, methods=config.methods, rules=config.rules)
    stages.say(f"Drawn: {config.output}")


def draw_density(config: DensityPlot, stages: Stages) -> None:
    """`seer-jax plot density`."""
    check_plot_file(config.output, setting="output")
    text = TextMaps.of(config)
    panels = []
    for phase, maps, policy in text.read(stages):
        head, density = _head_word(phase), np.asarray(maps.density)
        panels.append(HeadValues(f"{phase.value.capitalize()}: kept, %", density, head))
        values = policy_values(policy, *density.shape)
        if values is not None:
            panels.append(HeadValues(f"{phase.value.capitalize()}: {policy.value}", values, head, is_share=False))
    plot_densities(config.output, panels, title=f"{text.title}; {text.policies}")
    stages.say(f"Drawn: {config.output}")


def draw_maps(config: MapsPlot, stages: Stages) -> None:
    """`seer-jax plot maps`."""
    check_plot_file(config.output, setting="output", pages=True)
    text = TextMaps.of(config)
    if config.is_page:
        phases = [_page_phase(*one) for one in text.read(stages)]
        write_page(config.output, phases, title=f"Block maps of {text.name}", about=text.title)
    else:
        text.check_heads(config.pairs)
        ((phase, maps, policy),) = text.read(stages)
        settings: dict[str, Any] = dict(title=f"{text.title}; {text.policies}", scorer=policy.scorer.title)
        heads = config.pairs or far_sighted_heads(maps, DRAWN_HEADS)
        plot_block_maps(config.output, maps, heads, decode=phase is Phase.DECODE, **settings)
    stages.say(f"Drawn: {config.output}")


# Name: configuration, what draws by it, and a summary.
PLOTS: dict[str, tuple[type, Callable[..., None], str]] = {
    "loss": (LossPlot, draw_loss, "perplexity over dense against the blocks kept, from seer-jax eval"),
    "speed": (SpeedPlot, draw_speed, "times faster than dense against perplexity, with seer-jax bench"),
    "density": (DensityPlot, draw_density, "blocks kept by each layer and head"),
    "maps": (MapsPlot, draw_maps, "block maps of a text: a page to browse (.html) or a picture"),
}


def _head_word(phase: Phase) -> str:
    return "head" if phase is Phase.PREFILL else "key/value head"


def _page_phase(phase: Phase, maps: BlockMaps, policy: RankingPolicy) -> PagePhase:
    values = policy_values(policy, *np.shape(maps.density))
    return PagePhase(phase, maps, str(policy), policy.scorer.title, values, policy.value)


@dataclasses.dataclass(frozen=True)
class TextMaps:
    """What is read, checked before weights are loaded.

    Attributes:
      config: as the user wrote it.
      model_name: of the base model.
      shapes: the model without weights.
      chosen: policy of each phase.
      tokens: of the text.
    """

    config: TextPlot
    model_name: str
    shapes: Transformer
    chosen: dict[Phase, RankingPolicy]
    tokens: np.ndarray

    @classmethod
    def of(cls, config: TextPlot) -> "TextMaps":
        """Reads the text and the model's shapes.

        Raises:
          FileNotFoundError, PermissionError, ConnectionError: model, gates or text are not there.
          ValueError: settings, model, gates and text do not fit each other.
          MemoryError: the device has no room for weights and maps.
        """
        text = read_text(config.text or tiny_lm.path() / "eval_text.txt")
        name = model_of(config.model, config.gates, config.hub)
        dtype = config.dtype or DType.default()
        shapes = from_pretrained(name, config.gates, dtype=dtype, abstract=True, **config.hub)
        chosen = {phase: _policy(config, shapes, phase) for phase in config.shown}
        encoded = load_tokenizer(name, **config.hub).encode(text, special_tokens=False)
        tokens = np.array(encoded[: config.length], np.int32)
        if len(tokens) < 2:
            raise ValueError(f"The text must have at least 2 tokens; got {len(tokens)}. Name another `text`.")
        check_context(shapes, len(tokens), beyond_context=config.beyond_context)
        found = cls(config, name, shapes, chosen, tokens)
        found._check_memory()
        return found

    @property
    def name(self) -> str:
        """Of the model, without the folders above it."""
        return self.model_name.rstrip("/").rpartition("/")[2]

    @property
    def title(self) -> str:
        """Model and text."""
        text = "Python source" if self.config.text is None else self.config.text.name
        return f"{self.name}, {len(self.tokens)} tokens of {text}"

    @property
    def policies(self) -> str:
        """What chooses the blocks."""
        return ", ".join(f"{phase.value} {policy}" for phase, policy in self.chosen.items())

    def check_heads(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Raises ValueError for heads that the model has not."""
        (phase,), model = self.chosen, self.shapes.config
        heads = model.num_heads if phase is Phase.PREFILL else model.num_kv_heads
        if wrong := [f"{layer}.{head}" for layer, head in pairs if layer >= model.num_layers or head >= heads]:
            raise ValueError(
                f"heads must be layers 0 to {model.num_layers - 1} and {phase.value} heads 0 to {heads - 1}; got {wrong[0]}."
            )

    def read(self, stages: Stages) -> Iterator[tuple[Phase, BlockMaps, RankingPolicy]]:
        """Loads the model, and yields the maps of each phase with the policy that kept the blocks."""
        if len(self.tokens) < self.config.length:
            stages.say(f"The text has {len(self.tokens)} tokens; {self.config.length} were asked for.")
        with stages.stage("Loading the model"):
            dtype = self.config.dtype or DType.default()
            model = from_pretrained(self.model_name, self.config.gates, dtype=dtype, **self.config.hub)
        for phase, policy in self.chosen.items():
            with stages.stage(f"Reading the text, {phase.value} {policy}"):
                make = block_maps if phase is Phase.PREFILL else decode_block_maps
                maps = jax.device_get(make(model, self.tokens, policy))
            yield phase, maps, policy

    def _check_memory(self) -> None:
        memory, weights, count = available_memory(self.shapes), tree_bytes(self.shapes), len(self.tokens)
        needed = max(weights + _maps_bytes(self.shapes, phase, policy, count) for phase, policy in self.chosen.items())
        if memory is not None and needed > memory.free:
            raise MemoryError(
                f"Weights and block maps must fit in device memory: need {needed / GIB:.3f} GiB, {memory.free / GIB:.3f} GiB available. "
                "Lower `length`."
            )


def _maps_bytes(model: Transformer, phase: Phase, policy: RankingPolicy, count: int) -> int:
    """Of two maps in float32 and one of bits, of all layers."""
    blocks = -(-count // policy.tokens_per_block(gates_by_phase(model)[phase]))
    config = model.config
    rows, heads = (blocks, config.num_heads) if phase is Phase.PREFILL else (count, config.num_kv_heads)
    return config.num_layers * heads * rows * blocks * 9


def _policy(config: TextPlot, model: Transformer, phase: Phase) -> RankingPolicy:
    """The policy of a phase, checked against the model."""
    gate = gates_by_phase(model)[phase]
    recommended = None if gate is None else gate.recommended
    policy = getattr(config, phase.value)
    if policy is None:
        policy = recommended if isinstance(recommended, RankingPolicy) else TopK(DENSITY, _scorer(gate))
    model.segments(policy, gate, model.config.num_heads if phase is Phase.PREFILL else model.config.num_kv_heads)
    return policy


def _scorer(gate: Any) -> LearnedGate | Oracle:
    return Oracle() if gate is None else LearnedGate()
