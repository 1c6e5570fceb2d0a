"""The training loop: steps, metrics, checkpoints, and a clean stop on signals."""

import collections
import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from seer_jax.inference.memory import GIB, device_memory, laid_out_bytes
from seer_jax.models.decoder import Transformer
from seer_jax.train.data.batches import Batch, DataPosition, batches
from seer_jax.train.data.packing import PackedDataset
from seer_jax.train.loop.checkpoint import RunState
from seer_jax.train.loop.metrics import MetricsLog
from seer_jax.train.loop.progress import StepReport
from seer_jax.train.loop.session import ProgressFunction, Session, out_of_memory
from seer_jax.train.optimizer import make_optimizer, make_schedule
from seer_jax.train.step import Evaluation, FrozenWeights, Step, Task, Weights, make_evaluation, make_step

IN_FLIGHT = 2  # steps by which metrics lag, so that the device has the next step queued while the host reads them
SPEED_WINDOW = 20  # steps over which tokens per second are averaged

# Called after each checkpoint with the model and the number of steps that it is trained.
OnCheckpoint = Callable[[Transformer, int], None]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Result of a run.

    Attributes:
      model: with the trained weights; it shares all others with the model that the run started from.
      step: number of steps done, including those of earlier runs in the same folder.
      metrics: of the last step; empty if no step was left to do.
      dataset: rows that it was trained on.
      gates: folders of the gates that were written, each for `from_pretrained(gates=...)`.
    """

    model: Transformer
    step: int
    metrics: dict[str, float]
    dataset: PackedDataset
    gates: tuple[Path, ...] = ()


def run(
    task: Task,
    trained: Weights,
    frozen: FrozenWeights,
    dataset: PackedDataset,
    session: Session,
    *,
    held_out: PackedDataset | None = None,
    on_checkpoint: OnCheckpoint | None = None,
) -> TrainResult:
    """Trains until the last step, from the newest checkpoint if there is one.

    Args:
      task: what to train.
      trained, frozen: the model's weights; the former are donated.
      dataset: rows to draw from.
      session: of the run, which has accepted its settings.
      held_out: rows whose metrics are reported at each checkpoint.
      on_checkpoint: called after each checkpoint, and at the end of a run that had no step left to do.
    """
    config = session.config
    optimizer = make_optimizer(config.optimizer, config.steps)
    start = session.start(RunState(0, trained, optimizer.init(trained), DataPosition(), tokens=0))
    parts = config.batch_size // config.micro_batch_size
    step = make_step(task, optimizer, make_schedule(config.optimizer, config.steps), parts)
    evaluation = None if held_out is None else _evaluation(task, held_out, config.micro_batch_size)
    state = start
    with contextlib.ExitStack() as stack:
        log = None
        if session.folder is not None:
            log = MetricsLog(session.folder, step=start.step, tensorboard=config.tensorboard)
            stack.callback(log.close)
        if start.step:
            session.say(f"Resuming after step {start.step}.")
        reporter = _Reporter(config.steps, start, len(dataset), log, session.show)
        stop = stack.enter_context(StopSignals(session))
        for state, metrics in _steps(step, start, frozen, dataset, session, stop):
            reporter.add(state, metrics)
            asked = stop.asked is not None
            if asked or state.step % config.checkpoint_interval == 0 or state.step == config.steps:
                if evaluation is not None:  # the reporter has not read the metrics of this step yet
                    found = evaluation(state.trained, frozen)
                    metrics.update({f"held_out_{name}": value for name, value in found.items()})
                reporter.flush()  # a step whose loss is not finite must not replace a good checkpoint
                with contextlib.ExitStack() as always:
                    if (
                        on_checkpoint is not None
                    ):  # also where the checkpoint fails: gates need less room, and are what the run is for
                        always.callback(
                            _write_gates, on_checkpoint, task.parts.merge(state.trained, frozen), session, state.step
                        )
                    session.save(state)
            if asked:
                stop.leave(state.step)
    model = task.parts.merge(state.trained, frozen)
    if state is start and on_checkpoint is not None:
        on_checkpoint(model, state.step)
    return TrainResult(model, state.step, reporter.last, dataset)


def _write_gates(on_checkpoint: OnCheckpoint, model: Transformer, session: Session, step: int) -> None:
    on_checkpoint(model, step)
    session.gates_step = step


def _steps(
    step: Step, state: RunState, frozen: FrozenWeights, dataset: PackedDataset, session: Session, stop: "StopSignals"
) -> Iterator:
    """Makes the remaining steps; yields (state after the step, its metrics, still on the device)."""
    config = session.config
    stream = batches(dataset, config.batch_size, seed=config.seed, start=state.position)
    program = None
    for number in range(state.step, config.steps):
        rows, position = next(stream)
        batch, tokens = Batch.of(rows), state.tokens + int(np.count_nonzero(rows.segment_ids))
        arguments = (state.trained, state.optimizer, frozen, batch, jnp.int32(number))
        if program is None:
            with stop.at_once():  # nothing is lost by it yet
                program = _compile(step, arguments, session)
            session.begin("training")
        trained, optimizer, metrics = program(*arguments)
        state = RunState(number + 1, trained, optimizer, position, tokens)
        yield state, metrics


def _compile(step: Step, arguments: tuple, session: Session) -> Step:
    """The step as a program, whose memory the device has."""
    session.begin("compiling the training step")
    begun = time.monotonic()
    program = step.lower(*arguments).compile()
    session.say(f"Compiled in {time.monotonic() - begun:.1f} s.")
    needed, device = laid_out_bytes(program), next(iter(arguments[3].tokens.devices()))
    memory = device_memory(device)
    if needed is not None and memory is not None and needed > memory.limit - memory.in_use:
        free = (memory.limit - memory.in_use) / GIB
        raise out_of_memory(
            session.config, f"needs {needed / GIB:.3f} GiB beside weights and data, and {free:.3f} GiB are free"
        )
    return program


def _evaluation(task: Task, held_out: PackedDataset, part: int) -> Callable[[Weights, FrozenWeights], dict]:
    """The metrics of the rows held out, as a function of the weights."""
    short = -len(held_out) % part
    columns = zip(*(held_out[i] for i in range(len(held_out))), strict=True)
    # Rows of padding alone, which count for nothing, make the parts equal.
    padded = [np.pad(np.stack(column), ((0, short), (0, 0))) for column in columns]
    batch = Batch(*(jnp.asarray(x, jnp.int32) for x in padded))
    evaluate: Evaluation = make_evaluation(task, (len(held_out) + short) // part)
    return lambda trained, frozen: evaluate(trained, frozen, batch)


class _Reporter:
    """Reads metrics from the device `IN_FLIGHT` steps late, and passes them to log and display."""

    def __init__(self, steps: int, start: RunState, rows: int, log: MetricsLog | None, show: ProgressFunction):
        self._steps, self._rows, self._log, self._show = steps, rows, log, show
        self._pending: collections.deque = collections.deque()
        self._begun = (time.monotonic(), start.step, start.tokens)
        self._times: collections.deque = collections.deque(maxlen=SPEED_WINDOW)
        self.last: dict[str, float] = {}

    def add(self, state: RunState, metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of a step, which may not be computed yet."""
        epoch = state.position.epoch + state.position.index / self._rows
        self._pending.append((state.step, state.tokens, epoch, metrics))
        while len(self._pending) > IN_FLIGHT:
            self._read()

    def flush(self) -> None:
        """Waits for all steps."""
        while self._pending:
            self._read()

    def _read(self) -> None:
        step, tokens, epoch, metrics = self._pending.popleft()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if bad := {name: value for name, value in values.items() if not math.isfinite(value)}:
            raise FloatingPointError(
                f"Metrics must be finite; got {', '.join(f'{name} = {value}' for name, value in bad.items())} at step {step}. "
                "Check the base model for NaN weights, or lower the learning rate; checkpoints of earlier steps are intact."
            )
        self.last = values
        now = time.monotonic()
        # The first step includes compilation, so later speeds are measured from its end.
        since = self._times[0] if self._times else self._begun
        self._times.append((now, step, tokens))
        seconds = max(now - since[0], 1e-9)
        speed = (tokens - since[2]) / seconds
        left = (self._steps - step) * seconds / max(step - since[1], 1)
        if self._log is not None:
            line = {**values, "tokens": tokens, "epoch": round(epoch, 4), "tokens_per_second": round(speed, 1)}
            self._log.write(step, line)
        self._show(StepReport(step, self._steps, values, speed, left, epoch))


class StopSignals:
    """Defers SIGINT and SIGTERM until the end of a step; a second signal acts at once."""

    def __init__(self, session: Session) -> None:
        self.asked: int | None = None
        self._acted: int | None = None
        self._session, self._waits = session, True
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Lets a first signal act at once meanwhile."""
        self._waits = False
        try:
            yield
        finally:
            self._waits = True
        if self._acted is not None:  # code that calls Python from C++ may drop what a handler raises
            signal.raise_signal(self._acted)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None and self._waits:
            self.asked = number
            # Not `print`: the signal may have come while something was printed, which allows no second call.
            os.write(2, b"Stopping when the steps that are under way have ended; a second signal stops at once.\n")
            return
        self.__exit__()
        self._acted = number
        if (
            number == signal.SIGTERM and signal.getsignal(number) == signal.SIG_DFL
        ):  # the process ends without an exception
            self._session.warn(self._session.stopped(f"while {self._session.doing}"))
        signal.raise_signal(number)

    def leave(self, step: int) -> NoReturn:
        """Ends the run as the signal would have."""
        line = self._session.stopped(f"after step {step}")
        if self.asked == signal.SIGINT:
            stop = KeyboardInterrupt()
            stop.add_note(line)
            raise stop
        self._session.warn(line)
        raise SystemExit(128 + (self.asked or 0))
