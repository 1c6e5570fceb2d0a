"""Gates: the release's checkpoint layout in and out, as `.pth` or safetensors; gates that the release lacks as safetensors alone.

A folder holds one gate: `config.json` (the base model's, `base_model`, and the keys of the gate and of its recommended policy) and
`attn_gate_weights.pth` or `attn_gate_weights.safetensors`. A model that carries both gates is saved as two folders.
"""

import enum
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np
from flax import nnx

from seer_jax.convert.base import copy_files, write_safetensors
from seer_jax.convert.files import replacing_files
from seer_jax.convert.formats.sources import ArraySource, SafetensorsSource
from seer_jax.convert.formats.torch_zip import read_torch_zip, write_torch_zip
from seer_jax.convert.gate_config import (
    CALIBRATION_KEY,
    TRAINING_KEY,
    gate_config_from_hf,
    gate_config_to_hf,
    gate_settings,
    policy_from_hf,
    policy_to_hf,
    target_from_hf,
    without_gate_keys,
)
from seer_jax.convert.rules import DECODE_GATE_RULES, PREFILL_GATE_RULES, Rule
from seer_jax.convert.stream import Sharding, load_parameters, tensors_of
from seer_jax.folders import GATE_WEIGHTS, check_is_gate
from seer_jax.gates.configs import GateConfig, PrefillGateConfig
from seer_jax.gates.decode import DecodeGate
from seer_jax.gates.make import make_gate
from seer_jax.gates.prefill import PrefillGate
from seer_jax.models.config import DType, ModelConfig, RopeConfig
from seer_jax.models.families import config_from_hf, config_to_hf
from seer_jax.models.hub import HubSettings, Location, config_text, read_config, resolve_gate, resolve_gates
from seer_jax.models.layers import GateParam
from seer_jax.models.rope import same_rope
from seer_jax.selection.policies import Policy, check_policy
from seer_jax.text_files import parse_json

# Gates of Qwen3-4B and Qwen3-8B have the same shapes; only the widths tell their base models apart. What changes the queries and keys
# that a gate was distilled on must agree too; vocabulary and context may differ.
MUST_AGREE = (
    *("family", "num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size", "intermediate_size"),
    *("qkv_bias", "o_bias", "mlp_bias", "qk_norm", "rms_norm_eps"),
)
_WRITTEN_FOR = "seer_jax_gate"  # metadata of a safetensors file: the gate and the base model that its weights belong to


class GateFormat(enum.StrEnum):
    """How gate weights are stored."""

    TORCH = "pth"
    SAFETENSORS = "safetensors"

    @property
    def file_name(self) -> str:
        return f"{GATE_WEIGHTS}.{self.value}"


GATE_PATTERNS = ("config.json", *(format.file_name for format in GateFormat))


def load_gates(
    location: Location,
    model_config: ModelConfig | None = None,
    *,
    sharding: Sharding | None = None,
    **hub: Unpack[HubSettings],
) -> PrefillGate | DecodeGate:
    """A gate from a folder or hub id, in float32, with the policy that it recommends (`gate.recommended`) and the target that it was
    distilled on (`gate.distilled_on`).

    Args:
      location: a folder, or a hub id such as "SeerAttention/SeerAttention-Llama-3.1-8B-AttnGates". Where both formats are there,
        safetensors is read.
      model_config: of the base model that the gate is to serve. None: the one in the gate's own `config.json`.
      sharding: see `load_base`; paths are "linear_q", "linear_k", "q_norm", "k_norm".
      **hub: see `hub.HubSettings`.

    Raises:
      FileNotFoundError, PermissionError, ConnectionError: it is not there; see `hub.resolve`.
      ValueError: the gate was made for another model, its file or configuration is damaged or not supported, or the name stands for
        two gates.
    """
    folder = resolve_gate(location, GATE_PATTERNS, **hub)
    check_is_gate(folder)
    hf = read_config(folder)
    gate = described_gate(hf, model_config, place=str(folder))
    rules, path = gate_rules(gate.config), _weight_file(folder)
    if path.suffix == ".pth":
        return load_parameters(gate, rules, ArraySource(str(path), read_torch_zip(path)), sharding=sharding)
    with SafetensorsSource([path]) as source:
        _check_written_for(folder, source.metadata.get(_WRITTEN_FOR), gate)
        return load_parameters(gate, rules, source, sharding=sharding)


def described_gate(
    hf: Mapping[str, Any], model_config: ModelConfig | None = None, *, place: str = "config.json"
) -> PrefillGate | DecodeGate:
    """The gate that a parsed `config.json` describes, with its recommended policy and shapes in place of weights.

    Args:
      hf: of a gate.
      model_config: of its base model; None: the one in `hf`.
      place: of the gate, for messages.

    Raises:
      ValueError: the gate was made for another model, or its configuration is not supported.
    """
    found = config_from_hf(hf)
    if model_config is not None:
        _check_same_model(place, hf, found, model_config)
    gate = abstract_gate(gate_config_from_hf(hf), found if model_config is None else model_config)
    gate.recommended = policy_from_hf(hf)
    if (target := target_from_hf(hf)) is not None:
        gate.distilled_on = target
    return gate


def recommended_policy(location: Location) -> Policy | None:
    """The policy that a gate's `config.json` recommends, without reading the gate; None where it recommends nothing."""
    return policy_from_hf(read_config(resolve_gate(location, GATE_PATTERNS)))


def base_model(locations: Location | Sequence[Location], **hub: Unpack[HubSettings]) -> str | None:
    """The base model that gates name in their `config.json`; None where they name none.

    Args:
      locations: of one or several gates, see `from_pretrained`.
      **hub: see `hub.HubSettings`.

    Raises:
      ValueError: two gates name different models.
    """
    names = {
        str(folder): str(name)
        for folder in resolve_gates(locations, ("config.json",), **hub)
        if (folder / "config.json").is_file() and (name := read_config(folder).get("base_model"))
    }
    if len(set(names.values())) > 1:
        listed = ", ".join(f"{name!r} ({folder})" for folder, name in names.items())
        raise ValueError(f"Gates must be of one base model; got {listed}. Choose gates that belong together.")
    return next(iter(names.values()), None)


def save_gates(
    gate: PrefillGate | DecodeGate,
    folder: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str],
    hf_config: Mapping[str, Any] | None = None,
    format: GateFormat = GateFormat.SAFETENSORS,
    policy: Policy | None = None,
    dtype: Any = jnp.float32,
    training: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    copies: Iterable[Path] = (),
    force: bool = False,
) -> Path:
    """Writes a gate in the release's layout.

    Weights and `config.json` replace those of an earlier gate as one step: a process that is killed leaves the old gate, the new one, or
    a folder that loading refuses.

    Args:
      gate: prefill or decode.
      folder: created if it does not exist.
      base_model: folder or hub id of the base model, for readers of the folder.
      hf_config: the base model's `config.json`; keys of a gate in it are replaced. None: one is made.
      format: `.pth` (which the release reads) or safetensors.
      policy: recommended with the gate; None: `gate.recommended`.
      dtype: of the file, float32 (exact) or bfloat16 (rounded, half the size).
      training: how far the gate is trained, JSON, for readers of the folder; it becomes `seer_jax_training` in `config.json`. None: what
        the gate was distilled on, where it says so.
      calibration: how the policy was found, likewise; it becomes `seer_jax_calibration`.
      copies: files to copy into the folder in the same step, such as the base model's; a `config.json` among them is left out.
      force: the gate replaces one of the other kind, or one whose weights are in the other format.

    Returns:
      The weight file.

    Raises:
      ValueError: an argument is of another kind, hf_config describes another model, the policy ranks by a scorer that is not registered,
        or the format is .pth and the release has no such gate.
      FileExistsError: the folder has a gate of the other kind, or weights in the other format, which would then belong to another gate, and
        force is False.
      OSError: a file can't be written, such as on a full disk.
    """
    if not isinstance(gate, PrefillGate | DecodeGate):
        raise ValueError(f"gate must be a PrefillGate or a DecodeGate; got {gate!r}.")
    for name, value in (("folder", folder), ("base_model", base_model)):
        if not isinstance(value, str | os.PathLike):
            raise ValueError(f"{name} must be text or a path; got {value!r}.")
    if format not in list(GateFormat):
        raise ValueError(f"format must be one of {', '.join(GateFormat)}; got {format!r}.")
    if policy is not None:
        check_policy("policy", policy)
    folder, base_model, format, dtype = Path(folder), os.fspath(base_model), GateFormat(format), DType.of(dtype)
    if format is GateFormat.TORCH:
        _check_release_has(gate.config)
    other = next(f for f in GateFormat if f is not format)
    if (folder / other.file_name).exists() and not force:
        raise FileExistsError(
            f"A folder must hold one gate; {folder} already has {other.file_name}. Choose another folder, or replace it with force=True."
        )
    if not force and (there := _kind_in(folder)) not in (None, type(gate)):
        raise FileExistsError(
            f"A folder must hold one gate; {folder} has a {there.__name__}, which a {type(gate).__name__} would replace. Choose another folder, or "
            "replace it with force=True."
        )
    hf = dict(config_to_hf(gate.model) if hf_config is None else hf_config)
    _check_same_model(str(folder), hf, config_from_hf(hf), gate.model)
    hf = without_gate_keys(hf) | gate_config_to_hf(gate.config) | {"base_model": base_model}
    policy = gate.recommended if policy is None else policy
    if policy is not None:
        hf |= policy_to_hf(policy, gate.config)
    if training is None and gate.distilled_on is not None:
        training = {"target": gate.distilled_on}
    hf |= {
        key: dict(told) for key, told in ((TRAINING_KEY, training), (CALIBRATION_KEY, calibration)) if told is not None
    }
    arrays = {key: np.asarray(x.astype(dtype)) for key, x in tensors_of(gate, GateParam, gate_rules(gate.config))}
    with replacing_files(folder) as files:
        files.remove(folder / other.file_name)
        if format is GateFormat.TORCH:
            write_torch_zip(files.path(format.file_name), arrays)
        else:
            write_safetensors(files.path(format.file_name), arrays, **{_WRITTEN_FOR: json.dumps(_description(gate))})
        copy_files(files, (path for path in copies if path.name != "config.json"))
        files.path("config.json").write_text(config_text(hf), encoding="utf-8")
    return folder / format.file_name


def recommend(source: Path, folder: Path, policy: Policy, *, calibration: Mapping[str, Any] | None = None) -> Path:
    """Copies a gate with another recommended policy; weights stay byte for byte.

    Args:
      source: folder of the gate.
      folder: created if it does not exist; may be the source itself, whose configuration alone is then rewritten.
      policy: that is recommended.
      calibration: how it was found, JSON, for readers of the folder; it becomes `seer_jax_calibration` in `config.json`.

    Returns:
      The folder.

    Raises:
      ValueError: the policy does not fit the gate.
      OSError: a file can't be read or written.
    """
    hf = read_config(source)
    gate = described_gate(hf, place=str(source))
    gate.recommended = policy  # checked
    kept = {key: hf[key] for key in (TRAINING_KEY, "base_model") if key in hf}
    hf = without_gate_keys(hf) | kept | gate_config_to_hf(gate.config) | policy_to_hf(policy, gate.config)
    if calibration is not None:
        hf[CALIBRATION_KEY] = dict(calibration)
    with replacing_files(folder) as files:
        if source.resolve() != folder.resolve():
            weights = _weight_file(source)
            other = next(f.file_name for f in GateFormat if f.file_name != weights.name)
            files.remove(folder / other)
            copy_files(files, [weights])
        files.path("config.json").write_text(config_text(hf), encoding="utf-8")
    return folder


def _description(gate: PrefillGate | DecodeGate) -> dict[str, Any]:
    """What weights and `config.json` of a gate must agree in: the gate's configuration, and the base model it serves."""
    return gate_config_to_hf(gate.config) | {name: getattr(gate.model, name) for name in MUST_AGREE}


def _check_written_for(folder: Path, written: object, gate: PrefillGate | DecodeGate) -> None:
    """Raises ValueError where the weights were written for another gate than the one that config.json describes."""
    if written is None:
        return
    try:
        found = dict(parse_json(str(written), "it"))
        of_weights = gate_config_from_hf(found)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{folder}: {_WRITTEN_FOR} in the metadata of the weights must be a JSON object that describes a gate; {error}"
        ) from error
    models = [name for name in MUST_AGREE if name in found]
    expected = gate_settings(gate.config) | {name: getattr(gate.model, name) for name in models}
    found = gate_settings(of_weights) | {name: found[name] for name in models}
    names = expected if expected["kind"] == found["kind"] else ("kind",)
    differing = [name for name in names if expected[name] != found[name]]
    if differing:
        listed = "; ".join(
            f"{name} is {expected[name]!r} in config.json, {found[name]!r} in the weights" for name in differing
        )
        raise ValueError(
            f"{folder}: config.json and weights must be of one gate; {listed}. Save the gate again, or restore the file that was replaced."
        )


def _check_release_has(config: GateConfig) -> None:
    """Raises ValueError where the release, whose layout .pth files are, has no such gate and would take it for another one."""
    finer = config.finer_than_release()
    if finer:
        listed = "; ".join(f"{name} must be {needed}, got {getattr(config, name)}" for name, needed in finer.items())
        raise ValueError(
            f"A gate in the release's layout, {GateFormat.TORCH.file_name}, must be one that the release has: {listed}. Save it with "
            f"format={GateFormat.SAFETENSORS}, or distil a gate without."
        )


def gate_rules(config: GateConfig) -> tuple[Rule, ...]:
    """Rules for the tensors of a gate."""
    return PREFILL_GATE_RULES if isinstance(config, PrefillGateConfig) else DECODE_GATE_RULES


def abstract_gate(config: GateConfig, model: ModelConfig) -> PrefillGate | DecodeGate:
    """A gate with shapes in place of weights."""
    return nnx.eval_shape(lambda: make_gate(config, model, rngs=nnx.Rngs(0)))


def _weight_file(folder: Path) -> Path:
    paths = [folder / format.file_name for format in (GateFormat.SAFETENSORS, GateFormat.TORCH)]
    return next((path for path in paths if path.is_file()), paths[0])


def _kind_in(folder: Path) -> type[PrefillGate | DecodeGate] | None:
    """Of the gate that a folder holds; None where there is none, or a damaged one."""
    if not _weight_file(folder).is_file():
        return None
    try:
        config = gate_config_from_hf(read_config(folder))
    except (ValueError, OSError):
        return None
    return PrefillGate if isinstance(config, PrefillGateConfig) else DecodeGate


def _check_same_model(place: str, hf: Mapping[str, Any], found: ModelConfig, expected: ModelConfig) -> None:
    of = f"of a gate for {hf.get('base_model', 'another model')!r}"
    for name in MUST_AGREE:
        theirs, ours = getattr(found, name), getattr(expected, name)
        if theirs != ours:
            raise ValueError(
                f"{place}: a gate must be for this base model: {name} must be {ours}; got {theirs}, {of}. Use the gate of this base model."
            )
    if not same_rope(found.rope, expected.rope, expected.head_dim):
        raise ValueError(
            f"{place}: a gate must be for this base model: RoPE must be {_described(expected.rope)}; got {_described(found.rope)}, {of}. "
            "Use a gate that was distilled under the RoPE of this base model; where it is known to serve this one, change rope_scaling in "
            "the gate's config.json."
        )


def _described(rope: RopeConfig) -> str:
    """RoPE as config.json says it."""
    return ", ".join(f"{key}={value}" for key, value in rope.to_hf().items() if value is not None)
