"""What a model's generation_config.json asks for: how tokens are drawn, and which ones end a text."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seer_jax.inference.sampling import Greedy, Sample, Sampling
from seer_jax.models.config_json import token_ids
from seer_jax.models.hub import read_optional

NAME = "generation_config.json"
# Settings that change which tokens are drawn, or where a text ends, and that are not available, with the values that change nothing.
_NOT_AVAILABLE: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("repetition_penalty", "encoder_repetition_penalty", "typical_p", "num_beams", "guidance_scale"), (1,)
    ),
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size", "diversity_penalty"), (0,)),
    **dict.fromkeys(("penalty_alpha", "min_length", "min_new_tokens", "encoder_no_repeat_ngram_size", "top_h"), (0,)),
    **dict.fromkeys(
        ("bad_words_ids", "stop_strings", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"), ([], {})
    ),
    **dict.fromkeys(
        ("exponential_decay_length_penalty", "watermarking_config", "force_words_ids", "constraints"), ([], {})
    ),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids"), ([],)),
}


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Settings of a generation_config.json.

    Attributes:
      sampling: how tokens are to be drawn; None where the file does not ask for sampling.
      eos_token_ids: tokens that end a text; None where the file names none.
      not_available: settings that seer-jax does not have, as they are written.
    """

    sampling: Sampling | None = None
    eos_token_ids: tuple[int, ...] | None = None
    not_available: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def options(self) -> str:
        """The sampling as options of `seer-jax generate`."""
        match self.sampling:
            case Sample(temperature=temperature, top_k=top_k, top_p=top_p):
                options = {"--temperature": temperature, "--top-k": top_k, "--top-p": top_p}
                return " ".join(f"{name} {value}" for name, value in options.items() if value is not None)
        return "--temperature 0"


def read_generation_settings(folder: Path) -> GenerationSettings:
    """The settings of a model folder or a GGUF file; those of an empty file where it has none.

    Raises:
      ValueError: a setting is of a wrong type or outside its domain.
    """
    path = folder / NAME
    hf = read_optional(folder, NAME)
    eos = token_ids(f"{path}: eos_token_id", hf.get("eos_token_id"))
    left = {
        key: hf[key]
        for key, neutral in _NOT_AVAILABLE.items()
        if hf.get(key) is not None and hf[key] is not False and hf[key] not in neutral
    }
    try:
        sampling = _sampling(hf)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return GenerationSettings(sampling, eos or None, left)


def _sampling(hf: Mapping[str, Any]) -> Sampling | None:
    """Sampling, unless do_sample is false or nothing about it is said."""
    names = ("temperature", "top_p", "top_k")
    for name in names:
        value = hf.get(name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**31
        if value is not None and not (number and (name != "top_k" or int(value) == value)):
            raise ValueError(f"{name} must be {'an integer' if name == 'top_k' else 'a number'}; got {value!r}.")
    if not isinstance(hf.get("do_sample", True), bool | None):
        raise ValueError(f"do_sample must be true or false; got {hf['do_sample']!r}.")
    temperature, top_p, top_k = (hf.get(name) for name in names)
    if not hf.get("do_sample", any(value is not None for value in (temperature, top_p, top_k))):
        return None
    if temperature == 0:
        return Greedy()
    return Sample(
        1.0 if temperature is None else float(temperature),
        top_k=int(top_k) if top_k and top_k > 0 else None,  # 0 and -1 mean all
        top_p=None if top_p is None or top_p == 1 else float(top_p),
    )
