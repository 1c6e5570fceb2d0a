"""Models by name: base, gates, EOS tokens, devices."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax import Greedy, Sample, from_pretrained, load_generation_settings, load_tokenizer, tiny_lm
from seer_jax.convert import load_base, save_base, save_gates
from seer_jax.convert.formats.sources import SafetensorsSource
from seer_jax.models.hub import named_gates
from seer_jax.sharding import make_mesh, place
from seer_jax.train.data.tokens import ModelTokenizer
from tests.seer_jax.conftest import LLAMA, QWEN3, tiny_model

pytestmark = pytest.mark.usefixtures("compile_quickly")

TINY_LM = tiny_lm.path()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, prefill/, decode/ and another model's gate."""
    root, model, other = tmp_path_factory.mktemp("saved"), tiny_model(), tiny_model(QWEN3)
    save_base(model, root / "base")
    for kind, gate in (("prefill", model.prefill_gate), ("decode", model.decode_gate), ("other", other.prefill_gate)):
        assert gate is not None
        save_gates(gate, root / kind, base_model="base")
    return root


def test_a_model_comes_back_with_its_gates(saved: Path):
    expected = tiny_model()
    for places in ([saved / "prefill", saved / "decode"], (str(saved / "decode"), str(saved / "prefill"))):
        model = from_pretrained(saved / "base", places, dtype=jnp.float32)
        assert jax.tree.structure(model) == jax.tree.structure(expected)
        for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_gates_are_optional_and_the_base_is_bfloat16(saved: Path):
    model = from_pretrained(str(saved / "base"))
    assert model.prefill_gate is None and model.decode_gate is None
    assert model.dtype == jnp.bfloat16
    model = from_pretrained(saved / "base", saved / "decode")
    assert model.prefill_gate is None and model.decode_gate is not None
    assert model.decode_gate.linear_k.dtype == jnp.float32


def test_a_model_of_shapes_has_everything_but_weights(saved: Path, tmp_path: Path):
    for name in ("base", "prefill", "decode"):
        (tmp_path / name).mkdir()
        shutil.copy(saved / name / "config.json", tmp_path / name)
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[7, 9])))
    shapes = from_pretrained(tmp_path / "base", [tmp_path / "prefill", tmp_path / "decode"], abstract=True)
    assert shapes.config.eos_token_ids == (7, 9)
    model = from_pretrained(saved / "base", [saved / "prefill", saved / "decode"])
    for ours, theirs in zip(jax.tree.leaves(shapes), jax.tree.leaves(model), strict=True):
        assert isinstance(ours, jax.ShapeDtypeStruct)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    with pytest.raises(ValueError, match=r"one gate of each kind; got .*prefill \(PrefillGate\)"):
        from_pretrained(saved / "base", [saved / "prefill", saved / "prefill"], abstract=True)
    with pytest.raises(ValueError, match=f"family must be {LLAMA.family}; got {QWEN3.family}"):
        from_pretrained(saved / "base", saved / "other", abstract=True)


@pytest.mark.parametrize("abstract", [False, True])
def test_gates_serve_models_of_their_rope_alone(saved: Path, tmp_path: Path, abstract: bool):
    """Also where only shapes are read; another context of a plain RoPE is no other RoPE."""
    for name in ("base", "prefill"):
        shutil.copytree(saved / name, tmp_path / name)
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | dict(max_position_embeddings=2 * config["max_position_embeddings"])))
    assert from_pretrained(tmp_path / "base", tmp_path / "prefill", abstract=abstract).prefill_gate is not None
    path.write_text(json.dumps(config | dict(rope_theta=12345.0)))
    with pytest.raises(
        ValueError, match=r"prefill: a gate must be for this base model: RoPE must be rope_theta=12345.0"
    ):
        from_pretrained(tmp_path / "base", tmp_path / "prefill", abstract=abstract)


NAMED = {"added_tokens_decoder": {"3": {"content": "<|end|>"}, "11": {"content": "</s>", "special": True}}}
EOS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {  # generation_config.json, tokenizer_config.json, EOS tokens
    "config.json alone": (None, None, (5,)),
    "an empty generation_config.json": ({}, None, (5,)),
    "one token": (dict(eos_token_id=7), None, (7,)),
    "several": (dict(eos_token_id=[7, 9]), None, (7, 9)),
    "the tokenizer's beside them": (dict(eos_token_id=[7, 9]), NAMED | dict(eos_token="</s>"), (7, 9, 11)),
    "the tokenizer's beside config.json": (None, NAMED | dict(eos_token=dict(content="<|end|>")), (5, 3)),
    "the tokenizer's among them": (dict(eos_token_id=[7, 11]), NAMED | dict(eos_token="</s>"), (7, 11)),
    "the tokenizer's is not listed": (None, NAMED | dict(eos_token="<eos>"), (5,)),
    "the tokenizer's in tokenizer.json": (None, dict(eos_token="<eos>", tokens=[dict(id=4, content="<eos>")]), (5, 4)),
    "beyond the vocabulary": (None, dict(eos_token="<eos>", tokens=[dict(id=10**6, content="<eos>")]), (5,)),
}


@pytest.mark.parametrize("name", EOS)
def test_eos_tokens_are_those_of_the_generation_and_of_the_tokenizer(saved: Path, tmp_path: Path, name: str):
    generation, tokenizer, expected = EOS[name]
    folder = tmp_path / "base"
    folder.mkdir()
    config = json.loads((saved / "base" / "config.json").read_text()) | dict(eos_token_id=5)
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer is not None:
        tokens = dict(added_tokens=tokenizer.get("tokens", []))
        (folder / "tokenizer.json").write_text(json.dumps(tokens))
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert from_pretrained(folder, abstract=True).config.eos_token_ids == expected


SAMPLING: dict[str, tuple[dict[str, Any], Any, str, dict[str, Any]]] = {
    "nothing": ({}, None, "--temperature 0", {}),
    "off": (dict(do_sample=False, temperature=0.6), None, "--temperature 0", {}),
    "Qwen3": (
        dict(do_sample=True, temperature=0.6, top_k=20, top_p=0.95),
        Sample(0.6, top_k=20, top_p=0.95),
        "--temperature 0.6 --top-k 20 --top-p 0.95",
        {},
    ),
    "without do_sample": (dict(temperature=0.6, top_p=1.0, top_k=0), Sample(0.6), "--temperature 0.6", {}),
    "without a temperature": (dict(do_sample=True), Sample(1.0), "--temperature 1.0", {}),
    "temperature 0": (dict(do_sample=True, temperature=0.0), Greedy(), "--temperature 0", {}),
    "Qwen2.5": (
        dict(do_sample=True, temperature=0.7, repetition_penalty=1.05, num_beams=1, min_p=None, bad_words_ids=None),
        Sample(0.7),
        "--temperature 0.7",
        dict(repetition_penalty=1.05),
    ),
    "other ends": (
        dict(stop_strings=["END"], min_length=0, forced_eos_token_id=3),
        None,
        "--temperature 0",
        dict(stop_strings=["END"], forced_eos_token_id=3),
    ),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_the_sampling_that_a_model_asks_for(tmp_path: Path, name: str):
    hf, sampling, options, left = SAMPLING[name]
    (tmp_path / "generation_config.json").write_text(json.dumps(hf))
    settings = load_generation_settings(tmp_path)
    assert (settings.sampling, settings.options, settings.not_available) == (sampling, options, left)


WRONG_GENERATION: list[tuple[Any, str]] = [
    ([], "generation_config.json must hold a JSON object; got a list"),
    (dict(temperature="0.6"), "generation_config.json: temperature must be a number; got '0.6'"),
    (dict(temperature=-1), "generation_config.json: A sampling temperature must be positive and finite; got -1"),
    (dict(do_sample="false"), "generation_config.json: do_sample must be true or false; got 'false'"),
    (dict(top_k=True), "generation_config.json: top_k must be an integer; got True"),
    (dict(top_k=2.5), "generation_config.json: top_k must be an integer; got 2.5"),
    (dict(top_p=2), r"generation_config.json: top_p must .*got 2"),
    (
        dict(eos_token_id="</s>"),
        "generation_config.json: eos_token_id must be a token id, a list of token ids or null; got '</s>'",
    ),
    (dict(eos_token_id=[1, None]), r"eos_token_id must be a token id, .*got \[1, None\]"),
]


@pytest.mark.parametrize(("hf", "message"), WRONG_GENERATION, ids=range(len(WRONG_GENERATION)))
def test_wrong_generation_configs_are_refused(tmp_path: Path, hf: Any, message: str):
    (tmp_path / "generation_config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match=message):
        load_generation_settings(tmp_path)


def test_a_mesh_of_one_device_takes_the_model(saved: Path):
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    model = from_pretrained(saved / "base", saved / "prefill", mesh=mesh)
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(model))


@pytest.mark.mesh
@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("fsdp=2,tensor=2", (2, 16, 32)),
        pytest.param("data=2,tensor=2", (2, 32, 32), marks=pytest.mark.slow),
        pytest.param("fsdp=4", (2, 16, 32), marks=pytest.mark.slow),
    ],
)
def test_a_model_is_read_into_the_parts_of_a_mesh(
    saved: Path, text: str, part: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    rows: dict[str, list[int]] = {}
    read = SafetensorsSource.read

    def noted(self: SafetensorsSource, name: str, start: int, stop: int) -> np.ndarray:
        rows.setdefault(name, []).extend(range(start, stop))
        return read(self, name, start, stop)

    monkeypatch.setattr(SafetensorsSource, "read", noted)
    monkeypatch.setattr("seer_jax.convert.stream.CHUNK_BYTES", 1500)
    places = saved / "base", [saved / "prefill", saved / "decode"]
    model = from_pretrained(*places, dtype=jnp.float32, mesh=make_mesh(text))
    assert all(sorted(found) == list(range(len(found))) for found in rows.values()), "a row is read twice, or not"
    expected = place(tiny_model(), make_mesh(text))
    assert jax.tree.structure(model) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True):
        assert ours.sharding == theirs.sharding
        np.testing.assert_array_equal(ours, theirs)
    assert model.layers.self_attn.q_proj.weight.addressable_shards[-1].data.shape == part
    shapes = from_pretrained(*places, dtype=jnp.float32, mesh=make_mesh(text), abstract=True)
    assert [x.sharding for x in jax.tree.leaves(shapes)] == [x.sharding for x in jax.tree.leaves(model)]


def test_the_tokenizer_is_found_beside_the_model():
    assert load_tokenizer(str(TINY_LM)).decode(load_tokenizer(TINY_LM).encode("def")) == "def"


def test_the_bundled_model_has_a_name(tmp_path: Path):
    model = from_pretrained("tiny-lm", gates="tiny-lm")
    assert model.config == load_base("tiny-lm").config
    expected = from_pretrained(TINY_LM, list(named_gates("tiny-lm").values()))
    assert jax.tree.structure(model) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, model, expected)
    shapes = from_pretrained("tiny-lm", gates=("tiny-lm",), abstract=True)
    assert jax.tree.structure(shapes) == jax.tree.structure(model)
    assert load_tokenizer("tiny-lm").encode("def") == load_tokenizer(TINY_LM).encode("def")
    assert ModelTokenizer("tiny-lm").fingerprint == ModelTokenizer(str(TINY_LM)).fingerprint


def test_what_does_not_fit_is_refused(saved: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"one gate of each kind; got .*prefill \(PrefillGate\), .*\(PrefillGate\)"):
        from_pretrained(saved / "base", [saved / "prefill", saved / "prefill"])
    with pytest.raises(ValueError, match=f"family must be {LLAMA.family}; got {QWEN3.family}"):
        from_pretrained(saved / "base", saved / "other")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        from_pretrained(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        load_tokenizer(tmp_path / "absent")
    mesh = jax.sharding.Mesh(jax.devices()[:1] * 2, ("data",))
    with pytest.raises(ValueError, match="devices of a mesh must differ; got 2, of which 1 differ"):
        from_pretrained(saved / "base", mesh=mesh)
    folder = shutil.copytree(saved / "base", tmp_path / "base")
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config.json must hold a JSON object"):
        from_pretrained(folder)
