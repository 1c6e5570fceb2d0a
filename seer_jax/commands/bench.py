"""Time operations and models on this machine: bench prefill|decode|ground-truth|train|scaling|serving."""

import sys
from collections.abc import Callable

from seer_jax.bench import (
    DecodeBench,
    GroundTruthBench,
    PrefillBench,
    ScalingBench,
    ServingBench,
    TrainBench,
    bench_decode,
    bench_ground_truth,
    bench_prefill,
    bench_scaling,
    bench_serving,
    bench_training,
)
from seer_jax.bench.harness.measurement import Measurement
from seer_jax.commands import PROGRAM, ExitCode
from seer_jax.commands.arguments import parse
from seer_jax.commands.errors.usage import UsageError, UsageParser, one_of

# Name: configuration, what measures by it, and a summary.
BENCHES: dict[str, tuple[type, Callable[..., list[Measurement]], str]] = {
    "prefill": (PrefillBench, bench_prefill, "attention kernel, choice of blocks and whole model, on prompts"),
    "decode": (DecodeBench, bench_decode, "attention kernel, layer with its gate and whole model, on new tokens"),
    "ground-truth": (GroundTruthBench, bench_ground_truth, "dense attention with the scores that gates are trained on"),
    "train": (TrainBench, bench_training, "a step of distillation and a dense forward pass of the same tokens"),
    "scaling": (ScalingBench, bench_scaling, "prefill, decoding and steps of training over the devices of a mesh"),
    "serving": (ServingBench, bench_serving, "requests that come at random times, in slots and one after the other"),
}


def run(words: list[str]) -> int:
    parser = UsageParser(f"{PROGRAM} bench", description=__doc__)
    summaries = "; ".join(f"{name}: {summary}" for name, (_, _, summary) in BENCHES.items())
    parser.add_argument("what", metavar="{" + ",".join(BENCHES) + "}", help=summaries)
    what = parser.parse_args(words[:1]).what
    if what not in BENCHES:
        raise UsageError(one_of("what to measure", list(BENCHES), what))
    config, measure, _ = BENCHES[what]
    wrong = [m for m in measure(parse(config, f"bench {what}", words[1:], aliases={"--gates": "--kinds"})) if m.failure]
    for m in wrong:
        print(f"{PROGRAM} bench: {m.table}, {m.case}: {m.failure}", file=sys.stderr)
    return ExitCode.FAILED if wrong else ExitCode.OK
