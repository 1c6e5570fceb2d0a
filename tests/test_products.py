"""Where seer-jax promises float32 results, each product asks for its precision: a GPU would otherwise round to TF32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from pallas_kernels import (
    attention_with_block_scores,
    block_sparse_attention,
    pool_blocks,
    score_blocks,
    score_sub_blocks,
    sparse_decode_attention,
)
from pallas_kernels.block_ground_truth import cases as ground_truth
from pallas_kernels.block_pooling import cases as pooling
from pallas_kernels.block_sparse_attention import cases as block_sparse
from pallas_kernels.gate_scores import cases as gate_scores
from pallas_kernels.sparse_decode import cases as decode
from pallas_kernels.sub_block_scores import cases as sub_block_scores
from seer_jax.convert import verify_logits
from seer_jax.models.decoder import Transformer
from tests.products import rounded_products
from tests.seer_jax.conftest import tiny_model

X = jnp.ones((4, 4))
EXACT: list[Callable[..., Any]] = [
    lambda x: jnp.dot(x, x, precision="highest"),
    lambda x: jnp.dot(x, x, precision=jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3),
    lambda x: jnp.dot(x.astype(jnp.bfloat16), x.astype(jnp.bfloat16)),
    lambda x: jnp.einsum("ab,c->abc", x, x[0]),
    lambda x: x * x,
]
ROUNDED: list[Callable[..., Any]] = [
    lambda x: x @ x,
    jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32)),
    lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=3),
    lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x, lambda x: x @ x, x),
    jax.grad(lambda x: jnp.dot(x, x, precision="default").sum()),
    jax.checkpoint(lambda x: x @ x),
]


def test_products_that_round_are_found():
    for function in EXACT:
        assert not rounded_products(function, X)
    for function in ROUNDED:
        assert rounded_products(function, X)


CASES = [
    (block_sparse_attention, block_sparse.TINY[0]),
    (attention_with_block_scores, ground_truth.TINY[0]),
    (sparse_decode_attention, decode.TINY[0]),
    (score_blocks, gate_scores.TINY[0]),
    (score_sub_blocks, sub_block_scores.TINY[1]),
    (score_sub_blocks, sub_block_scores.FLOAT32_DECODE),
    (pool_blocks, pooling.TINY[0]),
]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(("operation", "case"), CASES, ids=lambda x: getattr(x, "__name__", None))
def test_operations_on_float32_are_exact(operation: Callable[..., Any], case: Any, implementation: str):
    arguments = case.arguments(jax.random.key(0, impl="rbg"))
    arrays = {name: x for name, x in arguments.items() if isinstance(x, jax.Array) and x.dtype == jnp.float32}
    others = {name: x for name, x in arguments.items() if name not in arrays}

    def run(arrays: dict[str, jax.Array]) -> Any:
        return operation(**arrays, **others, implementation=implementation)

    assert not rounded_products(run, arrays)
    if operation is attention_with_block_scores:  # targets: they have no gradient
        return

    def total(arrays: dict[str, jax.Array]) -> jax.Array:
        return sum(x.sum() for x in jax.tree.leaves(run(arrays)) if jnp.issubdtype(x.dtype, jnp.floating))  # pyright: ignore

    assert not rounded_products(jax.grad(total), arrays), "gradients"


def test_logits_are_verified_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever precision the caller has: the whole base model is computed at the highest."""
    seen, logits = [], Transformer.logits

    def spied(self: Transformer, hidden: jax.Array) -> jax.Array:
        seen.append(jax.config.jax_default_matmul_precision)
        return logits(self, hidden)

    monkeypatch.setattr(Transformer, "logits", spied)
    reference = {"input_ids": np.zeros((1, 3), np.int32), "logits": np.ones((1, 3, 64), np.float32)}
    save_file(reference, tmp_path / "reference.safetensors")
    with jax.default_matmul_precision("bfloat16"):
        verify_logits(tiny_model(gates=False), tmp_path / "reference.safetensors")
    assert seen == ["highest"]
