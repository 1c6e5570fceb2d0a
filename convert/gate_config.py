"""A gate and its recommended policy as keys of a checkpoint's `config.json`, in both directions.

Gates that the release has are described by its keys. Settings that it lacks would be overlooked there, so a gate with one of them is
described by a single key of our own, which holds all of its settings.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from seer_jax.gates.configs import DecodeGateConfig, GateConfig, Pool, PrefillGateConfig, QueryReduction
from seer_jax.models.config_json import typed
from seer_jax.selection.notation import policy_from_json, policy_to_json
from seer_jax.selection.policies import Policy
from seer_jax.selection.rules import RankingPolicy, Threshold, TokenBudget, TopK
from seer_jax.selection.scorers import LearnedGate
from seer_jax.settings import parse_setting

PREFIX = "seerattn_"  # of the release's keys
GATE_KEY = "seer_jax_gate"  # our own, for gates that the release's keys cannot express
POLICY_KEY = "seer_jax_policy"  # our own, for policies that the release's keys cannot express
TRAINING_KEY = "seer_jax_training"  # how far a gate is trained, and on which target
CALIBRATION_KEY = "seer_jax_calibration"  # how the recommended policy was found; loading ignores it
_POOLS = "(max)?(min)?(avg)?"
_PREFILL_KEY = "seerattn_gate_type"
_DECODE_KEYS = ("seerattn_k_seq_pooling_type", "seerattn_q_head_pooling_type")
_RELEASED_REDUCTIONS = tuple(kind for kind in QueryReduction if kind is not QueryReduction.HEADS)
_KINDS: dict[str, type[GateConfig]] = {"prefill": PrefillGateConfig, "decode": DecodeGateConfig}


def parse_prefill_pooling(name: str) -> tuple[tuple[Pool, ...], tuple[Pool, ...]]:
    """Pools of queries and keys from a name such as "Qavg_Kmaxminavg".

    Raises:
      ValueError: the name is not of this form.
    """
    match = re.fullmatch(f"Q{_POOLS}_K{_POOLS}", name)
    sides = (_pools(match.groups()[:3]), _pools(match.groups()[3:])) if match else ((), ())
    if not all(sides):
        raise ValueError(
            "The type of a prefill gate must be 'Q' + pools + '_K' + pools, where pools are at least one of max, min, avg in this "
            f"order, as in 'Qavg_Kmaxminavg'; got {name!r}."
        )
    return sides


def parse_key_pooling(name: str) -> tuple[Pool, ...]:
    """Pools of keys from a name such as "Kmaxminavg".

    Raises:
      ValueError: the name is not of this form.
    """
    match = re.fullmatch(f"K{_POOLS}", name)
    kinds = _pools(match.groups()) if match else ()
    if not kinds:
        raise ValueError(
            "The key pooling of a decode gate must be 'K' + pools, where pools are at least one of max, min, avg in this order, "
            f"as in 'Kmaxminavg'; got {name!r}."
        )
    return kinds


def _pools(groups: tuple[str | None, ...]) -> tuple[Pool, ...]:
    return tuple(Pool(g) for g in groups if g)


def gate_config_from_hf(hf: Mapping[str, Any]) -> GateConfig:
    """The gate that a parsed `config.json` describes. Absent keys have the defaults of the release.

    Raises:
      ValueError: it describes no gate, both kinds, or one that is not supported.
    """
    prefill, decode = _PREFILL_KEY in hf, any(key in hf for key in _DECODE_KEYS)
    if hf.get(GATE_KEY) is not None:
        if prefill or decode:
            raise ValueError(
                f"config.json of a gate must describe it once; got {GATE_KEY} beside keys of the release ({PREFIX}*). Remove those that "
                "do not belong to its weights."
            )
        return _own_config(hf[GATE_KEY])
    if prefill == decode:
        raise ValueError(
            f"config.json of a gate must have either {_PREFILL_KEY} (prefill) or {' and '.join(_DECODE_KEYS)} (decode); "
            f"got {'both' if prefill else 'neither'}. Give the folder of one gate."
        )
    sizes: dict[str, Any] = dict(
        block_size=_typed(hf, "gate_block_size", 64), gate_dim=_typed(hf, "gate_hidden_size", 128)
    )
    if prefill:
        q_pooling, k_pooling = parse_prefill_pooling(_typed(hf, "gate_type", ""))
        force = _typed(hf, "gate_force_double", False)
        return PrefillGateConfig(q_pooling=q_pooling, k_pooling=k_pooling, force_double=force, **sizes)
    reduction = _get(hf, "q_head_pooling_type", "Qproj")
    if reduction not in _RELEASED_REDUCTIONS:
        raise ValueError(
            f"seerattn_q_head_pooling_type must be one of {', '.join(_RELEASED_REDUCTIONS)}; got {reduction!r}. Gates that keep all "
            "query heads, an experiment of the release, are not supported."
        )
    return DecodeGateConfig(
        query_reduction=QueryReduction(reduction),
        k_pooling=parse_key_pooling(_typed(hf, "k_seq_pooling_type", "Kmaxminavg")),
        use_qk_norm=_typed(hf, "use_qk_norm", False),
        use_rope=_typed(hf, "use_rope", True),
        start_layer=_typed(hf, "start_layer", 0),
        **sizes,
    )


def _own_config(values: Any) -> GateConfig:
    """The gate that our own key describes."""
    kind = values.get("kind") if isinstance(values, Mapping) else None
    if kind not in _KINDS:
        raise ValueError(f"{GATE_KEY} of config.json must hold kind, one of {', '.join(_KINDS)}; got {values!r}.")
    try:
        return parse_setting(_KINDS[kind], {key: value for key, value in values.items() if key != "kind"}, GATE_KEY)
    except ValueError as error:
        raise ValueError(
            f"config.json of a gate must have settings that this version knows. {error} A gate of a later version needs that one."
        ) from error


def gate_settings(config: GateConfig) -> dict[str, Any]:
    """Every setting of a gate as JSON has it, its kind among them."""
    kind = next(name for name, of in _KINDS.items() if isinstance(config, of))
    return {"kind": kind} | json.loads(json.dumps(dataclasses.asdict(config)))


def gate_config_to_hf(config: GateConfig) -> dict[str, Any]:
    """The keys that describe a gate: the release's where it has such gates, otherwise our own."""
    if config.finer_than_release():
        return {GATE_KEY: gate_settings(config)}
    hf: dict[str, Any] = {"gate_block_size": config.block_size, "gate_hidden_size": config.gate_dim}
    k_pooling = "K" + "".join(config.k_pooling)
    if isinstance(config, PrefillGateConfig):
        hf |= {
            "gate_type": f"Q{''.join(config.q_pooling)}_{k_pooling}",
            "gate_force_double": config.force_double,
        }
    else:
        hf |= {
            "q_head_pooling_type": config.query_reduction.value,
            "k_seq_pooling_type": k_pooling,
            "use_qk_norm": config.normalizes,
            "use_rope": config.use_rope,
            "start_layer": config.start_layer,
        }
    return {PREFIX + key: value for key, value in hf.items()}


def without_gate_keys(hf: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` without the keys of a gate, its policy, its calibration and its training."""
    own = GATE_KEY, POLICY_KEY, TRAINING_KEY, CALIBRATION_KEY
    return {k: value for k, value in hf.items() if not k.startswith(PREFIX) and k not in own}


def target_from_hf(hf: Mapping[str, Any]) -> str | None:
    """The target that a gate was distilled on, "max" or "mass"; None where its `config.json` does not say."""
    training = hf.get(TRAINING_KEY)
    target = training.get("target") if isinstance(training, dict) else None
    return target if target in ("max", "mass") else None


def policy_from_hf(hf: Mapping[str, Any]) -> Policy | None:
    """The sparsity policy that a checkpoint recommends: from our own key where there is one, otherwise from the keys of the release.

    Returns:
      The policy; None where the checkpoint names none, or has the release's default values, which keep every block (threshold 0,
      nz_ratio 1).

    Raises:
      ValueError: the policy is unknown, or its value is missing or out of range.
    """
    if hf.get(POLICY_KEY) is None:
        return _policy_of_release(hf)
    try:
        return policy_from_json(hf[POLICY_KEY])
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{POLICY_KEY} of config.json must describe a policy; got {hf[POLICY_KEY]!r}. {error} Otherwise "
            "remove the key."
        ) from error


def _policy_of_release(hf: Mapping[str, Any]) -> Policy | None:
    method = _get(hf, "sparsity_method", None)
    if method is None:
        return None
    methods = ("threshold", "nz_ratio", "token_budget")
    if method not in methods:
        raise ValueError(f"seerattn_sparsity_method must be one of {', '.join(methods)}; got {method!r}.")
    value = _get(hf, method, None)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"seerattn_sparsity_method {method!r} needs a number as {PREFIX}{method}; got {value!r}.")
    dense_last_rows = 2 if _typed(hf, "last_block_dense", True) else 0
    match method:
        case "threshold":
            return Threshold(float(value), dense_last_rows=dense_last_rows) if value != 0 else None
        case "nz_ratio":
            return TopK(float(value), dense_last_rows=dense_last_rows) if value != 1 else None
    return TokenBudget(int(value))


def policy_to_hf(policy: Policy, config: GateConfig) -> dict[str, Any]:
    """The keys that recommend a policy for a gate.

    They are the release's where those express the policy, and our own where they would not give it back as it is.

    Raises:
      ValueError: its scorer is not registered, see `policy_to_json`.
    """
    own = policy_to_json(policy)
    hf = {PREFIX + key: value for key, value in _release_keys(policy, config).items()}
    read = policy_from_hf(hf)
    return hf if read is not None and policy_to_json(read) == own else hf | {POLICY_KEY: own}


def _release_keys(policy: Policy, config: GateConfig) -> dict[str, Any]:
    """The release's keys for a policy, without their prefix; none where they cannot express it."""
    if (
        config.finer_than_release()
        or not isinstance(policy, RankingPolicy)
        or type(policy.scorer) is not LearnedGate
        or policy.dense_layers
        or policy.skip is not None
    ):
        return {}
    rows, dense_rows = {}, getattr(policy, "dense_last_rows", None)
    if isinstance(config, PrefillGateConfig) and dense_rows is not None:
        if dense_rows not in (0, 2):
            return {}
        rows["last_block_dense"] = dense_rows == 2
    match policy:
        case Threshold(threshold=threshold) if not np.ndim(threshold):
            return {"sparsity_method": "threshold", "threshold": float(threshold)} | rows
        case TopK(density=density):
            return {"sparsity_method": "nz_ratio", "nz_ratio": density} | rows
        case TokenBudget(tokens=tokens):
            return {"sparsity_method": "token_budget", "token_budget": tokens}
    return {}


def _get(hf: Mapping[str, Any], name: str, default: Any) -> Any:
    value = hf.get(PREFIX + name)
    return default if value is None else value


def _typed[V: (bool, int, str)](hf: Mapping[str, Any], name: str, default: V) -> V:
    """The value of a key, of the type of its default."""
    value = _get(hf, name, default)
    if isinstance(default, str) and not isinstance(value, str):
        raise ValueError(f"{PREFIX}{name} of config.json must be a text; got {value!r}.")
    return typed(PREFIX + name, value, type(default))
