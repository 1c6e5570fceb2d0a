"""Small files of a model folder."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ValueError: the file holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON; {error}. Download it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object; got a {type(values).__name__}.")
    return values
