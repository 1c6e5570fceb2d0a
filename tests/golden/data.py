"""Reads the files of this folder; README.md says where they come from."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp  # noqa: F401 - registers the dtype bfloat16 with numpy
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent
RELEASE = ("prefill_llama_a", "decode_qwen3_a")
TRANSFORMERS = FOLDER / "transformers_models.safetensors"


@dataclasses.dataclass(frozen=True)
class Golden:
    """One model with what another implementation computes from it.

    Attributes:
      config: its `config.json`.
      base: weights by Hugging Face name, bfloat16.
      gate: gate weights by name, float32; empty for plain models.
      io: inputs and outputs.
    """

    config: dict[str, Any]
    base: dict[str, np.ndarray]
    gate: dict[str, np.ndarray]
    io: dict[str, np.ndarray]


@functools.cache
def release(name: str) -> Golden:
    """One of `RELEASE`."""
    with safe_open(FOLDER / f"{name}.safetensors", "np") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        return Golden(json.loads(file.metadata()["config"]), *(_below(arrays, p) for p in ("base.", "gate.", "io.")))


def gate_file(name: str) -> Path:
    """The gate of one of `RELEASE` as torch wrote it."""
    return FOLDER / f"{name}.attn_gate_weights.pth"


@functools.cache
def transformers_names(prefix: str = "") -> tuple[str, ...]:
    """Cases of `TRANSFORMERS`: models, or with the prefix "rope." frequencies."""
    with safe_open(TRANSFORMERS, "np") as file:
        names = sorted(set(file.metadata()) - {"torch", "transformers"})
    return tuple(n for n in names if n.startswith("rope.") == (prefix == "rope."))


@functools.cache
def transformers_case(name: str) -> Golden:
    """A model of `TRANSFORMERS` (io: input_ids, positions, logits) or a set of frequencies (config and io alone)."""
    with safe_open(TRANSFORMERS, "np") as file:
        keys = [k for k in file.keys() if k.startswith(f"{name}/")]  # noqa: SIM118 - not a dict
        arrays = {k.removeprefix(f"{name}/"): file.get_tensor(k) for k in keys}
        base = _below(arrays, "base.")
        io = {k: v for k, v in arrays.items() if not k.startswith("base.")}
        return Golden(json.loads(file.metadata()[name]), base, {}, io)


def write_base(folder: Path, golden: Golden, **changes: Any) -> Path:
    """The base model as a Hugging Face folder; `changes` go into its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(golden.config | changes))
    save_file(golden.base, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_gates(folder: Path, name: str, **changes: Any) -> Path:
    """The gate of one of `RELEASE` as a folder in the release's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    config = release(name).config | {"base_model": "authors/base"} | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "attn_gate_weights.pth").write_bytes(gate_file(name).read_bytes())
    return folder


def _below(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
