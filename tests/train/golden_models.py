"""The golden models and what the authors' release computed with them."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open

from seer_jax.gates.configs import GateConfig
from seer_jax.models.decoder import Transformer
from seer_jax.models.families import config_from_hf

GOLDEN = Path(__file__).parents[1] / "golden"


PREFILL_NAMES = {"linear_k": "mask_linear_k"}
DECODE_NAMES = {
    "linear_q": "attngate_linear_q",
    "linear_k": "attngate_linear_k",
    "q_norm": "attngate_qnorm",
    "k_norm": "attngate_knorm",
}


def load_golden(name: str, gate: GateConfig) -> tuple[Transformer, dict[str, np.ndarray]]:
    """The model of a golden file with its gate, in float32, and all arrays of the file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "np") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        config = config_from_hf(json.loads(file.metadata()["config"]))

    def tensor(path: tuple) -> np.ndarray:
        if path[0] == "layers":
            name = ".".join(path[1:]).removesuffix(".weight")
            return np.stack([arrays[f"base.model.layers.{i}.{name}.weight"] for i in range(config.num_layers)])
        if path[0] == "prefill_gate":
            return stacked(arrays, "gate.", PREFILL_NAMES[path[1]])
        if path[0] == "decode_gate":
            return stacked(arrays, "gate.", DECODE_NAMES[path[1]])
        return arrays[f"base.{'lm_head' if path[0] == 'lm_head' else f'model.{path[0]}'}.weight"]

    def make() -> Transformer:
        return Transformer(config, dtype=jnp.float32, rngs=nnx.Rngs(0)).add_gate(gate, rngs=nnx.Rngs(0))

    graph, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, nnx.map_state(lambda path, _: jnp.asarray(tensor(path), jnp.float32), state)), arrays


def stacked(arrays: dict[str, np.ndarray], prefix: str, name: str) -> np.ndarray:
    """A gate's array of both layers, stacked as ours are."""
    return np.stack([arrays[f"{prefix}model.layers.{i}.self_attn.attn_gate.{name}.weight"] for i in range(2)])


def relative_error(ours: Any, theirs: Any) -> float:
    """||ours - theirs|| / ||theirs||."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
