"""`seer-jax bench prefill`: block-sparse prefill from the attention kernel to the whole model."""

from collections.abc import Iterator

import jax
from jaxtyping import Array, Int

from seer_jax.bench.configs import PrefillBench, gate_settings
from seer_jax.bench.gradients.measured import GRADIENTS, GradientBench
from seer_jax.bench.harness.measurement import Measurement, Outcome, beside_dense, measure, not_finite, run_program
from seer_jax.bench.harness.plots import Panel
from seer_jax.bench.harness.report import DENSITY, MILLISECONDS, PROGRAM, SPEEDUP, Table, report
from seer_jax.bench.models import random_model
from seer_jax.bench.prefill_attention import ATTENTION, ODD_CASES, AttentionBench, aligned_cases, odd_cases, variants
from seer_jax.bench.selection import SELECTION, measure_selection
from seer_jax.models.cache import Cache
from seer_jax.models.decoder import Transformer
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.rules import TopK

FIRST_TOKEN = Table("model", "Whole model, time to first token", (DENSITY, MILLISECONDS, SPEEDUP, *PROGRAM))


def bench_prefill(config: PrefillBench) -> list[Measurement]:
    """Measures and reports, see `report`."""
    return report(config, measure_prefill(config), (ATTENTION, ODD_CASES, GRADIENTS, SELECTION, FIRST_TOKEN), PANELS)


def measure_prefill(config: PrefillBench) -> Iterator[Measurement]:
    """Yields each measurement as soon as it is there.

    Raises:
      ValueError: a shape that the device is too slow for, or an implementation that does not exist.
    """
    config.check_device()
    attention: dict[tuple[int, float], float | None] = {}
    offered = variants(config.implementation) if config.variants else {}
    for variant in offered.items() or (None,):
        bench = AttentionBench(config.implementation, variant, config.seed)
        for case in aligned_cases(config) if "attention" in config.only else ():
            yield (m := bench.measure(case))
            # The first kind of lists stands beside the choice of blocks.
            attention.setdefault((case.num_queries, case.density), m.results.get("milliseconds"))
        for pair in odd_cases(config) if "cases" in config.only else ():
            yield bench.pair(*pair)
    if config.backward:
        gradients = GradientBench(config.implementation, config.seed)
        yield from (gradients.measure(case) for case in aligned_cases(config) if case.skip_threshold is None)
    if "selection" in config.only:
        yield from measure_selection(config, attention)
    if "model" in config.only:
        yield from first_token(config)


def first_token(config: PrefillBench) -> Iterator[Measurement]:
    """Time from a prompt's tokens to the logits after it, dense (unless left out) and at a density, the shortest prompts first."""
    model = random_model(config.model, config.gate, seed=config.seed)

    def line(length: int, policy: Policy) -> Measurement:
        tokens = jax.random.randint(jax.random.key(config.seed), (1, length), 0, model.config.vocab_size)

        def prefill(cache: Cache, model: Transformer, tokens: Int[Array, "B T"]) -> tuple[Cache, tuple[Array, Array]]:
            logits, cache, kept = model.prefill(tokens, None, cache, sparsity=policy, chunk=config.chunk)
            return cache, (logits, kept)

        def run() -> Outcome:
            room = length if config.chunk is None else -(-length // config.chunk) * config.chunk
            program = run_program(prefill, model.make_cache(1, room), model, tokens)
            logits, kept = program.outputs
            results = {**program.timing._asdict(), "density": float(kept.mean()), **program.results}
            return Outcome(results, program.note, not_finite(logits=logits))

        kept = policy.expected_density
        settings = dict(model=config.shape.value, length=length, density=kept, dtype=str(model.dtype))
        settings |= {} if config.chunk is None else {"chunk": config.chunk}
        settings |= gate_settings(config.gate)
        case = f"{length}, " + ("dense" if kept is None else f"{kept:g}")
        case += "" if config.chunk is None else f", chunks of {config.chunk}"
        return measure(FIRST_TOKEN.name, case, settings, run)

    policies = *((Dense(),) if config.dense else ()), TopK(config.model_density)
    yield from beside_dense(line(n, policy) for n in sorted(config.lengths) for policy in policies)


def _lists(m: Measurement) -> str:
    """The kind of lists that the attention read."""
    s = m.settings
    lists = "own lists" if s["lists"] == s["heads"] else "shared lists"
    skip = "" if s["skip_threshold"] is None else f", skip {s['skip_threshold']:g}"
    return f"{s['block_size']}x{s['block_size']}, {lists}{skip}" + (f", {s['config']}" if s["config"] else "")


PANELS = (
    Panel("attention kernel", ATTENTION.name, lambda m: f"{m.settings['num_queries']} tokens", _lists, x="density"),
    Panel("attention kernel", ATTENTION.name, lambda m: f"{m.settings['density']:.0%}", _lists, x="num_queries"),
)
