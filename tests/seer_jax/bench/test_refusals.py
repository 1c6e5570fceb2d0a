"""What benchmarks refuse, and their command lines."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from seer_jax.bench import DecodeBench, PrefillBench, TrainBench, measure_decode, measure_prefill
from seer_jax.commands.main import main
from seer_jax.selection.scorers import SCORERS


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (PrefillBench, dict(lengths=()), r"at least 64 tokens; got none"),
        (PrefillBench, dict(lengths=(8192, 32)), r"got 8192, 32"),
        (PrefillBench, dict(densities=(0.1, 1.5)), r"\(0, 1\]; got 1.5"),
        (PrefillBench, dict(model_density=0.0), "got 0.0"),
        (PrefillBench, dict(densities=()), "where the attention is measured; got none"),
        (PrefillBench, dict(policies=("dense",)), "must rank blocks, as topk:0.1 does; got dense"),
        (
            PrefillBench,
            dict(policies=("topk:0.1:quest",)),
            "by a scorer for prefill; got quest, which is for decode alone",
        ),
        (
            DecodeBench,
            dict(policies=("topk:0.1:xattention",)),
            "by a scorer for decode; got xattention, which is for pref",
        ),
        (PrefillBench, dict(plot=Path("x.png"), only=("model",)), "got no attention"),
        (PrefillBench, dict(variants=True), "variants without implementation"),
        (PrefillBench, dict(skip_thresholds=(0.1, 1.5)), r"skip_thresholds must lie in \[0, 1\]; got 1.5"),
        (PrefillBench, dict(peak=-1.0), "peak must be a number of at least 0; got -1.0"),
        (PrefillBench, dict(backward=True, only=("model",)), "only must name attention where backward is measured"),
        (PrefillBench, dict(peak=2.0, only=("model",)), "only must name attention where skip_thresholds or a peak"),
        (DecodeBench, dict(lengths=(256, 64)), r"at least 128 tokens; got 256, 64"),
        (DecodeBench, dict(batches=()), r"one sequence; got none"),
        (DecodeBench, dict(batches=(1, 0)), r"one sequence; got 1, 0"),
        (DecodeBench, dict(densities=(0.0,)), "got 0.0"),
        (DecodeBench, dict(model_density=2.0), "got 2.0"),
        (DecodeBench, dict(lengths=(128,), tokens=128), "must be 1 to 127, part of the lengths; got 128"),
        (DecodeBench, dict(only=()), "some of kernel, layer, model; got none"),
        (TrainBench, dict(lengths=(256, 100)), r"at least 128 tokens, whole blocks of 64; got 256, 100"),
        (TrainBench, dict(lengths=(64,)), r"whole blocks of 64; got 64"),
        (TrainBench, dict(kinds=()), "kinds must name some of prefill, decode, both, or `finetune` a step; got none"),
        (TrainBench, dict(batch_size=0), "batch_size must be at least 1; got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind: Any, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


@pytest.mark.cpu
@pytest.mark.parametrize("lines", [measure_prefill(PrefillBench()), measure_decode(DecodeBench())])
def test_a_cpu_is_not_asked_for_gpu_sizes(lines: Iterator[Any]):
    with pytest.raises(ValueError, match=r"llama-3\.1-8b must run on a GPU; got a CPU\. Measure --shape tiny"):
        next(lines)


def test_the_command_line(capsys: pytest.CaptureFixture[str]):
    for words, code, text in (
        (["bench", "prefill", "--help"], 0, "usage: seer-jax bench prefill"),
        (["bench", "--help"], 0, "{prefill,decode,ground-truth,train,scaling,serving}"),
        (["bench", "train", "--help"], 0, "usage: seer-jax bench train"),
        (["bench", "ground-truth", "--help"], 0, "usage: seer-jax bench ground-truth"),
        (["bench", "decode", "--help"], 0, "usage: seer-jax bench decode"),
        (["bench", "scaling", "--help"], 0, "usage: seer-jax bench scaling"),
        (["bench", "serving", "--help"], 0, "usage: seer-jax bench serving"),
        (["bench", "scaling", "--mesh", "rows=2"], 2, "each of data, fsdp, tensor at most once; got 'rows=2'"),
        (["bench", "decode", "--lengths", "3"], 2, "at least 128 tokens"),
        (
            ["bench", "decode", "--policies", "topk:0.1:nothing"],
            2,
            f"the scorer must be one of {', '.join(SCORERS)}; got 'nothing'",
        ),
        (
            ["bench", "cooking"],
            2,
            "must be one of prefill, decode, ground-truth, train, scaling, serving; got 'cooking'",
        ),
        (["bench"], 2, "serving} must be given; got none"),
        (["bench", "prefill", "--lengths", "3"], 2, "at least 64 tokens"),
        (["bench", "ground-truth", "--lengths", "3"], 2, "at least 64 tokens"),
        (
            ["bench", "prefill", "--only", "attention", "--chunk", "64"],
            2,
            "only must name model where a --chunk is given",
        ),
        (["bench", "prefill", "--only", "cases", "--no-dense"], 2, "only must name model where --dense is off"),
        (["bench", "ground-truth", "--chunk", "100"], 2, "a multiple of the 64 tokens"),
        (["bench", "ground-truth", "--wanted"], 2, "wanted must name some of blocks, tokens, both, neither; got none"),
        (["bench", "ground-truth", "--statistics"], 2, "statistics must name some of max, mass; got none"),
    ):
        try:
            done = main(words)
        except SystemExit as end:  # of --help
            done = end.code
        captured = capsys.readouterr()
        assert done == code and text in " ".join((captured.out + captured.err).replace("│", " ").split())
