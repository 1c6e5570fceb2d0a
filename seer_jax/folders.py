"""What a folder holds: base weights, a gate, a LoRA adapter, or a training run with what it wrote."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

GATE_WEIGHTS = "attn_gate_weights"  # name of a gate's weight file, before its suffix
GATE_FOLDERS = ("prefill_gate", "decode_gate")  # where a training run writes its gates
ADAPTER_CONFIG = "adapter_config.json"  # of a LoRA adapter
ADAPTER_FOLDER = "adapter"  # where a run of fine-tuning writes its adapter
MODEL_FOLDER = "model"  # where a run of fine-tuning writes its model
ENDS = 2**20  # bytes at the start and the end of a file that its fingerprint is made of
GATE_KEYS = (
    "seerattn_gate_type",
    "seerattn_k_seq_pooling_type",
    "seerattn_q_head_pooling_type",
    "seer_jax_gate",
)


def holds_gate(folder: Path) -> bool:
    """Whether the weights of a gate are there."""
    return any((folder / f"{GATE_WEIGHTS}.{suffix}").is_file() for suffix in ("safetensors", "pth"))


def holds_base(folder: Path) -> bool:
    """Whether weights of a base model are there."""
    return any(folder.glob("model*.safetensors")) or (folder / "model.safetensors.index.json").is_file()


def holds_adapter(folder: Path) -> bool:
    """Whether a LoRA adapter is there."""
    return (folder / ADAPTER_CONFIG).is_file()


def files_of(place: Path, patterns: Iterable[str]) -> list[Path]:
    """The files of a model that match patterns, sorted; a model that is one file is that file."""
    if place.is_file():
        return [place]
    return sorted({path for pattern in patterns for path in place.glob(pattern) if path.is_file()})


def fingerprint(place: Path, patterns: Iterable[str]) -> str:
    """SHA-256 of names, sizes, first and last MiB of the files that `files_of` finds.

    It takes no time for large models, and weights that were trained further differ in it.
    """
    digest = hashlib.sha256()
    for path in files_of(place, patterns):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(ENDS))
            file.seek(max(0, size - ENDS))
            digest.update(file.read(ENDS))
    return digest.hexdigest()


def gates_of_run(folder: Path) -> list[Path]:
    """The gates that a training run wrote, the prefill gate first."""
    return [folder / name for name in GATE_FOLDERS if holds_gate(folder / name)]


def contents(folder: Path) -> str:
    """What a folder holds, for messages."""
    found = []
    if holds_base(folder):
        found.append("base weights")
    if holds_gate(folder):
        found.append(f"a gate of {_base_model(folder)}")
    if holds_adapter(folder):
        found.append("a LoRA adapter")
    if _is_run(folder):
        gates = [path.name for path in gates_of_run(folder)]
        with_gates = f"with gates in {' and '.join(gates)}" if gates else "without gates so far"
        found.append("a training run " + (f"with a model in {MODEL_FOLDER}" if _model_of(folder) else with_gates))
    if not found:
        names = sorted(path.name for path in folder.iterdir())
        found.append(f"{', '.join(names[:5])}{' and more' if len(names) > 5 else ''}" if names else "nothing")
    return " and ".join(found)


def check_is_base(folder: Path, *, with_gates: bool = True) -> None:
    """Raises ValueError where a folder that is to be a base model is a gate or a training run.

    Args:
      folder: that is there; a file passes.
      with_gates: whether gates can be given beside the base model, for the remedy.
    """
    if folder.is_file() or holds_base(folder) or (folder / "tokenizer.json").is_file():
        return
    if trained := _model_of(folder) or (_model_of(folder.parent) if holds_adapter(folder) else None):
        raise ValueError(f"{folder} must hold a base model; got {contents(folder)}. Give model={trained}.")
    run_adapter = folder / ADAPTER_FOLDER
    if adapter := next(
        (f for f in (folder, run_adapter) if holds_adapter(f) and (f is folder or _is_run(folder))), None
    ):
        raise ValueError(
            f"{folder} must hold a base model; got {contents(folder)}. Give model={_adapted_base(adapter) or '...'} and adapter={folder}."
        )
    gates, values = gates_of_run(folder), _config(folder)
    if _is_run(folder):
        base, gates_too = values.get("model", "..."), bool(gates)
    elif holds_gate(folder) or any(key in values for key in GATE_KEYS):
        base, gates_too = values.get("base_model", "..."), True
    else:
        return
    remedy = f"Give model={base}" + (f" and gates={folder}." if gates_too and with_gates else ".")
    what = contents(folder) if _is_run(folder) or holds_gate(folder) else f"a gate of {_base_model(folder)}"
    raise ValueError(f"{folder} must hold a base model; got {what}. {remedy}")


def check_is_gate(folder: Path) -> None:
    """Raises FileNotFoundError where a folder that is to be a gate has none."""
    if holds_gate(folder):
        return
    if _is_run(folder):
        remedy = "Gates are written with the checkpoints of a run; wait for the first one."
    elif holds_base(folder):
        remedy = "Give it as the base model, and as gates the folder of a gate."
    else:
        remedy = "Check that the download is complete."
    raise FileNotFoundError(
        f"A gate folder must hold {GATE_WEIGHTS}.safetensors or {GATE_WEIGHTS}.pth; {folder} has neither but "
        f"{contents(folder)}. {remedy}"
    )


def _model_of(folder: Path) -> Path | None:
    """The model that a run of fine-tuning wrote."""
    model = folder / MODEL_FOLDER
    return model if _is_run(folder) and holds_base(model) else None


def _adapted_base(folder: Path) -> str | None:
    """The base model that an adapter names."""
    try:
        values = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    named = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    return named if isinstance(named, str) and named else None


def _is_run(folder: Path) -> bool:
    return {"optimizer", "sequence_length"} <= set(_config(folder))


def _base_model(folder: Path) -> str:
    return repr(_config(folder).get("base_model") or "an unnamed model")


def _config(folder: Path) -> dict[str, Any]:
    """config.json where it can be read; what is wrong with it is told by what reads it for good."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
