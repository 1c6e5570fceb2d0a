"""Attention under the masks of a trained gate: of the bundled model, since masks of chance know neither sinks nor neighbours."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from pallas_kernels import BlockIndices
from pallas_kernels.block_sparse_attention.cases import Case
from pallas_kernels.cases import Heads
from seer_jax import tiny_lm
from seer_jax.selection.rules import TopK

LENGTH = 8192  # tokens the bundled model was trained to read


@dataclasses.dataclass(frozen=True)
class TrainedCase(Case):
    """A call under the masks of the last heads of the bundled model's prefill gate, by top-k on held-out text."""

    def arguments(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Random queries, keys and values; lists of the gate."""
        lists = _lists(self.num_queries, self.heads.heads, self.density)
        return super().arguments(key) | {"blocks": lists}


def trained_cases(heads: Heads, length: int, density: float) -> list[tuple[Case, Case]]:
    """A case of such masks, with the one of random masks that it is compared with."""
    random = Case(f"{length} tokens", heads, length, density=density)
    trained = TrainedCase(
        **dataclasses.asdict(random) | {"name": f"masks of a trained gate, {length} tokens", "heads": heads}
    )
    return [(trained, random)]


@functools.cache
def _lists(tokens: int, heads: int, density: float) -> BlockIndices:
    """Every layer's heads one after the other, the last of them; repeated where the model has fewer."""
    from seer_jax.evaluate import block_maps
    from seer_jax.models.pretrained import from_pretrained, load_tokenizer

    model = from_pretrained(tiny_lm.path(), [tiny_lm.gates()["prefill"]], dtype="float32")
    assert model.prefill_gate is not None
    ids = load_tokenizer(tiny_lm.path()).encode(tiny_lm.eval_text(), special_tokens=False)[:tokens]
    kept = block_maps(model, jnp.asarray(ids), TopK(density, dense_last_rows=0)).kept
    kept = kept.reshape(-1, *kept.shape[2:])
    kept = jnp.tile(kept, (-(-heads // len(kept)), 1, 1))[-heads:]
    return BlockIndices.from_mask(kept[None], block_size=model.prefill_gate.config.block_size)
