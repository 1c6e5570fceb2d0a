"""tiny_lm: a small Qwen3 model as saved by Hugging Face transformers, for demonstrations and tests. README.md is its model card."""

from pathlib import Path

NAME = "tiny-lm"  # stands for the model and for gates of it, see `seer_jax.models.hub`
# A folder for each kind; gates.json there records their training and the block scores that they hold.
GATES = Path(__file__).parent / "gates"


def path() -> Path:
    """Folder of the model: a Hugging Face checkpoint, held-out text, words for pass keys and reference figures."""
    return Path(__file__).parent


def eval_text() -> str:
    """Held-out text: Python source code that neither the model nor its gates were trained on."""
    return (path() / "eval_text.txt").read_text(encoding="utf-8")
