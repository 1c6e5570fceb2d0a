"""Base models: read exactly, completely and in little memory, or refused with the reason."""

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from seer_jax import load_tokenizer, tiny_lm
from seer_jax.convert import compare_logits, load_base, save_base
from seer_jax.convert.base import abstract_model
from seer_jax.convert.formats.sources import TensorInfo
from seer_jax.convert.rules import BASE_RULES, Rule, expected_slots
from seer_jax.convert.stream import load_parameters
from seer_jax.models.config import ModelConfig
from seer_jax.models.decoder import Transformer
from seer_jax.models.families import config_to_hf
from tests.golden.data import RELEASE, release, transformers_case, transformers_names, write_base
from tests.train.tiny import CONFIG, make_model

HERE = Path(__file__).parent
LLAMA, QWEN2, QWEN3 = "llama_llama3", "qwen2_tied_batch2", "qwen3_biases_yarn"
Q0 = "model.layers.0.self_attn.q_proj.weight"
UP1 = "model.layers.1.mlp.up_proj.weight"
Weights = dict[str, np.ndarray]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", transformers_case(LLAMA))


def rewrite(folder: Path, change: Callable[[Weights], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def assert_same(a: nnx.Module, b: nnx.Module) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.parametrize("name", transformers_names())
def test_logits_are_those_of_transformers(name: str, tmp_path: Path):
    golden = transformers_case(name)
    model = load_base(write_base(tmp_path, golden), dtype=jnp.float32)
    ours = jax.jit(lambda model, ids: model(ids))(model, jnp.asarray(golden.io["input_ids"], jnp.int32))
    report = compare_logits(np.asarray(ours[:, golden.io["positions"]]), golden.io["logits"])
    assert report.relative_error < 1e-5 and report.kl_max < 1e-8, report


@pytest.mark.parametrize("name", [*transformers_names(), *RELEASE])
def test_every_weight_is_stored_unchanged(name: str, tmp_path: Path):
    golden = release(name) if name in RELEASE else transformers_case(name)
    model = load_base(write_base(tmp_path, golden))
    for key, weight in golden.base.items():
        steps = key.removeprefix("model.").removesuffix(".weight").replace(".bias", "..bias").split(".")
        node: Any = model
        layer = int(steps.pop(1)) if steps[0] == "layers" else None
        for step in filter(None, steps):
            node = getattr(node, step)
        if hasattr(node, "weight"):
            node = node.weight
        stored = np.asarray(node[...] if layer is None else node[layer])
        assert stored.dtype == jnp.bfloat16
        np.testing.assert_array_equal(stored.view(np.uint16), weight.view(np.uint16), err_msg=key)


@pytest.mark.parametrize("stored", [np.float32, np.float16, jnp.bfloat16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("chunk", [100, 10**6])
def test_dtypes_are_converted_by_rounding_to_nearest(
    stored: Any, dtype: Any, chunk: int, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("seer_jax.convert.stream.CHUNK_BYTES", chunk)
    values = np.random.default_rng(0).normal(size=(32, 24)).astype(stored)
    values[0, :3] = 0.0, -0.0, 2.0**-14
    rewrite(folder, lambda w: w.update({Q0: values}))
    weight = load_base(folder, dtype=dtype).layers.self_attn.q_proj.weight
    assert weight.dtype == dtype
    np.testing.assert_array_equal(np.asarray(weight[0]), values.astype(dtype))


@pytest.mark.parametrize("chunk", [1, 100, 1000])
def test_pieces_of_any_size_give_the_same(chunk: int, folder: Path, monkeypatch: pytest.MonkeyPatch):
    whole = load_base(folder)
    monkeypatch.setattr("seer_jax.convert.stream.CHUNK_BYTES", chunk)
    assert_same(load_base(folder), whole)


# ---------------------------------------------------------------------------------------------------- which files are read


@pytest.mark.parametrize(
    ("name", "dtype", "shard_bytes"),
    [(LLAMA, jnp.float32, 10**9), (QWEN2, jnp.bfloat16, 10**9), (QWEN3, jnp.bfloat16, 5000), (QWEN2, jnp.float32, 1)],
)
def test_saved_models_read_back_bit_for_bit(name: str, dtype: Any, shard_bytes: int, tmp_path: Path):
    model = load_base(write_base(tmp_path / "a", transformers_case(name)), dtype=dtype)
    save_base(model, tmp_path / "b", shard_bytes=shard_bytes)
    assert ((tmp_path / "b" / "model.safetensors.index.json").exists()) == (shard_bytes < 10**9)
    assert not list((tmp_path / "b").glob("*.partial"))
    assert_same(load_base(tmp_path / "b", dtype=dtype), model)


def test_saved_models_keep_the_names_of_the_checkpoint(tmp_path: Path):
    golden = transformers_case(QWEN3)
    save_base(load_base(write_base(tmp_path / "a", golden)), tmp_path / "b", hf_config=golden.config)
    saved = load_file(tmp_path / "b" / "model.safetensors")
    assert saved.keys() == golden.base.keys()
    for key in saved:
        np.testing.assert_array_equal(saved[key].view(np.uint16), golden.base[key].view(np.uint16))
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == golden.config | {"torch_dtype": "bfloat16"}


def test_saving_again_leaves_no_old_weights(tmp_path: Path):
    model = load_base(write_base(tmp_path / "a", transformers_case(LLAMA)))
    save_base(model, tmp_path / "b", shard_bytes=5000)
    save_base(model, tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors"]
    save_base(model, tmp_path / "b", shard_bytes=5000)
    assert not (tmp_path / "b" / "model.safetensors").exists()
    assert_same(load_base(tmp_path / "b"), model)


@pytest.mark.parametrize(("context", "length"), [(16384, 65536), (8192, 16384)])
def test_the_tokenizer_has_the_context_that_yarn_gives(context: int, length: int, tmp_path: Path):
    """Where it had that of the model before: transformers truncates texts at its `model_max_length`."""
    config = dataclasses.replace(CONFIG, max_position_embeddings=context).with_yarn(4)
    model = make_model(layers=1, model=config)
    save_base(model, tmp_path, tokenizer="tiny-lm")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    before = json.loads((tiny_lm.path() / "tokenizer_config.json").read_text())
    assert settings == before | {"model_max_length": length}


def test_the_tokenizer_comes_with_the_model(tmp_path: Path):
    model = load_base(write_base(tmp_path / "a", transformers_case(LLAMA)))
    save_base(model, tmp_path / "b", tokenizer="tiny-lm")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tiny_lm.path() / name).read_bytes()
    assert load_tokenizer(tmp_path / "b").encode("import os") == load_tokenizer("tiny-lm").encode("import os")
    save_base(model, tmp_path / "b", tokenizer=tmp_path / "b")  # onto itself
    assert_same(load_base(tmp_path / "b"), model)
    with pytest.raises(
        FileNotFoundError, match=r"The folder of `tokenizer` must hold a tokenizer; .*/a has none of tokenizer\.json"
    ):
        save_base(model, tmp_path / "c", tokenizer=tmp_path / "a")
    assert not (tmp_path / "c").exists()


def test_a_saved_model_holds_no_gates(tmp_path: Path):
    from seer_jax.gates.configs import PrefillGateConfig

    model = load_base(write_base(tmp_path / "a", transformers_case(LLAMA)))
    model.add_gate(PrefillGateConfig(gate_dim=8), rngs=nnx.Rngs(0))
    save_base(model, tmp_path / "b")
    assert load_file(tmp_path / "b" / "model.safetensors").keys() == transformers_case(LLAMA).base.keys()


def test_saving_under_the_configuration_of_another_model_is_refused(tmp_path: Path):
    model = load_base(write_base(tmp_path / "a", transformers_case(LLAMA)))
    with pytest.raises(
        ValueError, match=r"hf_config must describe the model, .*family='llama'.*; got .*family='qwen3'"
    ):
        save_base(model, tmp_path / "b", hf_config=transformers_case(QWEN3).config)


BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    "model.rotary_emb.inv_freq": np.ones(4, np.float32),
}


def test_redundant_tensors_are_passed_over(tmp_path: Path):
    folder = write_base(tmp_path, transformers_case(QWEN2))
    plain = load_base(folder)
    rewrite(folder, lambda w: w.update(BUFFERS | {"lm_head.weight": w["model.embed_tokens.weight"].copy()}))
    assert_same(load_base(folder), plain)


# ------------------------------------------------------------------------------------------------------------- refusals


def nan_at(place: tuple[int, ...], value: float) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[UP1] = weights[UP1].copy()
        weights[UP1][place] = value

    return change


def merged(weights: Weights) -> None:
    for key in [k for k in weights if k.endswith(".weight") and "layers" in k]:
        del weights[key]


WRONG_TENSORS = {
    "one missing": (
        lambda w: w.pop(Q0),
        rf"missing: {Q0}; left over: none\. Check that config\.json and weights belong",
    ),
    "untied head missing": (lambda w: w.pop("lm_head.weight"), r"missing: lm_head\.weight; left over: none"),
    "one too many": (
        lambda w: w.update({"model.extra": np.ones(3, np.float32)}),
        r"missing: none; left over: model\.extra",
    ),
    "layer too many": (
        lambda w: w.update({Q0.replace("0", "2"): w[Q0].copy()}),
        r"left over: model\.layers\.2\.self_attn",
    ),
    "bias too many": (
        lambda w: w.update({Q0.replace("weight", "bias"): np.ones(32, np.float32)}),
        r"left over: .*q_proj\.bias",
    ),
    "renamed": (lambda w: w.update({"blk.0.q": w.pop(Q0)}), rf"missing: {Q0}; left over: blk\.0\.q"),
    "a long list": (merged, r"missing: (model\.\S+ ){8}and 10 more; left over: none"),
    "transposed": (
        lambda w: w.update({Q0: w[Q0].T.copy()}),
        rf"shapes must be .* got {Q0} \(24, 32\) instead of \(32, 24\)",
    ),
    "int8": (
        lambda w: w.update({Q0: w[Q0].astype(np.int8)}),
        rf"dtype BF16, F16, F32; got {Q0} I8\. Use .* not quantised",
    ),
    "float64": (lambda w: w.update({Q0: w[Q0].astype(np.float64)}), rf"dtype BF16, F16, F32; got {Q0} F64"),
    "nan": (nan_at((5, 3), np.nan), rf"weights must be finite in bfloat16; '{UP1}' holds NaN or infinity"),
    "nan in the last place": (nan_at((-1, -1), np.nan), rf"weights must be finite .*{UP1}"),
    "infinity": (nan_at((0, 0), -np.inf), rf"weights must be finite .*{UP1}"),
    "beyond bfloat16": (
        lambda w: w.update({UP1: np.full((32, 24), 3.4e38, np.float32)}),
        rf"weights must be finite in bfloat16; '{UP1}' .* do not fit this dtype",
    ),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_wrong_tensors_are_refused(name: str, folder: Path):
    change, message = WRONG_TENSORS[name]
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        load_base(folder)


@pytest.mark.parametrize("name", ["nan", "nan in the last place", "infinity", "beyond bfloat16"])
def test_wrong_numbers_are_found_in_pieces(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("seer_jax.convert.stream.CHUNK_BYTES", 100)
    test_wrong_tensors_are_refused(name, folder)


def test_a_tied_model_needs_no_head_but_an_untied_one_may_not_have_two(tmp_path: Path):
    golden = transformers_case(QWEN2)
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight; left over: none"):
        load_base(write_base(tmp_path, golden, tie_word_embeddings=False))


def test_a_head_beside_a_tied_embedding_must_be_the_embedding(tmp_path: Path):
    folder, embedding = write_base(tmp_path, transformers_case(QWEN2)), "model.embed_tokens.weight"
    expected = load_base(folder)
    rewrite(folder, lambda w: w.update({"lm_head.weight": w[embedding].copy()}))
    assert_same(load_base(folder), expected)
    for change in (lambda w: w["lm_head.weight"] * 2, lambda w: w["lm_head.weight"][:-1].copy()):
        rewrite(folder, lambda w, change=change: w.update({"lm_head.weight": change(w)}))
        with pytest.raises(
            ValueError, match=r"lm_head.weight must be model.embed_tokens.weight, .* Set it to false where"
        ):
            load_base(folder)


def header(path: Path, change: Callable[[dict], Any], *, data: bytes | None = None) -> None:
    """Rewrites the header of a safetensors file, whatever the safetensors package would say."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    content = json.loads(raw[8 : 8 + length])
    content = change(content) or content
    new = json.dumps(content).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + (raw[8 + length :] if data is None else data))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


WRONG_FILES = {
    "fp8": (lambda p: header(p, lambda h: h[Q0].update(dtype="F8_E4M3")), rf"dtype BF16, F16, F32; got {Q0} F8_E4M3"),
    "empty": (
        lambda p: p.write_bytes(b""),
        "first 8 bytes give the length of its header; got length 0 in a file of 0 bytes",
    ),
    "git-lfs pointer": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "or a git-lfs pointer"),
    "header cut off": (lambda p: cut(p, 100), "got length [0-9]+ in a file of 100 bytes. Download it again"),
    "data cut off": (
        lambda p: cut(p, p.stat().st_size - 1),
        "must fill its data_offsets within the .* cut off or damaged",
    ),
    "header not JSON": (lambda p: p.write_bytes((4).to_bytes(8, "little") + b"{a:}"), "header must hold JSON"),
    "header not UTF-8": (
        lambda p: p.write_bytes((4).to_bytes(8, "little") + b"\xff\xfe\xfd{"),
        "header must hold JSON",
    ),
    "header a list": (lambda p: header(p, lambda h: [1]), "header must be a JSON object; got a list"),
    "no shape": (
        lambda p: header(p, lambda h: h[Q0].pop("shape") and h),
        f"must have dtype, shape and data_offsets; '{Q0}'",
    ),
    "one offset": (lambda p: header(p, lambda h: h[Q0].update(data_offsets=[0])), f"must have dtype, shape .* '{Q0}'"),
    "negative offset": (
        lambda p: header(p, lambda h: h[Q0].update(data_offsets=[-2, 4])),
        f"must have dtype, .* '{Q0}'",
    ),
    "fractional shape": (lambda p: header(p, lambda h: h[Q0].update(shape=[1.5])), f"must have dtype, shape .* '{Q0}'"),
    "entry a string": (lambda p: header(p, lambda h: h.update({Q0: "x"})), f"must have dtype, shape .* '{Q0}' has x"),
    "shape too large": (
        lambda p: header(p, lambda h: h[Q0].update(shape=[2**40, 24])),
        f"'{Q0}' .* must fill its data_offs",
    ),
    "beyond the end": (
        lambda p: header(p, lambda h: h[Q0].update(data_offsets=[10**9, 10**9 + 1536])),
        "must fill its data",
    ),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_damaged_files_are_refused(name: str, folder: Path):
    change, message = WRONG_FILES[name]
    change(folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_base(folder)


@pytest.fixture
def sharded(folder: Path, tmp_path: Path) -> Path:
    save_base(load_base(folder), tmp_path / "sharded", shard_bytes=20_000)
    return tmp_path / "sharded"


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*"))[0]


def set_index(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)


def drop_from_shard(folder: Path) -> None:
    weights = load_file(first_shard(folder))
    weights.pop("model.embed_tokens.weight")
    save_file(weights, first_shard(folder))


def store_twice(folder: Path) -> None:
    weights = load_file(first_shard(folder))
    other = sorted(folder.glob("model-*"))[1]
    save_file(load_file(other) | {"model.embed_tokens.weight": weights["model.embed_tokens.weight"]}, other)


WRONG_SHARDS = {
    "shard absent": (
        lambda f: first_shard(f).unlink(),
        FileNotFoundError,
        r"must hold the files that its index names; \['model-00001-of-\d+\.safetens",
    ),
    "tensor absent": (drop_from_shard, ValueError, r"missing: model\.embed_tokens\.weight; left over: none"),
    "tensor twice": (
        store_twice,
        ValueError,
        "must be stored once; 'model.embed_tokens.weight' is in .* another file as well",
    ),
    "index not JSON": (lambda f: set_index(f, "{"), ValueError, "must be JSON with a weight_map"),
    "no weight_map": (lambda f: set_index(f, "{}"), ValueError, "must be JSON with a weight_map"),
    "empty weight_map": (
        lambda f: set_index(f, '{"weight_map": {}}'),
        ValueError,
        r"name files of its own folder; got \[\]",
    ),
    "path": (
        lambda f: set_index(f, '{"weight_map": {"a": "../x"}}'),
        ValueError,
        r"of its own folder; got \['\.\./x'\]",
    ),
    "number": (lambda f: set_index(f, '{"weight_map": {"a": 3}}'), ValueError, r"of its own folder; got \[3\]"),
}


@pytest.mark.parametrize("name", WRONG_SHARDS)
def test_wrong_shards_are_refused(name: str, sharded: Path):
    change, error, message = WRONG_SHARDS[name]
    change(sharded)
    with pytest.raises(error, match=message):
        load_base(sharded)


def test_files_that_no_index_names_are_not_read(sharded: Path):
    model = load_base(sharded)
    save_file({"x": np.ones(1, np.float32)}, sharded / "model-99999-of-99999.safetensors")
    assert_same(load_base(sharded), model)


def test_folders_without_safetensors_are_refused(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = r"must hold model\.safetensors, .* got \['pytorch_model\.bin'\]\. Save other formats with transformers'"
    with pytest.raises(FileNotFoundError, match=message):
        load_base(folder)


def test_a_gate_folder_is_no_base_model(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(transformers_case(LLAMA).config | {"base_model": "some/base"}))
    (tmp_path / "attn_gate_weights.pth").touch()
    with pytest.raises(
        ValueError, match=r"must hold a base model; got a gate of 'some/base'\. Give model=some/base and gates=/"
    ):
        load_base(tmp_path)


WRONG_CONFIGS = {
    "absent": (None, FileNotFoundError, "A model folder must hold config.json"),
    "not JSON": ("{", ValueError, "must hold JSON"),
    "a list": ("[]", ValueError, "must hold a JSON object; got a list"),
    "unknown family": (
        '{"model_type": "mamba"}',
        ValueError,
        "Unknown model_type 'mamba'; expected one of llama, qwen2, qwen3",
    ),
    "quantised": ('{"quantization_config": {"quant_method": "fp8"}}', ValueError, r"must not be quantised; .*\(fp8\)"),
}


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_wrong_configurations_are_refused(name: str, folder: Path):
    content, error, message = WRONG_CONFIGS[name]
    (folder / "config.json").unlink() if content is None else (folder / "config.json").write_text(content)
    with pytest.raises(error, match=message):
        load_base(folder)


def test_a_configuration_of_other_sizes_is_refused(tmp_path: Path):
    folder = write_base(tmp_path, transformers_case(LLAMA), num_key_value_heads=4)
    with pytest.raises(
        ValueError, match=r"shapes must be those that config\.json implies; got .*k_proj\.weight \(16, 24\) instead"
    ):
        load_base(folder)


@pytest.mark.parametrize("dtype", [jnp.float16, np.int8, "float64"])
def test_other_dtypes_are_refused(dtype: Any, folder: Path):
    with pytest.raises(ValueError, match=f"dtype must be bfloat16 or float32; got .*{np.dtype(dtype)}"):
        load_base(folder, dtype=dtype)


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match=r"Each parameter needs a rule .* got none for \['b'\]"):
        expected_slots((Rule("model.a", "a"),), {"a": (1,), "b": (1,)})


# ------------------------------------------------------------------------------------- large models, memory and sharding


class Recorder:
    """A source of the right names and shapes that only notes what is asked of it; every number is 1."""

    place = "recorder"

    def __init__(self, model: Transformer):
        state = nnx.state(model)
        flat = {".".join(map(str, path)): leaf.get_value().shape for path, leaf in nnx.to_flat_state(state)}
        self.tensors: Mapping[str, TensorInfo] = {
            k: TensorInfo(s.shape, "BF16") for k, s in expected_slots(BASE_RULES, flat).items()
        }
        self.rows: dict[str, list[tuple[int, int]]] = {}

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        self.rows.setdefault(name, []).append((start, stop))
        return np.ones((stop - start, *self.tensors[name].shape[1:]), jnp.bfloat16)


SMALL = ModelConfig("llama", 64, 32, 48, 3, 4, 2, 8)


def test_each_row_of_each_tensor_is_read_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("seer_jax.convert.stream.CHUNK_BYTES", 600)
    source = Recorder(abstract_model(SMALL))
    model = load_parameters(abstract_model(SMALL), BASE_RULES, source)
    assert source.rows.keys() == source.tensors.keys()
    for name, pieces in source.rows.items():
        assert [row for start, stop in pieces for row in range(start, stop)] == list(
            range(source.tensors[name].shape[0])
        )
    assert all((np.asarray(leaf) == 1).all() for leaf in jax.tree.leaves(model))


REAL = {
    "Llama-3.1-8B": (ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128), 291, 8.03e9),
    "Llama-3.1-70B": (ModelConfig("llama", 128256, 8192, 28672, 80, 64, 8, 128), 723, 70.6e9),
    "Qwen3-14B": (ModelConfig("qwen3", 151936, 5120, 17408, 40, 40, 8, 128, qk_norm=True), 443, 14.77e9),
    "Qwen2.5-7B": (ModelConfig("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, qkv_bias=True), 339, 7.62e9),
}


@pytest.mark.parametrize("name", REAL)
def test_whole_size_models_have_the_published_number_of_tensors_and_weights(name: str):
    config, tensors, weights = REAL[name]
    source = Recorder(abstract_model(config))
    assert len(source.tensors) == tensors
    assert sum(math.prod(t.shape) for t in source.tensors.values()) == pytest.approx(weights, rel=2e-3)


def sparse_folder(folder: Path, config: ModelConfig) -> tuple[Path, int]:
    """A checkpoint of zeros that takes no disk space; also the bytes of its largest tensor."""
    entries, end, largest = {}, 0, 0
    for name, info in Recorder(abstract_model(config)).tensors.items():
        size = 2 * math.prod(info.shape)
        entries[name] = {"dtype": "BF16", "shape": info.shape, "data_offsets": (end, end + size)}
        end, largest = end + size, max(largest, size)
    raw = json.dumps(entries).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return folder, largest


def run(script: str, *args: str | Path, **environment: str) -> dict:
    command = [sys.executable, str(HERE / script), *map(str, args)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's account of a process in /proc")
@pytest.mark.parametrize(
    ("mesh", "devices", "processes"),
    [("tensor=1", 1, 1), ("fsdp=2,tensor=2", 4, 1), ("fsdp=2,tensor=2", 4, 2)],
)
def test_the_host_holds_little_more_than_the_model(mesh: str, devices: int, processes: int, tmp_path: Path):
    tied: dict[str, Any] = dict(num_heads=8, num_kv_heads=4, head_dim=128, tie_word_embeddings=True)
    small, _ = sparse_folder(tmp_path / "small", ModelConfig("llama", 64, 128, 64, 1, **tied))
    large, largest = sparse_folder(tmp_path / "large", ModelConfig("llama", 49152, 2048, 49152, 1, **tied))
    flags = f"--xla_force_host_platform_device_count={devices // processes}"
    words = ["peak_memory.py", small, large, "bfloat16", mesh]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    numbers = [[]] if processes == 1 else [[str(number), port] for number in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        runs = [pool.submit(run, *words, *more, XLA_FLAGS=flags, JAX_PLATFORMS="cpu") for more in numbers]
    for memory in (one.result() for one in runs):
        assert memory["kept"] * processes > 4 * largest > 4 * 100e6
        assert memory["largest_part"] == pytest.approx(largest / devices)
        assert memory["peak"] <= memory["stays"] + 1.3 * memory["largest_part"], memory
        programs = 150e6  # compiled ones and thread pools, which do not grow with the model
        assert memory["stays"] <= memory["kept"] + programs < memory["kept"] + largest, memory


@pytest.mark.slow
def test_sharded_models_are_the_same_and_each_row_is_read_once(folder: Path):
    flags = "--xla_force_host_platform_device_count=4"
    report = run("sharded_load.py", folder, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    assert report == {"devices": 4, "same": [True, True], "shard": [1, 16, 24], "rows_of_one_layer": [32, 32]}
