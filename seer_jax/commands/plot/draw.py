"""What each `seer-jax plot` does: reads, draws, and says where."""

from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console

from seer_jax.commands import PROGRAM, ExitCode
from seer_jax.commands.arguments import parse
from seer_jax.commands.errors.usage import UsageError, UsageParser, one_of
from seer_jax.commands.plot.configs import DensityPlot, LossPlot, MapsPlot, SpeedPlot
from seer_jax.commands.plot.text_maps import TextMaps
from seer_jax.commands.stages import Stages
from seer_jax.evaluate.levels import Phase
from seer_jax.outputs import check_plot_file
from seer_jax.plots.density import HeadValues, plot_densities, policy_values
from seer_jax.plots.loss import not_drawn, plot_loss
from seer_jax.plots.map_figure import plot_block_maps
from seer_jax.plots.maps import BlockMaps, far_sighted_heads
from seer_jax.plots.page import PagePhase, write_page
from seer_jax.plots.score_files import read_experiments
from seer_jax.plots.speed import not_timed, plot_speed, read_timings
from seer_jax.selection.rules import RankingPolicy

DRAWN_HEADS = 4


def run(words: list[str]) -> int:
    parser = UsageParser(f"{PROGRAM} plot", description="Draws what evaluations, benchmarks and texts show.")
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
    for note in not_drawn(experiments, methods=config.methods, rules=config.rules):
        stages.say(note)
    stages.say(f"Drawn: {config.output}")


def draw_speed(config: SpeedPlot, stages: Stages) -> None:
    """`seer-jax plot speed`."""
    check_plot_file(config.output, setting="output")
    experiments, timings = read_experiments(config.score_files), read_timings(config.bench, length=config.length)
    chosen: dict[str, Any] = dict(methods=config.methods, rules=config.rules)
    plot_speed(config.output, experiments, timings, **chosen)
    for note in not_drawn(experiments, **chosen) + not_timed(experiments, timings, **chosen):
        stages.say(note)
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
