"""Tensors of a GGUF file under their Hugging Face names, dequantised by the package `gguf` a few rows at a time."""

import functools
import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from seer_jax.convert.formats.sources import TensorInfo
from seer_jax.gguf.config import EMBEDDING, HEAD, ROPE_FACTORS
from seer_jax.gguf.header import DAMAGED, GGUFHeader, GGUFTensor, read_header

_WHOLE = {EMBEDDING: "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", HEAD: "lm_head.weight"}
_OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_INTERLEAVED = (
    "llama",
)  # architectures whose q and k llama.cpp stores with the two channels of a rotated pair side by side
_ROTATED = re.compile(r"model\.layers\.\d+\.self_attn\.[qk]_proj\.(weight|bias)")


class GGUFSource:
    """The tensors of a GGUF file as a Hugging Face checkpoint of the model has them: names, float32, order of rows in q and k.

    Use it as a context manager, or `close` it.

    Attributes:
      place, tensors: see `sources.TensorSource`. A tensor without a Hugging Face name keeps its own.

    Raises:
      ImportError: the package `gguf` is not installed.
      ValueError: a tensor does not lie within the file, or is of a type that the package does not dequantise.
    """

    def __init__(self, path: Path, *, head_dim: int):
        """
        Args:
          path: of the file.
          head_dim: channels of a head.
        """
        header = read_header(path)
        self.place, self._head_dim = str(path), head_dim
        self._unpermute = header.metadata.get("general.architecture") in _INTERLEAVED
        self._stored = {_name(name): tensor for name, tensor in header.tensors.items() if name != ROPE_FACTORS}
        for name, tensor in self._stored.items():
            _check(header, name, tensor)
        self.tensors: Mapping[str, TensorInfo] = {name: TensorInfo(t.shape, "F32") for name, t in self._stored.items()}
        self._file = io.FileIO(path)

    def __enter__(self) -> "GGUFSource":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor, float32."""
        if not (self._unpermute and _ROTATED.fullmatch(name)):
            return self._rows(name, start, stop)
        # Channel i of half h of a head, which Hugging Face has at row h D/2 + i, is row 2i + h here.
        dim = self._head_dim
        head, channel = np.divmod(np.arange(start, stop), dim)
        rows = head * dim + channel % (dim // 2) * 2 + channel // (dim // 2)
        first = int(rows.min(initial=stop))
        return self._rows(name, first, int(rows.max(initial=first - 1)) + 1)[rows - first]

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        tensor = self._stored[name]
        row = tensor.shape[1:]
        stride = _bytes_of(tensor.type, math.prod(row))
        data = np.empty(max(stop - start, 0) * stride, np.uint8)
        self._file.seek(tensor.offset + start * stride)
        done = 0
        while done < data.size:
            count = self._file.readinto(memoryview(data)[done:])
            if not count:
                raise ValueError(
                    f"{self.place}: the file must hold all of {name!r}; it ends before. Download it again."
                )
            done += count
        with np.errstate(all="ignore"):  # what is not finite is refused by the reader of the rows
            return _dequantised(data.reshape(-1, stride), tensor.type).reshape(-1, *row)


def _name(name: str) -> str:
    """The Hugging Face name of a tensor, or its own."""
    if match := _LAYER_NAME.fullmatch(name):
        layer, part, kind = match.groups()
        return f"model.layers.{layer}.{_OF_LAYER[part]}.{kind}" if part in _OF_LAYER else name
    return _WHOLE.get(name, name)


def _check(header: GGUFHeader, name: str, tensor: GGUFTensor) -> None:
    package, kind = _package(), tensor.type
    if not _is_known(kind):
        names = {member.value: member.name for member in package.GGMLQuantizationType}
        raise ValueError(
            f"{header.path}: tensors must be of a type that the package gguf dequantises; {name!r} is of type {names.get(kind, kind)}. Use "
            "another quantisation of the model."
        )
    block, _ = package.GGML_QUANT_SIZES[kind]
    size = _bytes_of(kind, math.prod(tensor.shape))
    if tensor.shape[-1] % block or (len(tensor.shape) == 1 and block > 1) or tensor.offset + size > header.size:
        raise ValueError(
            f"{header.path}: {name!r} of shape {tensor.shape} must be rows of whole blocks of {block} and lie within the file of "
            f"{header.size} bytes; its {size} bytes start at {tensor.offset}. {DAMAGED}"
        )


def _bytes_of(kind: int, elements: int) -> int:
    block, size = _package().GGML_QUANT_SIZES[kind]
    return elements // block * size


@functools.cache
def _is_known(kind: int) -> bool:
    """Whether the package dequantises a type: it is asked to, for one block of zeros."""
    sizes = _package().GGML_QUANT_SIZES
    if kind not in sizes:
        return False
    try:
        _dequantised(np.zeros((1, sizes[kind][1]), np.uint8), kind)
    except (NotImplementedError, ValueError):
        return False
    return True


def _dequantised(rows: np.ndarray, kind: int) -> np.ndarray:
    """Rows of bytes as float32."""
    package = _package()
    types = package.GGMLQuantizationType
    plain = {types.F32: np.float32, types.F16: np.float16}.get(types(kind))
    return package.dequantize(rows if plain is None else rows.view(plain), types(kind))


@functools.cache
def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "Reading GGUF files needs the package gguf; it is not installed. Run pip install gguf."
        ) from error
    return gguf
