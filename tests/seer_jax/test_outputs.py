"""Places of results: refused before the work where nothing can be written, and files written whole or not at all."""

import builtins
import importlib
import inspect
import io
import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from seer_jax import tiny_lm
from seer_jax.commands import demo
from seer_jax.commands import main as cli
from seer_jax.folder_lock import locked
from seer_jax.models.hub import named_gates
from seer_jax.outputs import check_output_file, check_output_folder, check_plot_file, write_json, write_text

PLACES = [
    (check_output_file, "folder", IsADirectoryError, "output must be a file; got the folder .*Name a file in it"),
    (check_output_file, "file/x/y.json", NotADirectoryError, "must lie in a folder; got .*file is a file"),
    (check_output_folder, "file", NotADirectoryError, "output must be a folder; got the file"),
    (check_output_folder, "file/x", NotADirectoryError, "must lie in a folder"),
    (check_output_folder, "/proc/x", OSError, "must be writable; got /proc/x, and no file can be made in /proc"),
    (check_output_file, "/proc/x.json", OSError, "must be writable; got /proc/x.json.*Choose another place"),
    (check_plot_file, "x.jpg3", ValueError, r"plot must be a file whose name ends in \.png.*got .*x\.jpg3"),
    (check_plot_file, "folder", ValueError, "name ends in"),
    (check_plot_file, "/proc/x.png", OSError, "plot must be writable; got /proc/x.png"),
]


@pytest.fixture
def place(tmp_path: Path) -> Callable[[str], Path]:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    return lambda name: tmp_path / name


@pytest.mark.parametrize(("check", "name", "kind", "message"), PLACES)
def test_places_that_take_no_output_are_refused(
    place: Callable[[str], Path], check: Any, name: str, kind: type, message: str
):
    if check is check_plot_file:
        pytest.importorskip("matplotlib")
    with pytest.raises(kind, match=message):
        check(place(name))


@pytest.mark.parametrize("name", ["new.json", "a/b/new.json", "file"])
def test_a_check_leaves_nothing_behind(place: Callable[[str], Path], name: str):
    before = sorted(place(".").rglob("*"))
    check_output_file(place(name))
    check_output_folder(place(name).parent)
    assert sorted(place(".").rglob("*")) == before and place("file").read_text() == "old"


@pytest.mark.parametrize("name", ["file", "a/b/new"])
def test_files_are_written_whole_or_not_at_all(
    place: Callable[[str], Path], name: str, monkeypatch: pytest.MonkeyPatch
):
    path = place(name)
    write_text(path, "é")
    assert path.read_text(encoding="utf-8") == "é"

    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"x": 1})
    assert path.read_text(encoding="utf-8") == "é" and [p.name for p in path.parent.iterdir() if ".tmp" in p.name] == []


@pytest.mark.parametrize("path", ["file", "/dev/full"])
def test_a_full_disk_is_told_with_the_file(place: Callable[[str], Path], path: str):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(
            OSError, match=rf"{path} must be written whole; got '.*'\. Make room there .*, or choose another"
        ):
            write_text(place(path), "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert place("file").read_text() == "old"


def test_links_and_devices_stay_what_they_are(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "x"
    check_output_file(Path("/dev/null"))
    write_text(Path("/dev/null"), "x")
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "nan.json", float("nan"))


BASE, GATE = str(tiny_lm.path()), str(named_gates("tiny-lm-release")["prefill"])
# A command, what begins its work, and its outputs.
COMMANDS = [
    (["demo"], "seer_jax.commands.demo:from_pretrained", ["--output"]),
    (["eval"], "seer_jax.commands.eval:from_pretrained", ["--output"]),
    (["calibrate", "--gates", "tiny-lm"], "seer_jax.commands.calibrate:from_pretrained", ["--output"]),
    (["generate", "--prompt", "x"], "seer_jax.commands.text.generation:from_pretrained", ["--report"]),
    (["bench", "prefill"], "seer_jax.bench.prefill:measure_prefill", ["--output", "--plot"]),
    (["bench", "decode"], "seer_jax.bench.decode:measure_decode", ["--output", "--plot"]),
    (["bench", "ground-truth"], "seer_jax.bench.ground_truth:measure_ground_truth", ["--output", "--plot"]),
    (["bench", "train"], "seer_jax.bench.training:measure_training", ["--output", "--plot"]),
    (["bench", "serving"], "seer_jax.bench.serving.measure:measure_serving", ["--output"]),
    (["convert", "--gates", GATE], "seer_jax.commands.convert:load_gates", ["--output"]),
    (["train", "--model", BASE, "--data.paths", BASE], "seer_jax.train.api:_load_model", ["--output"]),
    (["finetune", "--model", BASE, "--data.paths", BASE], "seer_jax.train.api:_load_model", ["--output"]),
]
CASES = [(words, work, option) for words, work, options in COMMANDS for option in options]


def fail(*arguments: Any, **settings: Any) -> Any:
    raise AssertionError("the work has begun")


def fail_when_asked(*arguments: Any, **settings: Any) -> Iterator[Any]:
    yield fail()


@pytest.mark.parametrize("place", ["/proc/x.png", "{file}/x.png"])
@pytest.mark.parametrize(("words", "work", "option"), CASES, ids=[f"{' '.join(w[:2])} {o}" for w, _, o in CASES])
def test_an_output_that_can_not_be_written_is_refused_before_the_work(
    words: list[str],
    work: str,
    option: str,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    if option == "--plot":
        pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    place = place.format(file=tmp_path / "file")
    module, _, name = work.partition(":")
    home = importlib.import_module(module)
    lazily = inspect.isgeneratorfunction(inspect.unwrap(getattr(home, name)))
    monkeypatch.setattr(home, name, fail_when_asked if lazily else fail)
    assert cli.main([*words, option, place]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and place in error and " must " in error and option in error, error


SMALL = ["--length", "256", "--windows", "1"]
# A command that keeps a folder for its run, and what begins its work.
RUNS = [
    (["demo"], "seer_jax.commands.demo:_demo"),
    (["eval", *SMALL, "--passkeys", "0"], "seer_jax.commands.eval:_measure"),
    (
        ["eval", "--length", "256", "--tasks", "niah_single_1", "--samples", "1"],
        "seer_jax.commands.eval.tasks:_measure",
    ),
    (["calibrate", "--gates", "tiny-lm", *SMALL, "--held-out-windows", "0"], "seer_jax.commands.calibrate:_calibrate"),
    (["train", "--model", BASE, "--data.paths", BASE], "seer_jax.train.api:_load_model"),
    (["finetune", "--model", BASE, "--data.paths", BASE], "seer_jax.train.api:_load_model"),
]


@pytest.mark.usefixtures("unchecked")  # plans are made of shapes, which stand for arrays
@pytest.mark.parametrize(("words", "work"), RUNS, ids=["demo", "eval", "eval tasks", "calibrate", "train", "finetune"])
def test_a_folder_that_another_run_is_using_is_refused_before_the_work(
    words: list[str], work: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    module, _, name = work.partition(":")
    monkeypatch.setattr(importlib.import_module(module), name, fail)
    with locked(tmp_path):
        assert cli.main([*words, "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(
        rf"seer-jax {words[0]}: A folder must belong to one run at a time; process {os.getpid()} on .* is using {tmp_path}\. "
        r"Wait for its end, or give another --output\.\n",
        error,
    ), error
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_without_matplotlib_the_demo_leaves_the_plot_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    find, out = builtins.__import__, io.StringIO()

    def missing(name: str, *arguments: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return find(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr(demo, "from_pretrained", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt) as stop:
        demo.demo(demo.DemoConfig(output=tmp_path), console=Console(file=out, width=200))
    assert "it is not installed. Run pip install matplotlib. block_maps.png is left out." in out.getvalue()
    assert stop.value.__notes__ == ["Kept so far: nothing."]
