"""The model class that lm-evaluation-harness registers as `seer-jax`. The package is imported when the class is asked for."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from seer_jax.evaluate.harness.model import HarnessModel
from seer_jax.models.config import DType
from seer_jax.models.pretrained import from_pretrained, load_tokenizer
from seer_jax.selection.notation import parse_policy
from seer_jax.sharding.mesh import make_mesh

NAME = "seer-jax"
SEPARATOR = ";"  # within a value: commas separate the arguments themselves
IGNORED = ("device", "max_batch_size")  # that the harness gives to every model


def load_harness_model(
    pretrained: str = "tiny-lm",
    gates: str | Sequence[str] = (),
    adapter: str | None = None,
    prefill: str | None = None,
    decode: str | None = None,
    dtype: str | None = None,
    batch_size: int | str = 8,
    max_length: int | str | None = None,
    max_gen_toks: int | str = 256,
    seed: int | str = 0,
    beyond_context: bool | str = False,
    prefill_chunk: int | str | None = None,
    revision: str | None = None,
    mesh: str | None = None,
    **others: Any,
) -> HarnessModel:
    """A model by the arguments of `--model_args`.

    Args:
      pretrained: folder, GGUF file or hub id of the base model.
      gates: folders or hub ids of gates, several separated by ";".
      adapter: folder or hub id of a LoRA adapter for the base model, or the output folder of a run that trained one; None: none.
      prefill, decode: policies as on the command line, with ";" in place of ","; None: what the gates recommend, otherwise dense.
      dtype: bfloat16 or float32; None: bfloat16, or float32 on a CPU.
      batch_size: rows at a time.
      max_length: tokens of a row; None: the model's context.
      max_gen_toks: new tokens where a request names no number.
      seed: of requests that draw at random.
      beyond_context: allow a `max_length` above the model's context.
      prefill_chunk: tokens of the prompts of continuations that are read at a time, see `Request`.
      revision: of the base model on the hub.
      mesh: devices to spread the model over, as `make_mesh` takes them with ";" in place of ","; None: one.
      **others: those that the harness gives to every model.

    Raises:
      ValueError: an argument is unknown or out of its domain, a policy does not fit the model, or the mesh does not.
      FileNotFoundError, PermissionError, ConnectionError: model, adapter or gates are not there.
    """
    if unknown := [name for name in others if name not in IGNORED]:
        raise ValueError(f"Arguments of the model {NAME} must be known; got {', '.join(unknown)}.")
    named = [gate for gate in gates.split(SEPARATOR) if gate] if isinstance(gates, str) else list(gates)
    policies = {
        phase: None if text is None else parse_policy(text.replace(SEPARATOR, ","))
        for phase, text in (("prefill", prefill), ("decode", decode))
    }
    numbers = {"batch_size": batch_size, "new_tokens": max_gen_toks, "seed": seed, "max_length": max_length}
    numbers |= {"prefill_chunk": prefill_chunk}
    whole = {name: None if value is None else _whole(name, value) for name, value in numbers.items()}
    devices = None if mesh is None else make_mesh(mesh.replace(SEPARATOR, ","))
    kind = DType.default() if dtype is None else jnp.dtype(dtype)
    model = from_pretrained(pretrained, named, dtype=kind, adapter=adapter, revision=revision, mesh=devices)
    settings: dict[str, Any] = {**policies, **whole, "beyond_context": str(beyond_context) == "True"}
    return HarnessModel(model, load_tokenizer(pretrained, revision=revision), **settings)


def _whole(name: str, value: int | str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{name} must be an integer; got {value!r}.") from None


@functools.cache
def harness_class() -> Any:
    """The class that lm-evaluation-harness knows as `seer-jax` from then on.

    Raises:
      ImportError: lm-evaluation-harness is not installed.
    """
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
        from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ImportError(
            f"lm-evaluation-harness must be installed; {error}. Install it: pip install 'seer-jax[eval]'."
        ) from error

    @register_model(NAME)
    class SeerJaxLM(LM):
        """Likelihoods under the prefill policy, continuations under both; see `HarnessModel`."""

        def __init__(self, wrapped: HarnessModel | None = None, **arguments: Any):
            super().__init__()
            self.wrapped = load_harness_model(**arguments) if wrapped is None else wrapped

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return [tuple(found) for found in self._answered("loglikelihood", requests, lambda args: args)]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            return self._answered("loglikelihood_rolling", requests, lambda args: args[0])

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return self._answered("generate_until", requests, lambda args: args)

        def _answered(self, kind: str, requests: Sequence[Any], asked: Any) -> list[Any]:
            answers = getattr(self.wrapped, kind)([asked(request.args) for request in requests])
            for request, answer in zip(requests, answers, strict=True):
                self.cache_hook.add_partial(kind, request.args, answer)
            return answers

        @property
        def tokenizer_name(self) -> str:
            return self.wrapped.tokenizer.place.replace("/", "__")

        def chat_template(self, chat_template: bool | str = False) -> str:
            templates = self.wrapped.tokenizer.chat_templates
            return (
                templates.get(chat_template if isinstance(chat_template, str) else "default", "")
                if chat_template
                else ""
            )

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            variables: dict[str, Any] = dict(continue_final_message=True) if not add_generation_prompt else {}
            return self.wrapped.tokenizer.render_chat(
                chat_history, add_generation_prompt=add_generation_prompt, **variables
            )

    return SeerJaxLM
