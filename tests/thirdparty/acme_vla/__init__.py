"""What a third party's package may hold: one algorithm, one policy and one suite, and some that are broken."""

from dataclasses import dataclass

from vlarl_bench.algorithm import Algorithm
from vlarl_bench.policies.spec import PolicySpec
from vlarl_bench.protocol import Protocol
from vlarl_bench.suite import Suite, Task


@dataclass(frozen=True)
class Settings:
    strength: float = 1.0
    """How hard to push (unitless)."""


class AcmeRL(Algorithm):
    name = "acme-rl"
    summary = "needs what only the Acme policy has"
    requires = frozenset({"acme"})
    learns_from = "rollouts"
    Settings = Settings

    def __init__(self, settings, policy, budget, seed): ...

    def update(self, policy, data):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state): ...


class Abstract(Algorithm):
    name = "acme-abstract"


POLICY = PolicySpec("acme-policy", "a policy of Acme's", frozenset({"acme"}), "state", family="acme_vla.policy")


class AcmeSuite(Suite):
    name = "acme-suite"
    summary = "one task"
    benchmark = "acme"
    action_dim = 7
    proprio_dim = 8
    fps = 20
    film_camera = "front"
    tasks = (Task("acme-suite", "lift", "lift the anvil"),)

    def protocol(self, observation, name="tiny"):
        return Protocol("acme", 1, "state", {"acme-suite": 10}, 0, 1, train_states=(0,), eval_states=(1,))

    def open(self, task, protocol, video=False):
        raise NotImplementedError

    def demonstrate(self, simulator, task, init_state, seed):
        raise NotImplementedError
