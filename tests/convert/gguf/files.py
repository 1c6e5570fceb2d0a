"""GGUF files of tiny models, written by the package `gguf` as llama.cpp's converter lays them out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from seer_jax.models.config import RopeConfig
from seer_jax.models.rope import inverse_frequencies

LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """What llama.cpp calls a tensor of a Hugging Face checkpoint."""
    if name in WHOLE:
        return WHOLE[name]
    _, _, layer, part = name.split(".", 3)
    stem, _, kind = part.rpartition(".")
    return f"blk.{layer}.{LAYER[stem]}.{kind}"


def interleave(w: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k as llama.cpp stores them for the architecture llama: the two channels of a rotated pair side by side."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def stored(name: str, w: np.ndarray, hf: Mapping[str, Any]) -> np.ndarray:
    """A weight of a Hugging Face checkpoint as llama.cpp's converter hands it to the writer, float32."""
    w = np.asarray(w, np.float32)
    if hf["model_type"] in ("llama", "mistral") and any(part in name for part in ("q_proj", "k_proj")):
        heads = hf["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        return interleave(w, heads)
    return w


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of RoPE, in the style of transformers 4 or 5."""
    return dict(hf.get("rope_parameters") or {"rope_theta": hf["rope_theta"], **(hf["rope_scaling"] or {})})


def metadata_of(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes for a `config.json`."""
    arch = {"mistral": "llama"}.get(hf["model_type"], hf["model_type"])
    rope = _rope(hf)
    heads = hf["num_attention_heads"]
    keys: dict[str, Any] = {
        "vocab_size": hf["vocab_size"],
        "context_length": hf["max_position_embeddings"],
        "embedding_length": hf["hidden_size"],
        "block_count": hf["num_hidden_layers"],
        "feed_forward_length": hf["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": hf["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(hf["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if dim := hf.get("head_dim"):
        keys |= {"attention.key_length": dim, "attention.value_length": dim, "rope.dimension_count": dim}
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if "original_max_position_embeddings" in rope:
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    values = {"general.type": "model", "general.architecture": arch}
    return values | {f"{arch}.{key}": value for key, value in keys.items()}


def rope_factors(hf: Mapping[str, Any]) -> np.ndarray | None:
    """llama.cpp's `rope_freqs.weight`: by how much llama3 divides each frequency."""
    rope = _rope(hf)
    if rope.get("rope_type") != "llama3":
        return None
    plain, scaled = (
        inverse_frequencies(c, hf["head_dim"]) for c in (RopeConfig(rope["rope_theta"]), RopeConfig.from_hf(hf))
    )
    return plain / scaled


def write_gguf(
    path: Path,
    hf: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    *,
    type: Type = Type.F32,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Writes a model as a GGUF file.

    Args:
      path: of the file.
      hf: its `config.json`.
      weights: by Hugging Face name.
      type: of the matrices; vectors are float32.
      metadata: further entries, or others in place of those that follow from `hf`; None leaves one out.
      tensors: further ones, float32.
    """
    entries = {key: value for key, value in (metadata_of(hf) | dict(metadata or {})).items() if value is not None}
    writer = gguf.GGUFWriter(path, entries.pop("general.architecture"))
    for key, value in entries.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value), *_item(value))
    factors = rope_factors(hf)
    for name, w in {**({} if factors is None else {"rope_freqs.weight": factors}), **(tensors or {})}.items():
        writer.add_tensor(name, np.asarray(w, np.float32))
    for name, w in weights.items():
        kind = type if w.ndim == 2 else Type.F32
        writer.add_tensor(gguf_name(name), gguf.quantize(stored(name, w, hf), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _item(value: Any) -> list[Any]:
    return [gguf.GGUFValueType.get_type(value[0])] if isinstance(value, list) else []


def tokenizer_metadata(folder: Path, pre: str) -> dict[str, Any]:
    """The keys of a byte-level tokenizer of a Hugging Face folder."""
    file = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    special = {token["content"]: token["id"] for token in file["added_tokens"]}
    vocab = file["model"]["vocab"] | special
    tokens = sorted(vocab, key=vocab.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in file["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": special[settings["bos_token"]],
        "tokenizer.ggml.eos_token_id": special[settings["eos_token"]],
        "tokenizer.ggml.padding_token_id": special[settings["pad_token"]],
    }
