"""The measurements of `seer-jax bench serving`."""

import collections
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from seer_jax.bench.configs import gate_settings
from seer_jax.bench.harness.measurement import Measurement, Outcome, Results, measure
from seer_jax.bench.harness.report import Column, Table, report
from seer_jax.bench.models import random_model
from seer_jax.bench.serving.config import ServingBench
from seer_jax.inference.engine import Completion, Engine, FinishReason
from seer_jax.inference.memory import cache_bytes, tree_bytes
from seer_jax.models.decoder import Transformer

LATE = 0.95  # quantile of the times to first token beside the median
SERVING = Table(
    "serving",
    "Requests in the slots of an engine",
    (
        Column("s", "seconds", ".4g", "seconds from the first request's time to the last token"),
        Column("requests/s", "requests_per_second", ".4g", "requests over seconds"),
        Column("new\ntokens/s", "tokens_per_second", ".4g", "new tokens of all requests over seconds"),
        Column("prompt\ntokens/s", "prompt_tokens_per_second", ".4g", "tokens of all prompts over seconds"),
        Column(
            "first token\nmedian s",
            "first_token_median",
            ".3g",
            "seconds from a request's time to its first token, median",
        ),
        Column("first token\np95 s", "first_token_p95", ".3g", "the same, 95th percentile"),
        Column("times\nfaster", "speedup", ".2f", "requests/s over those of one after the other"),
    ),
)


class Arrival(NamedTuple):
    """A request that is to come.

    Fields:
      seconds: when, from the start.
      prompt: its tokens.
      new_tokens: how many it asks for.
    """

    seconds: float
    prompt: np.ndarray
    new_tokens: int


def bench_serving(config: ServingBench) -> list[Measurement]:
    """Measures and reports, see `report`."""
    return report(config, measure_serving(config), (SERVING,), ())


def measure_serving(config: ServingBench) -> Iterator[Measurement]:
    """Yields each measurement as soon as it is there: one after the other, then each number of slots.

    Raises:
      ValueError: a shape that the device is too slow for, or a chunk of parts of blocks.
    """
    config.check_device()
    model = random_model(config.model, config.prefill, config.decode, seed=config.seed)
    coming, alone = arrivals(config), None
    for slots in (1, *config.slots):
        line = _line(config, model, coming, slots)
        rate = line.results.get("requests_per_second")
        alone = rate if slots == 1 else alone
        speedup = rate / alone if rate and alone else None
        yield dataclasses.replace(line, results={**line.results, "speedup": speedup}) if line.results else line


def arrivals(config: ServingBench) -> list[Arrival]:
    """The requests by their times, the same for a seed."""
    rng = np.random.default_rng(config.seed)
    between = rng.exponential(1 / config.rate, config.requests) if config.rate else np.zeros(config.requests)
    times = np.cumsum(between) - between[0]
    made = []
    for seconds in times.tolist():
        length, new = (
            int(rng.integers(-(-most // 2), most + 1)) for most in (rng.choice(config.lengths), config.new_tokens)
        )
        made.append(Arrival(seconds, rng.integers(0, config.model.vocab_size, length), new))
    return made


def serve(engine: Engine, coming: Sequence[Arrival]) -> tuple[list[Completion], Results]:
    """Submits requests at their times and steps until all have finished; returns them, and the rates and times by name."""
    waiting, sent, first = collections.deque(coming), list[Completion](), list[float]()
    start = time.perf_counter()
    while waiting or engine.has_work:
        now = time.perf_counter() - start
        while waiting and waiting[0].seconds <= now:
            _, prompt, new_tokens = waiting.popleft()
            sent.append(engine.submit(prompt, max_new_tokens=new_tokens, eos=()))
        if engine.has_work:
            engine.step()
        else:
            time.sleep(max(waiting[0].seconds - (time.perf_counter() - start), 0))
    seconds = time.perf_counter() - start
    for arrival, completion in zip(coming, sent, strict=True):
        if completion.first_token is not None:
            first.append(completion.first_token - start - arrival.seconds)
    results: Results = dict(
        seconds=seconds,
        milliseconds=1e3 * seconds,
        requests_per_second=len(sent) / seconds,
        tokens_per_second=sum(len(completion.tokens) for completion in sent) / seconds,
        prompt_tokens_per_second=sum(len(completion.prompt) for completion in sent) / seconds,
        first_token_median=float(np.median(first)) if first else None,
        first_token_p95=float(np.quantile(first, LATE)) if first else None,
    )
    return sent, results


def _line(config: ServingBench, model: Transformer, coming: Sequence[Arrival], slots: int) -> Measurement:
    settings: dict[str, Any] = dict(
        **dict(model=config.shape.value, lengths=config.lengths, requests=config.requests, rate=config.rate),
        **dict(new_tokens=config.new_tokens, slots=slots, density=config.density, dtype=str(model.dtype)),
        **dict(decode_steps=config.decode_steps, chunk=config.chunk, **gate_settings(config.prefill, config.decode)),
    )

    def run() -> Outcome:
        policies: dict[str, Any] = dict(prefill=config.policy, decode=config.policy, beyond_context=True)
        chunk: dict[str, Any] = dict(prefill_chunk=config.chunk, max_queued=config.requests)
        start = time.perf_counter()
        with Engine(model, slots, config.capacity, decode_steps=config.decode_steps, **policies, **chunk) as engine:
            compiling = time.perf_counter() - start
            sent, results = serve(engine, coming)
        wrong = [completion for completion in sent if completion.finish_reason is not FinishReason.LENGTH]
        failure = f"{len(wrong)} requests did not get their tokens: {wrong[0].error or wrong[0]!r}" if wrong else None
        return Outcome({**results, "compile_seconds": compiling}, failure=failure)

    case = "one after the other" if slots == 1 else f"{slots} slots"
    needed = tree_bytes(jax.tree.leaves(model)) + cache_bytes(model, slots, config.capacity)
    return measure(SERVING.name, case, settings, run, needed_bytes=needed)
