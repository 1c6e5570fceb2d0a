"""`seer-jax bench prefill`: block-sparse prefill from the attention kernel to the whole model."""

import dataclasses
import enum
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.backends import Implementation
from seer_jax.bench.harness.baseline import Baseline
from seer_jax.bench.harness.config import BenchConfig, ModelShape, check_densities
from seer_jax.bench.harness.measurement import Measurement, Outcome, measure, run_program
from seer_jax.bench.harness.plots import Panel
from seer_jax.bench.harness.report import report
from seer_jax.bench.harness.tables import DENSITY, MILLISECONDS, PROGRAM, SPEEDUP, Table
from seer_jax.bench.models import random_model
from seer_jax.bench.prefill_attention import ATTENTION, ODD_CASES, AttentionBench, aligned_cases, odd_cases, variants
from seer_jax.bench.selection import SELECTION, measure_selection, parse_rules
from seer_jax.gates.configs import PrefillGateConfig
from seer_jax.models.cache import Cache
from seer_jax.models.decoder import Transformer
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.rules import TopK

FIRST_TOKEN = Table("model", "Whole model, time to first token", (DENSITY, MILLISECONDS, SPEEDUP, *PROGRAM))


class PrefillPart(enum.StrEnum):
    """What is measured."""

    ATTENTION = "attention"
    CASES = "cases"
    SELECTION = "selection"
    MODEL = "model"


@dataclasses.dataclass(frozen=True)
class PrefillBench(BenchConfig):
    """Measures block-sparse prefill on this machine: the attention kernel, the choice of blocks, and a whole model.

    Each result of the kernel is held against float32 before it is timed. The command fails if one is wrong.

    Attributes:
      densities: shares of the earlier blocks that random masks keep, for the attention.
      model_density: share of the causal map that gate and model keep.
      policies: what chooses blocks where selection is measured, as topk:0.1 or topk:0.1:window; none: a threshold, a
        cumulative mass and top-k of a gate.
      only: parts to measure.
      implementation: of the attention kernel; None: the best one here. The model always takes the best one.
      variants: measure every configuration that the implementation offers.
    """

    densities: tuple[float, ...] = (0.02, 0.1, 0.2, 0.5, 1.0)
    model_density: float = 0.1
    policies: tuple[str, ...] = ()
    only: tuple[PrefillPart, ...] = tuple(PrefillPart)
    implementation: Implementation | None = None
    variants: bool = False

    def __post_init__(self) -> None:
        self.check_lengths(1)
        check_densities(*self.densities, self.model_density)
        parse_rules(self.policies)
        if not self.densities and PrefillPart.ATTENTION in self.only:
            raise ValueError("densities must name some where the attention is measured; got none.")
        if self.plot is not None and PrefillPart.ATTENTION not in self.only:
            raise ValueError("A plot must have the attention among the parts to measure; got no attention.")
        if self.variants and self.implementation is None:
            raise ValueError("variants must be those of a named implementation; got variants without implementation.")


def bench_prefill(config: PrefillBench) -> list[Measurement]:
    """Prints the tables, writes file and plot if they are asked for, and returns the measurements.

    Raises:
      ImportError: a plot is asked for and matplotlib is not installed.
      ValueError: see `measure_prefill`.
    """
    return report(config, measure_prefill(config), (ATTENTION, ODD_CASES, SELECTION, FIRST_TOKEN), PANELS)


def measure_prefill(config: PrefillBench) -> Iterator[Measurement]:
    """Yields each measurement as soon as it is there.

    Raises:
      ValueError: a shape that the device is too slow for, or an implementation that does not exist.
    """
    config.check_device()
    attention: dict[tuple[int, float], float | None] = {}
    if {PrefillPart.ATTENTION, PrefillPart.CASES} & set(config.only):
        offered = variants(config.implementation) if config.variants else {}
        for variant in offered.items() or (None,):
            bench = AttentionBench(config.implementation, variant, config.seed)
            if PrefillPart.ATTENTION in config.only:
                for m in bench.cases(aligned_cases(config.heads, config.lengths, config.densities)):
                    shape = m.settings["num_queries"], m.settings["density"]
                    attention.setdefault(shape, m.results.get("milliseconds"))  # that of the first kind of lists
                    yield m
            if PrefillPart.CASES in config.only:
                longest = max(config.lengths)
                yield from bench.pairs(odd_cases(config.heads, longest, trained_density=config.model_density))
    if PrefillPart.SELECTION in config.only:
        yield from measure_selection(
            config.shape.config,
            config.lengths,
            config.model_density,
            policies=config.policies,
            attention=attention,
            seed=config.seed,
        )
    if PrefillPart.MODEL in config.only:
        yield from first_token(config.shape, config.lengths, config.model_density, seed=config.seed)


def first_token(shape: ModelShape, lengths: Sequence[int], density: float, *, seed: int = 0) -> Iterator[Measurement]:
    """Time from a prompt's tokens to the logits after it, dense and at a density, the shortest prompts first."""
    model = random_model(shape.config, PrefillGateConfig(), seed=seed)
    for length in sorted(lengths):
        dense = Baseline()
        for policy in (Dense(), TopK(density)):
            kept = policy.expected_density
            settings = dict(model=shape.value, length=length, density=kept, dtype=str(model.dtype))
            case = f"{length}, " + ("dense" if kept is None else f"{kept:g}")
            run = functools.partial(_first_token, model, length, policy, dense, seed)
            line = measure(FIRST_TOKEN.name, case, settings, run)
            if policy.is_dense:
                dense = Baseline(line.results.get("milliseconds"))
            yield line


def _first_token(model: Transformer, length: int, policy: Policy, dense: Baseline, seed: int) -> Outcome:
    tokens = jax.random.randint(jax.random.key(seed), (1, length), 0, model.config.vocab_size)

    def prefill(cache: Cache, model: Transformer, tokens: Int[Array, "B T"]) -> tuple[Cache, tuple[Array, Array]]:
        logits, cache, kept = model.prefill(tokens, None, cache, sparsity=policy)
        return cache, (logits, kept)

    program = run_program(prefill, model.make_cache(1, length), model, tokens)
    logits, kept = program.outputs
    results = {
        **program.timing.results,
        "density": float(kept.mean()),
        **program.results,
        "speedup": 1.0 if policy.is_dense else dense.over(program.timing.milliseconds),
    }
    fault = None if bool(jnp.isfinite(logits).all()) else "the logits are not finite"
    return Outcome(results, program.note, fault)


def _lists(m: Measurement) -> str:
    """The kind of lists that the attention read."""
    s = m.settings
    lists = "own lists" if s["lists"] == s["heads"] else "shared lists"
    return f"{s['block_size']}x{s['block_size']}, {lists}" + (f", {s['config']}" if s["config"] else "")


PANELS = (
    Panel(
        "at each length",
        ATTENTION.name,
        colour=lambda m: f"{m.settings['num_queries']} tokens",
        style=_lists,
        x="density",
        x_label="share of the causal map's blocks",
        ticks="density",
        tick=".0%",
        ideal=True,
    ),
    Panel(
        "at each density",
        ATTENTION.name,
        colour=lambda m: f"{m.settings['density']:.0%}",
        style=_lists,
        x="num_queries",
        ticks="num_queries",
    ),
)
