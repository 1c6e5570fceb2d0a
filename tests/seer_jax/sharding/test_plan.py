"""`seer-jax plan`: memory and time of models that are not there, on devices that are not there."""

import pytest

from seer_jax.commands.main import main

# Shapes stand for arrays.
pytestmark = [pytest.mark.usefixtures("compile_quickly"), pytest.mark.usefixtures("unchecked")]


def run(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["plan", *words.split()]) == 0
    return capsys.readouterr().out


def test_a_shape_on_a_mesh(capsys: pytest.CaptureFixture[str]):
    text = run(
        "--model llama-3.1-70b --mesh tensor=8 --length 128000 --batch 8 --no-compiled --device-memory 50", capsys
    )
    head, weights, *_ = text.splitlines()
    assert head == "each of 8 devices" and weights.split() == ["weights", "16.429", "GiB"]
    assert "not compiled" in text and "missing" in text and "available               50.000 GiB" in text
    assert "By formula (docs/scaling.md), on 8 H200: prompts in 88 s" in text and "depends on the text" not in text


def test_a_shape_has_the_dtype_that_is_named(capsys: pytest.CaptureFixture[str]):
    text = run("--model llama-3.1-8b --dtype float32 --length 128 --no-compiled", capsys)
    assert float(text.split()[1]) == pytest.approx(2 * GIB_8B, abs=2e-3)


def test_policies_count_in_the_time(capsys: pytest.CaptureFixture[str]):
    words = "--model llama-3.1-8b --length 120000 --no-compiled"
    dense = run(words, capsys)
    sparse = run(f"{words} --prefill topk:0.1 --decode budget:12000", capsys)
    assert "on an H200: prompts in 9.27 s" in dense and "on an H200: prompts in 3.46 s" in sparse
    assert "devices" not in dense
    assert "prefill is counted as dense there" in run(f"{words} --prefill threshold:0.001", capsys)


def test_a_model_is_compiled_for_its_part(capsys: pytest.CaptureFixture[str]):
    text = run("--model tiny-lm --gates tiny-lm --mesh tensor=2 --length 64 --max-new-tokens 1", capsys)
    assert text.startswith("each of 2 devices\nweights                  0.007 GiB") and "not compiled" not in text
    assert "The policy for prefill is counted as dense there: what it keeps depends on the text." in text


def test_gates_name_their_model(capsys: pytest.CaptureFixture[str]):
    words = "--gates tiny-lm --length 64 --max-new-tokens 1 --no-compiled"
    assert run(words, capsys) == run(f"--model tiny-lm {words}", capsys)


def test_finer_gates_of_a_shape_keep_more_keys(capsys: pytest.CaptureFixture[str]):
    """While decoding: eight keys of 64 channels per block in place of one of 128."""
    sizes = []
    for kind in ("release", "fine"):
        text = run(f"--kind {kind} --length 65280 --decode topk:0.1 --no-compiled", capsys)
        (line,) = (line for line in text.splitlines() if "keys of gates" in line)
        sizes.append(float(line.split()[-2]))
    assert sizes[1] == pytest.approx(4 * sizes[0], abs=3e-3)


GIB_8B = 8_030_261_248 * 2 / 2**30  # bfloat16
GATE_8B = 32 * 32 * 3 * 128 * 128 / 2**30  # layers, heads, 3 pools D, C
ADAPTER_8B = 32 * 16 * (4096 * 9 + 1024 * 2 + 14336 * 3) / 2**30


@pytest.mark.parametrize(
    ("words", "trains", "frozen"),
    [
        ("lora", ADAPTER_8B, GIB_8B),
        ("lora --prefill topk:0.1", ADAPTER_8B + GATE_8B, GIB_8B),
        ("full", GIB_8B / 2, 0),
    ],
)
def test_fine_tuning_of_a_shape(words: str, trains: float, frozen: float, capsys: pytest.CaptureFixture[str]):
    text = run(f"--model llama-3.1-8b --no-compiled --device-memory 20 --length 32768 --finetune {words}", capsys)
    sizes = {line[:22].strip(): float(line.split()[-2]) for line in text.splitlines() if "compiled" not in line}
    assert sizes["frozen weights"] == pytest.approx(frozen, abs=2e-3)
    assert sizes["trained weights"] == pytest.approx(4 * trains, abs=2e-3)
    assert sizes["moments"] == pytest.approx(8 * trains, abs=2e-3)
    assert ("missing" in sizes) == (words == "full") and "not compiled" in text


@pytest.mark.slow
def test_a_step_of_fine_tuning_is_compiled(capsys: pytest.CaptureFixture[str]):
    words = "--model tiny-lm --gates tiny-lm --finetune lora --prefill topk:0.5 --length 256 --batch 2"
    assert "not compiled" not in run(words, capsys)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ("--mesh tensor=3 --length 64", 1, "tensor=3. Use tensor=1 or 2 or 4"),
        ("--mesh tensor=-1", 2, "must have a size for each axis; got 'tensor=-1'. Write for example tensor=8."),
        ("--length 0", 2, "--length must be"),
        ("--device-memory 0", 2, "--device-memory must be a number of GiB above 0; got 0"),
        ("--device-memory inf", 2, "--device-memory must be a number of GiB above 0; got inf"),
        ("--finetune full --mesh tensor=2", 2, "--mesh must be left out with --finetune"),
        (
            "--finetune full --decode dense",
            2,
            "--decode must be left out with --finetune, which decodes nothing; got dense",
        ),
        (
            "--finetune full --model tiny-lm --adapter x",
            2,
            "--adapter must be left out with --finetune full, which trains",
        ),
        (
            "--finetune full --length 500 --prefill topk:0.5",
            1,
            "multiple of the gate's block size 64 and at least two blocks, as a run's rows must; got 500. Set --length 448",
        ),
        ("--finetune full --prefill-chunk 64", 2, "--prefill-chunk must be left out with --finetune, which reads"),
        ("--finetune full --max-new-tokens 8", 2, "--max-new-tokens must be left out with --finetune, which decodes"),
        ("--finetune lora --beyond-context", 2, "--beyond-context must be left out with --finetune, which plans rows"),
        ("--finetune full --prefill mass:0.9", 2, "--prefill must be topk:DENSITY with --finetune, ranked"),
        ("--finetune full --prefill topk:0.1:oracle", 2, "that trains along; got topk:0.1:oracle. Write topk:0.1"),
        ("--finetune full --model tiny-lm --prefill topk:0.5", 1, "the model has none. Add --gates ..."),
        ("--model llama-3.1-8b --adapter x", 2, "--adapter must be left out where the model is a shape; got x"),
        (
            "--model llama-3.1-8b --gates tiny-lm",
            2,
            "got tiny-lm for llama-3.1-8b. Name the base model that they are for, or none.",
        ),
        ("--model tiny-lm --kind fine", 2, "--kind must be left out where the model is no shape; got fine. Name gates"),
        ("--gates tiny-lm --kind fine", 2, "--kind must be left out where the model is no shape"),
        ("--length 131072", 1, "must fit the model's context of 131072 tokens; got 131072 + 256"),
        ("--model tiny-lm --prefill threshold:0.1 --length 64", 1, "no prefill gate"),
    ],
)
def test_what_can_not_be_planned_is_one_line(words: str, code: int, text: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *words.split()]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("seer-jax plan: ") and text in line
