"""Prompts in chunks on a mesh: rows whose prompts end in different chunks, on devices that exchange weights in each."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from seer_jax import Conversation, Threshold, TokenBudget, generate
from seer_jax.models.decoder import Transformer
from tests.seer_jax.sharding.spread import BATCH, LENGTHS, MESHES, OF_TWO, TOKENS, alone, on

pytestmark = [pytest.mark.mesh, pytest.mark.usefixtures("compile_quickly")]
POLICY = Threshold(np.linspace(0.05, 0.3, 8, dtype=np.float32).reshape(2, 4))


@functools.partial(jax.jit, static_argnums=1)
def read(model: Transformer, chunk: int | None) -> tuple:
    logits, cache, kept = model.prefill(TOKENS, LENGTHS, model.make_cache(BATCH, 128), sparsity=POLICY, chunk=chunk)
    inside = np.arange(128) < LENGTHS[:, None]
    return logits, kept, *(jax.numpy.where(inside[None, ..., None, None], x, 0) for x in cache.token_arrays)


@functools.cache
def read_alone() -> tuple:
    return read(alone(), None)


@pytest.mark.slow
@pytest.mark.parametrize("text", [*MESHES, *OF_TWO])
def test_chunks_on_a_mesh_are_whole_prompts_on_one_device(text: str):
    for ours, theirs in zip(read(on(text), 32), read_alone(), strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("text", MESHES)
def test_generation_in_chunks_is_that_of_one_device(text: str):
    request: dict[str, Any] = dict(max_new_tokens=5, prefill=POLICY, decode=TokenBudget(48), eos=())
    got = generate(on(text), TOKENS, LENGTHS, prefill_chunk=32, **request)
    assert got.rows() == generate(alone(), TOKENS, LENGTHS, **request).rows()


@pytest.mark.slow
def test_conversations_on_a_mesh_are_those_of_one_device(tmp_path: Path):
    """Saved from one and loaded on the other, too."""

    def talk(model: Transformer) -> list[list[int]]:
        one = Conversation(model, 100, prefill=POLICY, decode=TokenBudget(48), prefill_chunk=32)
        first = one.generate(TOKENS[0, :21].tolist(), max_new_tokens=5, eos=())
        other = one.branch()
        one.save(tmp_path)
        return [
            *first.rows(),
            *one.generate(TOKENS[0, 21:40].tolist(), max_new_tokens=5, eos=()).rows(),
            *other.generate(TOKENS[1, :3].tolist(), max_new_tokens=5, eos=()).rows(),
        ]

    rows = talk(alone())
    assert talk(on("data=2,tensor=2")) == rows
    for model in (on("data=2,tensor=2"), alone()):  # from the mesh
        again = Conversation.load(tmp_path, model)
        assert again.generate(TOKENS[0, 21:40].tolist(), max_new_tokens=5, eos=()).rows() == rows[1:2]
