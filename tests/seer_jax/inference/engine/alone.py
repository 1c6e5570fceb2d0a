"""Requests to an engine of a tiny model, and what `generate` makes of each alone."""

import functools
from typing import Any

import jax
import numpy as np

from seer_jax import Greedy, Sample, Transformer, generate
from seer_jax.inference.engine import Completion, Engine
from seer_jax.inference.sampling import Sampling
from seer_jax.selection.rules import TokenBudget, TopK
from tests.seer_jax.conftest import tiny_model

SLOTS, CAPACITY, CHUNK, STEPS = 3, 112, 64, 3
# Rules that ask for the length of the whole prompt, which a piece of it must not answer by itself.
SETTINGS: dict[str, Any] = dict(prefill=TopK(0.3), decode=TokenBudget(32), prefill_chunk=CHUNK, decode_steps=STEPS)
STOP = (3, 5, 11, 17)  # several, so that some rows end early
MOST = 16  # new tokens
SAMPLING: tuple[Sampling, ...] = (Greedy(), Sample(1.1, top_k=30, top_p=0.8))


@functools.cache
def llama() -> Transformer:
    return tiny_model()


def make_engine(model: Transformer | None = None, **changes: Any) -> Engine:
    settings: dict[str, Any] = dict(slots=SLOTS, capacity=CAPACITY) | SETTINGS | changes
    return Engine(model or llama(), **settings)


def prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, 63, length).tolist()


def submit(
    engine: Engine, length: int, new: int = MOST, sampling: int = 0, seed: int = 0, **changes: Any
) -> Completion:
    settings: dict[str, Any] = dict(max_new_tokens=new, sampling=SAMPLING[sampling], key=jax.random.key(seed), eos=STOP)
    return engine.submit(prompt(length), **settings | changes)


@functools.cache
def alone(length: int, sampling: int = 0, seed: int = 0, eos: tuple[int, ...] = STOP) -> list[int]:
    """Of `MOST` new tokens at most; the program is the same for all lengths."""
    settings: dict[str, Any] = dict(SETTINGS, cache_capacity=CAPACITY, sampling=SAMPLING[sampling])
    del settings["decode_steps"]
    key = jax.random.key(seed)
    return generate(llama(), [prompt(length)], max_new_tokens=MOST, key=key, eos=eos, **settings).rows()[0]


def run(engine: Engine) -> None:
    """Steps until nothing is left."""
    while engine.step():
        pass
