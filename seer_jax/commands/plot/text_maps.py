"""The block maps of a text for `seer-jax plot`, checked before weights are loaded."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from seer_jax import tiny_lm
from seer_jax.commands.arguments import model_of
from seer_jax.commands.plot.configs import TextPlot
from seer_jax.commands.stages import Stages
from seer_jax.evaluate.comparison import check_context, check_policy
from seer_jax.evaluate.levels import Phase, gates_by_phase
from seer_jax.inference.memory import check_room, device_bytes
from seer_jax.models.config import DType
from seer_jax.models.decoder import Transformer
from seer_jax.models.pretrained import from_pretrained, load_tokenizer
from seer_jax.plots.maps import BlockMaps, block_maps, decode_block_maps
from seer_jax.selection.rules import RankingPolicy, TopK
from seer_jax.selection.scorers import LearnedGate, Oracle
from seer_jax.sharding.table import TENSOR
from seer_jax.text_files import read_text

DENSITY = 0.1  # where neither the user nor a gate names a policy


@dataclasses.dataclass(frozen=True)
class TextMaps:
    """What is read, checked before weights are loaded.

    Attributes:
      config: as the user wrote it.
      model_name: of the base model.
      shapes: the model without weights.
      chosen: policy of each phase.
      tokens: of the text.
      notes: what is drawn in place of what a reader may expect, and what to pass.
    """

    config: TextPlot
    model_name: str
    shapes: Transformer
    chosen: dict[Phase, RankingPolicy]
    tokens: np.ndarray
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: TextPlot) -> "TextMaps":
        """Reads the text and the model's shapes.

        Raises:
          FileNotFoundError, PermissionError, ConnectionError: model, gates or text are not there.
          ValueError: settings, model, gates and text do not fit each other.
          MemoryError: the device has no room for weights and maps.
        """
        text = read_text(config.text or tiny_lm.path() / "eval_text.txt")
        name = model_of(config.model, config.gates, config.hub, config.adapter)
        dtype = config.dtype or DType.default()
        shapes = from_pretrained(name, config.gates, dtype=dtype, abstract=True, **config.loading)
        chosen, notes = {}, []
        for phase in _shown(config, shapes):
            chosen[phase], note = _policy(config, shapes, phase)
            notes += [note] * bool(note)
        encoded = load_tokenizer(name, **config.hub).encode(text, special_tokens=False)
        tokens = np.array(encoded[: config.length], np.int32)
        if len(tokens) < 2:
            raise ValueError(f"The text must have at least 2 tokens; got {len(tokens)}. Name another `text`.")
        check_context(shapes, len(tokens), beyond_context=config.beyond_context)
        found = cls(config, name, shapes, chosen, tokens, tuple(notes))
        found._check_memory()
        return found

    @property
    def name(self) -> str:
        """Of the model, without the folders above it."""
        return self.model_name.rstrip("/").rpartition("/")[2]

    @property
    def title(self) -> str:
        """Model and text."""
        text = "Python source" if self.config.text is None else self.config.text.name
        return f"{self.name}, {len(self.tokens)} tokens of {text}"

    @property
    def policies(self) -> str:
        """What chooses the blocks."""
        return ", ".join(f"{phase.value} {policy}" for phase, policy in self.chosen.items())

    def check_heads(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Raises ValueError for heads that the model has not."""
        (phase,), model = self.chosen, self.shapes.config
        heads = model.num_heads if phase is Phase.PREFILL else model.num_kv_heads
        if wrong := [f"{layer}.{head}" for layer, head in pairs if layer >= model.num_layers or head >= heads]:
            raise ValueError(
                f"heads must be layers 0 to {model.num_layers - 1} and {phase.value} heads 0 to {heads - 1}; got {wrong[0]}."
            )

    def read(self, stages: Stages) -> Iterator[tuple[Phase, BlockMaps, RankingPolicy]]:
        """Loads the model, and yields the maps of each phase with the policy that kept the blocks."""
        for note in self.notes:
            stages.say(note)
        if len(self.tokens) < self.config.length:
            stages.say(f"The text has {len(self.tokens)} tokens; {self.config.length} were asked for.")
        with stages.stage("Loading the model"):
            config, dtype = self.config, self.config.dtype or DType.default()
            model = from_pretrained(self.model_name, config.gates, dtype=dtype, **config.loading)
        for phase, policy in self.chosen.items():
            with stages.stage(f"Reading the text, {phase.value} {policy}"):
                make = block_maps if phase is Phase.PREFILL else decode_block_maps
                maps = jax.device_get(make(model, self.tokens, policy))
            yield phase, maps, policy

    def _check_memory(self) -> None:
        count = len(self.tokens)
        maps = max(_maps_bytes(self.shapes, phase, policy, count) for phase, policy in self.chosen.items())
        parts = {"weights": device_bytes(self.shapes), "maps": maps}
        check_room("Block maps", self.shapes, parts, "Lower `length`.")


def _maps_bytes(model: Transformer, phase: Phase, policy: RankingPolicy, count: int) -> int:
    """Of two maps in float32 and one of bits, of all layers: of a prompt with all heads, which every device gets in the end, of tokens with
    those that a device has."""
    blocks = -(-count // policy.tokens_per_block(gates_by_phase(model)[phase]))
    config, layout = model.config, model.layout
    own_heads = config.num_kv_heads // (1 if layout is None else layout.size(TENSOR))
    rows, heads = (blocks, config.num_heads) if phase is Phase.PREFILL else (count, own_heads)
    return config.num_layers * heads * rows * blocks * 9


def _shown(config: TextPlot, model: Transformer) -> tuple[Phase, ...]:
    """The phases that are drawn: in a picture that no option gives a phase, the one that has a gate."""
    gates = gates_by_phase(model)
    if config.is_open and gates[Phase.PREFILL] is None and gates[Phase.DECODE] is not None:
        return (Phase.DECODE,)
    return config.shown


def _policy(config: TextPlot, model: Transformer, phase: Phase) -> tuple[RankingPolicy, str]:
    """The policy of a phase, checked against the model; and a line where it is neither the user's nor what the gate recommends."""
    gate, note = gates_by_phase(model)[phase], ""
    recommended = None if gate is None else gate.recommended
    policy = getattr(config, phase.value) or recommended
    if not isinstance(policy, RankingPolicy):
        policy = TopK(DENSITY, Oracle() if gate is None else LearnedGate())
        lack = "the gate recommends none that is sparse" if gate is not None else f"there is no {phase} gate"
        load = "" if gate is not None else "--gates with one, or "
        note = f"{phase}: {policy} is drawn, as {lack}; for others pass {load}--{phase} POLICY."
    check_policy(model, phase, policy)
    return policy, note
