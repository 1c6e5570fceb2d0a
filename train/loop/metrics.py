"""Metrics of a run: a file with one JSON object per step, and TensorBoard files."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from seer_jax.outputs import write_text
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
    """The lines of a metrics.jsonl, without incomplete and damaged ones."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines, and the number of damaged ones."""
    if not path.exists():
        return [], 0
    # Text behind the last newline is an incomplete line.
    found = [_line(text) for text in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]]
    lines = [line for line in found if line is not None]
    return lines, len(found) - len(lines)


def _line(text: str) -> dict[str, Any] | None:
    try:
        line = parse_json(text, "the line")
    except ValueError:
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


def _cut(path: Path, step: int) -> None:
    lines, damaged = _read(path)
    if damaged:
        print(f"{path}: {damaged} damaged lines are left out.", file=sys.stderr, flush=True)
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))
