"""tiny_lm: a small Qwen3 model as saved by Hugging Face transformers, for demonstrations and tests. README.md is its model card."""

from pathlib import Path

NAME = "tiny-lm"  # stands for the model and for its gates wherever a model is named, see `seer_jax.models.hub`


def path() -> Path:
    """Folder of the model: a Hugging Face checkpoint, held-out text, words for pass keys and reference figures."""
    return Path(__file__).parent


def gates() -> dict[str, Path]:
    """Folders of its trained gates, "prefill" and "decode"; gates.json beside them records their training and the block scores that they hold."""
    return {kind: path() / "gates" / kind for kind in ("prefill", "decode")}


def eval_text() -> str:
    """Held-out text: Python source code that neither the model nor its gates were trained on."""
    return (path() / "eval_text.txt").read_text(encoding="utf-8")
