"""Precision of products in the XLA implementations, which results on a CPU do not show."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.online_softmax import dot


@pytest.mark.parametrize(("dtype", "precision"), [("float32", jax.lax.Precision.HIGHEST), ("bfloat16", None)])
def test_products_have_the_precision_of_their_inputs_and_sum_in_float32(
    dtype: str, precision: jax.lax.Precision | None
):
    """Accelerators multiply float32 in lower precision unless asked."""
    x = jnp.ones((4, 4), dtype)
    with jax.default_matmul_precision(None):
        jaxpr = jax.make_jaxpr(lambda x: dot("qd,sd->qs", x, x))(x)
    (parameters,) = [eqn.params for eqn in _equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    assert parameters["precision"] == (precision and (precision, precision))
    assert parameters["preferred_element_type"] == jnp.float32


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in eqn.params.values():
            if hasattr(inner, "jaxpr"):
                yield from _equations(inner.jaxpr)
