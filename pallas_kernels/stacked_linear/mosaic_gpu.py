"""`stacked_linear` for Hopper GPUs, in Pallas Mosaic GPU: reads the layer's weights in place and once, at the memory's bandwidth.

A CTA of one warpgroup takes 64 outputs and a part of the inputs. Weights are the left operand of its matrix products, so that their
64 rows fill the tensor cores; the vectors, padded to a multiple of 8, are the right one. Tiles of 64 x 128 weights arrive in a ring
buffer; four CTAs per multiprocessor have enough of them in flight to saturate the memory. The outputs of the parts are summed in a
fixed order.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.backends import Unsupported
from pallas_kernels.devices import interpreter
from pallas_kernels.mosaic.edge_tiles import store_transposed
from pallas_kernels.mosaic.flash_tiles import MATRIX, i32, product, tile

OUTPUTS, INPUTS = 64, 128  # sizes of a tile
STAGES = 3  # tiles in the ring buffer
CTAS = 4 * 132  # CTAs that run at a time on an H100 or H200
MAX_VECTORS = 64
_VECTOR_MULTIPLE = 8  # of the columns of a matrix product


def stacked_linear(
    x: Float[Array, "R in"], weights: list[Float[Array, "L _ in"]], layer: Int[Array, ""]
) -> list[Float[Array, "R _"]]:
    """See the function of this name in api.py."""
    vectors, inputs = x.shape
    outputs = tuple(w.shape[1] for w in weights)
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"takes bfloat16 and float16; got {x.dtype}.")
    if vectors > MAX_VECTORS:
        raise Unsupported(f"takes at most {MAX_VECTORS} vectors; got {vectors}.")
    if inputs % INPUTS or any(n % OUTPUTS for n in outputs):
        raise Unsupported(
            f"takes multiples of {INPUTS} inputs and {OUTPUTS} outputs; got {inputs} inputs and {outputs} outputs."
        )
    call = _Call(vectors, inputs, outputs, interpreter())
    return _multiply(call, x, weights, layer)


@dataclasses.dataclass(frozen=True)
class _Call:
    """Parameters that the kernel is compiled for: vectors, inputs, and outputs of each map."""

    vectors: int
    inputs: int
    outputs: tuple[int, ...]
    interpret: Any

    @property
    def columns(self) -> int:
        """Vectors, padded for a matrix product."""
        return -(-self.vectors // _VECTOR_MULTIPLE) * _VECTOR_MULTIPLE

    @property
    def tiles(self) -> tuple[int, ...]:
        """Number of tiles of each map's outputs."""
        return tuple(n // OUTPUTS for n in self.outputs)

    @property
    def steps(self) -> int:
        """Number of tiles of the inputs."""
        return self.inputs // INPUTS

    @property
    def parts(self) -> int:
        """Number of parts of the inputs: enough to fill the GPU, but at least two tiles each."""
        return max(1, min(CTAS // sum(self.tiles), self.steps // 2))


@functools.partial(jax.jit, static_argnums=0)
def _multiply(
    call: _Call, x: Float[Array, "R in"], weights: list[Float[Array, "L _ in"]], layer: Int[Array, ""]
) -> list[Float[Array, "R _"]]:
    padded = jnp.pad(x, ((0, call.columns - len(x)), (0, 0)))
    products = _kernel(call, x.dtype)(layer[None], padded, *weights)
    return [y.sum(0).astype(x.dtype) for y in products]


def _kernel(call: _Call, dtype: Any) -> Callable:
    """The kernel from layer [1], x [R, in] and weights [L, out_i, in] to the products of the parts, [parts, R, out_i] in float32."""

    def kernel(layer_ref, x_ref, *refs):
        weight_refs, y_refs = refs[: len(call.outputs)], refs[len(call.outputs) : -3]
        x_tiles, w_tiles, ready = refs[-3:]
        cta = lax.axis_index("cta")
        number, part = lax.rem(cta, i32(sum(call.tiles))), lax.div(cta, i32(sum(call.tiles)))
        layer = layer_ref[0]
        first, end = (lax.div((part + i) * call.steps, i32(call.parts)) for i in range(2))

        def multiply(w_ref: Any, y_ref: Any, row: Array) -> None:
            def load(step: Array) -> None:
                @pl.when(step < end)
                def _():
                    stage, columns = lax.rem(step - first, i32(STAGES)), pl.ds(step * INPUTS, INPUTS)
                    source = w_ref.at[layer, pl.ds(row, OUTPUTS), columns]
                    plgpu.copy_gmem_to_smem(source, w_tiles.at[stage], ready.at[stage])
                    plgpu.copy_gmem_to_smem(x_ref.at[:, columns], x_tiles.at[stage], ready.at[stage])

            for i in range(STAGES):
                load(first + i)

            def step(i: Array, y: Array) -> Array:
                stage = lax.rem(i - first, i32(STAGES))
                plgpu.barrier_wait(ready.at[stage])
                y += product(w_tiles.at[stage], x_tiles.at[stage])
                load(i + STAGES)
                return y

            y = plgpu.layout_cast(jnp.full((OUTPUTS, call.columns), 0, jnp.float32), MATRIX)
            y = lax.fori_loop(first, end, step, y)
            target = y_ref.at[part, :, pl.ds(row, OUTPUTS)]
            store_transposed(y, target, layout=MATRIX, interpreted=call.interpret is not None)

        before = 0
        for w_ref, y_ref, tiles in zip(weight_refs, y_refs, call.tiles, strict=True):
            mine = (number >= before) & (number < before + tiles)
            pl.when(mine)(functools.partial(multiply, w_ref, y_ref, (number - before) * OUTPUTS))
            before += tiles

    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((call.parts, call.vectors, n), jnp.float32) for n in call.outputs],
        scratch_types=[
            tile(STAGES, call.columns, INPUTS, dtype),
            tile(STAGES, OUTPUTS, INPUTS, dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ],
        grid=(sum(call.tiles) * call.parts,),
        grid_names=("cta",),
        interpret=call.interpret,
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
    )
