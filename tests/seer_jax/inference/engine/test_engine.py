"""An engine: its requests against `generate` for each alone, turns, ends of all kinds, threads, refusals."""

import itertools
import logging
import queue
import threading
from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax import Sample
from seer_jax.inference import memory
from seer_jax.inference.engine import Completion, Engine, FinishReason, Load, Stage, programs
from seer_jax.inference.sampling import Greedy
from seer_jax.selection.policies import Given
from seer_jax.selection.rules import TopK
from seer_jax.selection.scorers import MInference
from tests.seer_jax.conftest import tiny_model
from tests.seer_jax.inference.engine.alone import (
    CAPACITY,
    MOST,
    SLOTS,
    STEPS,
    STOP,
    alone,
    llama,
    make_engine,
    prompt,
    run,
    submit,
)

pytestmark = pytest.mark.usefixtures("compile_quickly")
LENGTHS = (1, 16, 30, 64, 65, 97)


@pytest.fixture(scope="module", autouse=True)
def small_pieces() -> Iterator[None]:
    """So that prompts of these lengths end in pieces of two sizes; and engines of fixtures see no device that tells its memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "SMALLEST", 16)
        patch.setattr(memory, "device_memory", lambda device: None)
        yield


@pytest.fixture(scope="module")
def shared() -> Engine:
    """One engine for all that leave it open: what one test leaves in its slots must not matter to the next."""
    return make_engine()


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    yield shared
    assert shared.load == Load(0, 0, 0), "a test should leave no requests"


REQUEST = st.fixed_dictionaries(
    dict(
        arrives=st.integers(0, 12),
        length=st.sampled_from(LENGTHS),
        new=st.integers(1, MOST),
        sampling=st.integers(0, 1),
        seed=st.integers(0, 1),
        cancelled=st.none() | st.none() | st.integers(0, 15),
    )
)


@hypothesis.settings(max_examples=8)
@hypothesis.given(st.lists(REQUEST, min_size=1, max_size=9))
def test_tokens_are_those_of_generate_for_each_alone(shared: Engine, requests: list[dict[str, Any]]):
    """Whatever comes, ends and is cancelled beside them; and each comes to its end in bounded time."""
    sent: dict[int, Completion] = {}
    for step in range(200):
        for number, request in enumerate(requests):
            if request["arrives"] == step:
                sent[number] = submit(shared, *(request[name] for name in ("length", "new", "sampling", "seed")))
            if request["cancelled"] == step and number in sent:
                sent[number].cancel()
        if not shared.step() and len(sent) == len(requests):
            break
    pieces = sum(-(-request["length"] // 16) for request in requests)
    steps = sum(-(-request["new"] // STEPS) for request in requests)
    assert step <= 12 + pieces + steps + 1
    for number, request in enumerate(requests):
        whole = alone(request["length"], request["sampling"], request["seed"])[: request["new"]]
        made = sent[number]
        if made.finish_reason is FinishReason.CANCELLED:
            assert made.tokens == whole[: len(made.tokens)]
        else:
            assert made.result() == whole
            assert made.finish_reason is (FinishReason.STOP if whole[-1] in STOP else FinishReason.LENGTH)


def test_no_length_compiles_anything(engine: Engine, caplog: pytest.LogCaptureFixture):
    keys = [jax.random.key(seed) for seed in range(2)]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.block_until_ready(jax.jit(lambda x: x + 2)(np.float32(1)))
        (control,) = {m for m in caplog.messages if "Compiling" in m}
        caplog.clear()
        for number, length in enumerate((1, 2, 15, 17, 40, 63, 64, 66, 80, 81, 96, CAPACITY)):
            sampling = (Greedy(), Sample(0.5 + number / 10, top_k=number + 1), Sample(top_p=0.5))[number % 3]
            engine.submit(prompt(length), max_new_tokens=1, sampling=sampling, key=keys[number % 2], eos=())
        run(engine)
    assert "Compiling" in control and not [m for m in caplog.messages if "Compiling" in m]


def test_what_a_slot_held_reaches_no_one(engine: Engine):
    """Rows that are free or read hold NaN; the others go on beside them."""
    first = submit(engine, 30, eos=())
    second = submit(engine, 97, new=1)
    while not second.done:
        engine.step()
    assert first.stage is Stage.DECODING

    def poison(x: jax.Array) -> jax.Array:
        return x if x.ndim < 2 else x.at[:, 1:].set(jnp.nan)

    slots = engine._programs.slots
    assert slots is not None
    cache = jax.tree.map(poison, slots.cache)
    assert all(bool(jnp.isnan(x).any()) for x in jax.tree.leaves(cache) if x.ndim > 1)
    engine._programs.slots = type(slots)(cache, slots.settings, slots.last, slots.counts, slots.active)
    others = [submit(engine, length, eos=()) for length in (16, 65, 1, 97)]
    assert first.result() == alone(30, eos=())
    assert [other.result() for other in others] == [alone(length, eos=()) for length in (16, 65, 1, 97)]


def test_rows_go_on_while_a_prompt_is_read_and_turns_are_fair(engine: Engine):
    """Two pieces of a long prompt, a short one between them, and tokens of a running row in every step."""
    running = submit(engine, 1, eos=())
    engine.step()
    long, short, waiting, last = (submit(engine, length, eos=()) for length in (97, 16, 1, 1))
    before = len(running.tokens)
    engine.step()  # a step reads at most a chunk: the first piece of the long prompt
    assert engine.load == Load(queued=2, reading=2, decoding=1)
    assert len(running.tokens) == before + STEPS and not long.tokens and not short.tokens
    assert [row for row, _ in engine._scheduler._turns] == [2, 1]
    engine.step()  # then 16 tokens of the short one, and the 33 tokens that are left of the long one in three pieces
    assert short.tokens and long.tokens and len(running.tokens) == before + 2 * STEPS
    run(engine)
    assert waiting.first_token is not None and last.first_token is not None and waiting.first_token <= last.first_token
    assert running.submitted < running.first_token <= running.finished  # pyright: ignore[reportOperatorIssue]
    assert [x.tokens for x in (running, long, short)] == [alone(n, eos=()) for n in (1, 97, 16)]


@pytest.mark.parametrize("stage", [Stage.QUEUED, Stage.READING, Stage.DECODING, Stage.FINISHED])
def test_cancels(engine: Engine, stage: Stage):
    others = [submit(engine, 1, eos=()) for _ in range(SLOTS - (stage is not Stage.QUEUED))]
    told: list[list[int]] = []
    one = submit(engine, 97, eos=(), on_tokens=told.append)
    while one.stage is not stage:
        engine.step()
    tokens = list(one.tokens)
    one.cancel()
    reason = FinishReason.LENGTH if stage is Stage.FINISHED else FinishReason.CANCELLED
    assert one.finish_reason is reason and one.result() == tokens
    next_one = submit(engine, 30, eos=())
    run(engine)
    assert one.tokens == tokens == list(itertools.chain(*told)) and one.finish_reason is reason
    assert stage is Stage.FINISHED or told[-1] == []
    assert [x.tokens for x in (*others, next_one)] == [*[alone(1, eos=())] * len(others), alone(30, eos=())]


def test_errors_of_one_request_stay_its_own():
    model = llama()
    embedding = model.embed_tokens[...]
    try:
        model.embed_tokens[...] = embedding.at[63].set(jnp.nan)
        engine = make_engine(model)
        broken, good = engine.submit([1, 63, 2], max_new_tokens=4), submit(engine, 30)

        def gone(new: list[int]) -> None:
            raise ConnectionError("the reader has gone")

        left, nested = submit(engine, 16, on_tokens=gone), submit(engine, 65, on_tokens=lambda new: list(nested))
        run(engine)
    finally:
        model.embed_tokens[...] = embedding
    with pytest.raises(ValueError, match="Logits must be finite; those at new token 0 hold NaN or infinity"):
        broken.result()
    assert good.result() == alone(30)
    with pytest.raises(ConnectionError, match="the reader has gone"):
        list(left)
    assert left.tokens == alone(16)[: 1 + STEPS][: len(left.tokens)]
    with pytest.raises(ValueError, match="on_tokens must not wait for tokens or step the engine"):
        nested.result()
    engine.close()


def test_an_error_of_the_device_ends_all_and_closes(monkeypatch: pytest.MonkeyPatch):
    engine = make_engine()
    seated = [submit(engine, 16) for _ in range(SLOTS + 1)]

    def fail(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(engine._programs, "decode", fail)
    for request in seated:
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            request.result()
    with pytest.raises(ValueError, match="The engine must be open"):
        engine.step()


def test_a_thread_serves_readers_in_other_threads():
    """One reads at once, one late, one not at all, one is called back; `close` ends what is left."""
    with make_engine().start() as engine:
        called: queue.Queue[list[int]] = queue.Queue()
        unread, late, back = submit(engine, 64), submit(engine, 30), submit(engine, 97, on_tokens=called.put)
        results: list[list[int]] = []
        readers = [threading.Thread(target=lambda n=n: results.append(submit(engine, n).result())) for n in (1, 16, 65)]
        for reader in readers:
            reader.start()
        made: list[int] = []
        while not back.done or len(made) < len(back.tokens):  # in this order: tokens come before the end
            made += called.get(timeout=60)
        for reader in readers:
            reader.join()
        assert made == alone(97) and late.result() == alone(30)
        assert sorted(results) == sorted(alone(n) for n in (1, 16, 65))
        assert unread.tokens == alone(64)[: len(unread.tokens)]
        rest = [submit(engine, 97, eos=()) for _ in range(9)]
    assert all(x.done for x in rest) and rest[-1].finish_reason is FinishReason.CANCELLED
    with pytest.raises(ValueError, match="The engine must be open; it has been closed"):
        submit(engine, 1)
    engine.close()  # once more changes nothing


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(slots=0), "slots must be an integer of at least 1; got 0"),
        (dict(capacity=0.5), "capacity must be an integer of at least 1; got 0.5"),
        (dict(prefill_chunk=24), "prefill_chunk must be a multiple of 16 tokens, whole blocks; got 24. Use 32"),
        (dict(prefill_tokens=63), "prefill_tokens must be at least a prefill_chunk of 64 tokens; got 63"),
        (dict(decode_steps=0), "decode_steps must be an integer of at least 1; got 0"),
        (dict(max_queued=0), "max_queued must be an integer of at least 1; got 0"),
        (dict(max_new_tokens=0), "max_new_tokens must be an integer of at least 1; got 0"),
        (dict(prefill=TopK(0.1, MInference())), "got topk:0.1:minference, which looks at the whole prompt"),
        (dict(decode=Given(np.ones((2, 3, 2, 7), bool), 16)), "The policies of an engine must .* got Given masks"),
        (dict(model=jax.eval_shape(tiny_model)), "model must have weights to generate; got one of shapes alone"),
        (dict(model="tiny-lm"), "model must be a Transformer; got 'tiny-lm'"),
    ],
)
def test_refuses_settings(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_engine(**changes)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tokens=[]), "A prompt must have at least one token; got none"),
        (dict(tokens=[64]), r"Tokens must lie in \[0, 64\), the model's vocabulary"),
        (
            dict(tokens=[[1], [2]]),
            r"A prompt must be one list of integers; got int64 of shape \(2, 1\). Give each list by itself",
        ),
        (dict(tokens=["a"]), "A prompt must be one list of integers"),
        (
            dict(tokens=[[1], [2, 3]]),
            "A prompt must be one list of integers; got lists of different lengths. Give each by itself",
        ),
        (dict(tokens=7), "A prompt must be one list of integers"),
        (dict(max_new_tokens=0), "max_new_tokens must be an integer of at least 1; got 0"),
        (dict(max_new_tokens=10**9), "Prompt and new tokens must fit the model's context of"),
        (dict(max_new_tokens=41), "max_new_tokens must be at most 40, which is this engine's limit; got 41"),
        (dict(tokens=[1] * 100, max_new_tokens=14), r"prompt and new tokens, 100 \+ 14 - 1; got capacity 112"),
        (dict(sampling=Sample()), "draws at random, so a key must be given"),
        (dict(sampling=Sample(), key=jax.random.key(0, impl="rbg")), "key must be of the kind threefry2x32; got rbg"),
        (dict(sampling=None), "sampling must be Greedy"),
        (dict(eos=list(range(33))), r"at most 32 stop tokens \(eos\); got 33\. Pass fewer"),
        (dict(eos=64), "EOS tokens must lie in"),
    ],
)
def test_refuses_requests(limited: Engine, changes: dict[str, Any], message: str):
    request: dict[str, Any] = dict(tokens=[1, 2], max_new_tokens=4) | changes
    with pytest.raises(ValueError, match=message):
        limited.submit(**request)


@pytest.fixture(scope="module")
def limited() -> Engine:
    return make_engine(max_queued=2, max_new_tokens=40)


def test_refuses_more_than_may_wait(limited: Engine):
    first, second = (submit(limited, 1) for _ in range(2))
    with pytest.raises(queue.Full, match=r"At most 2 requests may wait for a slot \(max_queued\)"):
        submit(limited, 1)
    first.cancel()
    submit(limited, 1)
    run(limited)
    assert first.finish_reason is FinishReason.CANCELLED and second.tokens == alone(1)
