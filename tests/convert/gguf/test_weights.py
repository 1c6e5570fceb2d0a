"""Weights of GGUF files: dequantised as the package does it, in the order of Hugging Face, piece by piece."""

import dataclasses
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from gguf import GGMLQuantizationType as Type

from seer_jax.convert import compare_logits, load_base
from seer_jax.convert.base import abstract_model
from seer_jax.convert.formats import gguf as formats
from seer_jax.convert.formats.gguf import GGUFSource
from seer_jax.convert.rules import base_rules, expected_slots
from seer_jax.models.families import config_from_hf
from seer_jax.models.hub import read_config
from seer_jax.models.rope import same_rope
from tests.convert.gguf.files import interleave, stored, write_gguf
from tests.golden.data import transformers_case, transformers_names

LLAMA, QWEN2, QWEN3 = "llama_llama3", "qwen2_tied_batch2", "qwen3_biases_yarn"
NOT_IN_GGUF = ("llama_mha_yarn_tuned",)  # mscale and truncate have no keys
CASES = [name for name in transformers_names() if name not in NOT_IN_GGUF]
QUANTISED = [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.MXFP4]

pytestmark = pytest.mark.usefixtures("compile_quickly")


def wide(model_type: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A model of one layer whose rows are whole blocks of 32 elements: config.json and weights by Hugging Face name."""
    golden = transformers_case({"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}[model_type])
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=8)
    hf = {**golden.config, **sizes}
    config = config_from_hf(hf)
    state: Any = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(abstract_model(config))), sep=".")
    slots = expected_slots(base_rules(config), {path: spec.shape for path, spec in state.items()})
    rng = np.random.default_rng(0)
    return hf, {name: rng.normal(size=slot.shape).astype(np.float32) for name, slot in slots.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_the_same_from_both_formats(name: str, tmp_path: Path):
    golden = transformers_case(name)
    path = write_gguf(tmp_path / "model.gguf", golden.config, golden.base)
    ours, theirs = config_from_hf(read_config(path)), config_from_hf(golden.config)
    assert same_rope(ours.rope, theirs.rope, ours.head_dim)
    # The architecture llama is that of Mistral too.
    other = dict(rope=theirs.rope, family=theirs.family, eos_token_ids=theirs.eos_token_ids)
    assert dataclasses.replace(ours, **other) == theirs
    with GGUFSource(path, head_dim=ours.head_dim) as source:
        assert source.tensors.keys() == golden.base.keys()
        for key, w in golden.base.items():
            np.testing.assert_array_equal(source.read(key, 0, len(w)), w.astype(np.float32), err_msg=key)


def test_logits_are_those_of_transformers(tmp_path: Path):
    golden = transformers_case(LLAMA)
    model = load_base(write_gguf(tmp_path / "model.gguf", golden.config, golden.base), dtype=jnp.float32)
    logits = jax.jit(lambda model, ids: model(ids))(model, jnp.asarray(golden.io["input_ids"], jnp.int32))
    report = compare_logits(np.asarray(logits[:, golden.io["positions"]]), golden.io["logits"])
    assert report.relative_error < 1e-5 and report.kl_max < 1e-8, report


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("type", QUANTISED, ids=lambda t: t.name)
def test_a_quantised_model_has_its_dequantised_weights(type: Type, model_type: str, tmp_path: Path):
    hf, weights = wide(model_type)
    path = write_gguf(tmp_path / "model.gguf", hf, weights, type=type)
    config = config_from_hf(read_config(path))
    with GGUFSource(path, head_dim=config.head_dim) as source:
        for name, w in weights.items():
            own = stored(name, w, hf)
            own = gguf.dequantize(gguf.quantize(own, type), type) if w.ndim == 2 else own
            if model_type == "llama" and any(part in name for part in ("q_proj", "k_proj")):
                own = undo(own, hf["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
            np.testing.assert_array_equal(source.read(name, 0, len(w)), own, err_msg=name)


def undo(w: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleave`, by where it puts each row."""
    out = np.empty_like(w)
    out[interleave(np.arange(len(w)), heads)] = w
    return out


def file_of(path: Path, tensors: dict[str, tuple[np.ndarray, Type]], arch: str = "llama") -> Path:
    """A file with the embedding and the given tensors alone."""
    writer = gguf.GGUFWriter(path, arch)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


KNOWN = [kind for kind in Type if formats._is_known(kind)]


def test_every_type_is_read_in_pieces_as_the_package_reads_it(tmp_path: Path):
    assert len(KNOWN) >= 26
    rng = np.random.default_rng(0)
    tensors = {}
    for kind in KNOWN:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        columns = 512 // block * size
        dtype = {Type.F32: np.float32, Type.F16: np.float16}.get(kind, np.uint8)
        # Small bytes are finite scales.
        tensors[kind.name] = rng.integers(0, 60, (7, columns), np.uint8).view(dtype), kind
    with GGUFSource(file_of(tmp_path / "x.gguf", tensors), head_dim=8) as source:
        for name, (data, kind) in tensors.items():
            assert source.tensors[name].shape == (7, 512) and source.tensors[name].dtype == "F32"
            whole = gguf.dequantize(data, kind)
            pieces = np.concatenate([source.read(name, *rows) for rows in ((0, 3), (3, 4), (4, 7))])
            np.testing.assert_array_equal(pieces, whole, err_msg=name)


def test_rows_are_read_alone(tmp_path: Path):
    data = np.zeros((4096, 16 * 34), np.uint8)  # 8 MiB as float32
    with GGUFSource(file_of(tmp_path / "x.gguf", {"x": (data, Type.Q8_0)}), head_dim=8) as source:
        tracemalloc.start()
        try:
            assert source.read("x", 4000, 4010).shape == (10, 512)
            assert tracemalloc.get_traced_memory()[1] < 2**18
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_rotated_rows_come_back_in_pieces(rows: int, tmp_path: Path):
    w = np.random.default_rng(0).normal(size=(24, 32)).astype(np.float32)
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors = {"blk.0.attn_k.weight": (interleave(w, 3), Type.F32)}
    with GGUFSource(file_of(tmp_path / "x.gguf", tensors), head_dim=8) as source:
        pieces = [source.read(name, start, min(start + rows, 24)) for start in range(0, 24, rows)]
        np.testing.assert_array_equal(np.concatenate(pieces), w)
        assert source.read(name, 5, 5).shape == (0, 32)


@pytest.mark.parametrize("kind", [Type.I8, Type.F64, Type.Q8_K, Type.Q8_1], ids=lambda t: t.name)
def test_types_without_a_reader_are_refused(kind: Type, tmp_path: Path):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.zeros((2, 512 // block * size), np.uint8)
    path = file_of(tmp_path / "x.gguf", {"blk.0.attn_v.weight": (data, kind)})
    with pytest.raises(
        ValueError, match=rf"'model.layers.0.self_attn.v_proj.weight' is of type {kind.name}\. Use another"
    ):
        GGUFSource(path, head_dim=8)


def test_the_package_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = file_of(tmp_path / "x.gguf", {"token_embd.weight": (np.zeros((2, 8), np.float32), Type.F32)})
    formats._package.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"needs the package gguf; it is not installed\. Run pip install gguf"):
        GGUFSource(path, head_dim=8)


def test_tensors_of_other_models_are_left_over(tmp_path: Path):
    golden = transformers_case(LLAMA)
    extra = {"blk.0.ffn_gate_exps.weight": np.zeros((2, 24))}
    path = write_gguf(tmp_path / "model.gguf", golden.config, golden.base, tensors=extra)
    with pytest.raises(ValueError, match=r"left over: blk\.0\.ffn_gate_exps\.weight"):
        load_base(path)
