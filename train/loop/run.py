"""The training loop: steps, metrics, checkpoints, and a clean stop on signals."""

import collections
import contextlib
import dataclasses
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from seer_jax.models.decoder import Transformer
from seer_jax.train.config import TrainConfig, to_dict
from seer_jax.train.data.batches import Batch, DataPosition, batches
from seer_jax.train.data.packing import PackedDataset
from seer_jax.train.loop.checkpoint import Checkpoints, RunState
from seer_jax.train.loop.metrics import MetricsLog
from seer_jax.train.loop.progress import ConsoleProgress, StepReport
from seer_jax.train.optimizer import make_optimizer, make_schedule
from seer_jax.train.step import FrozenWeights, Step, Task, Weights, make_step

IN_FLIGHT = 2  # steps by which metrics lag, so that the device has the next step queued while the host reads them
SPEED_WINDOW = 20  # steps over which tokens per second are averaged

ProgressFunction = Callable[[StepReport], None]


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


def run_folder(config: TrainConfig) -> Path | None:
    """The output folder as an absolute path."""
    return None if config.output is None else Path(config.output).expanduser().absolute()


def run(
    task: Task,
    trained: Weights,
    frozen: FrozenWeights,
    dataset: PackedDataset,
    config: TrainConfig,
    settings: dict[str, Any],
    *,
    progress: ProgressFunction | None,
) -> TrainResult:
    """Trains until the last step, from the newest checkpoint if there is one.

    Args:
      task: what to train.
      trained, frozen: the model's weights; the former are donated.
      dataset: rows to draw from.
      config: settings of the run.
      settings: further settings that determine its results, JSON.
      progress: see `distill`.
    """
    optimizer = make_optimizer(config.optimizer, config.steps)
    start = RunState(0, trained, optimizer.init(trained), DataPosition(), tokens=0)
    parts = config.batch_size // config.micro_batch_size
    step = make_step(task, optimizer, make_schedule(config.optimizer, config.steps), parts)
    folder, checkpoints, log = run_folder(config), None, None
    with contextlib.ExitStack() as stack:
        if folder is not None:
            data = {"digest": dataset.digest, "rows": len(dataset)}
            settings = {"config": config.defining(), "data": data, **settings}
            checkpoints = Checkpoints(folder / "checkpoints", keep=config.keep_checkpoints, settings=settings)
            stack.callback(checkpoints.close)
            start = checkpoints.restore(start)
            (folder / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
            log = MetricsLog(folder, step=start.step, tensorboard=config.tensorboard)
            stack.callback(log.close)
        if progress is None:
            progress = ConsoleProgress(interval=config.log_interval)
            stack.callback(progress.close)
            progress.note(f"Training data: {dataset.report}")
            if start.step:
                progress.note(f"Resuming after step {start.step}.")
        reporter = _Reporter(config.steps, start, log, progress)
        stop = stack.enter_context(StopSignals())
        state = start
        for state, metrics in _steps(step, start, frozen, dataset, config):
            reporter.add(state.step, state.tokens, metrics)
            asked = stop.asked
            if asked or state.step % config.checkpoint_interval == 0 or state.step == config.steps:
                reporter.flush()  # a step whose loss is not finite must not replace a good checkpoint
                if checkpoints is not None:
                    checkpoints.save(state)
            if asked:
                stop.leave(asked, state.step, saved=checkpoints is not None)
    return TrainResult(task.parts.merge(state.trained, frozen), state.step, reporter.last, dataset)


def _steps(step: Step, state: RunState, frozen: FrozenWeights, dataset: PackedDataset, config: TrainConfig) -> Iterator:
    """Makes the remaining steps; yields (state after the step, its metrics, still on the device)."""
    stream = batches(dataset, config.batch_size, seed=config.seed, start=state.position)
    for number in range(state.step, config.steps):
        rows, position = next(stream)
        batch, tokens = Batch.of(rows), state.tokens + int(np.count_nonzero(rows.segment_ids))
        trained, optimizer, metrics = step(state.trained, state.optimizer, frozen, batch, jnp.int32(number))
        state = RunState(number + 1, trained, optimizer, position, tokens)
        yield state, metrics


class _Reporter:
    """Reads metrics from the device `IN_FLIGHT` steps late, and passes them to log and display."""

    def __init__(self, steps: int, start: RunState, log: MetricsLog | None, show: ProgressFunction):
        self._steps, self._log, self._show = steps, log, show
        self._pending: collections.deque = collections.deque()
        self._begun = (time.monotonic(), start.step, start.tokens)
        self._times: collections.deque = collections.deque(maxlen=SPEED_WINDOW)
        self.last: dict[str, float] = {}

    def add(self, step: int, tokens: int, metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of a step, which may not be computed yet."""
        self._pending.append((step, tokens, metrics))
        while len(self._pending) > IN_FLIGHT:
            self._read()

    def flush(self) -> None:
        """Waits for all steps."""
        while self._pending:
            self._read()

    def _read(self) -> None:
        step, tokens, metrics = self._pending.popleft()
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
            self._log.write(step, {**values, "tokens": tokens, "tokens_per_second": round(speed, 1)})
        self._show(StepReport(step, self._steps, values, speed, left))


class StopSignals:
    """Defers SIGINT and SIGTERM until the end of a step; a second signal acts at once."""

    def __init__(self) -> None:
        self.asked: int | None = None
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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            self.__exit__()
            signal.raise_signal(number)
        self.asked = number

    def leave(self, number: int, step: int, *, saved: bool) -> NoReturn:
        """Ends the run as the signal would have."""
        note = "the same call resumes there" if saved else "without an output folder nothing is kept"
        print(f"Stopped after step {step}; {note}.", file=sys.stderr)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)
