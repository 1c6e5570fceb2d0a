"""Which settings a run may have when it goes on in the folder of an earlier one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_WHAT = {
    "data": "training data",
    "model": "base model",
    "weights": "initial weights",
    "frozen": "weights that do not train",
}


def check_resumed(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, step: int, folder: Path) -> str | None:
    """Compares the settings of a run with those it was started with.

    Args:
      ours: of this run, JSON: `config` and what follows from model and data.
      theirs: of the newest checkpoint; keys that one of the two lacks are not compared.
      step: of that checkpoint.
      folder: of the run, for errors.

    Returns:
      What changes because the number of steps does; None where it does not.

    Raises:
      ValueError: the run is of another kind of training, another setting differs, or the run has done more steps than it is to have.
    """
    if foreign := [name for name in theirs.get("config", {}) if name not in ours.get("config", theirs["config"])]:
        raise ValueError(
            f"A folder must belong to one run; that in {folder} is another kind of training, with settings that this one lacks: "
            f"{', '.join(foreign)}. Give another `output`."
        )
    differing = [
        difference for key in ours if key in theirs for difference in _differences(ours[key], theirs[key], key)
    ]
    steps = next((d for d in differing if d[0] == "config.steps"), None)
    differing = [d for d in differing if d[0] != "config.steps"]
    if differing:
        raise ValueError(_refusal(differing, folder))
    if steps is None:
        return None
    _, now, before = steps
    if now < step:
        raise ValueError(
            f"`steps` must be at least the {step} that this run has done, of {before}; got {now}. Set steps={step} or more, or give another `output` "
            f"for a new run; this one is {folder}."
        )
    return (
        f"The run was to have {before} steps, and now has {now}. From step {step + 1} on, the learning rate is that of a run of "
        f"{now} steps; the rows of data stay the same."
    )


def _refusal(differing: list[tuple[str, Any, Any]], folder: Path) -> str:
    # What follows from the configuration, such as the gates that it describes, says nothing more.
    differing = [d for d in differing if d[0].startswith("config.")] or differing
    parts, remedies = [], []
    for place, now, before in differing:
        kind, _, name = place.partition(".")
        if kind == "config":
            parts.append(f"`{name}`: this run was started with {before!r}; got {now!r}")
            # The commands turn name=value into an option.
            remedies.append(f"`{name}`" if isinstance(before, (list, dict)) else f"{name}={before}")
        else:
            parts.append(
                f"{_WHAT.get(kind, kind)}: {name or kind} was {before!r} when this run was started; got {now!r}"
            )
    remedy = ", ".join(remedies) or "it"
    return f"{'; '.join(parts)}. Restore {remedy} to go on with the run in {folder}, or give another `output` for a new run."


def _differences(ours: Any, theirs: Any, place: str) -> list[tuple[str, Any, Any]]:
    """Leaves in which two JSON values differ, as (place, ours, theirs)."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = list(dict.fromkeys([*ours, *theirs]))
        found = [_differences(ours.get(name), theirs.get(name), f"{place}.{name}") for name in names]
        return [difference for part in found for difference in part]
    if _are_objects(ours) and _are_objects(theirs) and len(ours) == len(theirs):
        return [d for pair in zip(ours, theirs, strict=True) for d in _differences(*pair, place)]
    return [] if ours == theirs else [(place, ours, theirs)]


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
