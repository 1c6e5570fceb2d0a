"""`seer-jax bench serving`: the requests that come, what the command shows, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seer_jax.bench.configs import ModelShape
from seer_jax.bench.serving import ServingBench, measure
from seer_jax.bench.serving.measure import Arrival, arrivals, serve
from seer_jax.commands.main import main
from seer_jax.inference.engine import Completion, FinishReason
from seer_jax.selection.policies import Dense

TINY: dict[str, Any] = dict(shape=ModelShape.TINY, lengths=(64, 200), requests=40, new_tokens=9)


def test_requests_are_those_of_the_seed():
    first, again, other = (arrivals(ServingBench(**TINY, rate=5.0, seed=seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(x.prompt, y.prompt) and x[::2] == y[::2] for x, y in zip(first, again, strict=True))
    assert any(x.seconds != y.seconds for x, y in zip(first, other, strict=True))
    times = [x.seconds for x in first]
    assert times[0] == 0 and times == sorted(times) and 0.1 < times[-1] / 39 < 0.4  # 0.2 s apart on average
    lengths = {len(x.prompt) for x in first}
    assert min(lengths) >= 32 and max(lengths) <= 200 and not lengths & set(range(65, 100)) and len(lengths) > 10
    assert {x.new_tokens for x in first} == {5, 6, 7, 8, 9}
    assert {x.seconds for x in arrivals(ServingBench(**TINY))} == {0}


class Instant:
    """An engine that makes all tokens of all requests in a step."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Completion, int]] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting)

    def submit(self, tokens: np.ndarray, *, max_new_tokens: int, eos: tuple) -> Completion:
        completion = Completion(tokens.tolist(), None, lambda *_: None, lambda *_: None)
        self.waiting.append((completion, max_new_tokens))
        return completion

    def step(self) -> None:
        for completion, new in self.waiting:
            completion.add([1] * new, measure.time.perf_counter())
            completion.finish(FinishReason.LENGTH)
        self.waiting.clear()


@pytest.mark.usefixtures("unchecked")
def test_times_count_from_when_requests_were_to_come(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    engine, step = Instant(), Instant.step

    def slow_step() -> None:
        now[0] += 1
        step(engine)

    engine.step = slow_step  # pyright: ignore[reportAttributeAccessIssue]
    coming = [Arrival(at, np.arange(n), 3) for at, n in ((0.0, 4), (0.5, 6), (3.0, 10))]
    sent, results = serve(engine, coming)  # pyright: ignore[reportArgumentType]
    assert [len(x.prompt) for x in sent] == [4, 6, 10]
    assert results["seconds"] == 4 and results["requests_per_second"] == 0.75  # steps end at 1, 2 and 4
    assert results["tokens_per_second"] == 9 / 4 and results["prompt_tokens_per_second"] == 5
    assert results["first_token_median"] == 1 and results["first_token_p95"] == pytest.approx(1.45)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked", "compile_quickly")  # shapes stand for caches
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = "bench serving --shape tiny --lengths 64 --requests 5 --rate 50 --new-tokens 6 --slots 2 --chunk 64"
    assert main([*words.split(), "--output", str(tmp_path / "bench.json")]) == 0
    text = capsys.readouterr().out
    assert "\nRequests in the slots of an engine" in text and "first token p95 s: the same, 95th percentile" in text
    lines = json.loads((tmp_path / "bench.json").read_text())["measurements"]
    assert [m["case"] for m in lines] == ["one after the other", "2 slots"] and not any(m["failure"] for m in lines)
    results = [m["results"] for m in lines]
    assert results[0]["speedup"] == 1
    assert results[1]["speedup"] == pytest.approx(results[1]["requests_per_second"] / results[0]["requests_per_second"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lengths=()), "lengths must be at least 2 tokens; got none"),
        (dict(lengths=(64, 1)), "lengths must be at least 2 tokens; got 64, 1"),
        (dict(requests=0), "requests must be at least 1; got 0"),
        (dict(slots=(8, 1)), "slots must be at least 2, .* got 8, 1"),
        (dict(rate=float("inf")), "rate must be a number of at least 0 requests per second; got inf"),
        (dict(density=0.0), r"density must lie in \(0, 1\]; got 0.0"),
        (dict(chunk=0), "chunk must be a multiple of 64 tokens, whole blocks of the gates; got 0"),
        (dict(chunk=100), "chunk must be a multiple of 64 tokens, whole blocks of the gates; got 100"),
        (dict(plot=Path("x.png")), "plot must be left out of bench serving"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ServingBench(**TINY | changes)
    assert ServingBench(**TINY, density=1.0).policy == Dense()
