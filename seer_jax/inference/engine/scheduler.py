"""Which requests wait, are read and are decoded: first come, first served, and prompts in turns."""

import collections
import time
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool

from seer_jax.inference.engine.completion import Completion, FinishReason, Stage
from seer_jax.inference.engine.programs import ReadPiece, piece_size
from seer_jax.inference.engine.requests import Seat
from seer_jax.inference.request import NO_TOKEN

NOT_FINITE = (
    "Logits must be finite; those at new token {} hold NaN or infinity. The weights are damaged, or activations overflow their dtype; load "
    "the model anew, or with dtype=jnp.float32."
)


class Scheduler:
    """Requests in a queue and in slots. It knows nothing of threads and devices: an `Engine` guards it, and runs what it plans.

    Attributes:
      queue: requests that wait.
      seats: of each slot the request that has it; None: it is free.
    """

    def __init__(self, slots: int, sizes: list[int], prefill_tokens: int):
        """Without requests.

        Args:
          slots: how many.
          sizes: of pieces of prompts, the largest first.
          prefill_tokens: see `Engine`.
        """
        self.queue: collections.deque[Seat] = collections.deque()
        self.seats: list[Seat | None] = [None] * slots
        self._turns: collections.deque[tuple[int, int]] = (
            collections.deque()
        )  # slots that read, and tokens that were read
        self._sizes, self._budget = sizes, prefill_tokens

    @property
    def unfinished(self) -> list[Completion]:
        """Requests that have not finished."""
        seats = [*self.queue, *(seat for seat in self.seats if seat is not None)]
        return [seat.completion for seat in seats if not seat.completion.done]

    @property
    def decoding(self) -> Bool[np.ndarray, "slots"]:
        """Slots whose rows go on."""
        return np.array([seat is not None and seat.completion.stage is Stage.DECODING for seat in self.seats])

    def seat(self) -> None:
        """Frees the slots of requests that have finished, and gives free ones to those that have waited longest."""
        for row, seat in enumerate(self.seats):
            if seat is not None and seat.completion.done:
                self.seats[row] = None
        self._turns = collections.deque(turn for turn in self._turns if self.seats[turn[0]] is not None)
        for row, seat in enumerate(self.seats):
            if seat is None and self.queue:
                self.seats[row] = seat = self.queue.popleft()
                seat.completion.stage = Stage.READING
                self._turns.append((row, 0))

    def pieces(self) -> Iterator[ReadPiece]:
        """The pieces of prompts that a step reads: slots take turns, as long as `prefill_tokens` lasts."""
        left = self._budget
        while self._turns:
            row, start = self._turns[0]
            seat = self.seats[row]
            assert seat is not None
            prompt = seat.completion.prompt
            piece = ReadPiece(row, prompt, start, piece_size(len(prompt) - start, self._sizes), seat.settings)
            if (left := left - piece.size) < 0:
                return
            self._turns.popleft()
            if piece.is_last:
                seat.completion.stage = Stage.DECODING
            else:
                self._turns.append((row, start + piece.size))
            yield piece

    def deliver(self, outcomes: dict[int, np.ndarray]) -> list[Completion]:
        """Gives rows their new tokens, and ends those that have come to an end; returns which requests have news.

        Args:
          outcomes: by row; see `decode_steps`.
        """
        now, news = time.perf_counter(), []
        for row, outcome in outcomes.items():
            seat = self.seats[row]
            if seat is None or (completion := seat.completion).done:  # cancelled meanwhile
                continue
            *tokens, active, failed = outcome.tolist()
            new = [token for token in tokens if token != NO_TOKEN]
            completion.add(new, now)
            if failed:
                completion.finish(FinishReason.ERROR, ValueError(NOT_FINITE.format(len(completion.tokens))))
            elif not active:
                stopped = completion.tokens[-1] in seat.settings.stop[0]
                completion.finish(FinishReason.STOP if stopped else FinishReason.LENGTH)
            if new or completion.done:
                news.append(completion)
        return news

    def leave(self, completion: Completion) -> None:
        """Takes a request out of the queue, if it is there; a slot is freed by `seat`, once the request has finished."""
        self.queue = collections.deque(seat for seat in self.queue if seat.completion is not completion)
