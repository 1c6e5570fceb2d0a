"""Processes that work as one program: they agree on values, wait for each other, and end together where one fails."""

import atexit
import contextlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src.distributed import global_state  # the store of names that all processes share has no public name

_FAILED = "seer_jax/failed"
_ASK = 60_000  # milliseconds that one question to the store may take
_SECONDS_TO_LOOK = 0.5  # between two looks for a failure
_SECONDS_TO_END = 2.0  # that a process has to end by itself once another one has failed
_EXIT_FAILED, _EXIT_INTERRUPTED = 1, 130

_calls = 0
_watch: "_Watch | None" = None


def is_first() -> bool:
    """Whether this is the process that writes files: process 0, or the only one."""
    return jax.process_index() == 0


def exchange(value: Any) -> list[Any]:
    """The values of all processes, in their order. Each must call, in the same order as other exchanges.

    Args:
      value: JSON.
    """
    global _calls
    if jax.process_count() == 1:
        return [value]
    _calls += 1
    client, place = _client(), f"seer_jax/exchange/{_calls}"
    client.key_value_set(f"{place}/{jax.process_index()}", json.dumps(value))
    return [json.loads(_get(client, f"{place}/{number}")) for number in range(jax.process_count())]


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Lets the first process run a block before the others do."""
    if not is_first():
        exchange(None)
    yield
    if is_first():
        exchange(None)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends all processes where one fails in this block: the others, which may wait for it in a collective, say so and exit as it does.

    The block ends for all of them at the same time. An exception that all have agreed on (`agree_to_end`) is that of each.
    """
    global _watch
    if jax.process_count() == 1:
        yield
        return
    _watch = _Watch()
    try:
        yield
        agree_to_end()
    except BaseException as error:
        _watch.report(error)
        raise
    finally:
        _watch.end()


def agree_to_end() -> None:
    """Waits for the other processes; how this one ends concerns them no more."""
    exchange(None)
    if _watch is not None:
        _watch.end()


class _Watch:
    """A thread that waits for the failure of another process."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def end(self) -> None:
        """Watches no longer."""
        self._ended.set()

    def report(self, error: BaseException) -> None:
        """Tells the others, unless all end; the process then leaves without JAX's own farewell, which waits for those that have gone."""
        if self._ended.is_set():
            return
        self.end()
        stopped = isinstance(error, SystemExit | KeyboardInterrupt)
        code = getattr(error, "code", _EXIT_INTERRUPTED) if stopped else _EXIT_FAILED
        code = code if isinstance(code, int) else _EXIT_FAILED
        text = " ".join(str(error).split())[:500]
        what = {
            "process": jax.process_index(),
            "host": platform.node(),
            "code": code,
            "kind": type(error).__name__,
            "text": text,
        }
        # Another one has told already, or the first process is gone.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().key_value_set(_FAILED, json.dumps(what))
        # The first process has the store, which the others still read.
        atexit.register(_exit, code, 2 * _SECONDS_TO_END if is_first() else 0.0)

    def _run(self) -> None:
        while not self._ended.wait(_SECONDS_TO_LOOK):
            told = _failure()
            if told is None or self._ended.wait(_SECONDS_TO_END):
                continue
            os.write(2, f"Process {jax.process_index()} ends, as {_sentence(told)}.\n".encode())
            _exit(told["code"], _SECONDS_TO_END if is_first() else 0.0)


def failure_of_another() -> str | None:
    """What another process that has failed told, as part of a sentence; None: none has, as far as this one can know."""
    told = _failure() if jax.process_count() > 1 else None
    return None if told is None or told["process"] == jax.process_index() else _sentence(told)


def _sentence(told: dict[str, Any]) -> str:
    reason = ": ".join(filter(None, (told["kind"], told["text"])))
    return f"process {told['process']} on {told['host']} has ended ({reason})"


def _failure() -> dict[str, Any] | None:
    """What a process that has failed told, if one has."""
    try:
        return json.loads(_client().key_value_try_get(_FAILED))
    except jax.errors.JaxRuntimeError as error:
        if str(error).startswith("NOT_FOUND"):
            return None
        return {"process": 0, "host": "the first host", "code": _EXIT_FAILED, "kind": "", "text": "it can't be reached"}


def _client() -> Any:
    """The store of names that all processes share."""
    return global_state.client


def _exit(code: int, wait: float) -> None:
    time.sleep(wait)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _get(client: Any, key: str) -> str:
    """The value of a name, however long another process takes to set it."""
    while True:
        try:
            return client.blocking_key_value_get(key, _ASK)
        except jax.errors.JaxRuntimeError as error:
            if not str(error).startswith("DEADLINE_EXCEEDED"):
                raise ConnectionError(
                    f"The first process of a program must stay alive; process {jax.process_index()} has lost it. Start all processes again."
                ) from error
