"""Folders whose files belong together, written by a process that is killed at any moment: the old ones, the new ones, or a refusal."""

import dataclasses
import functools
import itertools
import os
import resource
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from seer_jax.convert import GateFormat, load_base, load_gates, save_base, save_gates
from seer_jax.convert.base import write_safetensors
from seer_jax.gates.configs import DecodeGateConfig
from seer_jax.models.decoder import Transformer
from seer_jax.train.data.sources import SourceConfig
from seer_jax.train.data.store import read_store
from seer_jax.train.data.tokens import load_tokens
from tests.train.tiny import make_model


class Killed(BaseException):
    """In place of the end of a process."""


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Nothing is renamed or removed from the `number`-th time on."""
    count = itertools.count()

    def stopping(function: Callable) -> Callable:
        def call(*arguments, **settings):
            if next(count) >= number:
                raise Killed
            return function(*arguments, **settings)

        return call

    for name in ("replace", "unlink", "rename"):
        monkeypatch.setattr(os, name, stopping(getattr(os, name)))


@functools.cache
def model(number: int) -> Transformer:
    """A model with a gate: of other weights, another RoPE and other blocks for each number, but of the same shapes."""
    made = make_model(gates=(DecodeGateConfig(block_size=16 * (number + 1), gate_dim=16),))
    rope = dataclasses.replace(made.config.rope, theta=1e4 * (number + 1))
    made.config = dataclasses.replace(made.config, rope=rope)
    return jax.tree.map(lambda x: x + number, made)


class Gates:
    """A gate in one format."""

    def __init__(self, format: GateFormat):
        self.format = format

    def save(self, folder: Path, number: int) -> None:
        gate = model(number).decode_gate
        assert gate is not None
        save_gates(gate, folder, base_model=f"base {number}", format=self.format)

    def load(self, folder: Path) -> None:
        load_gates(folder)


class Bases:
    """A model in one file or several, by number."""

    def __init__(self, *files: int):
        self.files = files

    def save(self, folder: Path, number: int) -> None:
        save_base(model(number), folder, shard_bytes=10**9 if self.files[number] == 1 else 20_000)

    def load(self, folder: Path) -> None:
        load_base(folder)


class Letters:
    fingerprint = "letters"

    def encode(self, documents):
        return [[ord(c) for c in d] for d in documents]


class Tokens:
    """Tokens of a text; where they are not complete, they are read anew."""

    def save(self, folder: Path, number: int) -> None:
        text = folder.parent / f"text{number}.txt"
        if not text.exists():
            text.write_text("ab" * (number + 1))
        load_tokens(SourceConfig(paths=(str(text),)), Letters(), folder)

    def load(self, folder: Path) -> None:
        if read_store(folder) is None:
            raise FileNotFoundError(f"{folder} was being written when the process ended")


KINDS = {
    "gates": Gates(GateFormat.SAFETENSORS),
    "gates for torch": Gates(GateFormat.TORCH),
    "base": Bases(1, 1),
    "base in fewer files": Bases(2, 1),
    "base in more files": Bases(1, 2),
    "tokens": Tokens(),
}


def contents(folder: Path) -> dict[str, bytes]:
    """The complete files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".partial"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_leaves_old_files_or_new_ones_or_a_refusal(kind: str, tmp_path: Path):
    folders = [tmp_path / "old", tmp_path / "new"]
    for number, folder in enumerate(folders):
        KINDS[kind].save(folder, number)
        KINDS[kind].load(folder)
    old, new = map(contents, folders)
    seen = []
    for number in range(99):
        folder = tmp_path / f"killed {number}"
        shutil.copytree(folders[0], folder)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, number)
            try:
                KINDS[kind].save(folder, 1)
            except Killed:
                left = contents(folder)
            else:
                break
        seen.append("old" if left == old else "new" if left == new else "refused")
        if seen[-1] == "refused":
            with pytest.raises(FileNotFoundError, match="was being written when the process ended"):
                KINDS[kind].load(folder)
        KINDS[kind].save(folder, 1)  # which what was left does not disturb
        assert contents(folder) == new and not list(folder.glob("*.partial"))
    assert contents(folder) == new and set(seen) == {"old", "refused"}


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_while_writing_leaves_the_old_files(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "folder"
    KINDS[kind].save(folder, 0)
    before = contents(folder)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for place in ("convert.base.config_text", "convert.gates.config_text", "train.data.store._digest"):
        monkeypatch.setattr(f"seer_jax.{place}", full)
    with pytest.raises(OSError, match="No space left"):
        KINDS[kind].save(folder, 1)
    assert contents(folder) == before and not list(folder.glob("*.partial"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_told_with_the_file_and_leaves_the_old_ones(kind: str, tmp_path: Path):
    """By the process's own limit of file sizes, which each writer meets as it meets a full disk."""
    folder = tmp_path / "folder"
    for number, place in enumerate((folder, tmp_path / "other")):  # the other one makes what is read
        KINDS[kind].save(place, number)
    before = contents(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(
            OSError,
            match=rf"{tmp_path}/\S+[a-z0-9](?<!partial) must be written whole; got '.*File too large.*'\. Make room",
        ) as caught:
            KINDS[kind].save(folder, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert contents(folder) == before and not list(folder.glob("*.partial"))


def test_weights_under_the_configuration_of_another_gate_are_refused(tmp_path: Path):
    for number in (0, 1):
        KINDS["gates"].save(tmp_path / str(number), number)
    os.replace(tmp_path / "1" / "config.json", tmp_path / "0" / "config.json")
    message = (
        r"config\.json and weights must be of one gate; block_size is 32 in config\.json, 16 in the weights\. Save"
    )
    with pytest.raises(ValueError, match=message):
        load_gates(tmp_path / "0")


def test_files_have_the_permissions_of_any_new_file(tmp_path: Path):
    write_safetensors(tmp_path / "a.safetensors", {"x": np.ones(2, np.float32)})
    (tmp_path / "b").touch()
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)
