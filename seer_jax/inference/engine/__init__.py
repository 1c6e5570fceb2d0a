"""An engine: requests that come and end at any time share the rows of one batch."""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from seer_jax.checks import whole_number
from seer_jax.inference.engine.completion import Completion, FinishReason, Stage
from seer_jax.inference.engine.programs import Programs, StepSizes
from seer_jax.inference.engine.requests import Seat, check_room, row_settings
from seer_jax.inference.engine.scheduler import Scheduler
from seer_jax.inference.engine.slots import KEY_KIND
from seer_jax.inference.prompts import check_prompt
from seer_jax.inference.request import Request
from seer_jax.inference.sampling import Greedy, Keys, Sample, Sampling
from seer_jax.models.decoder import Transformer
from seer_jax.selection.policies import Policy

__all__ = ["Completion", "Engine", "FinishReason", "Load", "Stage"]

STEPS = 8  # new tokens of each row before the host looks


class Load(NamedTuple):
    """How busy an engine is.

    Fields:
      queued: requests that wait for a slot.
      reading: requests whose prompts are being read.
      decoding: requests whose tokens are being made.
    """

    queued: int
    reading: int
    decoding: int


class Engine:
    """Continuous batching: a batch of slots, whose rows end and are replaced by new requests while the others go on.

    Each `step` reads at most `prefill_tokens` tokens of prompts, in pieces of a few fixed sizes, and then makes up to `decode_steps` tokens of every row
    whose prompt has been read: rows go on getting tokens while a long prompt is read. Slots are given in the order of submission, and the
    prompts in slots are read in turns, a piece each, so that a short prompt does not wait for a long one: one of n pieces has been read after at
    most n times `slots` pieces.

    A request's tokens are those of `generate` for it alone, whatever else the engine works on. The programs are compiled when the engine is made; no request compiles
    anything. Policies, cache and model are the engine's; sampling, key, stop tokens and number of new tokens are a request's own.

    `submit`, `cancel` and reading may be done from any thread. Without `start`, a caller that waits for tokens runs the steps; after it, a
    thread does.

    Attributes:
      model: whose tokens are made.
      slots: rows.
      capacity: tokens that each slot has room for, prompt and new tokens.
    """

    def __init__(
        self,
        model: Transformer,
        slots: int,
        capacity: int,
        *,
        prefill: Policy | None = None,
        decode: Policy | None = None,
        prefill_chunk: int | None = None,
        prefill_tokens: int | None = None,
        decode_steps: int = STEPS,
        max_queued: int = 1024,
        max_new_tokens: int | None = None,
        beyond_context: bool = False,
    ):
        """Makes the cache and compiles the programs.

        Args:
          model: with the gates that the policies need; on a mesh, one that splits no rows (`tensor`).
          slots: requests that are worked on at a time.
          capacity: tokens of a prompt and its new tokens; the cache takes memory for all slots from the start.
          prefill, decode: of all requests, as in `Request`.
          prefill_chunk: tokens of the largest piece of a prompt, a multiple of the block size; None: 8192, or what the capacity needs.
          prefill_tokens: most tokens of prompts that a step reads, padding included, at least `prefill_chunk`; None: that.
          decode_steps: most new tokens of each row in a step.
          max_queued: requests that may wait for a slot.
          max_new_tokens: most that a request may ask for; None: what its slot has room for.
          beyond_context: allow more tokens than the model's context.

        Raises:
          ValueError: a setting is out of its domain, or a policy does not fit the model, is a mask, or looks at whole prompts.
          NotImplementedError: the model's mesh splits rows, or has devices of several processes.
          MemoryError: the device has no room for the cache or the programs.
        """
        whole_number("max_queued", max_queued)
        if max_new_tokens is not None:
            whole_number("max_new_tokens", max_new_tokens)
        self.model, self.slots, self.capacity = model, slots, capacity
        self._beyond_context, self._max_queued, self._max_new_tokens = beyond_context, max_queued, max_new_tokens
        policies: dict[str, Any] = dict(prefill=prefill, decode=decode, beyond_context=beyond_context)
        sizes = StepSizes(prefill_chunk, prefill_tokens, decode_steps)
        self._programs = Programs(model, slots, capacity, sizes, **policies)
        self._scheduler = Scheduler(slots, self._programs.sizes, self._programs.prefill_tokens)
        self._changed, self._stepping = threading.Condition(), threading.Lock()
        self._stepper: int | None = None  # thread that steps
        self._thread: threading.Thread | None = None
        self._closed = False
        sampled = Request(max_new_tokens=1, sampling=Sample(), key=jax.random.key(0, impl=KEY_KIND))
        row_settings(sampled, model)  # compiles what makes keys

    def submit(
        self,
        tokens: Sequence[int] | np.ndarray,
        *,
        max_new_tokens: int,
        sampling: Sampling = Greedy(),
        key: Keys | None = None,
        eos: int | Sequence[int] | np.ndarray | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> Completion:
        """Queues a request.

        Args:
          tokens: of the prompt, at least one.
          max_new_tokens: N >= 1.
          sampling: `Greedy` or `Sample`.
          key: a PRNG key of JAX's usual kind, where `sampling` draws at random.
          eos: at most 32 tokens that end the request; None: `model.config.eos_token_ids`; (): none.
          on_tokens: called with new tokens as they come, by the thread that steps or ends the request, one call at a time, and a last time, perhaps with none,
            when the request has finished; the first call may come before this returns. It must return soon, as the next step waits for it; where it
            raises, its request ends with that error.

        Returns:
          The request's `Completion`.

        Raises:
          ValueError: an argument is out of its domain, the slot has no room for prompt and new tokens, or the engine is closed.
          queue.Full: `max_queued` requests are waiting.
        """
        settings: dict[str, Any] = dict(sampling=sampling, key=key, eos=eos, beyond_context=self._beyond_context)
        request = Request(max_new_tokens=max_new_tokens, **settings)
        request.require_key()
        prompt = check_prompt(tokens, "A prompt", vocab_size=self.model.config.vocab_size)
        check_room(request, self.model, len(prompt), self.capacity, self._max_new_tokens)
        completion = Completion(prompt, on_tokens, self._progress, self._cancel)
        seat = Seat(completion, row_settings(request, self.model))
        with self._changed:
            self._check_open()
            if len(self._scheduler.queue) >= self._max_queued:
                raise queue.Full(
                    f"At most {self._max_queued} requests may wait for a slot (max_queued), and as many do. Submit again later."
                )
            self._scheduler.queue.append(seat)
            self._changed.notify_all()
        return completion

    @property
    def load(self) -> Load:
        """How busy the engine is."""
        with self._changed:
            stages = [completion.stage for completion in self._scheduler.unfinished]
        return Load(*(stages.count(stage) for stage in (Stage.QUEUED, Stage.READING, Stage.DECODING)))

    @property
    def has_work(self) -> bool:
        """Whether there are requests that have not finished."""
        with self._changed:
            return bool(self._scheduler.unfinished)

    def step(self) -> bool:
        """Reads some of the prompts and makes some tokens; returns whether there is work left.

        Raises:
          ValueError: the engine is closed, or `on_tokens` calls this.
          Exception: what the device raises; all requests end with it, and the engine is closed.
          KeyboardInterrupt: Ctrl-C; all requests are cancelled, and the engine is closed.
        """
        self._check_not_within()
        with self._stepping:
            self._check_open()
            self._step()
        return self.has_work

    def start(self) -> "Engine":
        """Lets a thread run the steps from now on, until `close`."""
        with self._changed:
            self._check_open()
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="seer-jax engine", daemon=True)
                self._thread.start()
        return self

    def close(self) -> None:
        """Cancels all requests, stops the thread, and gives the cache's memory back. A closed engine stays closed."""
        self._end(FinishReason.CANCELLED)
        if self._stepper != threading.get_ident():  # otherwise the step does the rest
            if self._thread is not None:
                self._thread.join()
            with self._stepping:
                self._programs.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _step(self) -> None:
        """A step, of which there is one at a time."""
        self._stepper = threading.get_ident()
        try:
            with self._changed:
                self._scheduler.seat()
                pieces = list(self._scheduler.pieces())
                alive = self._scheduler.decoding
            read = [(piece, self._programs.read(piece)) for piece in pieces]
            made = self._programs.decode(alive) if alive.any() else None
            for piece, outcome in read:  # while the device makes the next tokens
                if piece.is_last:
                    self._deliver({piece.row: np.asarray(outcome)[0]})
            if made is not None:
                rows = np.asarray(made)
                self._deliver({row: rows[row] for row in np.flatnonzero(alive).tolist()})
        except BaseException as error:
            failed = isinstance(error, Exception)
            self._end(FinishReason.ERROR if failed else FinishReason.CANCELLED, error if failed else None)
            raise
        finally:
            self._stepper = None
            if self._closed:
                self._programs.close()

    def _deliver(self, outcomes: dict[int, np.ndarray]) -> None:
        with self._changed:
            news = self._scheduler.deliver(outcomes)
        self._tell(news)

    def _tell(self, news: list[Completion]) -> None:
        """Calls back, without the lock; then wakes up all that wait."""
        for completion in news:
            completion.tell()
        with self._changed:
            self._changed.notify_all()

    def _cancel(self, completion: Completion) -> None:
        with self._changed:
            if completion.done:
                return
            self._scheduler.leave(completion)
            completion.finish(FinishReason.CANCELLED)
        self._tell([completion])

    def _end(self, reason: FinishReason, error: BaseException | None = None) -> None:
        """Closes the engine, and ends all requests."""
        with self._changed:
            self._closed = True
            ended = self._scheduler.unfinished
            for completion in ended:
                completion.finish(reason, error)
            self._scheduler.queue.clear()
        self._tell(ended)

    def _progress(self, completion: Completion, seen: int) -> None:
        """Waits until a request may have more than `seen` tokens, or steps where no thread does."""
        self._check_not_within()
        if self._thread is not None:
            with self._changed:
                self._changed.wait_for(lambda: completion.done or len(completion.tokens) > seen)
            return
        with self._stepping:
            if not completion.done and len(completion.tokens) == seen:
                self._step()

    def _serve(self) -> None:
        """The thread's work. An error of a step is that of the requests, which say so."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self.has_work)
            with self._stepping:
                if self._closed:
                    return
                try:
                    self._step()
                except Exception:  # all requests have it, and the engine is closed
                    return

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(
                "The engine must be open; it has been closed, or an error of the device or Ctrl-C in a step ended it. Make a new one."
            )

    def _check_not_within(self) -> None:
        if self._stepper == threading.get_ident():
            raise ValueError(
                "on_tokens must not wait for tokens or step the engine; got such a call within a step. Do so in another thread."
            )
