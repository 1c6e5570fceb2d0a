"""Say what memory and time a generation, or a step of fine-tuning, would take, on one device or a mesh, without weights and devices."""

import dataclasses
import enum
import math
from typing import Any

from seer_jax.bench.configs import MODELS, ModelShape
from seer_jax.bench.models import abstract_model
from seer_jax.bench.scaling.estimates import MeshSize, decode, prefill
from seer_jax.checks import check_at_least
from seer_jax.commands import ExitCode
from seer_jax.commands.arguments import AdapterOptions, HubOptions, model_of, parse
from seer_jax.gates.kinds import GateKind, gates_of_kind
from seer_jax.inference.generate import plan_memory
from seer_jax.inference.memory import GIB, MemoryPlan
from seer_jax.inference.request import Request
from seer_jax.models.config import DType
from seer_jax.models.decoder import Transformer
from seer_jax.models.pretrained import from_pretrained
from seer_jax.selection.policies import Policy
from seer_jax.selection.rules import TokenBudget, TopK
from seer_jax.sharding.mesh import mesh_sizes
from seer_jax.train.config import FinetuneConfig
from seer_jax.train.planned import StepPlan, plan_finetuning

SHAPES = tuple(shape.value for shape in ModelShape if shape is not ModelShape.TINY)
DESCRIPTION = f"""Says what memory and time a generation would take on one device, or on each device of a mesh that need not be there. Weights are
not read; what one device computes is compiled for the device that is here.

The model is a name or folder as in every command, or a shape: {", ".join(SHAPES)} (with untrained gates of a kind).

  seer-jax plan --model llama-3.1-70b --mesh tensor=8 --length 128000
  seer-jax plan --model tiny-lm --gates tiny-lm --length 4096 --batch 8

With --finetune full|lora it says what a step of fine-tuning takes on one device, of --batch rows one after the other; with --prefill topk:DENSITY
together with the model's prefill gate, as seer-jax finetune --initial-gates trains it.

  seer-jax plan --finetune lora --model llama-3.1-8b --length 32768 --prefill topk:0.1"""


class Finetuning(enum.StrEnum):
    """What trains: all weights, or adapters of rank 16 in every linear map."""

    FULL = "full"
    LORA = "lora"


@dataclasses.dataclass(frozen=True)
class PlanConfig(HubOptions, AdapterOptions):
    """Says what memory and time a generation would take.

    Attributes:
      model: folder, GGUF file or hub id of the base model, tiny-lm, smollm2, or a shape such as llama-3.1-70b. None: the base model that the
        gates or the adapter name, otherwise llama-3.1-8b.
      gates: folders, hub ids or names (such as smollm2) of one prefill gate, one decode gate, or both; shapes have both.
      kind: of the gates of a shape: those of the release with 128 channels, or fine ones (see seer-jax demo) with 64.
      mesh: devices along the axes data, fsdp and tensor, such as tensor=8 or data=2,tensor=4; None: one device.
      length: tokens of each prompt.
      batch: prompts.
      max_new_tokens: new tokens of each.
      prefill: blocks that the prompt's tokens attend to (a policy). None: what the gate recommends, otherwise dense.
      decode: blocks that each new token attends to (a policy). None: likewise.
      dtype: of the base model's weights and arithmetic.
      device_memory: GiB that each device has; None: what the device tells that is here, on a CPU nothing for a mesh.
      compiled: compile, for what the program takes besides weights and cache; False: at once, without that.
      finetune: say what a step of fine-tuning takes, of all weights (full) or of adapters (lora). None: a generation.
      beyond_context: allow more tokens than the model's context.
      prefill_chunk: tokens of the prompts that are read at a time, a multiple of the block size; 0: all at once. None: all at once up to 32768
        tokens, above that 8192 at a time where the policy for prompts allows it.
    """

    model: str | None = None
    gates: tuple[str, ...] = ()
    kind: GateKind = GateKind.RELEASE
    mesh: str | None = None
    length: int = 65536
    batch: int = 1
    max_new_tokens: int = 256
    prefill: Policy | None = None
    decode: Policy | None = None
    dtype: DType = DType.BFLOAT16
    device_memory: float | None = None
    compiled: bool = True
    finetune: Finetuning | None = None
    beyond_context: bool = False
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        check_at_least(1, self, "length", "batch", "max_new_tokens")
        if self.device_memory is not None and not 0 < self.device_memory < math.inf:
            raise ValueError(f"device_memory must be a number of GiB above 0; got {self.device_memory}.")
        if self.mesh is not None:
            mesh_sizes(self.mesh)
        if self.model in SHAPES and self.gates:
            raise ValueError(
                f"gates must be left out where the model is a shape, which has some; got {self.gates[0]} for {self.model}. Name the base "
                "model that they are for, or none."
            )
        if self.model in SHAPES and self.adapter is not None:
            raise ValueError(f"adapter must be left out where the model is a shape; got {self.adapter}.")
        if self.shape is None and self.kind is not PlanConfig.kind:
            raise ValueError(f"kind must be left out where the model is no shape; got {self.kind}. Name gates instead.")
        if self.finetune is not None:
            self._check_finetuning()

    def _check_finetuning(self) -> None:
        for name, why in (
            ("mesh", "is planned for one device"),
            ("decode", "decodes nothing"),
            ("max_new_tokens", "decodes nothing"),
            ("prefill_chunk", "reads whole rows"),
            ("beyond_context", "plans rows of any length"),
        ):
            if (value := getattr(self, name)) != getattr(PlanConfig, name):
                raise ValueError(f"{name} must be left out with `finetune`, which {why}; got {value}.")
        if self.finetune is Finetuning.FULL and self.adapter is not None:
            raise ValueError(
                f"adapter must be left out with finetune=full, which trains the weights of a model; got {self.adapter}. Plan "
                "finetune=lora, or merge the adapter first: seer-jax convert."
            )
        if self.prefill is not None and (
            not isinstance(self.prefill, TopK) or self.prefill != TopK(self.prefill.density)
        ):
            raise ValueError(
                f"prefill must be topk:DENSITY with `finetune`, ranked by the gate that trains along; got {self.prefill}. Write topk:0.1, for "
                "example."
            )

    @property
    def shape(self) -> ModelShape | None:
        """Of the model, where it is nothing but one."""
        if self.model is None:
            return None if self.gates or self.adapter is not None else ModelShape.LLAMA_3_1_8B
        return ModelShape(self.model) if self.model in SHAPES else None

    @property
    def size(self) -> MeshSize:
        """Devices along the axes of the mesh."""
        return MeshSize() if self.mesh is None else MeshSize(**mesh_sizes(self.mesh))


def run(words: list[str]) -> int:
    config = parse(PlanConfig, "plan", words, description=DESCRIPTION)
    model = load_shapes(config)
    if config.finetune is not None:
        print(finetuning_plan(config, model))
        return ExitCode.OK
    print(plan_of(config, model))
    print(times_of(config, model))
    return ExitCode.OK


def load_shapes(config: PlanConfig) -> Transformer:
    """The model, of shapes."""
    if config.shape is not None:
        channels = 128 if config.kind is GateKind.RELEASE else 64
        gates = gates_of_kind(config.kind, block_size=64, gate_dim=channels)
        return abstract_model(MODELS[config.shape], gates.prefill, gates.decode, dtype=config.dtype)
    name = model_of(config.model, config.gates, config.hub, config.adapter)
    settings: dict[str, Any] = {"adapter": config.adapter, **config.hub}
    return from_pretrained(name, config.gates, dtype=config.dtype, abstract=True, **settings)


def plan_of(config: PlanConfig, model: Transformer) -> MemoryPlan:
    """The memory of each device."""
    available = None if config.device_memory is None else int(config.device_memory * GIB)
    return plan_memory(
        model,
        config.batch,
        config.length,
        mesh=config.mesh,
        compiled=config.compiled,
        available=available,
        **_policies(config),
    )


def finetuning_plan(config: PlanConfig, model: Transformer) -> StepPlan:
    """The memory of a step of fine-tuning."""
    recipe = FinetuneConfig.full_recipe if config.finetune is Finetuning.FULL else FinetuneConfig.lora_recipe
    settings = recipe(sequence_length=config.length, batch_size=config.batch)
    model.decode_gate = None
    if not isinstance(config.prefill, TopK):
        model.prefill_gate = None
    elif model.prefill_gate is None:
        raise ValueError("`prefill` must come with a prefill gate to train along; the model has none. Add gates=...")
    elif (length := config.length) % (block := model.prefill_gate.config.block_size) or length < 2 * block:
        raise ValueError(
            f"length must be a multiple of the gate's block size {block} and at least two blocks, as a run's rows must; got {length}. "
            f"Set length={max(2, length // block) * block}, for example."
        )
    else:
        settings = dataclasses.replace(settings, density=config.prefill.density)
    available = None if config.device_memory is None else int(config.device_memory * GIB)
    return plan_finetuning(model, settings, compiled=config.compiled, available=available)


def times_of(config: PlanConfig, model: Transformer) -> str:
    """Times by the formula of docs/scaling.md."""
    request = Request.of(model, **_policies(config))
    assert request.prefill is not None and request.decode is not None
    mesh, sizes = config.size, (config.batch, config.length)
    shares = [_share(policy, config.length) for policy in (request.prefill, request.decode)]
    first, step = (
        make(model.config, mesh, *sizes, x or 1.0) for make, x in zip((prefill, decode), shares, strict=True)
    )
    devices = "an H200" if mesh.devices == 1 else f"{mesh.devices} H200"
    lines = [
        f"By formula (docs/scaling.md), on {devices}: prompts in {first.seconds:.3g} s, then {1e3 * step.seconds:.3g} ms a token, "
        f"{config.batch / step.seconds:,.0f} tokens/s of all."
    ]
    unknown = [phase for phase, share in zip(("prefill", "decode"), shares, strict=True) if share is None]
    lines += [
        f"The policy for {phase} is counted as dense there: what it keeps depends on the text." for phase in unknown
    ]
    return "\n".join(lines)


def _share(policy: Policy, length: int) -> float | None:
    """Share of the blocks that a policy reads; None: not known beforehand."""
    if isinstance(policy, TokenBudget):
        return min(1.0, policy.tokens / length)
    return 1.0 if policy.is_dense else policy.expected_density


def _policies(config: PlanConfig) -> dict:
    return dict(
        max_new_tokens=config.max_new_tokens,
        prefill=config.prefill,
        decode=config.decode,
        beyond_context=config.beyond_context,
        prefill_chunk=config.prefill_chunk,
    )
