"""The order of an engine's work, without a device: first come, first served; turns; no request waits for ever."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np

from seer_jax.inference.engine.completion import Completion, FinishReason, Stage
from seer_jax.inference.engine.programs import ReadPiece
from seer_jax.inference.engine.requests import Seat
from seer_jax.inference.engine.row_sampling import RowSampling
from seer_jax.inference.engine.scheduler import Scheduler
from seer_jax.inference.engine.slots import RowSettings
from seer_jax.inference.request import NO_TOKEN
from seer_jax.inference.sampling import Greedy

SIZES = [64, 16]
SETTINGS = RowSettings.empty(1, 1, RowSampling.of(Greedy(), 8))
REQUEST = st.tuples(
    st.integers(0, 30), st.integers(1, 500), st.integers(1, 12)
)  # arrival, tokens of the prompt, new ones


def ignore(*_: Any) -> None:
    pass


def outcome(token: int, active: bool) -> np.ndarray:
    return np.array([token, active, False], np.int32)


@hypothesis.settings(max_examples=100)
@hypothesis.given(st.lists(REQUEST, min_size=1, max_size=12), st.integers(1, 4), st.sampled_from((64, 100, 200)))
def test_requests_are_served_in_order_and_in_turns(requests: list[tuple[int, int, int]], slots: int, budget: int):
    scheduler = Scheduler(slots, SIZES, budget)
    wanted: dict[Completion, int] = {}
    read: list[tuple[Completion, ReadPiece]] = []
    for step in range(1000):
        for arrives, length, new in requests:
            if arrives == step:
                completion = Completion([0] * length, None, ignore, ignore)
                wanted[completion] = new
                scheduler.queue.append(Seat(completion, SETTINGS))
        scheduler.seat()
        pieces = list(scheduler.pieces())
        assert sum(piece.size for piece in pieces) <= budget
        assert pieces or Stage.READING not in [x.stage for x in wanted], (
            "a request that is read must get on in every step"
        )
        for piece in pieces:
            seat = scheduler.seats[piece.row]
            assert seat is not None
            read.append((seat.completion, piece))
        rows = np.flatnonzero(scheduler.decoding).tolist()
        running = {row: seat.completion for row in rows if (seat := scheduler.seats[row]) is not None}
        news = scheduler.deliver({row: outcome(1, len(x.tokens) + 1 < wanted[x]) for row, x in running.items()})
        assert news == list(running.values()), "each row should get a token in each step"
        if not scheduler.unfinished and step > 30:
            break
    assert [x.tokens for x in wanted] == [[1] * new for new in wanted.values()]
    assert {x.finish_reason for x in wanted} == {FinishReason.LENGTH}
    first = list(dict.fromkeys(completion for completion, _ in read))
    assert first == list(wanted), "prompts should be begun in the order of submission"
    for completion in wanted:
        turns = [number for number, (reader, _) in enumerate(read) if reader is completion]
        pieces = [read[number][1] for number in turns]
        assert [x.start for x in pieces] == np.cumsum([0, *(x.size for x in pieces[:-1])]).tolist()
        assert sum(x.size for x in pieces) - len(completion.prompt) in range(max(SIZES[1], SIZES[0] // 4 + 1))
        assert max(np.diff(turns), default=1) <= slots, "between two turns each other slot should have at most one"


def test_one_that_has_finished_gets_nothing_more():
    scheduler = Scheduler(1, SIZES, 64)
    first, second = (Completion([0] * 3, None, ignore, ignore) for _ in range(2))
    scheduler.queue.extend(Seat(x, SETTINGS) for x in (first, second))
    scheduler.seat()
    list(scheduler.pieces())
    first.finish(FinishReason.CANCELLED)
    assert scheduler.deliver({0: outcome(5, True)}) == [] and first.tokens == []
    assert scheduler.unfinished == [second] and not scheduler.decoding.any()
    scheduler.seat()
    seat = scheduler.seats[0]
    assert seat is not None and seat.completion is second and second.stage is Stage.READING
    assert scheduler.deliver({0: outcome(NO_TOKEN, True)}) == []
