"""The formulas of docs/scaling.md: against measurements on one device and on two, against plans of real shapes, and the tables of the document."""

import pytest

from seer_jax import plan_memory
from seer_jax.bench.configs import MODELS, ModelShape
from seer_jax.bench.models import abstract_model
from seer_jax.bench.scaling.estimates import (
    GIB,
    H200,
    Estimate,
    MeshSize,
    cache_bytes,
    decode,
    distil,
    prefill,
    weight_bytes,
)
from seer_jax.bench.scaling.tables import MEASURED, MEASURED_ON_TWO, tables
from tests.packaging.checkout import ROOT

LLAMA, LARGE = MODELS[ModelShape.LLAMA_3_1_8B], MODELS[ModelShape.LLAMA_3_1_70B]


def test_the_document_has_these_tables():
    text = (ROOT / "docs/scaling.md").read_text()
    missing = [name for name, table in tables().items() if table not in text]
    assert not missing, f"{missing}: write what `python -m seer_jax.bench.scaling.tables` prints"


@pytest.mark.parametrize("row", MEASURED, ids=[name for name, *_ in MEASURED])
def test_formulas_are_near_what_was_measured(row: tuple):
    _, estimate, batch, length, density, seconds, gib = row
    made: Estimate = estimate(LLAMA, MeshSize(), batch, length, *(() if estimate is distil else (density,)))
    assert made.seconds == pytest.approx(seconds, rel=0.11) and made.total_bytes / GIB == pytest.approx(gib, rel=0.04)


@pytest.mark.parametrize("row", MEASURED_ON_TWO, ids=[name for name, *_ in MEASURED_ON_TWO])
def test_formulas_are_near_what_two_devices_took(row: tuple):
    """Decoding by lists is bound by launches, whose times vary."""
    _, estimate, shape, mesh, rows, length, density, _, seconds, gib = row
    made: Estimate = estimate(MODELS[shape], mesh, rows, length, *(() if estimate is distil else (density,)))
    bound = 0.18 if estimate is decode and density < 1 else 0.05
    assert made.seconds == pytest.approx(seconds, rel=bound) and made.total_bytes / GIB == pytest.approx(gib, rel=0.1)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("mesh", ["tensor=8", "fsdp=8", "tensor=16", "data=2,fsdp=2,tensor=4"])
@pytest.mark.filterwarnings("ignore:16 devices of the mesh axis tensor share:RuntimeWarning")
def test_memory_is_that_of_plans(mesh: str):
    size = MeshSize(**{axis: int(n) for axis, _, n in (part.partition("=") for part in mesh.split(","))})
    assert str(size) == mesh
    plan = plan_memory(
        abstract_model(LARGE), 8, 65472, max_new_tokens=64, cache_capacity=65536, mesh=mesh, compiled=False
    )
    assert weight_bytes(LARGE, size) == pytest.approx(plan.weights, rel=1e-3)
    assert cache_bytes(LARGE, size, 8, 65536) == plan.cache


def test_what_is_split_takes_its_share():
    one = MeshSize()
    for mesh, rows in ((MeshSize(tensor=4), 1), (MeshSize(data=4), 4), (MeshSize(fsdp=4), 4)):
        for make in (prefill, distil):
            whole, part = make(LLAMA, one, rows, 65536), make(LLAMA, mesh, rows, 65536)
            assert part.linears == pytest.approx(whole.linears / 4) and part.attention == pytest.approx(
                whole.attention / 4
            )
    sparse, dense = (prefill(LLAMA, one, 1, 65536, density) for density in (0.1, 1.0))
    assert sparse.attention / dense.attention == pytest.approx(0.1 * H200.dense_flop / H200.sparse_flop)
    assert dense.exchange == 0 == decode(LLAMA, MeshSize(data=8), 8, 65536).exchange
    assert (
        decode(LLAMA, MeshSize(fsdp=8), 8, 65536).linears == decode(LLAMA, one, 8, 65536).linears
    )  # gathered, then read


def test_exchange_counts_bytes_on_links():
    """Two sums a layer: 2 (n - 1) / n of the hidden states each; weights over fsdp: (n - 1) / n of them, and between hosts over all networks."""
    layer, tokens, latency = 218103808 * 2, 65536, H200.latency
    sums = prefill(LLAMA, MeshSize(tensor=2), 1, tokens).exchange
    assert sums == pytest.approx(32 * 2 * (tokens * 4096 * 2 / H200.link + latency))
    inside = prefill(LLAMA, MeshSize(fsdp=8), 8, tokens).exchange
    assert inside == pytest.approx(32 * (layer * 7 / 8 / H200.link + latency))
    across = prefill(LLAMA, MeshSize(fsdp=64), 64, tokens).exchange
    assert across == pytest.approx(
        32 * (max(layer * 63 / 64 / H200.link, layer * 7 / 8 / (8 * H200.network)) + latency)
    )
    # Each of eight groups gathers its own eighth over the networks of its hosts: as much together as one group that gathers all.
    groups = (
        prefill(LLAMA, MeshSize(fsdp=8, tensor=8), 8, tokens).exchange
        - prefill(LLAMA, MeshSize(tensor=8), 1, tokens).exchange
    )
    assert groups == pytest.approx(
        32 * (max(layer / 8 * 7 / 8 / H200.link, layer * 7 / 8 / (8 * H200.network)) + latency)
    )


def test_overlap_bounds_the_time():
    made = prefill(LARGE, MeshSize(tensor=8), 1, 131072, 0.1)
    assert made.overlapped == made.linears + made.attention < made.seconds == made.overlapped + made.exchange
    slow = decode(LARGE, MeshSize(fsdp=8), 8, 65536)
    assert slow.overlapped == slow.exchange
