"""Time and memory of prefill, decoding and distillation on a mesh of H200, by formula."""

import dataclasses
import math

from seer_jax.models.config import ModelConfig

BYTES = 2  # of a bfloat16 element
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Rates of a device and between devices, per second.

    Attributes:
      linear_flop: of products with weights, for many tokens.
      dense_flop, sparse_flop: of attention of prompts, by cuDNN and by the kernel that reads lists.
      distil_flop: of dense attention that gives the scores of blocks and tokens.
      memory: bytes that the memory of a device gives.
      link: bytes that a device sends, and receives, to others of its host, as collectives reach it.
      network: the same to other hosts.
      host: devices of a host.
      latency: seconds of a collective of a few bytes.
      layer, sparse_layer: seconds of a layer of decoding besides what it reads.
    """

    linear_flop: float
    dense_flop: float
    sparse_flop: float
    distil_flop: float
    memory: float
    link: float
    network: float
    host: int
    latency: float
    layer: float
    sparse_layer: float


# The first five and the last two as docs/performance.md has them. Link and latency: what sums of large and of small arrays reached between two
# devices (of NVLink's 450 GB/s each way). Network: 400 Gb/s, of which collectives reach about three quarters.
H200 = Hardware(
    linear_flop=620e12,
    dense_flop=575e12,
    sparse_flop=500e12,
    distil_flop=520e12,
    memory=4.18e12,
    link=210e9,
    network=0.75 * 50e9,
    host=8,
    latency=20e-6,
    layer=25e-6,
    sparse_layer=55e-6,
)


@dataclasses.dataclass(frozen=True)
class MeshSize:
    """Devices along the axes of a mesh, `tensor` innermost."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor

    def rows(self, batch: int) -> float:
        """Rows of a batch that each device has."""
        return batch / (self.data * self.fsdp)

    def __str__(self) -> str:
        sizes = dataclasses.asdict(self).items()
        return ",".join(f"{axis}={size}" for axis, size in sizes if size > 1) or "1 device"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds and bytes of one step on each device of a mesh.

    Attributes:
      linears, attention, exchange: seconds of products with weights (decoding: of reading them), of attention, and of collectives.
      other: seconds of what is left.
      weights, cache, scratch: bytes.
    """

    linears: float
    attention: float
    exchange: float
    other: float
    weights: float
    cache: float
    scratch: float

    @property
    def seconds(self) -> float:
        """Where nothing that is exchanged is hidden behind products: the program's order."""
        return self.linears + self.attention + self.exchange + self.other

    @property
    def overlapped(self) -> float:
        """Where everything is."""
        return max(self.linears + self.attention + self.other, self.exchange)

    @property
    def total_bytes(self) -> float:
        return self.weights + self.cache + self.scratch


def layer_weights(config: ModelConfig) -> int:
    """Weights of projections and MLP of one layer."""
    heads = config.num_heads + config.num_kv_heads
    return 2 * config.hidden_size * config.head_dim * heads + 3 * config.hidden_size * config.intermediate_size


def weight_bytes(config: ModelConfig, mesh: MeshSize) -> float:
    """Of the base weights that each device has; keys and values of one head are copied where there are fewer heads than devices."""
    copies = max(1, mesh.tensor // config.num_kv_heads)
    own = layer_weights(config) + 2 * (copies - 1) * config.hidden_size * config.head_dim * config.num_kv_heads
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return BYTES * (config.num_layers * own + tables) / (mesh.fsdp * mesh.tensor)


def cache_bytes(config: ModelConfig, mesh: MeshSize, batch: int, length: int) -> float:
    """Of keys and values that each device has."""
    heads = max(1, config.num_kv_heads / mesh.tensor)
    return 2 * BYTES * config.num_layers * mesh.rows(batch) * length * heads * config.head_dim


def prefill(
    config: ModelConfig, mesh: MeshSize, batch: int, length: int, density: float = 1.0, on: Hardware = H200
) -> Estimate:
    """Reading prompts, up to the logits after them.

    Linears: 2 flop per token and weight. Attention: 4 H D for each pair of a query and a key that it reads, of T^2 / 2. Scratch: hidden states
    of two places, and queries, keys, values and output of one layer.

    Args:
      config: of the model.
      mesh: whose devices along data and fsdp divide the batch.
      batch: rows.
      length: T.
      density: share of the causal blocks that are read; 1: dense attention.
      on: rates of the devices.
    """
    tokens, attention = mesh.rows(batch) * length, _attention_flop(config, mesh, batch, length)
    rate = on.dense_flop if density == 1 else on.sparse_flop
    return Estimate(
        linears=_linear_flop(config, mesh, tokens) / on.linear_flop,
        attention=density * attention / rate,
        exchange=_exchange(config, mesh, tokens, on),
        other=0.0,
        weights=weight_bytes(config, mesh),
        cache=cache_bytes(config, mesh, batch, length),
        scratch=_activations(config, mesh, tokens, 2) + _gathered(config, mesh),
    )


def decode(
    config: ModelConfig, mesh: MeshSize, batch: int, length: int, density: float = 1.0, on: Hardware = H200
) -> Estimate:
    """One new token of each of `batch` sequences of `length` tokens: weights and the listed blocks' keys and values are read once."""
    head = BYTES * config.vocab_size * config.hidden_size / mesh.tensor
    read = BYTES * config.num_layers * layer_weights(config) / mesh.tensor + head
    held = cache_bytes(config, mesh, batch, length)
    compressed = (
        held / 128 if density < 1 else 0.0
    )  # the decode gate's: one key of D channels per block of 64 beside 2 x 64
    tokens = mesh.rows(batch)
    return Estimate(
        linears=read / on.memory,
        attention=(density * held + compressed) / on.memory,
        exchange=_exchange(config, mesh, tokens, on),
        other=config.num_layers * (on.layer if density == 1 else on.sparse_layer),
        weights=weight_bytes(config, mesh),
        cache=held + compressed,
        scratch=_gathered(config, mesh),
    )


def distil(config: ModelConfig, mesh: MeshSize, batch: int, length: int, on: Hardware = H200) -> Estimate:
    """A step of distillation of both gates, each device's rows one at a time: a dense forward pass whose attention gives the targets.

    Scratch: that of prefill with three layers' parts, and the targets and scores of 8192 tokens, 2 float32 [K, 8192, T / 64].
    """
    rows = math.ceil(mesh.rows(batch))
    targets = 2 * 4 * 8192 * config.num_kv_heads / mesh.tensor * length / 64
    return Estimate(
        linears=rows * _linear_flop(config, mesh, length) / on.linear_flop,
        attention=_attention_flop(config, mesh, batch, length) / on.distil_flop,
        exchange=rows * _exchange(config, mesh, length, on),
        other=0.0,
        weights=weight_bytes(config, mesh),
        cache=0.0,
        scratch=_activations(config, mesh, length, 3) + targets + _gathered(config, mesh),
    )


def sums_bytes(config: ModelConfig, devices: int, tokens: float) -> float:
    """That each of the devices of tensor receives in a layer: two sums of hidden states."""
    return 2 * 2 * (1 - 1 / devices) * BYTES * tokens * config.hidden_size


def ring_bytes(config: ModelConfig, devices: int, tokens: int) -> float:
    """That each of some devices would receive in a layer if each held a part of a prompt's keys and values, and these were passed round."""
    return 2 * (1 - 1 / devices) * BYTES * tokens * config.num_kv_heads * config.head_dim


def combined_bytes(config: ModelConfig, devices: int, tokens: int) -> float:
    """That each of some devices would receive in a layer for a new token if each held a part of the keys: the float32 scores of the blocks of
    the others, and of each query head output, largest score and sum."""
    scores = (1 - 1 / devices) * 4 * config.num_kv_heads * tokens / 64
    return scores + (devices - 1) * 4 * config.num_heads * (config.head_dim + 2)


def _linear_flop(config: ModelConfig, mesh: MeshSize, tokens: float) -> float:
    return 2 * tokens * config.num_layers * layer_weights(config) / mesh.tensor


def _attention_flop(config: ModelConfig, mesh: MeshSize, batch: int, length: int) -> float:
    pairs = length * (length + 1) / 2
    return 4 * config.num_layers * config.num_heads / mesh.tensor * config.head_dim * pairs * mesh.rows(batch)


def _activations(config: ModelConfig, mesh: MeshSize, tokens: float, parts: int) -> float:
    """Two hidden states, and `parts` times the queries and keys of one layer (in prefill: queries and output, keys and values)."""
    heads = config.num_heads / mesh.tensor + max(1, config.num_kv_heads / mesh.tensor)
    return BYTES * tokens * (2 * config.hidden_size + parts * heads * config.head_dim)


def _gathered(config: ModelConfig, mesh: MeshSize) -> float:
    """A layer's weights, whole over fsdp."""
    return BYTES * layer_weights(config) / mesh.tensor if mesh.fsdp > 1 else 0.0


def _exchange(config: ModelConfig, mesh: MeshSize, tokens: float, on: Hardware) -> float:
    """Two sums of hidden states over tensor in each layer, and its weights gathered over fsdp."""
    sums = 2 * config.num_layers * _collective(2 * BYTES * tokens * config.hidden_size, mesh.tensor, 1, on)
    weights = BYTES * layer_weights(config) / mesh.tensor
    return sums + config.num_layers * _collective(weights, mesh.fsdp, mesh.tensor, on)


def _collective(size: float, devices: int, stride: int, on: Hardware) -> float:
    """Seconds in which each of some devices receives a share 1 - 1 / devices of `size` bytes: all-gathers; sums take twice the bytes.

    Between hosts each host receives a share 1 - 1 / hosts over the networks of its devices, and passes it on inside.

    Args:
      stride: from one of the devices to the next.
    """
    if devices == 1:
        return 0.0
    inside = size * (1 - 1 / devices) / on.link
    hosts = max(1, math.ceil(devices * stride / on.host))
    groups = min(stride, on.host)  # that share the host's networks
    across = size * groups * (1 - 1 / hosts) / (on.host * on.network)
    return on.latency + max(inside, across)
