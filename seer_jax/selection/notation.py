"""Policies as text, for command lines and tables, and as JSON, for files."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from seer_jax.selection.policies import Dense, Given, Policy
from seer_jax.selection.rules import RULES, RankingPolicy
from seer_jax.selection.scorers import SCORERS, LearnedGate, Scorer


def policy_syntax() -> str:
    """How a policy is written, with the rules and scorers that exist."""
    rules = "|".join(f"{name}:{rule.metavar}" for name, rule in RULES.items())
    settings = dict.fromkeys(name for rule in RULES.values() for name in _settings(rule))
    return f"dense|{rules}[:{'|'.join(SCORERS)}]" + "".join(f"[,{name}=N]" for name in settings)


def _settings(rule: type[RankingPolicy]) -> list[str]:
    """Fields of a rule that are written by name, where they differ from their default."""
    names = [field.name for field in reversed(dataclasses.fields(rule))]
    return [name for name in names if name not in (rule.value, "scorer")]


def parse_policy(text: str) -> Policy:
    """A sparsity policy as written on a command line.

    >>> parse_policy("threshold:5e-4")
    Threshold(threshold=0.0005, scorer=LearnedGate(), dense_last_rows=2, dense_layers=0)
    >>> parse_policy("budget:4096:oracle,dense_layers=2")
    TokenBudget(tokens=4096, scorer=Oracle(), dense_layers=2)

    Raises:
      ValueError: it is none.
    """
    rule, *settings = text.split(",")
    name, _, rest = rule.partition(":")
    value, _, scorer = rest.partition(":")
    try:
        if text == "dense":
            return Dense()
        policy = _parse_rule(name, value, _scorer(scorer or LearnedGate.name))
        return dataclasses.replace(policy, **_parse_settings(policy, settings))
    except ValueError as error:
        raise ValueError(f"A policy is written {policy_syntax()}; got {text!r} ({error}).") from error


def _scorer(name: str) -> Scorer:
    if name not in SCORERS:
        raise ValueError(f"no scorer {name!r}")
    return SCORERS[name]()


def _parse_rule(name: str, value: str, scorer: Scorer) -> RankingPolicy:
    if name not in RULES:
        raise ValueError("dense stands alone" if name == "dense" else f"no rule {name!r}")
    rule = RULES[name]
    whole = {field.name: field.type for field in dataclasses.fields(rule)}[rule.value] is int
    fields: dict[str, Any] = {rule.value: int(value) if whole else float(value), "scorer": scorer}
    return rule(**fields)


def _parse_settings(policy: RankingPolicy, words: list[str]) -> dict[str, Any]:
    """Fields that are written NAME=N, each once, and only those that the policy has."""
    settings: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in _settings(type(policy)):
            raise ValueError(f"no setting {name!r} of {type(policy).__name__}")
        if name in settings:
            raise ValueError(f"{name} twice")
        settings[name] = int(value)
    return settings


def write_policy(policy: Policy) -> str:
    """The inverse of `parse_policy`, for help texts and reports; values per layer and head are written as their shape.

    >>> write_policy(parse_policy("topk:0.1:random,dense_layers=2"))
    'topk:0.1:random,dense_layers=2'
    """
    if not isinstance(policy, RankingPolicy):
        return type(policy).__name__.lower()
    suffix = "" if isinstance(policy.scorer, LearnedGate) else f":{policy.scorer.name}"
    defaults = {field.name: field.default for field in dataclasses.fields(policy)}
    for name in _settings(type(policy)):
        if getattr(policy, name) != defaults[name]:
            suffix += f",{name}={getattr(policy, name)}"
    value = getattr(policy, policy.value)
    written = f"[{' x '.join(map(str, jnp.shape(value)))}]" if jnp.ndim(value) else value
    return f"{policy.name}:{written}{suffix}"


def policy_to_json(policy: Policy) -> dict[str, Any]:
    """A policy as JSON holds it; the inverse of `policy_from_json`. Arrays become nested lists of their exact values.

    Raises:
      ValueError: the policy or its scorer has no name that leads back to its class.
    """
    kind = _KINDS_BY_TYPE.get(type(policy))
    if kind is None:
        raise ValueError(f"A policy must be one of {', '.join(_KINDS)} to be saved; got {policy!r}.")
    fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    scorer = fields.pop("scorer", None)
    values = {name: np.asarray(value).tolist() for name, value in fields.items()}
    if scorer is not None:
        if SCORERS.get(scorer.name) is not type(scorer):
            raise ValueError(
                f"A policy can be saved only with a registered scorer; got {scorer!r}. "
                "Register its class (seer_jax.selection.scorers.register)."
            )
        values["scorer"] = {"name": scorer.name, **dataclasses.asdict(scorer)}
    return {"rule": kind, **values}


def policy_from_json(values: Mapping[str, Any]) -> Policy:
    """The policy that `policy_to_json` wrote.

    Raises:
      ValueError: a rule, scorer or setting is unknown, or a value is out of its domain.
    """
    given = dict(values)
    kind = _KINDS.get(given.pop("rule", ""))
    if kind is None:
        raise ValueError(f"A saved policy must name a rule out of {', '.join(_KINDS)}; got {values!r}.")
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(given) - known):
        raise ValueError(
            f"A saved {kind.__name__} must have the fields {', '.join(sorted(known))}; got {', '.join(unknown)}."
        )
    if empty := [name for name, value in given.items() if value is None]:
        raise ValueError(f"A saved {kind.__name__} must have a value for {', '.join(empty)}; got null.")
    if "scorer" in given:
        scorer = dict(given["scorer"])
        name = scorer.pop("name", None)
        if name not in SCORERS:
            raise ValueError(f"A saved policy must name a scorer out of {', '.join(SCORERS)}; got {name!r}.")
        given["scorer"] = SCORERS[name](**scorer)
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = np.asarray(value, bool if kind is Given else np.float32)
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(
            f"A saved {kind.__name__} must hold what its fields take; got {values!r} ({error})."
        ) from error


_KINDS: dict[str, Any] = {"dense": Dense, "given": Given, **RULES}
_KINDS_BY_TYPE = {kind: name for name, kind in _KINDS.items()}
