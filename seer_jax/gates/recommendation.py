"""What a gate tells of itself beside its weights: the policy that it is best used with, and what it was distilled on."""

import json
from typing import ClassVar

from seer_jax.models.config import ModelConfig
from seer_jax.selection.interfaces import LayerGate
from seer_jax.selection.notation import policy_from_json, policy_to_json
from seer_jax.selection.policies import Policy, check_policy


class Recommending(LayerGate):
    """Base of the gates: gives them the attributes `recommended` and `distilled_on`.

    The policy is kept as text: a module's static parts must be comparable, and thresholds per layer and head are arrays.

    Attributes:
      distilled_on: what the gate learned to predict of each block, "max" or "mass" (`TargetStatistic`); None: it is not known.
    """

    _recommended: str | None = None
    distilled_on: str | None = None
    model: ModelConfig
    phase: ClassVar[str]  # "prefill" or "decode"

    @property
    def num_lists(self) -> int:
        """Lists of blocks in each row, for which policies may hold values: H while prompts are read, K while tokens are decoded."""
        raise NotImplementedError

    @property
    def recommended(self) -> Policy | None:
        """The policy to use the gate with; None where nothing is recommended.

        Raises:
          ValueError: when it is set to what is no policy, or does not fit the gate's model.
        """
        return None if self._recommended is None else policy_from_json(json.loads(self._recommended))

    @recommended.setter
    def recommended(self, policy: Policy | None) -> None:
        if policy is not None:
            check_policy("recommended", policy)
            policy.check(self.model.num_layers, self, self.phase)
            policy.stacked(self.model.num_layers, self.num_lists)
            self._recommended = json.dumps(policy_to_json(policy))
        elif self._recommended is not None:
            del self._recommended  # so that the gate equals one that never recommended anything
