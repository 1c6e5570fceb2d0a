"""The policy that a gate is best used with."""

import json

from seer_jax.selection.interfaces import LayerGate
from seer_jax.selection.notation import policy_from_json, policy_to_json
from seer_jax.selection.policies import Policy


class Recommending(LayerGate):
    """Base of the gates: gives them the attribute `recommended`.

    It is kept as text: a module's static parts must be comparable, and thresholds per layer and head are arrays.
    """

    _recommended: str | None = None

    @property
    def recommended(self) -> Policy | None:
        """The policy to use the gate with; None where nothing is recommended."""
        return None if self._recommended is None else policy_from_json(json.loads(self._recommended))

    @recommended.setter
    def recommended(self, policy: Policy | None) -> None:
        if policy is not None:
            self._recommended = json.dumps(policy_to_json(policy))
        elif self._recommended is not None:
            del self._recommended  # so that the gate equals one that never recommended anything
