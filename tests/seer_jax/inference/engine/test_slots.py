"""The memory of an engine's programs: the cache in place, and what a device must have for it."""

from typing import Any

import jax
import pytest

from seer_jax.inference import memory
from seer_jax.inference.engine import programs
from tests.seer_jax.inference.engine.alone import llama, make_engine

pytestmark = [pytest.mark.usefixtures("compile_quickly"), pytest.mark.usefixtures("unchecked")]


def planned(slots: int) -> list[tuple[int, int]]:
    """Of each program: bytes of scratch, and of results in places of their own."""
    made = make_engine(slots=slots, capacity=4096)._programs
    assert made.slots is not None
    plans: list[Any] = [lowered.compile().memory_analysis() for lowered in made._lowered(slots)]
    cache = memory.tree_bytes(made.slots.cache)
    assert all(plan.alias_size_in_bytes >= cache for plan in plans)
    return [(plan.temp_size_in_bytes, plan.output_size_in_bytes - plan.alias_size_in_bytes) for plan in plans]


@pytest.mark.cpu
@pytest.mark.slow
def test_no_program_copies_the_cache():
    """A prompt is read into one row of it, in scratch that does not grow with the rows; a step's scratch is far less than a row."""
    few, many = planned(2), planned(6)
    row = memory.tree_bytes(jax.eval_shape(lambda: llama().make_cache(1, 4096)))
    assert [x[0] for x in few[:-1]] == pytest.approx([x[0] for x in many[:-1]], rel=0.02)
    assert many[-1][0] - few[-1][0] < row
    assert all(beside < 10_000 for _, beside in few + many)


@pytest.mark.parametrize(
    ("changes", "scratch", "needs"),
    [
        (dict(capacity=2**20, beyond_context=True), 0, "weights .*, cache .*"),
        pytest.param({}, 2**30, "weights .*, scratch 1.000", marks=pytest.mark.slow, id="scratch"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_runs(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], scratch: int, needs: str
):
    weights = memory.tree_bytes(llama())
    told = memory.DeviceMemory(weights + 10_000_000, weights)
    monkeypatch.setattr(memory, "device_memory", lambda device: told)
    monkeypatch.setattr(programs, "laid_out_bytes", lambda program: scratch)
    monkeypatch.setattr(programs.Programs, "_warm_up", lambda *_: pytest.fail("nothing should run"))
    message = (
        rf"The engine must fit in device memory: needs .* GiB \({needs}\), .* available. Take fewer slots or a smaller"
    )
    with pytest.raises(MemoryError, match=message):
        make_engine(**changes)
