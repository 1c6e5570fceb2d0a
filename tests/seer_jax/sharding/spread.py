"""A tiny model on one device and on meshes of four and of two, rows for it, and what devices exchange in a compiled program, in which order."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from seer_jax.models.decoder import Transformer
from seer_jax.sharding import make_mesh, place
from tests.seer_jax.conftest import LLAMA, tiny_model

MESHES = ["data=2,tensor=2", "fsdp=4", "tensor=4"]
# Each axis by itself, on machines with two GPUs; on CPUs meshes of four are enough.
OF_TWO = [
    pytest.param(f"{axis}=2", marks=(pytest.mark.mesh(2), pytest.mark.gpu)) for axis in ("data", "fsdp", "tensor")
]
BIASED = dataclasses.replace(LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True)
BATCH, WIDTH = 4, 112
TOKENS = np.random.default_rng(0).integers(0, 63, (BATCH, WIDTH)).astype(np.int32)
LENGTHS = np.array([112, 49, 64, 7], np.int32)


@functools.cache
def alone() -> Transformer:
    """A model on one device, whose biases are not zeros."""
    model = tiny_model(BIASED)
    for layer in (model.layers.self_attn, model.layers.mlp):
        for name, linear in vars(layer).items():
            if getattr(linear, "bias", None) is not None:
                shape = linear.bias[...].shape
                linear.bias[...] = 0.1 * jax.random.normal(jax.random.key(len(name) + shape[1]), shape)
    return model


@functools.cache
def on(text: str) -> Transformer:
    """The same model on a mesh."""
    if text == "tensor=4":
        with pytest.warns(
            RuntimeWarning, match="4 devices of the mesh axis tensor share 2 key/value heads: 2 devices each hold"
        ):
            return place(alone(), make_mesh(text))
    return place(alone(), make_mesh(text))


COLLECTIVE = re.compile(r"= (.+?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
SHAPE = re.compile(r"\w+\[[\d,]*\]")


def collectives(program: jax.stages.Compiled) -> dict[str, list[str]]:
    """Shapes of the results of the collectives in a program, by kind; those in a loop over layers count once."""
    found: dict[str, list[str]] = {}
    for shapes, kind in COLLECTIVE.findall(program.as_text() or ""):
        found.setdefault(kind, []).extend(SHAPE.findall(shapes))
    return found


COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.-]+) \(.*\{$")
OPERATION = re.compile(r"^  (?:ROOT )?%([\w.-]+) = (?:\((?:[^()]|\([^()]*\))*\)|\S+) ([\w-]+)\(([^)]*)\)(.*)")
EXCHANGES = re.compile(r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?")
RUNS = re.compile(r"(?:body|condition|to_apply|calls|(?:true|false|branch)_computations?)=\{?((?:%[\w.-]+(?:, )?)+)")
NAME = re.compile(r"%([\w.-]+)")


def unordered(program: jax.stages.Compiled) -> list[tuple[str, str]]:
    """(loop, what devices exchange after it in the schedule of a program for CPUs without waiting for it): devices exchange in the loop, too.

    XLA's CPU devices start the latter when the loop has started, each at a time of its own, and take one exchange for the other. What
    is no loop ends before anything after it starts.
    """
    computations: dict[str, list[tuple[str, ...]]] = {}
    for line in (program.as_text() or "").splitlines():
        if found := COMPUTATION.match(line):
            operations = computations.setdefault(found[1], [])
        elif found := OPERATION.match(line):
            operations.append(found.groups())

    @functools.cache
    def exchanges(name: str) -> bool:
        return any(
            EXCHANGES.fullmatch(kind) or any(map(exchanges, run(kind, rest))) for _, kind, _, rest in computations[name]
        )

    def run(kind: str, rest: str) -> list[str]:
        return [] if kind == "fusion" or EXCHANGES.fullmatch(kind) else NAME.findall(" ".join(RUNS.findall(rest)))

    pairs = []
    for operations in computations.values():
        loops, needs = [], dict[str, set[str]]()
        for name, kind, operands, rest in operations:
            needs[name] = {name}.union(*(needs[operand] for operand in NAME.findall(operands)))
            is_loop = any(map(exchanges, run(kind, rest)))
            if is_loop or EXCHANGES.fullmatch(kind):
                pairs += [(loop, name) for loop in loops if loop not in needs[name]]
            loops += [name] * is_loop
    return pairs
