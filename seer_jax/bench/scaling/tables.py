"""The tables of docs/scaling.md, from the formulas of `estimates`: python -m seer_jax.bench.scaling.tables."""

from collections.abc import Callable, Iterator, Sequence

from seer_jax.bench.configs import MODELS, ModelShape
from seer_jax.bench.scaling.estimates import (
    GIB,
    H200,
    Estimate,
    MeshSize,
    combined_bytes,
    decode,
    distil,
    prefill,
    ring_bytes,
    sums_bytes,
)

SHAPES = {"8B": ModelShape.LLAMA_3_1_8B, "32B": ModelShape.QWEN3_32B, "70B": ModelShape.LLAMA_3_1_70B}
LENGTHS = {"64k": 65536, "128k": 131072}
DENSITY = 0.1
RECIPE_TOKENS = 500 * 16 * 65536
DEVICE_GIB = 139
# Measured on one H200 with the 8B's shape (docs/performance.md, seer_jax/bench/README.md): what, seconds, GiB as planned by the compiler.
MEASURED: tuple[tuple[str, Callable[..., Estimate], int, int, float, float, float], ...] = (
    ("prefill of 32k, dense", prefill, 1, 32768, 1.0, 1.23, 20.5),
    ("prefill of 32k, 10.7%", prefill, 1, 32768, 0.107, 0.805, 20.7),
    ("prefill of 128k, dense", prefill, 1, 131072, 1.0, 11.4, 35.6),
    ("prefill of 128k, 10.2%", prefill, 1, 131072, 0.102, 3.84, 36.3),
    ("new tokens of 8 x 32k, dense", decode, 8, 32768, 1.0, 0.01246, 47.0),
    ("new tokens of 8 x 32k, 10%", decode, 8, 32768, 0.1, 0.00663, 47.4),
    ("new tokens of 16 x 32k, 10%", decode, 16, 32768, 0.1, 0.00795, 79.6),
    ("new tokens of 8 x 96k, 10%", decode, 8, 98304, 0.1, 0.00821, 111.9),
    ("new tokens of 4 x 128k, dense", decode, 4, 131072, 1.0, 0.02047, 79.0),
    ("new tokens of 4 x 128k, 10%", decode, 4, 131072, 0.1, 0.00744, 79.6),
    ("distillation of both gates, 64k", distil, 1, 65536, 1.0, 3.736, 18.6),
    ("distillation of both gates, 128k", distil, 1, 131072, 1.0, 11.773, 22.1),
)
# The same on two H200 (`seer-jax bench scaling`): what, shape, mesh, rows, tokens, density, seconds on one (None: not measured) and on two, GiB.
MEASURED_ON_TWO: tuple[
    tuple[str, Callable[..., Estimate], ModelShape, MeshSize, int, int, float, float | None, float, float], ...
] = (
    ("prefill of 32k, dense", prefill, ModelShape.LLAMA_3_1_8B, MeshSize(tensor=2), 1, 32768, 1.0, 1.217, 0.6910, 10.4),
    ("prefill of 32k, 10.7%", prefill, ModelShape.LLAMA_3_1_8B, MeshSize(tensor=2), 1, 32768, 0.107, 0.7968, 0.4726, 10.6),
    ("prefill of 128k, dense", prefill, ModelShape.LLAMA_3_1_8B, MeshSize(tensor=2), 1, 131072, 1.0, 11.23, 5.939, 18.6),
    ("prefill of 128k, 10.2%", prefill, ModelShape.LLAMA_3_1_8B, MeshSize(tensor=2), 1, 131072, 0.102, 3.853, 2.253, 19.3),
    ("new tokens of 8 x 32k, dense", decode, ModelShape.LLAMA_3_1_8B, MeshSize(tensor=2), 8, 32768, 1.0, 0.01225, 0.00793, 23.5),
    ("new tokens of 8 x 32k, 10%", decode, ModelShape.LLAMA_3_1_8B, MeshSize(tensor=2), 8, 32768, 0.1, 0.00630, 0.00526, 23.7),
    ("new tokens of 4 x 128k, dense", decode, ModelShape.LLAMA_3_1_8B, MeshSize(tensor=2), 4, 131072, 1.0, 0.01996, 0.01195, 39.5),
    ("new tokens of 4 x 128k, 10%", decode, ModelShape.LLAMA_3_1_8B, MeshSize(tensor=2), 4, 131072, 0.1, 0.00741, 0.00691, 39.8),
    ("new tokens of 8 x 128k, dense", decode, ModelShape.LLAMA_3_1_8B, MeshSize(tensor=2), 8, 131072, 1.0, None, 0.02004, 71.5),
    ("new tokens of 8 x 128k, 10%", decode, ModelShape.LLAMA_3_1_8B, MeshSize(tensor=2), 8, 131072, 0.1, None, 0.00688, 72.1),
    ("distillation of both gates, 2 x 64k", distil, ModelShape.LLAMA_3_1_8B, MeshSize(data=2), 2, 65536, 1.0, 7.610, 3.800, 18.8),
    ("32B: distillation of both gates, 2 x 32k", distil, ModelShape.QWEN3_32B, MeshSize(fsdp=2), 2, 32768, 1.0, None, 5.724, 37.2),
)  # fmt: skip
PREFILL_MESHES = MeshSize(tensor=2), MeshSize(tensor=8), MeshSize(data=8, tensor=8)
DECODE_MESHES = MeshSize(tensor=8), MeshSize(data=8, tensor=8)
TRAIN_MESHES = (
    MeshSize(data=8),
    MeshSize(fsdp=8),
    MeshSize(tensor=8),
    MeshSize(data=8, fsdp=8),
    MeshSize(fsdp=64),
    MeshSize(fsdp=8, tensor=8),
)
PARTS = 8  # devices along a context axis


def tables() -> dict[str, str]:
    """Each table as Markdown, by its name."""
    return {
        "measured": _table(
            ("one H200, 8B", "formula", "measured", "off", "GiB by formula", "planned"), measured_rows()
        ),
        "measured on two": _table(
            ("two H200, 8B", "mesh", "one", "two", "times faster", "formula", "off", "GiB by formula", "planned"),
            rows_of_two(),
        ),
        "prefill": _table(
            ("prompts", "devices", "dense s", "10% s", "of it exchange", "10%, all hidden", "GiB each"), prefill_rows()
        ),
        "decode": _table(
            ("sequences", "devices", "dense ms", "10% ms", "of it exchange", "tokens/s at 10%", "GiB each"),
            decode_rows(),
        ),
        "distil": _table(
            ("rows", "devices", "s per step", "of it exchange", "all hidden", "H200 hours", "GiB each"), distil_rows()
        ),
        "context": _table(
            (
                "128k tokens",
                "`tensor=8`: sums",
                "context of 8: keys and values",
                "seconds of all layers",
                "new token, `tensor=8`",
                "new token, context of 8",
            ),
            context_rows(),
        ),
    }


def measured_rows() -> Iterator[Sequence[str]]:
    """Formula beside measurement, on one device."""
    for name, estimate, batch, length, density, seconds, gib in MEASURED:
        settings = () if estimate is distil else (density,)
        made = estimate(MODELS[ModelShape.LLAMA_3_1_8B], MeshSize(), batch, length, *settings)
        yield (
            name,
            _time(made.seconds),
            _time(seconds),
            _off(made, seconds),
            f"{made.total_bytes / GIB:.1f}",
            f"{gib:.1f}",
        )


def rows_of_two() -> Iterator[Sequence[str]]:
    """One device beside two, and the formula beside these."""
    for name, estimate, shape, mesh, rows, length, density, one, two, gib in MEASURED_ON_TWO:
        settings = () if estimate is distil else (density,)
        made = estimate(MODELS[shape], mesh, rows, length, *settings)
        alone, faster = ("-", "-") if one is None else (_time(one), f"{one / two:.2f}")
        formula = _time(made.seconds), _off(made, two), f"{made.total_bytes / GIB:.1f}"
        yield name, f"`{mesh}`", alone, _time(two), faster, *formula, f"{gib:.1f}"


def prefill_rows() -> Iterator[Sequence[str]]:
    """A prompt for each group of tensor."""
    for name, shape in SHAPES.items():
        for text, length in LENGTHS.items():
            for mesh in PREFILL_MESHES:
                rows = mesh.data * mesh.fsdp
                dense, sparse = (prefill(MODELS[shape], mesh, rows, length, d) for d in (1.0, DENSITY))
                if sparse.total_bytes > DEVICE_GIB * GIB:
                    continue
                times = (
                    f"{dense.seconds:.2f}",
                    f"{sparse.seconds:.2f}",
                    f"{sparse.exchange:.2f}",
                    f"{sparse.overlapped:.2f}",
                )
                yield f"{name}, {rows} x {text}", f"`{mesh}`", *times, f"{sparse.total_bytes / GIB:.0f}"


def decode_rows() -> Iterator[Sequence[str]]:
    """Eight sequences for each group of tensor."""
    for name, shape in SHAPES.items():
        for text, length in LENGTHS.items():
            for mesh in DECODE_MESHES:
                batch = 8 * mesh.data
                dense, sparse = (decode(MODELS[shape], mesh, batch, length, d) for d in (1.0, DENSITY))
                times = f"{1e3 * dense.seconds:.1f}", f"{1e3 * sparse.seconds:.1f}", f"{1e3 * sparse.exchange:.1f}"
                rate, size = f"{batch / sparse.seconds:,.0f}", f"{sparse.total_bytes / GIB:.0f}"
                yield f"{name}, {batch} x {text}", f"`{mesh}`", *times, rate, size


def distil_rows() -> Iterator[Sequence[str]]:
    """A row for each device along data and fsdp; the hours of the authors' recipe of 0.52 billion tokens."""
    for name, shape in SHAPES.items():
        for mesh in TRAIN_MESHES:
            for text, length in LENGTHS.items():
                rows = mesh.data * mesh.fsdp
                made = distil(MODELS[shape], mesh, rows, length)
                if made.total_bytes > DEVICE_GIB * GIB:
                    continue
                hours = RECIPE_TOKENS / (rows * length) * made.seconds * mesh.devices / 3600
                times = f"{made.seconds:.2f}", f"{made.exchange:.2f}", f"{made.overlapped:.2f}"
                yield f"{name}, {rows} x {text}", f"`{mesh}`", *times, f"{hours:.0f}", f"{made.total_bytes / GIB:.0f}"


def context_rows() -> Iterator[Sequence[str]]:
    """What a device receives in each layer, of a prompt and of a new token of one sequence."""
    for name, shape in SHAPES.items():
        model, length = MODELS[shape], LENGTHS["128k"]
        sums, ring = sums_bytes(model, PARTS, length), ring_bytes(model, PARTS, length)
        seconds = " and ".join(f"{model.num_layers * size / H200.link:.2f}" for size in (sums, ring))
        small = sums_bytes(model, PARTS, 1), combined_bytes(model, PARTS, length)
        new = (f"{size / 1e3:.0f} kB" for size in small)
        yield name, f"{sums / 1e9:.2f} GB", f"{ring / 1e9:.2f} GB", seconds, *new


def _off(made: Estimate, seconds: float) -> str:
    return f"{round(made.seconds / seconds - 1, 2) + 0.0:+.0%}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds > 0.1 else f"{1e3 * seconds:.3g} ms"


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print("\n\n".join(tables().values()))
