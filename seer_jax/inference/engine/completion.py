"""One request to an engine: its new tokens while they come, and how it ended."""

import enum
import threading
import time
from collections.abc import Callable, Iterator


class Stage(enum.StrEnum):
    """Where a request stands."""

    QUEUED = "queued"
    READING = "reading"  # its prompt
    DECODING = "decoding"
    FINISHED = "finished"


class FinishReason(enum.StrEnum):
    """Why a request has finished."""

    STOP = "stop"  # one of its stop tokens
    LENGTH = "length"  # max_new_tokens are there
    CANCELLED = "cancelled"
    ERROR = "error"  # see `Completion.error`


class Completion:
    """What becomes of one request; made by `Engine.submit`.

    It keeps all its tokens, so that a reader may be as slow as it likes, or never come. Iterating gives the tokens one by one and makes the
    engine step where no thread does; at the end it raises `error` where there is one.

    Attributes:
      prompt: tokens of the prompt.
      tokens: new tokens so far, the stop token included.
      stage: where it stands.
      finish_reason: why it has finished; None before.
      error: what ended it where `finish_reason` is ERROR: ValueError for logits that are not finite, or what the device or its `on_tokens`, also by its
        last call, raised.
      submitted, first_token, finished: times by `time.perf_counter()`, in seconds; None before.
    """

    def __init__(
        self,
        prompt: list[int],
        on_tokens: Callable[[list[int]], None] | None,
        progress: Callable[["Completion", int], None],
        cancel: Callable[["Completion"], None],
    ):
        self.prompt, self.tokens = prompt, list[int]()
        self.stage = Stage.QUEUED
        self.finish_reason: FinishReason | None = None
        self.error: BaseException | None = None
        self.submitted = time.perf_counter()
        self.first_token: float | None = None
        self.finished: float | None = None
        self._on_tokens, self._progress, self._cancel = on_tokens, progress, cancel
        self._telling = threading.Lock()
        self._is_telling, self._told, self._told_end = False, 0, False

    @property
    def done(self) -> bool:
        """Whether it has finished."""
        return self.finish_reason is not None

    def cancel(self) -> None:
        """Ends the request, wherever it stands, at once; from any thread. One that has finished stays as it is."""
        self._cancel(self)

    def result(self) -> list[int]:
        """All new tokens, once the request has finished.

        Raises:
          Exception: `error`.
        """
        return list(self)

    def __iter__(self) -> Iterator[int]:
        shown = 0
        while True:
            done, new = self.done, self.tokens[shown:]  # in this order: tokens come before the end
            yield from new
            shown += len(new)
            if done:
                break
            if not new:
                self._progress(self, shown)
        if self.error is not None:
            raise self.error

    def __repr__(self) -> str:
        how = self.finish_reason or self.stage
        return f"Completion({how}, prompt of {len(self.prompt)} tokens, {len(self.tokens)} new)"

    def add(self, new: list[int], now: float) -> None:
        """New tokens; for the engine."""
        self.tokens += new
        if new and self.first_token is None:
            self.first_token = now

    def finish(self, reason: FinishReason, error: BaseException | None = None) -> None:
        """The end; for the engine. A later one changes nothing."""
        if not self.done:
            self.error, self.finished, self.stage = error, time.perf_counter(), Stage.FINISHED
            self.finish_reason = reason

    def tell(self) -> None:
        """Calls `on_tokens` with what is new, one call at a time and the end last; one that raises ends its own request. For the engine.

        A thread that comes while another one calls leaves its news to that one: it waits for no callback.
        """
        while (new := self._next_news()) is not None:
            assert self._on_tokens is not None
            try:
                self._on_tokens(new)
            except Exception as error:
                self._on_tokens = None
                # The call that tells the end has raised.
                if self.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                    self.error, self.finish_reason = error, FinishReason.ERROR
                self.finish(FinishReason.ERROR, error)
            finally:
                self._is_telling = False

    def _next_news(self) -> list[int] | None:
        """The tokens to call `on_tokens` with, by this thread; None: there is nothing to tell, or another thread tells it."""
        with self._telling:
            if self._on_tokens is None or self._is_telling:
                return None
            done, new = self.done, self.tokens[self._told :]  # in this order: tokens come before the end
            if not new and (not done or self._told_end):
                return None
            self._is_telling, self._told, self._told_end = True, self._told + len(new), done
            return new
