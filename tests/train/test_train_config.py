"""Settings of runs: what they refuse, how they are read and written, and that a command line can be made from them."""

import dataclasses
import enum
import json
import math
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro

from seer_jax.gates.configs import DecodeGateConfig, Pool, PrefillGateConfig, QueryReduction
from seer_jax.models.config import DType
from seer_jax.train import DistillConfig, FinetuneConfig, LoraConfig, OptimizerConfig, Packing, TrainedGates
from seer_jax.train.config import TrainConfig, absolute, from_dict, load_config, to_dict
from seer_jax.train.data.batches import DataConfig
from seer_jax.train.data.sources import SourceConfig

WRONG = [
    (lambda: OptimizerConfig(learning_rate=0), r"learning_rate > 0; got 0.0 and 0"),
    (
        lambda: OptimizerConfig(learning_rate=1e-3, end_learning_rate=1e-2),
        r"end_learning_rate <= .* got 0.01 and 0.001",
    ),
    (lambda: OptimizerConfig(end_learning_rate=-1e-9), r"0 <= end_learning_rate"),
    (lambda: OptimizerConfig(warmup_steps=-1), r"OptimizerConfig\.warmup_steps must be at least 0; got -1"),
    (lambda: OptimizerConfig(weight_decay=-0.1), r"weight_decay must be at least 0; got -0.1"),
    (lambda: OptimizerConfig(clip_norm=0.0), r"clip_norm must be positive, or None .* got 0.0"),
    *(
        (
            lambda name=name: dataclasses.replace(TrainConfig(), **{name: 0}),
            rf"TrainConfig.{name} must be at least 1; got 0",
        )
        for name in ("sequence_length", "batch_size", "micro_batch_size", "steps")
    ),
    *(
        (
            lambda name=name: dataclasses.replace(TrainConfig(), **{name: 0}),
            rf"TrainConfig.{name} must be at least 1; got 0",
        )
        for name in ("checkpoint_interval", "keep_checkpoints", "log_interval")
    ),
    (lambda: TrainConfig(batch_size=10, micro_batch_size=4), r"micro_batch_size must divide batch_size.* got 4 and 10"),
    (
        lambda: TrainConfig(steps=20, optimizer=OptimizerConfig(warmup_steps=20)),
        r"warmup must end before the run; got 20 warmup steps of 20\. Lower optimizer\.warmup_steps, or leave it out",
    ),
    (lambda: OptimizerConfig(beta2=1.0), r"beta2 must lie in \[0, 1\); got 1\.0"),
    (lambda: OptimizerConfig(eps=0.0), r"OptimizerConfig\.eps must be positive; got 0\.0"),
    (lambda: DataConfig(held_out_rows=-1), r"DataConfig\.held_out_rows must be at least 0; got -1"),
    (lambda: DataConfig(min_length=0), r"DataConfig\.min_length must be at least 1; got 0"),
    (lambda: TrainConfig(seed=-1), r"TrainConfig.seed must be an integer of at least 0; got -1"),
    (lambda: DistillConfig(prefill_skip=1.0), r"prefill_skip must be a share in \[0, 1\) .* got 1.0"),
    (
        lambda: DistillConfig(decode_stride=3),
        r"decode_stride must divide the decode gate's block size 64; got 3\. Use a power of two",
    ),
    (lambda: DistillConfig(decode_stride=0), r"decode_stride must be at least 1; got 0"),
    (lambda: DistillConfig(decode_skip=-0.1), r"decode_skip must be a share in \[0, 1\) .* got -0.1"),
    (lambda: DistillConfig(recall_density=0.0), r"recall_density must be a share in \(0, 1\]; got 0.0"),
    (
        lambda: DistillConfig(kind=TrainedGates.BOTH, decode=DecodeGateConfig(block_size=32)),
        r"must have one block size; got 64 and 32\. Set both .*, or distil them one after the other\.",
    ),
    (
        lambda: DistillConfig(sequence_length=1000),
        r"must be a multiple of the block size 64 and at least two blocks; got 1000",
    ),
    (lambda: DistillConfig(sequence_length=64), r"at least two blocks; got 64"),
    (lambda: from_dict(DistillConfig, {"stepz": 3}), r"Settings of DistillConfig must be some of model, .*; got stepz"),
    (
        lambda: from_dict(DistillConfig, {"data": {"path": 1}}),
        r"Settings of DistillConfig\.data must be some of paths, .*; got path",
    ),
    (lambda: from_dict(DistillConfig, {"steps": "many"}), r"DistillConfig\.steps must be of type int; got 'many'"),
    (lambda: from_dict(DistillConfig, {"steps": True}), r"DistillConfig\.steps must be of type int; got True"),
    (lambda: from_dict(DistillConfig, {"kind": "none"}), r"\.kind must be one of prefill, decode, both; got 'none'"),
    (
        lambda: from_dict(DistillConfig, {"optimizer": {"eps": "tiny"}}),
        r"\.optimizer\.eps must be a number; got 'tiny'",
    ),
    (lambda: from_dict(DistillConfig, {"optimizer": 1}), r"\.optimizer must be of type OptimizerConfig; got 1"),
    (lambda: from_dict(DistillConfig, {"data": {"paths": ["a", 1]}}), r"\.data\.paths\[1\] must be of type str; got 1"),
    (lambda: load_config(DistillConfig, "run.toml"), r"must end in \.yaml, \.yml or \.json; got run\.toml"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Values of the wrong kind, by the kind of the field; each is refused wherever such a field is.
WRONG_VALUES = {
    int: (2.5, True, "3", None),
    float: ("tiny", True, math.nan, math.inf, [1.0]),
    bool: (1, "yes"),
    str: (3, None, ["a"]),
}
CONFIGS = [
    DistillConfig,
    FinetuneConfig,
    LoraConfig,
    OptimizerConfig,
    DataConfig,
    SourceConfig,
    PrefillGateConfig,
    DecodeGateConfig,
]


def wrong_values(kind: type) -> Iterator[tuple[str, Any]]:
    """(name of a field, a value of the wrong type for it)"""
    for name, hint in typing.get_type_hints(kind).items():
        arguments = [a for a in typing.get_args(hint) if a not in (types.NoneType, ...)]
        one = arguments[0] if arguments else hint
        if typing.get_origin(hint) is tuple:
            values = ((3,), 3, None)
        elif issubclass(one, enum.Enum):
            values = ("botth", 1, None)
        else:
            values = WRONG_VALUES.get(one, (1, "x"))
        optional = types.NoneType in typing.get_args(hint)
        yield from ((name, value) for value in values if not (optional and value is None))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", CONFIGS)
def test_values_of_a_wrong_type_are_refused_by_name(kind):
    for name, value in wrong_values(kind):
        with pytest.raises(ValueError, match=rf"\b{kind.__name__}\.{name}(\[0\])? must be .*; got .*\.$"):
            kind(**{name: value})


@pytest.mark.usefixtures("unchecked")
def test_values_that_mean_one_thing_are_taken():
    given: dict[str, Any] = dict(data={"paths": "x.txt"}, kind="both", dtype="float32", steps=np.int64(40))
    given |= dict(optimizer={"learning_rate": 1}, prefill={"k_pooling": ["max"]})
    config = DistillConfig(**given)
    assert config.data.paths == ("x.txt",) and config.kind is TrainedGates.BOTH and config.dtype is DType.FLOAT32
    assert type(config.steps) is int and config.optimizer.learning_rate == 1.0
    assert config.prefill.k_pooling == (Pool.MAX,)


def test_the_warmup_is_a_tenth_of_a_short_run():
    assert [OptimizerConfig().warmup(steps) for steps in (1, 9, 10, 60, 200, 500)] == [0, 0, 1, 6, 20, 20]
    assert all(TrainConfig(steps=steps).steps == steps for steps in (1, 2, 20))


def test_paths_become_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    data = DataConfig(paths=("a.txt", "/b"), dataset="org/set", chat_template="own.jinja")
    config = absolute(DistillConfig(model="base", output="run", data=data, initial_gates=("org/gate",)))
    assert config.model == f"{tmp_path}/base" and config.output == f"{tmp_path}/run"
    assert config.data.paths == (f"{tmp_path}/a.txt", "/b") and config.data.dataset == "org/set"
    assert config.initial_gates == ("org/gate",) and absolute(config) == config
    assert config.data.chat_template == f"{tmp_path}/own.jinja"
    inline = dataclasses.replace(config, data=DataConfig(paths=("/b",), chat_template="{{ messages }}"))
    assert absolute(inline) == inline


FULL = DistillConfig(
    model="org/name",
    output="runs/1",
    data=DataConfig(paths=("a", "b"), packing=Packing.BEST_FIT, max_tokens=5),
    kind=TrainedGates.DECODE,
    decode=DecodeGateConfig(k_pooling=(Pool.MAX, Pool.AVG), query_reduction=QueryReduction.AVG_PROJ),
    optimizer=OptimizerConfig(clip_norm=None, learning_rate=3e-4),
    dtype=DType.FLOAT32,
)


@pytest.mark.parametrize("config", [DistillConfig(), FULL, FinetuneConfig()])
def test_there_and_back(config):
    assert from_dict(type(config), to_dict(config)) == config
    assert json.loads(json.dumps(to_dict(config))) == to_dict(config)


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
def test_files(tmp_path, suffix):
    texts = {
        "json": '{"steps": 60, "kind": "both", "optimizer": {"learning_rate": 1e-2}, "data": {"paths": ["x"]}}',
        "yaml": "steps: 60\ngates: both\noptimizer:\n  learning_rate: 1e-2\ndata:\n  paths: [x]\n",
    }
    path = tmp_path / f"run.{suffix}"
    path.write_text(texts.get(suffix, texts["yaml"]))
    config = load_config(DistillConfig, path)
    expected = DistillConfig(
        steps=60, kind=TrainedGates.BOTH, optimizer=OptimizerConfig(learning_rate=1e-2), data=DataConfig(paths=("x",))
    )
    assert config == expected
    path.write_text("")
    assert load_config(DistillConfig, path) == DistillConfig()


BAD_FILES = {
    "broken.json": (b'{"steps": 1', r"broken\.json must hold JSON; Expecting"),
    "deep.json": (b"[" * 200_000, r"deep\.json must hold JSON of a few levels; it is nested too deeply"),
    "broken.yaml": (b"steps: [1\nmodel: x: y\n", r"broken\.yaml must hold YAML; [^<]* at line 2, column 6:"),
    "list.yaml": (b"- 1\n", r"list\.yaml must hold settings by name, such as `steps: 100`; got list"),
    "latin.yaml": (b"model: \xff\n", r"latin\.yaml must be UTF-8 text; byte 0xff"),
    "control.yaml": (b"model: \x01\n", r"control\.yaml must "),
    "date.yaml": (b"model: 2026-99-99\n", r"date\.yaml must hold YAML; "),
    "wrong.yaml": (b"steps: many\n", r"wrong\.yaml: steps must be of type int; got 'many'"),
    "low.yaml": (b"optimizer: {warmup_steps: -1}\n", r"low\.yaml: warmup_steps must be at least 0; got -1"),
    "keys.yaml": (b"1: 2\n", r"keys\.yaml: Settings must be some of model, .*; got 1"),
    "deep.yaml": (b"[" * 5_000, r"deep\.yaml must hold YAML of a few levels; it is nested too deeply\."),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_damaged_files_are_refused_in_one_line(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_config(DistillConfig, tmp_path / name)
    assert "\n" not in str(error.value)


def test_the_example_of_the_documentation_is_read(tmp_path):
    readme = (Path(__file__).parents[2] / "train" / "README.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "run.yaml").write_text(example)
    config = load_config(DistillConfig, tmp_path / "run.yaml")
    assert config.kind is TrainedGates.BOTH and config.data.held_out_rows == 8 and len(config.data.paths) == 2


@pytest.mark.usefixtures("unchecked")
def test_paths_are_taken_as_text():
    config = DistillConfig(model=Path("m"), output=Path("x"), data=DataConfig(paths=Path("y")), initial_gates=Path("z"))  # pyright: ignore[reportArgumentType]
    assert (config.model, config.output, config.data.paths, config.initial_gates) == ("m", "x", ("y",), ("z",))


def test_files_may_have_older_names():
    assert from_dict(DistillConfig, {"gates": "both", "precision": "float32"}) == DistillConfig(
        kind=TrainedGates.BOTH, dtype=DType.FLOAT32
    )


def test_recipes_are_those_of_the_papers():
    prefill, decode = DistillConfig.prefill_recipe(model="m"), DistillConfig.decode_recipe(steps=900)
    assert prefill.steps * prefill.batch_size * prefill.sequence_length == 524_288_000
    assert prefill.kind is TrainedGates.PREFILL and prefill.model == "m" and prefill.data.packing is Packing.CONCATENATE
    assert decode.kind is TrainedGates.DECODE and decode.steps == 900 and decode.data.packing is Packing.BEST_FIT
    assert (decode.sequence_length, decode.batch_size, decode.optimizer.end_learning_rate) == (32768, 16, 1e-5)
    for recipe in (prefill, decode):
        assert recipe.optimizer.learning_rate == 1e-3 and recipe.optimizer.weight_decay == 0
        assert recipe.optimizer.warmup(recipe.steps) == 20 and recipe.dtype is DType.BFLOAT16
    assert prefill.block_size == PrefillGateConfig().block_size == decode.block_size == 64


def test_what_defines_a_run():
    config = DistillConfig()
    for change in ({"output": "x"}, {"log_interval": 3}, {"checkpoint_interval": 7}, {"keep_checkpoints": 9}):
        assert dataclasses.replace(config, **change).defining() == config.defining()
    for change in ({"seed": 1}, {"steps": 501}, {"decode_skip": 0.25}, {"data": DataConfig(field="content")}):
        assert dataclasses.replace(config, **change).defining() != config.defining()


def test_command_line():
    arguments = [
        "--model",
        "org/name",
        "--data.paths",
        "a",
        "b",
        "--kind",
        "both",
        "--optimizer.learning-rate",
        "1e-4",
    ]
    arguments += ["--prefill.gate-dim", "64", "--decode.query-reduction", "Qavg", "--dtype", "float32"]
    assert tyro.cli(DistillConfig, args=arguments, config=(tyro.conf.EnumChoicesFromValues,)) == DistillConfig(
        model="org/name",
        data=DataConfig(paths=("a", "b")),
        kind=TrainedGates.BOTH,
        optimizer=OptimizerConfig(learning_rate=1e-4),
        prefill=PrefillGateConfig(gate_dim=64),
        decode=DecodeGateConfig(query_reduction=QueryReduction.AVG),
        dtype=DType.FLOAT32,
    )
