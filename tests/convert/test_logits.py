"""Comparison of a model with reference logits."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from seer_jax.convert import Bounds, LogitsReport, compare_logits, load_base, verify_logits
from seer_jax.models.config import DType
from tests.golden.data import Golden, transformers_case, write_base

LLAMA, BATCH = "llama_llama3", "qwen2_tied_batch2"


def test_the_figures_are_those_of_the_definition():
    reference = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    ours = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]])) + 3
    report = compare_logits(ours, reference)
    assert report.positions == 2
    assert report.kl_max == pytest.approx(0.25 * np.log(2)) and report.kl_mean == pytest.approx(0.125 * np.log(2))
    assert report.max_abs_error == pytest.approx(3 + np.log(2))
    assert report.relative_error == pytest.approx(np.linalg.norm(ours - reference) / np.linalg.norm(reference))
    assert report.same_argmax == 0.5
    assert not report.passed and str(report).startswith("FAIL at 2 positions: relative error ")


def test_equal_logits_pass_and_large_ones_do_not_overflow():
    logits = np.array([[1e4, -1e4, 0.0]], np.float32)
    report = compare_logits(logits, logits)
    assert (report.kl_max, report.relative_error, report.max_abs_error, report.same_argmax) == (0, 0, 0, 1)
    assert report.passed and str(report).startswith("PASS")


@pytest.mark.parametrize(
    ("bounds", "passed"), [(Bounds(1e-2, 1e-2), True), (Bounds(1e-5, 1e-2), False), (Bounds(1e-2, 1e-9), False)]
)
def test_both_bounds_count(bounds: Bounds, passed: bool):
    reference = np.random.default_rng(0).normal(size=(5, 40))
    noise = np.random.default_rng(1).normal(size=(5, 40))
    assert compare_logits(reference + 1e-3 * noise, reference, bounds).passed is passed


def test_nan_fails():
    reference = np.ones((2, 3))
    assert not compare_logits(np.where(np.eye(2, 3), np.nan, 1), reference, Bounds(1e9, 1e9)).passed


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"must have the shape of the reference, \(2, 3\); got \(2, 4\)"):
        compare_logits(np.ones((2, 4)), np.ones((2, 3)))


@pytest.mark.parametrize("values", [(0, 1), (1, 0), (-1, 1), (float("nan"), 1)])
def test_bounds_are_positive(values: tuple[float, float]):
    with pytest.raises(ValueError, match="Bounds must be positive; got relative_error="):
        Bounds(*values)


def verify(base: Path, path: Path, *bounds: Bounds, dtype: DType = DType.FLOAT32) -> LogitsReport:
    return verify_logits(load_base(base, dtype=dtype), path, *bounds)


def reference(folder: Path, golden: Golden, **changes: Any) -> Path:
    names = ("input_ids", "positions", "logits")
    tensors = {k: golden.io[k] for k in names} | changes
    path = folder / "reference.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items() if v is not None}, path)
    return path


@pytest.mark.parametrize("name", [LLAMA, BATCH])
def test_a_right_model_passes(name: str, tmp_path: Path):
    golden = transformers_case(name)
    base = write_base(tmp_path / "base", golden)
    report = verify(base, reference(tmp_path, golden))
    assert report.passed and report.relative_error < 1e-5 and report.positions == golden.io["logits"][..., 0].size, (
        report
    )


def test_a_reference_of_one_row_needs_no_batch_axis_and_no_positions(tmp_path: Path):
    golden = transformers_case(LLAMA)
    model = load_base(write_base(tmp_path / "base", golden), dtype=jnp.float32)
    ids = golden.io["input_ids"][0]
    logits = np.asarray(model(jnp.asarray(ids, jnp.int32)[None]))[0]
    path = reference(tmp_path, golden, input_ids=ids, logits=logits, positions=None)
    assert verify_logits(model, path).positions == len(ids)


WRONG_MODELS = {
    "RoPE base": dict(rope_parameters=transformers_case(LLAMA).config["rope_parameters"] | dict(rope_theta=1e4)),
    "RoPE scaling": dict(rope_parameters=dict(rope_type="default", rope_theta=5e5)),
    "norm": dict(rms_norm_eps=1e-2),
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_a_model_that_is_slightly_wrong_fails(name: str, tmp_path: Path):
    golden = transformers_case(LLAMA)
    base = write_base(tmp_path / "base", golden, **WRONG_MODELS[name])
    report = verify(base, reference(tmp_path, golden))
    assert not report.passed and report.relative_error > 1e-3, report


def test_bfloat16_fails_the_bounds_of_float32_and_passes_its_own(tmp_path: Path):
    golden = transformers_case(LLAMA)
    base, path = write_base(tmp_path / "base", golden), reference(tmp_path, golden)
    assert not verify(base, path, dtype=DType.BFLOAT16).passed
    assert verify(base, path, Bounds(0.05, 0.05), dtype=DType.BFLOAT16).passed


WRONG_REFERENCES = {
    "no logits": (dict(logits=None), r"must have input_ids and logits, and may have positions; missing \['logits'\]"),
    "no tokens": (dict(input_ids=None), r"missing \['input_ids'\]"),
    "vocabulary": (dict(logits=np.ones((1, 14, 50), np.float32)), "over the model's 48 tokens; got 50"),
    "positions missing": (
        dict(positions=None),
        r"logits \(1, 14, 48\), input_ids \(1, 40\), positions 0 \.\. 39 \(40\)",
    ),
    "positions outside": (dict(positions=np.arange(14) + 30), r"positions 30 \.\. 43 \(14\)"),
    "positions negative": (dict(positions=np.arange(14) - 1), r"positions -1 \.\. 12"),
    "batch": (dict(logits=np.ones((2, 14, 48), np.float32)), r"got logits \(2, 14, 48\), input_ids \(1, 40\)"),
    "tokens outside": (dict(input_ids=np.full((1, 40), 48)), r"Tokens must lie in \[0, 48\)"),
}


@pytest.mark.parametrize("name", WRONG_REFERENCES)
def test_wrong_references_are_refused(name: str, tmp_path: Path):
    changes, message = WRONG_REFERENCES[name]
    golden = transformers_case(LLAMA)
    base, path = write_base(tmp_path / "base", golden), reference(tmp_path, golden, **changes)
    with pytest.raises(ValueError, match=message):
        verify(base, path)


def test_references_that_are_no_safetensors_are_refused(tmp_path: Path):
    base = write_base(tmp_path / "base", transformers_case(LLAMA))
    with pytest.raises(FileNotFoundError, match=r"The reference must be a file; '.*/x' is none\. Check the path"):
        verify(base, tmp_path / "x")
    (tmp_path / "x").write_text("logits")
    with pytest.raises(ValueError, match="a reference must be a safetensors file; got "):
        verify(base, tmp_path / "x")
