"""Conversations as folders: arrays of the cache as safetensors; tokens, sizes, policies and what they belong to as JSON."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seer_jax.models.decoder import Transformer
from seer_jax.models.fingerprint import fingerprint
from seer_jax.outputs import write_bytes, write_json
from seer_jax.selection.notation import policy_from_json, policy_to_json
from seer_jax.selection.policies import Policy
from seer_jax.text_files import parse_json

FILE = "conversation.json"
LAYOUT = 1  # version of the folder; others are refused
GATES = ("prefill_gate", "decode_gate")
_DTYPES = {"BF16": jnp.bfloat16, "F32": jnp.float32, "I32": jnp.int32}  # of the cache, by their names in safetensors
_AGAIN = "Save the conversation anew."


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedConversation:
    """What a conversation's folder says besides its arrays.

    Attributes:
      tokens: all so far, answers included; at most one more than the capacity, as the last token of an answer is never fed.
      read: the first of them that prefill has read.
      capacity, prefill, decode, prefill_chunk: as in `Conversation`.
      belongs_to: see `identity`.
      arrays_file: name of the file with the arrays.
    """

    tokens: list[int]
    read: int
    capacity: int
    prefill: Policy
    decode: Policy
    prefill_chunk: int
    belongs_to: dict[str, Any]
    arrays_file: str = ""

    def write(self, folder: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
        """Writes the folder, in place of an earlier conversation there as one step.

        Args:
          folder: created if it does not exist.
          arrays: of the cache, by name.
        """
        from safetensors.numpy import save

        folder = Path(folder)
        data = save({name: np.ascontiguousarray(x) for name, x in arrays.items()})
        name = _name(data)
        write_bytes(folder / name, data)
        before = _written(folder / FILE)
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        policies = {phase: policy_to_json(values[phase]) for phase in ("prefill", "decode")}
        # From here on the folder is the new conversation: until then its old file names the old arrays.
        write_json(folder / FILE, dict(layout=LAYOUT) | values | policies | dict(arrays_file=name))
        for old in folder.glob("cache-*.safetensors"):
            # Newer ones are of another process, which saves here too and is about to name its own.
            if old.name != name and _written(old) <= before:
                old.unlink(missing_ok=True)

    @classmethod
    def read_folder(cls, folder: str | os.PathLike[str]) -> "SavedConversation":
        """What `write` wrote.

        Raises:
          FileNotFoundError: there is none.
          ValueError: it is damaged, or of another layout version.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"A conversation's folder must hold {FILE}; {folder} has none. Check the path.")
        values = parse_json(path.read_bytes(), str(path))
        if not isinstance(values, dict) or "layout" not in values:
            raise ValueError(
                f"{path} must be a saved conversation; it is JSON of another kind. Name the folder of a conversation."
            )
        if (layout := values.pop("layout")) != LAYOUT:
            raise ValueError(
                f"{path} must have layout version {LAYOUT}, which this version of seer-jax reads; got {layout}. Load it with the version that "
                "saved it, or start a new conversation."
            )
        _check_values(values, path)
        policies: dict[str, Any] = {phase: policy_from_json(values[phase]) for phase in ("prefill", "decode")}
        return cls(**values | policies)

    def check_fits(self, model: Transformer, folder: str | os.PathLike[str]) -> None:
        """Raises ValueError, with the name of what differs, where the conversation is not that of a model with its gates."""
        theirs, ours = _flat(self.belongs_to), _flat(identity(model, self.prefill, self.decode))
        for name in dict.fromkeys([*theirs, *ours]):
            if theirs.get(name) != ours.get(name):
                raise ValueError(
                    f"A conversation must be loaded with the model and gates that it was saved with: {name} must be {theirs.get(name)}, as in "
                    f"{folder}; got {ours.get(name)}. Load those, or start a new conversation."
                )

    def arrays(self, folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
        """The arrays of the cache, by name.

        Raises:
          OSError: the file can't be read.
          ValueError: it is damaged.
        """
        from safetensors import SafetensorError, deserialize

        path = Path(folder) / Path(self.arrays_file).name
        if path.name != (name := _name(data := path.read_bytes())):
            raise ValueError(
                f"{path} must hold what was saved, which its name tells; its bytes are those of {name}. {_AGAIN}"
            )
        try:
            tensors = deserialize(data)
            return {name: np.frombuffer(x["data"], _DTYPES[x["dtype"]]).reshape(x["shape"]) for name, x in tensors}
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} must be a safetensors file of a cache; {error}. {_AGAIN}") from error


def _name(data: bytes) -> str:
    """Name of the file with the arrays, which tells whether it is whole."""
    return f"cache-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"


def _written(path: Path) -> int:
    """When a file was written, in ns; 0: it is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def identity(model: Transformer, prefill: Policy, decode: Policy) -> dict[str, Any]:
    """What the tokens and arrays of a conversation depend on, as JSON: the model and the gates that the policies use.

    EOS tokens are no part of it, as they change no cache.
    """
    weights = [(path, x) for path, x in jax.tree_util.tree_leaves_with_path(model) if not _of_gate(path)]
    config = dataclasses.asdict(model.config)
    del config["eos_token_ids"]
    found: dict[str, Any] = dict(model=config | _about([x for _, x in weights], model.dtype))
    for name, policy in zip(GATES, (prefill, decode), strict=True):
        gate = getattr(model, name)
        if policy.needs_gate:
            found[name] = None if gate is None else dataclasses.asdict(gate.config) | _about(gate, model.dtype)
    return json.loads(json.dumps(found, default=str))  # tuples and enumerations as a file has them


def _check_values(values: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError where the fields of a file, or their values, are not those of a conversation."""
    names = [field.name for field in dataclasses.fields(SavedConversation)]
    if set(values) != set(names):
        raise ValueError(f"{path} must hold {', '.join(names)}; got {', '.join(values)}. {_AGAIN}")
    tokens, read, capacity, chunk = (values[name] for name in ("tokens", "read", "capacity", "prefill_chunk"))
    listed = isinstance(tokens, list) and isinstance(values["belongs_to"], dict)
    whole = listed and all(type(x) is int for x in (read, capacity, chunk, *tokens))
    if not whole or not 0 <= read <= len(tokens) <= capacity + 1 or chunk < 1 or type(values["arrays_file"]) is not str:
        raise ValueError(
            f"{path} must hold whole numbers, with 0 <= read <= tokens <= capacity + 1; it is damaged. {_AGAIN}"
        )


def _about(weights: Any, dtype: Any) -> dict[str, str]:
    return dict(dtype=jnp.dtype(dtype).name, weights=fingerprint(weights))


def _of_gate(path: Any) -> bool:
    return any(name in jax.tree_util.keystr(path[:1]) for name in GATES)


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    """Values by dotted names: model.num_layers."""
    if not isinstance(values, Mapping):
        return {name: values}
    parts = (_flat(value, f"{name}.{key}" if name else key) for key, value in values.items())
    return {key: value for part in parts for key, value in part.items()}
