"""Base models: Hugging Face safetensors folders in and out, and GGUF files in."""

import collections
import dataclasses
import fnmatch
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seer_jax.convert.files import Replacement, replacing_files
from seer_jax.convert.formats.gguf import GGUFSource
from seer_jax.convert.formats.sources import SafetensorsSource, TensorSource
from seer_jax.convert.rules import ROTARY_BUFFERS, TIED_HEAD, base_rules
from seer_jax.convert.stream import Sharding, load_parameters, tensors_of
from seer_jax.folders import check_is_base
from seer_jax.gguf.header import is_gguf
from seer_jax.inference.generation_config import NAME as GENERATION_CONFIG
from seer_jax.inference.text import TOKENIZER_CONFIG, TOKENIZER_PATTERNS, Tokenizer
from seer_jax.lora import merge_lora
from seer_jax.models.config import DType, ModelConfig, RopeKind
from seer_jax.models.decoder import Transformer, check_model
from seer_jax.models.families import config_from_hf, config_to_hf
from seer_jax.models.hub import HubSettings, Location, config_text, read_config, read_json, read_optional, resolve
from seer_jax.models.layers import BaseParam
from seer_jax.outputs import not_written
from seer_jax.sharding.processes import ending_together, is_first

BASE_PATTERNS = ("config.json", "model*.safetensors", "model.safetensors.index.json")
TEXT_PATTERNS = (
    *TOKENIZER_PATTERNS,
    GENERATION_CONFIG,
)  # what a model needs besides weights to read and write text
SHARD_BYTES = 5 * 10**9
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPARED_ROWS = 64

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARDS = "model*.safetensors"


def load_base(
    location: Location, *, dtype: Any = jnp.bfloat16, sharding: Sharding | None = None, **hub: Unpack[HubSettings]
) -> Transformer:
    """A base model from a Hugging Face folder, a GGUF file or a hub id, without gates.

    Tensors go to their device piece by piece: the host never holds more than a few tens of MB besides the model.

    Args:
      location: a folder with `config.json` and safetensors (one file, or several with an index), a GGUF file, a hub id, "tiny-lm" or
        "smollm2".
      dtype: of all weights, bfloat16 or float32.
      sharding: the `jax.sharding.Sharding` of each parameter, from its path (such as "layers.mlp.up_proj.weight", with its
        leading axis over layers) and its abstract array; each device reads only its own part. None: the default device.
      **hub: see `hub.HubSettings`.

    Raises:
      FileNotFoundError, PermissionError, ConnectionError: it is not there; see `hub.resolve`.
      ValueError: the model type or RoPE is not supported, or the checkpoint is incomplete, has further tensors, or tensors of a wrong
        shape or dtype or with NaN.
    """
    dtype = DType.of(dtype)
    folder = resolve(location, BASE_PATTERNS, **hub)
    check_is_base(folder)
    config = config_from_hf(read_config(folder))
    ignored = (*ROTARY_BUFFERS, TIED_HEAD) if config.tie_word_embeddings else ROTARY_BUFFERS
    with _open(folder, config) as source:
        if config.tie_word_embeddings:
            _check_tied(source)
        return load_parameters(
            abstract_model(config, dtype), base_rules(config), source, ignored=ignored, sharding=sharding
        )


def _open(place: Path, config: ModelConfig) -> GGUFSource | SafetensorsSource:
    return GGUFSource(place, head_dim=config.head_dim) if is_gguf(place) else SafetensorsSource(_weight_files(place))


def abstract_model(config: ModelConfig, dtype: Any = jnp.bfloat16) -> Transformer:
    """A model with shapes and dtypes in place of weights."""
    return nnx.eval_shape(lambda: Transformer(config, dtype=dtype, rngs=nnx.Rngs(0)))


def save_base(
    model: Transformer,
    folder: str | os.PathLike[str],
    *,
    hf_config: Mapping[str, Any] | None = None,
    tokenizer: Location | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the base weights (without gates) as a folder that transformers and `load_base` read.

    The files replace those of an earlier model in the folder as one step: a process that is killed leaves the old model, the new one,
    or a folder that loading refuses. Of several processes that share a model all must call; the first one writes.

    Args:
      model: its weights are written in their own dtype; an adapter that it carries is merged into them.
      folder: created if it does not exist.
      hf_config: the `config.json` to write, for example of the model this one was trained from; None: one is made from the
        configuration.
      tokenizer: folder, GGUF file or hub id of the model whose tokenizer and `generation_config.json` are copied, without which the folder takes
        tokens alone. None: none is written, and one that the folder has stays.
      shard_bytes: larger weights are split into files of at most this size; the host holds one file at a time.

    Raises:
      ValueError: hf_config describes another model.
      FileNotFoundError: the folder of `tokenizer` has none; see also `hub.resolve`.
    """
    check_model(model)
    folder, model = Path(folder), merge_lora(model)
    hf = dict(config_to_hf(model.config) if hf_config is None else hf_config)
    expected, got = (_without_eos(config_from_hf(c)) for c in (config_to_hf(model.config), hf))
    if expected != got:
        raise ValueError(f"hf_config must describe the model, {expected}; got {got}. Leave it out, and one is made.")
    hf["torch_dtype"] = str(model.dtype)
    hf.pop("dtype", None)
    source = None if tokenizer is None else tokenizer_folder(tokenizer)
    tensors = tensors_of(model, BaseParam, base_rules(model.config))
    if model.layout is not None and jax.process_count() > 1:
        tensors = ((key, model.layout.everywhere(tensor)) for key, tensor in tensors)
    with ending_together():
        if is_first():
            _write_base(folder, hf, tensors, source, shard_bytes)
        else:
            collections.deque(tensors, maxlen=0)  # each comes from the devices of all processes


def _write_base(
    folder: Path, hf: dict[str, Any], tensors: Iterator[tuple[str, jax.Array]], source: Path | None, shard_bytes: int
) -> None:
    """See `save_base`."""
    with replacing_files(folder) as files:
        _write_shards(files, tensors, shard_bytes)
        if source is not None and is_gguf(source):
            _write_text_files(files, source)
        elif source is not None and source.resolve() != folder.resolve():
            copy_files(files, {path for pattern in TEXT_PATTERNS for path in source.glob(pattern)})
        if source is not None:
            _stretch_tokenizer(files, source, config_from_hf(hf))
        files.path("config.json").write_text(config_text(hf), encoding="utf-8")


def copy_files(files: Replacement, paths: Iterable[Path]) -> None:
    """Copies files into a folder; links into the hub's cache are copied as files. Weights among them take the place of all old ones."""
    names = []
    for path in paths:
        shutil.copyfile(os.path.realpath(path), files.path(path.name))
        names.append(path.name)
    if any(fnmatch.fnmatchcase(name, _SHARDS) for name in names):
        _remove_weights(files)


def _write_text_files(files: Replacement, source: Path) -> None:
    """Writes the tokenizer and the settings of a generation that a GGUF file describes."""
    files.path("tokenizer.json").write_text(Tokenizer.load(source).to_json(), encoding="utf-8")
    for name in (TOKENIZER_CONFIG, GENERATION_CONFIG):
        files.path(name).write_text(config_text(read_optional(source, name)), encoding="utf-8")


def _stretch_tokenizer(files: Replacement, source: Path, config: ModelConfig) -> None:
    """Gives a tokenizer that has the context before YaRN the one after it: transformers truncates texts there."""
    settings, rope = read_optional(source, TOKENIZER_CONFIG), config.rope
    if rope.kind is RopeKind.YARN and settings.get("model_max_length") == rope.original_max_position:
        settings = settings | {"model_max_length": config.context}
        files.path(TOKENIZER_CONFIG).write_text(config_text(settings), encoding="utf-8")


def _remove_weights(files: Replacement) -> None:
    files.remove(*files.folder.glob(_SHARDS), files.folder / _INDEX)


def tokenizer_folder(location: Location) -> Path:
    """The folder or GGUF file of a model's tokenizer, see `hub.resolve`.

    Raises:
      FileNotFoundError: the model has none.
    """
    folder = resolve(location, TEXT_PATTERNS)
    if not is_gguf(folder) and not any(path for pattern in TOKENIZER_PATTERNS for path in folder.glob(pattern)):
        raise FileNotFoundError(
            f"The folder of `tokenizer` must hold a tokenizer; {folder} has none of {', '.join(TOKENIZER_PATTERNS)}."
        )
    return folder


def _without_eos(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, eos_token_ids=())  # they concern text, not weights


def _check_tied(source: TensorSource) -> None:
    """Raises ValueError where a head is there that is not the embedding, though config.json ties them; some rows are compared."""
    if not {EMBEDDING, HEAD} <= set(source.tensors):
        return
    rows, *_ = source.tensors[HEAD].shape or (0,)
    same = source.tensors[HEAD] == source.tensors[EMBEDDING]
    for row in range(0, rows, max(rows // COMPARED_ROWS, 1)) if same else ():
        same &= source.read(HEAD, row, row + 1).tobytes() == source.read(EMBEDDING, row, row + 1).tobytes()
    if not same:
        raise ValueError(
            f"{source.place}: {HEAD} must be {EMBEDDING}, as config.json has tie_word_embeddings true; got another one. Set it to false "
            "where the head is the one to use, as transformers does; otherwise remove the head."
        )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} must be JSON with a weight_map from tensors to files; got {error!r}.") from error
        if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
            raise ValueError(f"{index}: weight_map must name files of its own folder; got {names[:4]}.")
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise FileNotFoundError(
                f"{folder} must hold the files that its index names; {absent} are absent. Download it again."
            )
        return [folder / name for name in names]
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    found = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf"))
    raise FileNotFoundError(
        f"{folder} must hold {_WEIGHTS}, or {_INDEX} and the files it names; got {found}. Save other formats with "
        "transformers' save_pretrained first."
    )


def _write_shards(files: Replacement, tensors: Iterator[tuple[str, jax.Array]], shard_bytes: int) -> None:
    """Writes one file where all weights fit, otherwise numbered ones with an index; the weights that the folder had are to go."""
    _remove_weights(files)
    shards: list[list[str]] = []
    total = 0
    for shard in _group(tensors, shard_bytes):
        write_safetensors(files.path(f"shard-{len(shards)}"), shard)
        shards.append(list(shard))
        total += sum(array.nbytes for array in shard.values())
    if len(shards) == 1:
        files.rename("shard-0", _WEIGHTS)
        return
    weight_map = {}
    for number, keys in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files.rename(f"shard-{number - 1}", name)
        weight_map.update(dict.fromkeys(keys, name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files.path(_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _group(tensors: Iterator[tuple[str, jax.Array]], shard_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for key, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[key] = np.asarray(tensor)
        size += tensor.nbytes
    yield shard


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], **metadata: str) -> None:
    """Writes a safetensors file as transformers expects it, with the permissions of any new file; equal arrays give equal bytes.

    Args:
      path: of the file, replaced if it is there.
      arrays: by name.
      **metadata: further entries of the header's `__metadata__`.

    Raises:
      OSError: it can't be written, such as on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode  # safetensors itself makes files that only their owner can read
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    try:
        save_file(contiguous, path, metadata={"format": "pt"} | metadata)
    except SafetensorError as error:
        raise OSError(not_written(path, str(error).removeprefix("Error while serializing: "))) from error
    if metadata:
        _sort_metadata(path)
    path.chmod(mode)


def _sort_metadata(path: Path) -> None:
    """Rewrites the header with its metadata in a fixed order; safetensors writes them in a random one."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(length))
