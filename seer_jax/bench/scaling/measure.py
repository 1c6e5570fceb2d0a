"""The measurements of `seer-jax bench scaling`: each case on one device, then on each mesh; or in turns without a mesh and on a mesh of one."""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from seer_jax.bench.harness.clock import time_in_turns
from seer_jax.bench.harness.measurement import Measurement, Outcome, Results, measure
from seer_jax.bench.harness.plots import Panel
from seer_jax.bench.harness.report import MILLISECONDS, Column, Table, report
from seer_jax.bench.models import abstract_model, random_model
from seer_jax.bench.scaling.cases import (
    LISTS_BOUND,
    Case,
    agreement,
    all_cases,
    error_against,
    listed_blocks,
)
from seer_jax.bench.scaling.config import ScalingBench
from seer_jax.inference.memory import tree_bytes
from seer_jax.models.decoder import Transformer
from seer_jax.sharding.layout import Layout, place
from seer_jax.sharding.planned import planned_model

ERROR = Column(
    "error",
    "error",
    ".1e",
    "against one device: of logits, relative (root of the mean square); of losses, the largest one over their sum",
)
LISTS = Column(
    "lists",
    "lists",
    ".2%",
    "share of the first layer's listed blocks that are those of one device, on a prompt of at most 4096 tokens",
)
PLANNED = Column("planned\nGiB", "planned_gib", ".1f", "what the compiler lays out on each device for a call")
SCALING = Table(
    "scaling",
    "Over the devices of a mesh",
    (
        MILLISECONDS,
        Column(
            "steps/s",
            "steps_per_second",
            ".4g",
            "calls per second: prompts read at once, steps of decoding or training",
        ),
        Column("tokens/s", "tokens_per_second", ".5g", "tokens read, trained on, or made, of all rows"),
        Column("times\nfaster", "speedup", ".2f", "ms of one device (of the smallest mesh that can run it) over ms"),
        Column("efficiency", "efficiency", ".0%", "that over the number of devices"),
        ERROR,
        LISTS,
        PLANNED,
    ),
)
ONE = Table(
    "mesh of one",
    "A mesh of one device beside no mesh, in turns",
    (
        Column("no mesh\nms", "alone_milliseconds", ".5g", "ms of a call without a mesh"),
        dataclasses.replace(MILLISECONDS, title="mesh\nms", form=".5g"),
        Column("over\n%", "over_percent", "+.2f", "median over the turns of the mesh's time over the other, less 1"),
        Column("spread\n%", "spread_percent", ".2f", "largest less smallest of these"),
        ERROR,
        LISTS,
        PLANNED,
    ),
)
PANEL = Panel(
    "a model over several devices",
    SCALING.name,
    colour=lambda m: m.case.partition(": ")[2],
    style=lambda m: m.settings["axes"],
    x="devices",
    y_label="times faster than one device",
)


def bench_scaling(config: ScalingBench) -> list[Measurement]:
    """Measures and reports, see `report`."""
    return report(config, measure_scaling(config), (SCALING, ONE), (PANEL,))


def measure_scaling(config: ScalingBench) -> Iterator[Measurement]:
    """Yields each measurement as soon as it is there.

    Raises:
      ValueError: a shape that the devices are too slow for, or a mesh that is none, has too many devices or can't split the model.
    """
    config.check_device()
    meshes = config.meshes()
    layouts = [Layout.of(mesh, config.model) for mesh in meshes]
    cases = list(all_cases(config, meshes[-1]))
    if meshes[-1].size == 1:
        yield from _beside_one(config, cases, meshes[-1])
        return
    reference = _Reference(config)
    for layout in (*((None,) if config.alone else ()), *layouts):
        yield from reference.measure_all(cases, layout)


def mesh_text(mesh: Mesh | AbstractMesh) -> str:
    """A mesh as a command line names it."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "tensor=1"


@dataclasses.dataclass
class _Known:
    """Of a case on the fewest devices that could run it."""

    devices: int
    milliseconds: float
    first: dict[str, np.ndarray]
    lists: np.ndarray | None


class _Reference:
    """What is known of each case from fewer devices, beside which more devices are measured."""

    def __init__(self, config: ScalingBench) -> None:
        self._config, self._known = config, {}
        self._model = abstract_model(config.model, *config.gates)

    def measure_all(self, cases: list[Case], layout: Layout | None) -> Iterator[Measurement]:
        """All cases on one mesh, or on one device."""
        made: list[Transformer] = []

        def model() -> Transformer:
            if not made:
                gc.collect()  # what the last mesh had is free
                made.append(
                    random_model(self._config.model, *self._config.gates, seed=self._config.seed, layout=layout)
                )
            return made[0]

        devices, text = (1, "1 device") if layout is None else (layout.mesh.size, mesh_text(layout.mesh))
        axes = "none" if layout is None else "+".join(axis for axis, size in layout.mesh.shape.items() if size > 1)
        part = self._model if layout is None else planned_model(self._model, layout, ())
        for case in cases:
            settings = _settings(self._config, case) | dict(mesh=text, axes=axes, devices=devices)
            needed = case.needed_bytes(tree_bytes(part), devices)
            run = _bound(self._run, case, model, devices)
            yield measure(SCALING.name, f"{text}: {case.name}", settings, run, needed_bytes=needed)

    def _run(self, case: Case, model: Callable[[], Transformer], devices: int) -> Outcome:
        program = case.make(model())
        program.start(program.lower().compile())
        times = time_in_turns([program], repetitions=self._config.repetitions)[0]
        milliseconds = statistics.median(times)
        planned, first = program.planned_gib, program.first
        del program
        lists = _lists(self._config, case, model())
        known = self._known.setdefault(case.name, _Known(devices, milliseconds, first, lists))
        speedup = known.milliseconds / milliseconds
        results: Results = {
            "milliseconds": milliseconds / case.steps,
            "spread": (max(times) - min(times)) / milliseconds,
            "steps_per_second": 1e3 * case.steps / milliseconds,
            "tokens_per_second": 1e3 * case.tokens / milliseconds,
            "speedup": speedup,
            "efficiency": speedup * known.devices / devices,
            "planned_gib": planned,
            **{name: float(x) for name, x in first.items() if "loss" in name},
        }
        errors, failure = {}, None
        if known.devices < devices:
            errors, failure = compared(case, (first, lists), (known.first, known.lists))
        note = None if known.devices == 1 else f"{case.name}: beside {known.devices} devices, the fewest that ran it"
        return Outcome(results | errors, note, failure)


def _beside_one(config: ScalingBench, cases: list[Case], mesh: Mesh) -> Iterator[Measurement]:
    """Each case without a mesh and on a mesh of one device, which share the weights."""
    alone = random_model(config.model, *config.gates, seed=config.seed)
    spread = place(alone, mesh)
    for case in cases:
        run = _bound(_in_turns, config, case, alone, spread)
        yield measure(ONE.name, case.name, _settings(config, case), run, needed_bytes=2.0 * case.cache_bytes)


def _in_turns(config: ScalingBench, case: Case, alone: Transformer, spread: Transformer) -> Outcome:
    programs = [case.make(model) for model in (alone, spread)]
    begun = time.perf_counter()
    lowered = [program.lower() for program in programs]
    with ThreadPoolExecutor() as threads:
        compiled = list(threads.map(lambda program: program.compile(), lowered))
    seconds = time.perf_counter() - begun
    for program, executable in zip(programs, compiled, strict=True):
        program.start(executable)
    times = time_in_turns(programs, repetitions=config.repetitions)
    ratios = [100 * (ours / theirs - 1) for theirs, ours in zip(*times, strict=True)]
    planned, first = programs[1].planned_gib, [program.first for program in programs]
    programs.clear()
    results: Results = {
        "alone_milliseconds": statistics.median(times[0]) / case.steps,
        "milliseconds": statistics.median(times[1]) / case.steps,
        "over_percent": statistics.median(ratios),
        "spread_percent": max(ratios) - min(ratios),
        "planned_gib": planned,
        "compile_seconds": seconds,
        **{name: float(x) for name, x in first[1].items() if "loss" in name},
    }
    same = all(np.array_equal(first[1][name], x) for name, x in first[0].items())  # then lists are the same as well
    lists = [None if same else _lists(config, case, model) for model in (spread, alone)]
    errors, failure = compared(case, (first[1], lists[0]), (first[0], lists[1]))
    return Outcome(results | errors, failure=failure)


def _lists(config: ScalingBench, case: Case, model: Transformer) -> np.ndarray | None:
    if case.policy is None or case.settings["length"] != min(config.lengths):
        return None
    return listed_blocks(model, case.list_tokens, case.policy, case.settings["rows"], config.seed)


def compared(case: Case, ours: Any, theirs: Any) -> tuple[Results, str | None]:
    """How far first outputs and lists are from those of fewer devices, and what is wrong with that."""
    error = error_against(ours[0], theirs[0])
    results: Results = {"error": error}
    if not error <= case.bound:
        return (
            results,
            f"results must be those of one device; they differ by {error:.1e}, of which {case.bound:g} is allowed",
        )
    if ours[1] is not None and theirs[1] is not None:
        first = agreement(ours[1][0], theirs[1][0])
        results |= {"lists": first, "lists_of_all_layers": agreement(ours[1], theirs[1])}
        if first < LISTS_BOUND:
            return (
                results,
                f"lists must be those of one device; {first:.1%} of the first layer's blocks agree, {LISTS_BOUND:.0%} must",
            )
    return results, None


def _settings(config: ScalingBench, case: Case) -> dict[str, Any]:
    model = dict(model=config.shape.value, dtype="bfloat16", jax_devices=jax.device_count())
    return model | dict(case.settings) | dict(tokens=config.tokens, repetitions=config.repetitions)


def _bound(function: Callable[..., Outcome], *arguments: Any) -> Callable[[], Outcome]:
    return lambda: function(*arguments)
