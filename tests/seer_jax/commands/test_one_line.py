"""What goes wrong in a command is one line on standard error, reason first, in the command's own options, and an exit code."""

import importlib
import re
from pathlib import Path
from typing import Any

import jax
import pytest
import tyro

from seer_jax import tiny_lm
from seer_jax.commands import main as cli
from seer_jax.commands.arguments import parse
from seer_jax.commands.errors.options import Options
from seer_jax.commands.errors.usage import UsageError
from seer_jax.commands.finetune import FinetuneOptions
from seer_jax.commands.train import TrainOptions
from seer_jax.selection.scorers import SCORERS
from tests.packaging.checkout import ROOT
from tests.seer_jax.commands.fuzz.cases import COMMANDS

# Each command line with its one line of standard error after the program's name and the command's; "*" stands for any text.
USAGE = [
    ("generat", "there is no command 'generat'. Did you mean generate? See seer-jax --help."),
    ("xyz", "there is no command 'xyz'. The commands are demo, convert, *"),
    ("--verbose eval", "there is no option before the command '--verbose'. The *"),
    ("verify --model x", "--reference must be given; got none. See seer-jax verify --help."),
    ("verify --model", "--model must have a value; got none. *"),
    ("eval --polices topk:0.1", "there is no option --polices. Did you mean --policies? *"),
    (
        "generate --prompt two words",
        "'words' must belong to an option; got it alone. Put values with spaces into quotes. *",
    ),
    ("generate --prompt --max-new-tokens x", "*"),
    (
        "generate --prefill topk:2",
        "--prefill: 'topk:2' is not a policy: density, the share *, must lie in *; got 2.0. A policy *",
    ),
    ("generate --decode sparse", "--decode: 'sparse' is not a policy: the rule must be one of dense, *"),
    (
        "generate --decode topk:0.1,layers=2",
        "--decode: * the settings of topk:DENSITY:gate are *; got 'layers'. A policy *",
    ),
    ("generate --decode topk:0.5:oracle:x", "--decode: * the scorer must be one of *; got 'oracle:x'. *"),
    (
        "generate --decode topk:0.1,dense_last_rows=1",
        "--decode must leave out dense_last_rows, which concerns the rows of *",
    ),
    ("generate --seed 99999999999 --temperature 1", "--seed must be at most 4294967295; got 99999999999. *"),
    ("demo --seed -1", "--seed must be an integer of at least 0; got -1. *"),
    ("bench prefill --seed 99999999999", "--seed must be at most 4294967295; got 99999999999. See seer-jax bench *"),
    ("train --steps 99999999999", "--steps must be at most 2147483647; got 99999999999. *"),
    ("train --seed 99999999999", "--seed must be at most 4294967295; got 99999999999. *"),
    ("eval --windows 99999999999", "--windows must be at most 2147483647; got 99999999999. *"),
    ("generate --decode budget:99999999999", "--decode: * tokens must be at most 2147483647; got 99999999999. *"),
    ("generate --prompt x --prompt-file y", "The prompt must come from --prompt or from --prompt-file; got both. *"),
    ("generate --system x", "--system must come with --chat, * Add --chat. *"),
    ("generate --temperature -1", "--temperature must be 0 *; got -1.0. *"),
    ("generate --temperature nan", "--temperature must be 0 *; got nan. *"),
    ("chat --temperature inf", "A sampling temperature must be positive and finite; got inf. *"),
    ("chat --temperature 1 --top-p 2", "--top-p must be a probability mass in *; got 2.0. *"),
    ("chat --temperature 1 --top-k 0", "--top-k must be an integer of at least 1*; got 0. *"),
    ("generate --temperature hot", "--temperature must be a number; got 'hot'. *"),
    ("generate --max-new-tokens many", "--max-new-tokens must be a whole number; got 'many'. *"),
    ("generate --top-k 3", "--top-k must come with a --temperature above 0; got 0, * Add --temperature 0.7. *"),
    ("generate --seed 5 --top-p 0.5", "--top-p and --seed must come with a --temperature above 0; got 0, *"),
    ("generate --plan --report x", "--report must come without --plan, with which nothing is generated; got both. *"),
    ("generate --plan --kept", "--kept must come without --plan, *"),
    ("convert --gates x --output ./x", "--output must differ from the folders that are read; got x. Choose another *"),
    ("convert --gates x --output y --model y", "--output must differ from the folders that are read; got y. Choose *"),
    ("convert --gates x --output y --revision v2", "--revision must come with the --model that it is of; got 'v2' *"),
    ("generate --dtype float33", "--dtype must be one of *; got 'float33'. Did you mean float32? *"),
    ("generate --scorers", "--scorers must name a module or FILE.py; got none. *"),
    ("eval --methods gate best", f"--methods must be one of {', '.join(SCORERS)}; got 'best'. *"),
    ("eval --policies dense", "--policies must rank blocks *; got dense. *"),
    (
        "eval --gates x --policies topk:0.2+budget:64:quest",
        "--policies must be for one phase at a time, except with --tasks; got topk:0.2+budget:64:quest. Name its halves apart "
        "(--policies topk:0.2 budget:64:quest), or pass --tasks. *",
    ),
    (
        "eval --gates x --tasks vt --phases decode --policies topk:0.2+topk:0.2",
        "--phases must be both for a policy of both; got decode with topk:0.2+topk:0.2. Leave --phases out, or name one *",
    ),
    (
        "eval --tasks vt --policies topk:0.2:quest+topk:0.2",
        "A prefill policy must rank blocks by a scorer for prefill; got quest, *",
    ),
    ("calibrate", "--gates must be named, or a --baseline in their place; got neither. *"),
    ("calibrate --gates x --density 0.1 --over 0.1", "One target must be given, *; got density and over. *"),
    (
        "calibrate --gates x --density 2",
        "--density, the share of the visible blocks to keep, must lie in (0, 1]; got 2.0. *",
    ),
    ("calibrate --gates x --density 3x%", "--density must be a number; got '3x%'. *"),
    ("generate --prompt x --top-p many", "--top-p must be a number; got 'many'. *"),
    ("train --optimizer.warmup-steps many", "--optimizer.warmup-steps must be a whole number; got 'many'. *"),
    ("calibrate --gates x --rule topk", "--rule must be one of best, threshold, mass; got 'topk'. *"),
    (
        "calibrate --baseline gate",
        "--baseline must be a scorer that needs no gate; got 'gate'. Calibrate gates by --gates alone. *",
    ),
    (
        "calibrate --baseline xatention",
        "--baseline must be one of flexprefill, *; got 'xatention'. Did you mean xattention? *",
    ),
    ("train --recipe both", "--recipe must be one of prefill, decode; got 'both'. *"),
    (
        "train --gates runs/x",
        "--gates, the same as --kind, must be one of prefill, *; got 'runs/x'. Gates to train further are given by --initial-gates. *",
    ),
    ("train --model tiny-lm", "--output must be a folder *; got none. *"),
    ("train --output /absent", "--model must be a base model; got none. *"),
    ("train --config README.md", "The name of a configuration file must end in .yaml, *; got README.md. *"),
    ("train --recipe decode --config x.yaml", "*choose one. *"),
    ("train --steps 0", "--steps must be at least 1; got 0. *"),
    (
        "train --optimizer.warmup-steps -1",
        "--optimizer.warmup-steps must be at least 0; got -1. *",
    ),
    ("train --decode.gate-dim 3", "**gate*dim must be even and positive, *; got 3. *"),
    ("train --decode.k-pool-size 1", "--decode.k-pool-size 1 * got max, min, avg. Set --decode.k-pooling avg. *"),
    (
        "train --prefill.join max",
        "* so --prefill.k-pool-size must be * Set --prefill.k-pool-size, or leave --prefill.join *",
    ),
    ("train --decode.heads max", "* Set --decode.query-reduction Qheads, or leave --decode.heads out. *"),
    (
        "bench prefil",
        "what to measure must be one of prefill, *; got 'prefil'. Did you mean prefill? See seer-jax bench --help.",
    ),
    ("bench decode --lengths 5", "--lengths must be at least 128 tokens; got 5. See seer-jax bench decode --help."),
    ("bench decode --batches 0 1", "--batches must hold at least one sequence; got 0, 1. *"),
    ("plot los", "what to draw must be one of loss, speed, *; got 'los'. Did you mean loss? See seer-jax plot --help."),
    ("plot loss --output x.png", "--scores must be given; got none. See seer-jax plot loss --help."),
    (
        "plot speed --scores x --output x.png",
        "--bench must name at least one file; got none. See seer-jax plot speed *",
    ),
    (
        "plot maps --output x.png --phases prefill decode",
        "--phases must be one in a picture; got prefill and decode. *",
    ),
    ("plot maps --output x.png --heads 3,0", "--heads must be written LAYER.HEAD, such as 3.0; got 3,0. *"),
    (
        "plot maps --output x.html --heads 3.0",
        "--heads must come with a picture, as a page has all of them; got 3.0. *",
    ),
    ("plot density --output x.png --prefill dense", "--prefill must rank blocks, as topk:0.1 does; got dense. *"),
    ("plot density --output x.png --decode topk:0.1:minference", "*minference*prefill*"),
    (
        "plot density --output x.png --phases prefill --decode topk:0.1",
        "--decode must be left out where prefill is drawn alone; got topk:0.1. Name its phase: --phases decode. *",
    ),
    (
        "plot maps --output x.png --prefill topk:0.1 --decode topk:0.1",
        "--phases must be one in a picture; got prefill and decode. *",
    ),
    ("plot density --output x.png --length 1", "--length must be at least 2; got 1. *"),
    ("demo --densities 0.1 2", "--densities must be at least one share of the blocks in (0, 1]; got 0.1, 2.0. *"),
    (
        "bench prefill --policies [a,b]",
        "--policies must be policies; '[a,b]' is not a policy: the rule must be one of dense, *",
    ),
    ("info --all", "there is no option --all. See seer-jax info --help."),
    ("info x", "there must be nothing behind the command; got 'x'. See seer-jax info --help."),
    ("eval --base tiny-lm", "there is no option --base. Did you mean --model? *"),
    ("generate --base=tiny-lm", "there is no option --base. Did you mean --model? *"),
    ("train --base tiny-lm", "there is no option --base. Did you mean --model? *"),
    ("verify --model x --precision float32", "there is no option --precision. Did you mean --dtype? *"),
    (
        "generate --mesh dat=2",
        "A mesh must be written as axes with sizes, each of data, fsdp, tensor at most once; got 'dat=2' in 'dat=2'. *",
    ),
    ("eval --mesh data=0", "The size of a mesh axis must be a whole number of devices, or -1 for all that are left; *"),
    ("calibrate --gates x --mesh data=2,data=2", "A mesh must be written * got 'data=2' in 'data=2,data=2'. *"),
    ("verify --model x --reference y --mesh 4", "A mesh must be written as axes with sizes, * got '4' in '4'. *"),
    ("plot maps --output x.html --mesh fsdp", "A mesh must be written * got 'fsdp' in 'fsdp'. *"),
    ("demo --mesh tensor=-1,data=-1", "At most one axis of a mesh may have size -1; *"),
    ("generate --prompt \udcff", "a command line must be UTF-8; got '*xff'. *"),
]
FAILURES = [
    ("generate --model /absent --prompt x", "There is no folder '/absent', *"),
    ("generate --model docs --prompt x", "A model folder must hold config.json; docs has none. Check *"),
    ("generate --prompt-file /absent --model tiny-lm", "No such file or directory: '/absent'. Check the path."),
    ("generate --prompt ''", "The prompt must have at least one token; *"),
    ("generate --prompt x --max-new-tokens 0", "--max-new-tokens must be an integer of at least 1; got 0."),
    ("generate --prompt x --max-new-tokens 99999", "Prompt and new tokens must fit * or pass --beyond-context."),
    (
        "generate --prompt x --decode topk:0.5",
        "topk:0.5 ranks blocks by a learned gate, but the model has no decode gate; load one (--gates ...), * the policy dense.",
    ),
    (
        "generate --gates seer_jax/tiny_lm/gates/release/decode --prompt x --prefill topk:0.5",
        "topk:0.5 ranks blocks by a learned gate, but the model has no prefill gate; load one (--gates ...), *",
    ),
    ("generate --gates tiny-lm --prompt x --decode budget:3", "A token budget must hold at least one block of 64 *"),
    ("generate --prompt x --max-new-tokens 99999 --plan", "Prompt and new tokens must fit * or pass --beyond-context."),
    ("generate --prompt x --decode budget:64:window,dense_layers=99", "dense_layers must leave a sparse layer: *"),
    (
        "generate --prompt x --report /proc/x",
        "--report must be writable; got /proc/x, and no file can be made in /proc *",
    ),
    (
        "generate --prompt x --scorers absent_module",
        "--scorers must name a module or a Python file; got 'absent_module', which Python does not find. Check the name, or *",
    ),
    (
        "generate --prompt x --mesh tensor=8",
        "A mesh must fit the 4 devices that JAX has here (cpu); got 'tensor=8', which is 8 devices. Lower a size; *",
    ),
    (
        "eval --mesh tensor=3 --methods window",
        "The 8 query heads of the model must be divisible by the mesh axis tensor; got tensor=3. Use tensor=1 or 2 or 4 or 8.",
    ),
    (
        "plot maps --output /tmp/x.html --mesh fsdp=3",
        "The model's hidden_size of 256 must be divisible by the mesh axis fsdp; got fsdp=3. Use an fsdp size that *",
    ),
    ("plot loss --scores /absent --output x.png", "No such file or directory: '/absent'. Check the path."),
    ("plot loss --scores README.md --output x.png", "README.md must hold JSON; *. Name a file that seer-jax eval *"),
    (
        "plot speed --bench Makefile --scores x --output x.gif",
        "--output must be a file whose name ends in .png, *; got *",
    ),
    ("plot maps --output x.htm", "--output must be a file whose name ends in .png, .pdf, .svg, .html; got x.htm."),
    ("plot maps --output /proc/x.html", "--output must be writable; got /proc/x.html, and no file can be made in *"),
    ("plot maps --output /tmp/x.png --heads 8.0", "--heads must be layers 0 to 7 and prefill heads 0 to 7; got 8.0."),
    ("plot maps --output /tmp/x.html --prefill topk:0.1", "topk:0.1 ranks blocks by a learned gate, * load one *"),
    ("plot density --output /tmp/x.png --text /tmp", "Is a directory: '/tmp'. Name a file in it."),
    ("info --scorers README.md", "--scorers must name a module or a Python file; got 'README.md', which Python does *"),
    ("generate --prompt-file /tmp", "Is a directory: '/tmp'. Name a file in it."),
    ("generate --prompt x --revision v2", "--revision must be that of a hub id; got 'v2' for 'tiny-lm', which is on *"),
    ("eval --model seer_jax/tiny_lm --revision v2", "--revision must be that of a hub id; got 'v2' for 'seer_jax/*"),
    (
        "verify --model seer_jax/tiny_lm/gates/release/decode --reference x",
        "* must hold a base model; got a gate of 'tiny-lm'. Give --model tiny-lm.",
    ),
    ("eval --length 128 --windows 1 --distractors 20", "* fewer --distractors, or set --passkeys to 0."),
    (
        "eval --tasks vt --length 512 --samples 1 --methods gate --gates seer_jax/tiny_lm/gates/release/decode --policies topk:0.2+topk:0.2",
        "topk:0.2+topk:0.2 must have a scorer for either phase; got none that works, as the model has no prefill gate. Load the gates "
        "(--gates ...), or name scorers: topk:0.2:oracle+topk:0.2:oracle.",
    ),
    ("eval --text .gitignore", "The text must fill * or a smaller --length."),
    ("generate --prompt x --gates seer_jax/tiny_lm", "A gate folder must hold *; * has neither but base weights. *"),
    (
        "generate --prompt x --model seer_jax/tiny_lm/gates/release/decode",
        "* must hold a base model; got a gate of 'tiny-lm'. Give --model tiny-lm and --gates *",
    ),
    ("--scorers /absent.py eval", "--scorers must name a module or a Python file; got '/absent.py', *"),
    ("eval --scorers=/absent.py", "--scorers must name a module or a Python file; got '/absent.py', *"),
    ("train --config /absent.yaml", "No such file or directory: '/absent.yaml'. Check the path."),
    ("convert --gates /absent --output /also", "There is no folder '/absent', *"),
    ("verify --base tiny-lm --reference README.md", "README.md: a reference must be a safetensors file; *"),
]
LINES = [(line, 2, text) for line, text in USAGE] + [(line, 1, text) for line, text in FAILURES]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("line", "code", "text"), LINES, ids=[line for line, *_ in LINES])
def test_what_went_wrong_is_one_line(
    line: str, code: int, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    words = ["" if word == "''" else word for word in line.split(" ")]
    assert cli.main(words) == code
    (last,) = capsys.readouterr().err.splitlines()
    command = next((f" {word}" for word in words if word in cli.COMMANDS and words[0] != "--verbose"), "")
    pattern = ".*".join(map(re.escape, f"seer-jax{command}: {text}".split("*")))
    assert re.fullmatch(pattern, last), last


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("f(", "SyntaxError: '(' was never closed (scorers.py, line 1). Mend it first; *"),
        ("1 / 0", "ZeroDivisionError: division by zero. Mend *"),
        ("import absent_module", "ModuleNotFoundError: No module named 'absent_module'. Mend *"),
    ],
)
def test_scorers_that_can_not_be_imported(source: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "scorers.py"
    path.write_text(source)
    assert cli.main(["--scorers", str(path), "info"]) == 1
    line = capsys.readouterr().err
    text = f"seer-jax info: --scorers {path} must be a module that can be imported; got {text}"
    assert re.fullmatch(".*".join(map(re.escape, f"{text}\n".split("*"))), line), line


@pytest.mark.parametrize("name", cli.COMMANDS)
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 4294967296 bytes [tf-allocator]\n..."
            ),
            "the memory of the device or the host ran out, at an allocation of 4294967296 bytes. Lower *; on a GPU, "
            "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 *",
        ),
        (
            MemoryError(
                "Unable to allocate 4.00 PiB for an array with shape (1125899906842624,) and data type float32"
            ),
            "the memory of the device or the host ran out, at an allocation of 4.00 PiB. Lower *",
        ),
        (MemoryError(), "the memory of the device or the host ran out. Lower *"),
        (MemoryError("The run must fit in device memory: ..."), "The run must fit in device memory: ..."),
        (ValueError("[a, b] must\n\tnot [/bold] be\x1b lost"), "[a, b] must not [/bold] be\\x1b lost"),
        (FloatingPointError(), "FloatingPointError"),
    ],
    ids=["XLA", "NumPy", "Python", "plan", "markup", "nameless"],
)
def test_failures_of_every_command(
    name: str, error: Exception, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def fail(words: list[str]) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module(f"seer_jax.commands.{name}"), "run", fail)
    assert cli.main([name]) == 1
    line = capsys.readouterr().err
    assert re.fullmatch(".*".join(map(re.escape, f"seer-jax {name}: {text}\n".split("*"))), line), line


CONFIGS = COMMANDS | {
    "train": (TrainOptions, "--model tiny-lm --output x"),
    "finetune": (FinetuneOptions, "--model tiny-lm --output x"),
}
OPTIONS = [(command, option) for command, (kind, _) in CONFIGS.items() for option in Options(kind).all]
NUMBERS = [(command, option.flag) for command, option in OPTIONS if option.kind in (int, float)]


@pytest.mark.usefixtures("unchecked")
def test_verify_names_the_bounds_of_bfloat16(capsys: pytest.CaptureFixture[str]):
    words = ["verify", "--model", "tiny-lm", "--reference", str(tiny_lm.path() / "logits_check.safetensors")]
    assert cli.main([*words, "--dtype", "bfloat16"]) == 1
    said = capsys.readouterr()
    assert said.out.startswith("FAIL at ") and said.err.startswith(
        "seer-jax verify: the usual bounds are those of float32"
    )
    bounds = re.findall(r"--bounds\.[\w-]+ [\d.e-]+", said.err)
    assert len(bounds) == 2 and cli.main([*words, "--dtype", "bfloat16", *" ".join(bounds).split()]) == 0


def test_calls_that_a_message_shows_stay_as_they_are():
    call = "TrainConfig(optimizer=(1, f(seed=2)), seed=3)"
    assert Options(TrainOptions).rewrite(f"got {call}, and seed=4") == f"got {call}, and --seed 4"


class Parsed(BaseException):
    """Raised in place of the work of a command."""


@pytest.mark.slow
@pytest.mark.parametrize(("command", "flag"), NUMBERS)
def test_a_wrong_number_names_its_option(
    command: str, flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Whatever the configuration behind it says, in Python's words; some numbers may be negative."""
    cli_of_tyro = tyro.cli

    def parse(*arguments: Any, **settings: Any) -> None:
        cli_of_tyro(*arguments, **settings)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", parse)
    for value in ("-7", "many"):
        try:
            code = cli.main([*command.split(), *CONFIGS[command][1].split(), flag, value])
        except Parsed:
            assert value == "-7"
            continue
        error = capsys.readouterr().err
        assert code == 2 and flag in error.partition(" See ")[0], error


@pytest.mark.parametrize(
    ("command", "flag"), [(command, option.flag) for command, option in OPTIONS if option.kind is float]
)
def test_a_number_may_be_a_percentage(command: str, flag: str):
    """Densities, masses, thresholds and all others are read alike."""
    kind, words = CONFIGS[command]

    def outcome(value: str) -> object:
        try:
            return parse(kind, command, [*words.split(), flag, value])
        except UsageError as error:
            return str(error)

    assert outcome("0.7%") == outcome("0.007")


def test_an_error_can_be_traced():
    with pytest.raises(FileNotFoundError, match="There is no folder '/absent'"):
        cli.main(["generate", "--model", "/absent", "--prompt", "x", "--traceback"])
