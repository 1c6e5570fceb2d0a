"""LoRA adapters in the layout of PEFT: adapter_config.json and adapter_model.safetensors.

`config.json` beside them is that of the model that the adapter was trained in: an adapter that was trained with YaRN belongs to a model
with YaRN, which PEFT's own file cannot say.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import jax
import numpy as np
from flax import nnx

from seer_jax.convert.base import write_safetensors
from seer_jax.convert.files import replacing_files
from seer_jax.convert.formats.sources import SafetensorsSource
from seer_jax.convert.gates import MUST_AGREE
from seer_jax.convert.rules import LORA_RULES
from seer_jax.convert.stream import check_tensors, load_parameters, tensors_of
from seer_jax.folders import ADAPTER_CONFIG, ADAPTER_FOLDER, holds_adapter
from seer_jax.lora import LoraConfig, abstract_lora, lora_config, place
from seer_jax.models.config_json import typed
from seer_jax.models.decoder import Transformer, check_model
from seer_jax.models.families import config_from_hf, config_to_hf
from seer_jax.models.hub import HubSettings, Location, config_text, read_config, read_json, resolve
from seer_jax.models.layers import LoraParam
from seer_jax.models.rope import same_rope
from seer_jax.sharding.processes import ending_together, is_first

CONFIG, WEIGHTS = ADAPTER_CONFIG, "adapter_model.safetensors"
ADAPTER_PATTERNS = (CONFIG, WEIGHTS, "config.json")
_KEY = re.compile(r"base_model[.]model[.]model[.]layers[.]\d+[.]\w+[.](\w+)[.]lora_[AB][.]weight")
# Keys at whose other values PEFT computes something else.
_NEUTRAL: dict[str, Any] = dict(
    bias="none",
    use_dora=False,
    use_qalora=False,
    alora_invocation_tokens=None,
    arrow_config=None,
    lora_bias=False,
    fan_in_fan_out=False,
    modules_to_save=None,
    rank_pattern={},
    alpha_pattern={},
    layers_to_transform=None,
    layer_replication=None,
    trainable_token_indices=None,
    target_parameters=None,
    use_bdlora=None,
)
# Initialisations at which PEFT leaves the base weights as they are; the others (PiSSA, CorDA, OLoRA, LoftQ) change them whenever an adapter
# is loaded.
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


def save_adapter(
    model: Transformer, folder: str | os.PathLike[str], *, base_model: str | os.PathLike[str]
) -> LoraConfig:
    """Writes the adapter of a model, float32, for PEFT and `load_adapter`. Of several processes that share a model all must call.

    Args:
      model: carries the adapter.
      folder: created if it does not exist.
      base_model: folder or hub id of the model without it, for readers of the folder.

    Returns:
      Rank, alpha and targets.

    Raises:
      ValueError: the model has no adapter.
      OSError: a file can't be written.
    """
    check_model(model)
    config = lora_config(model)
    if config is None:
        raise ValueError(
            "The model must carry an adapter to save; it has none. Write its weights: save_base(model, folder)."
        )
    tensors = dict(tensors_of(model, LoraParam, LORA_RULES))
    if model.layout is not None and jax.process_count() > 1:
        tensors = model.layout.everywhere(tensors)
    with ending_together():
        if is_first():
            with replacing_files(Path(folder), CONFIG) as files:
                write_safetensors(files.path(WEIGHTS), {key: np.asarray(x) for key, x in tensors.items()})
                files.path("config.json").write_text(config_text(config_to_hf(model.config)), encoding="utf-8")
                files.path(CONFIG).write_text(config_text(_to_peft(config, os.fspath(base_model))), encoding="utf-8")
    return config


def resolve_adapter(location: Location, **hub: Unpack[HubSettings]) -> Path:
    """The local folder of an adapter, downloaded if need be; named by itself or by the output folder of the run that trained it.

    Raises:
      FileNotFoundError, PermissionError, ConnectionError: it is not there; see `hub.resolve`.
    """
    path = Path(os.path.expanduser(location))
    if path.is_file() and holds_adapter(path.parent):  # named by one of its files
        location = path.parent
    folder = resolve(location, ADAPTER_PATTERNS, named=False, **hub)
    if folder.is_dir() and not holds_adapter(folder) and holds_adapter(folder / ADAPTER_FOLDER):
        folder /= ADAPTER_FOLDER
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        found = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else []
        raise FileNotFoundError(
            f"An adapter must be a folder with {CONFIG} and {WEIGHTS}; {folder} has no {' and no '.join(missing)} but {found}. Give the "
            "folder that PEFT's save_pretrained or a run with LoRA wrote."
        )
    return folder


def adapted_model(location: Location, **hub: Unpack[HubSettings]) -> str | None:
    """The base model that an adapter names; None where it names none."""
    named = read_json(resolve_adapter(location, **hub) / CONFIG).get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


def load_adapter(
    location: Location,
    model: Transformer,
    *,
    base: Location | None = None,
    abstract: bool = False,
    **hub: Unpack[HubSettings],
) -> Transformer:
    """Attaches an adapter to the model that it was trained for, float32, unmerged; see `seer_jax.lora.merge_lora`.

    Args:
      location: folder or hub id of an adapter that PEFT or `save_adapter` wrote, or the output folder of a run that trained one.
      model: it takes the RoPE that the adapter was trained with, where its folder says so.
      base: name of the model, for messages.
      abstract: attach shapes in place of weights, for a model of shapes; the weights' names, shapes and dtypes are checked.
      **hub: see `hub.HubSettings`.

    Raises:
      FileNotFoundError, PermissionError, ConnectionError: it is not there; see `hub.resolve`.
      ValueError: it is damaged, no LoRA adapter, one that can't be computed exactly here, or made for another model.
    """
    folder = resolve_adapter(location, **hub)
    try:
        loras = _read(folder, model, abstract)
        _use_rope(folder, model)
    except ValueError as error:
        of = "its base model" if base is None else f"the base model {os.fspath(base)}"
        raise ValueError(f"The adapter {os.fspath(location)} must fit {of}: {error}") from error
    for path, lora in loras.items():
        place(model, path, lora)
    return model


def _read(folder: Path, model: Transformer, abstract: bool) -> dict[str, Any]:
    """The adapter in a folder, by path of the linear maps."""
    with SafetensorsSource([folder / WEIGHTS]) as source:
        config = _from_peft(read_json(folder / CONFIG), [*source.tensors], str(folder / CONFIG))
        loras = abstract_lora(model, config)
        parts: dict[str, dict[str, nnx.Module]] = {}
        for path, lora in loras.items():
            part, name = path.split(".")
            parts.setdefault(part, {})[name] = nnx.Dict(lora=lora)
        stacked: Any = nnx.Dict(layers=nnx.Dict({part: nnx.Dict(linears) for part, linears in parts.items()}))
        if abstract:
            check_tensors(stacked, LORA_RULES, source)
            return dict(loras)
        sharding = None if model.layout is None else model.layout.sharding
        loaded: Any = load_parameters(stacked, LORA_RULES, source, sharding=sharding)
    return {path: loaded["layers"][path.split(".")[0]][path.split(".")[1]]["lora"] for path in loras}


def _use_rope(folder: Path, model: Transformer) -> None:
    """Gives the model the RoPE that the adapter was trained with.

    Raises:
      ValueError: it was trained in another model. Its weights alone do not tell: many models have linear maps of the same shapes.
    """
    if (folder / "config.json").is_file():
        found = config_from_hf(read_config(folder))
        # Not the family: a GGUF file says that a Mistral model is a Llama, which computes the same.
        theirs, ours = (
            {name: getattr(config, name) for name in MUST_AGREE if name != "family"} | {"rope_theta": config.rope.theta}
            for config in (found, model.config)
        )
        if differing := [name for name in ours if theirs[name] != ours[name]]:
            values = (", ".join(f"{name}={x[name]}" for name in differing) for x in (ours, theirs))
            raise ValueError(
                "config.json beside the adapter, that of the model which it was trained in, must have {}; got {}. Take the "
                "adapter's own base model.".format(*values)
            )
        if not same_rope(found.rope, model.config.rope, model.config.head_dim):
            model.use_rope(found)


def _to_peft(config: LoraConfig, base_model: str) -> dict[str, Any]:
    return dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        r=config.rank,
        lora_alpha=int(config.alpha) if config.alpha.is_integer() else config.alpha,
        target_modules=list(config.targets),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=False,
        use_rslora=False,
        use_dora=False,
        init_lora_weights=True,
        inference_mode=True,
        modules_to_save=None,
        rank_pattern={},
        alpha_pattern={},
    )


def _from_peft(values: Mapping[str, Any], tensors: list[str], place: str) -> LoraConfig:
    """Rank and alpha of PEFT's configuration, and the targets that the file has tensors for."""
    if values.get("peft_type") != "LORA":
        raise ValueError(
            f"{place}: peft_type must be 'LORA'; got {values.get('peft_type')!r}. Other adapters can't be computed."
        )
    remedy = "Merge the adapter with PEFT's merge_and_unload, and load the result as the model."
    for name, neutral in _NEUTRAL.items():
        if (got := values.get(name)) not in (None, [], {}, neutral):
            raise ValueError(f"{place}: {name} must be {neutral!r} or absent; got {got!r}. {remedy}")
    if (got := values.get("init_lora_weights")) not in _INITIALISATIONS:
        raise ValueError(
            f"{place}: init_lora_weights must be one that leaves the base weights as they are, such as true or 'gaussian'; got {got!r}. {remedy}"
        )
    try:
        rank, alpha = typed("r", values.get("r"), int), typed("lora_alpha", values.get("lora_alpha"), float)
        stabilised = typed("use_rslora", values.get("use_rslora") or False, bool)
        if rank < 1 or not 0 < alpha < math.inf:
            raise ValueError(f"r and lora_alpha must be positive; got {rank} and {alpha}")
    except ValueError as error:
        reason = str(error).replace(" of config.json", "").rstrip(".")
        raise ValueError(f"{place}: {reason}. Save the adapter again.") from error
    if stabilised:  # scaled by alpha / sqrt(r)
        alpha *= math.sqrt(rank)
    targets = tuple(dict.fromkeys(match[1] for key in tensors if (match := _KEY.fullmatch(key))))
    if not targets:
        raise ValueError(
            f"{place}: the adapter must have tensors such as base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight; got "
            f"{tensors[:2]}."
        )
    return LoraConfig(rank, alpha, targets)
