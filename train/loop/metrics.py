"""Metrics of a run: a file with one JSON object per step, and TensorBoard files."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from seer_jax.text_files import parse_json


class MetricsLog:
    """metrics.jsonl, one line per step, and TensorBoard files beside it.

    A run that resumes from step n continues the file after the line of step n: the lines of later steps, which are made again, and an
    incomplete line are removed.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool):
        """
        Args:
          folder: of the run.
          step: from which the run resumes; 0 at its start.
          tensorboard: whether to write TensorBoard files, if tensorboardX is installed.
        """
        self.path = folder / "metrics.jsonl"
        _cut(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = None
        if tensorboard and importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends the line of a step and flushes the file."""
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # text behind the last newline is an incomplete line
    return [_parse_line(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _parse_line(text: str, place: str) -> dict[str, Any]:
    values = parse_json(text, place)
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        raise ValueError(
            f"{place} must hold an object with the number of its step; got {text[:80]!r}. Remove the file."
        )
    return values


def _cut(path: Path, step: int) -> None:
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(part, path)
