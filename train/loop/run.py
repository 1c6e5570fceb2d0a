"""The training loop: steps, metrics and checkpoints."""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from seer_jax.inference.memory import GIB, device_memory, laid_out_bytes
from seer_jax.models.decoder import Transformer
from seer_jax.sharding.layout import Layout
from seer_jax.sharding.processes import is_first
from seer_jax.sharding.table import DATA, FSDP
from seer_jax.train.config import TrainConfig
from seer_jax.train.data.batches import Batch, DataPosition, Place, batches
from seer_jax.train.data.packing import PackedDataset, PackedRow
from seer_jax.train.loop.checkpoint import RunState
from seer_jax.train.loop.metrics import MetricsLog
from seer_jax.train.loop.progress import StepReport
from seer_jax.train.loop.session import ProgressFunction, Session, out_of_memory
from seer_jax.train.loop.stopping import StopSignals
from seer_jax.train.optimizer import make_optimizer, make_schedule
from seer_jax.train.over_mesh import ASKED, asking, of_processes
from seer_jax.train.step import (
    Evaluation,
    FrozenWeights,
    Step,
    Task,
    Weights,
    initial_state,
    make_evaluation,
    make_step,
)

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
      saved: folder of the model that was written, for `from_pretrained`; None: none was.
      adapter: folder of the adapter that was written, for `from_pretrained(adapter=...)`; None: none was.
    """

    model: Transformer
    step: int
    metrics: dict[str, float]
    dataset: PackedDataset
    gates: tuple[Path, ...] = ()
    saved: Path | None = None
    adapter: Path | None = None


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
    optimizer, layout = make_optimizer(config.optimizer, config.steps, gate_scale=config.gate_scale), task.parts.layout
    state = initial_state(layout, optimizer, trained)
    start = session.start(RunState(0, trained, state, DataPosition(), tokens=0))
    devices, at_once = rows_at_once(config, layout)
    parts = config.batch_size // (devices * at_once)
    step = make_step(task, optimizer, make_schedule(config.optimizer, config.steps), parts)
    if layout is not None and jax.process_count() > 1:
        step = asking(step)
    evaluation = None if held_out is None else _evaluation(task, held_out, devices, at_once)
    state = start
    with contextlib.ExitStack() as stack:
        log = None
        if session.folder is not None and is_first():
            log = MetricsLog(session.folder, step=start.step, tensorboard=config.tensorboard)
            stack.callback(log.close)
        if start.step:
            session.say(f"Resuming after step {start.step}.")
        reporter = _Reporter(config.steps, start, len(dataset), log, session.show)
        stop = stack.enter_context(StopSignals(session))
        place = None if layout is None else Place(layout, config.batch_size)
        for state, metrics in _steps(step, start, frozen, dataset, place, session, stop):
            reporter.add(state, metrics)
            if jax.process_count() > 1:
                stop.asked = reporter.asked
            asked = stop.asked is not None
            if asked or state.step % config.checkpoint_interval == 0 or state.step == config.steps:
                if evaluation is not None:  # the reporter has not read the metrics of this step yet
                    found = evaluation(state.trained, frozen)
                    metrics.update({f"held_out_{name}": value for name, value in found.items()})
                reporter.flush()  # a step whose loss is not finite must not replace a good checkpoint
                with contextlib.ExitStack() as always:
                    # Also where the checkpoint fails: the results need less room, and are what the run is for.
                    if on_checkpoint is not None:
                        merged = task.parts.merge(state.trained, frozen)
                        always.callback(_write_results, on_checkpoint, merged, session, state.step)
                    session.save(state)
            if asked:
                stop.leave(state.step)
    model = task.parts.merge(state.trained, frozen)
    if state is start and on_checkpoint is not None:
        on_checkpoint(model, state.step)
    return TrainResult(model, state.step, reporter.last, dataset)


def _write_results(on_checkpoint: OnCheckpoint, model: Transformer, session: Session, step: int) -> None:
    on_checkpoint(model, step)
    session.written_step = step


def rows_at_once(config: TrainConfig, layout: Layout | None) -> tuple[int, int]:
    """(devices that have different rows of a batch, rows that each processes at once: a divisor of the rows that it has).

    Raises:
      ValueError: the devices cannot have equally many rows.
    """
    if layout is None:
        return 1, config.micro_batch_size
    devices = layout.size(DATA, FSDP)
    if config.batch_size % devices:
        raise ValueError(
            f"batch_size must be a multiple of the {devices} devices along the mesh axes data and fsdp, over which its rows are split; "
            f"got {config.batch_size}. Set batch_size={-(-config.batch_size // devices) * devices}, or lower data or fsdp in favour of tensor."
        )
    own = config.batch_size // devices
    return devices, next(n for n in range(min(own, config.micro_batch_size), 0, -1) if own % n == 0)


def _steps(
    step: Step,
    state: RunState,
    frozen: FrozenWeights,
    dataset: PackedDataset,
    place: Place | None,
    session: Session,
    stop: StopSignals,
) -> Iterator:
    """Makes the remaining steps; yields (state after the step, its metrics, still on the device)."""
    config = session.config
    own = None if place is None else place.own
    stream = batches(dataset, config.batch_size, seed=config.seed, start=state.position, own=own)
    program = None
    for number in range(state.step, config.steps):
        rows, count, position = next(stream)
        batch, tokens = Batch.of(rows, place), state.tokens + count
        arguments: tuple = (state.trained, state.optimizer, frozen, batch, jnp.int32(number))
        if place is not None and jax.process_count() > 1:
            arguments += (of_processes(place.layout, stop.signal or 0),)
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
    needed, device = laid_out_bytes(program), arguments[3].tokens.addressable_shards[0].device
    memory = device_memory(device)
    if needed is not None and memory is not None and needed > memory.limit - memory.in_use:
        free = (memory.limit - memory.in_use) / GIB
        raise out_of_memory(
            session.config, f"needs {needed / GIB:.3f} GiB beside weights and data, and {free:.3f} GiB are free"
        )
    return program


def _evaluation(
    task: Task, held_out: PackedDataset, devices: int, at_once: int
) -> Callable[[Weights, FrozenWeights], dict]:
    """The metrics of the rows held out, as a function of the weights."""
    short, layout = -len(held_out) % (devices * at_once), task.parts.layout
    columns = zip(*(held_out[i] for i in range(len(held_out))), strict=True)
    # Rows of padding alone, which count for nothing, make the parts equal.
    padded = [np.pad(np.stack(column), ((0, short), (0, 0))) for column in columns]
    rows = len(held_out) + short
    place = None if layout is None else Place(layout, rows)
    batch = Batch.of(PackedRow(*(x if place is None else x[place.own] for x in padded)), place)
    evaluate: Evaluation = make_evaluation(task, rows // (devices * at_once))
    return lambda trained, frozen: evaluate(trained, frozen, batch)


class _Reporter:
    """Reads metrics from the device `IN_FLIGHT` steps late, and passes them to log and display."""

    def __init__(self, steps: int, start: RunState, rows: int, log: MetricsLog | None, show: ProgressFunction):
        self._steps, self._rows, self._log, self._show = steps, rows, log, show
        self._pending: collections.deque = collections.deque()
        self._begun = (time.monotonic(), start.step, start.tokens)
        self._times: collections.deque = collections.deque(maxlen=SPEED_WINDOW)
        self.last: dict[str, float] = {}
        self.asked: int | None = None  # signal that a process has got, known to all from the same step on

    def add(self, state: RunState, metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of a step, which may not be computed yet."""
        epoch = state.position.epoch + state.position.index / self._rows
        self._pending.append((state.step, state.tokens, epoch, metrics))
        # Fewer of several processes, which learn from metrics that one is to stop.
        while len(self._pending) > (IN_FLIGHT if jax.process_count() == 1 else 1):
            self._read()

    def flush(self) -> None:
        """Waits for all steps."""
        while self._pending:
            self._read()

    def _read(self) -> None:
        step, tokens, epoch, metrics = self._pending.popleft()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.asked = int(values.pop(ASKED, 0)) or self.asked
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
