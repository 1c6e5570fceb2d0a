"""What a completion tells `on_tokens`: all tokens in order, one call at a time, the end last; whichever threads bring news."""

import threading
from typing import Any

import pytest

from seer_jax.inference.engine.completion import Completion, FinishReason


def ignore(*_: Any) -> None:
    pass


def cancelled(completion: Completion) -> None:
    """As an engine cancels."""
    completion.finish(FinishReason.CANCELLED)
    completion.tell()


def test_news_that_come_during_a_call_are_told_by_the_thread_that_calls():
    """A step has tokens to tell while another thread cancels: that one does not wait, and the end still comes last."""
    calls: list[tuple[list[int], bool]] = []
    entered, go_on = threading.Event(), threading.Event()

    def on_tokens(new: list[int]) -> None:
        calls.append((new, completion.done))
        entered.set()
        assert go_on.wait(60)

    completion = Completion([0], on_tokens, ignore, cancelled)
    completion.add([1, 2], 0.0)
    step = threading.Thread(target=completion.tell)
    step.start()
    assert entered.wait(60)
    completion.add([3], 0.0)
    completion.cancel()  # returns while the call goes on
    assert completion.done and calls == [([1, 2], False)]
    go_on.set()
    step.join(60)
    assert calls == [([1, 2], False), ([3], True)]
    completion.tell()  # tokens of a step that ended before it was cancelled
    assert len(calls) == 2


def test_a_call_may_cancel_its_own_request():
    calls: list[list[int]] = []

    def on_tokens(new: list[int]) -> None:
        calls.append(new)
        completion.cancel()

    completion = Completion([0], on_tokens, ignore, cancelled)
    completion.add([1], 0.0)
    completion.tell()
    assert calls == [[1], []] and completion.result() == [1]


def test_a_call_that_raises_is_the_last():
    calls: list[list[int]] = []

    def on_tokens(new: list[int]) -> None:
        calls.append(new)
        raise ConnectionError("the reader has gone")

    completion = Completion([0], on_tokens, ignore, cancelled)
    completion.add([1], 0.0)
    completion.tell()
    completion.tell()
    with pytest.raises(ConnectionError, match="the reader has gone"):
        completion.result()
    assert calls == [[1]] and completion.finish_reason is FinishReason.ERROR


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.STOP, FinishReason.CANCELLED])
def test_the_last_call_may_raise_too(reason: FinishReason):
    """A short answer has no other call. A request that was cancelled stays so, as its reader has gone anyway."""

    def on_tokens(new: list[int]) -> None:
        raise ConnectionError("the reader has gone")

    completion = Completion([0], on_tokens, ignore, cancelled)
    completion.add([1], 0.0)
    completion.finish(reason)
    completion.tell()
    if reason is FinishReason.CANCELLED:
        assert completion.finish_reason is reason and completion.result() == [1]
        return
    with pytest.raises(ConnectionError, match="the reader has gone"):
        completion.result()
    assert completion.tokens == [1] and completion.finish_reason is FinishReason.ERROR
