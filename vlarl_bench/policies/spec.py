"""What the registry knows of a policy before it is built. Light: `list` imports this; torch comes with a policy."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from ..errors import BenchError

if TYPE_CHECKING:
    from ..suite import Embodiment
    from .base import NoisePolicy, Policy

PRIORS = Path(__file__).parent / "priors"
"""The shipped weights, `<policy>/<benchmark>/`."""


@dataclass(frozen=True)
class PolicySpec:
    """What the registry knows of a policy before it is built."""

    name: str
    summary: str
    capabilities: frozenset[str]
    observation: str
    """`state` or `pixels`: what a protocol must show it."""
    cameras: tuple[str, ...] = ()
    """Those it cannot do without; a tiny policy is made for whatever cameras its protocol has."""
    image_size: int = 0
    """Side of the square images (pixels); 0 in `state` mode."""
    published: ClassVar[bool] = False
    """Whether it exists at its published size only: no random weights, no prior that ships, `--base` is a folder."""
    source: str = ""
    """What that folder is, in a few words."""
    resizes: bool = False
    """Whether it brings images of any size to its own."""
    family: str = "vlarl_bench.policies.pi0"
    """Module with `create(spec, embodiment, vocabulary, seed)` and `restore(config)`, which may raise whatever
    a wrong configuration makes it raise."""

    def prior_folder(self, benchmark: str) -> Path | None:
        """Where the weights lie from which fine-tuning on suites of `benchmark` starts; None if none are shipped."""
        folder = PRIORS / self.name / benchmark
        return folder if folder.is_dir() else None

    def create(self, embodiment: Embodiment, vocabulary: Sequence[str], seed: int = 0) -> Policy:
        """Random weights. `vocabulary`: the instructions and object names (any texts) whose words it will know."""
        policy: Policy = importlib.import_module(self.family).create(self, embodiment, vocabulary, seed)
        return policy

    def load(self, folder: Path | str) -> Policy:
        """The policy stored in `folder`. Raises BenchError if it is damaged, or another policy's."""
        from .steering import steer
        from .store import load_weights, read_policy

        config, tensors = read_policy(folder)
        if config.get("policy") != self.name:
            raise BenchError(f"policy: {folder} holds {config.get('policy')!r}, not {self.name!r}")
        policy = self.restore(config)
        if "steering" in config:
            steer(cast("NoisePolicy", policy), config["steering"])
        load_weights(policy, tensors, folder)
        return policy

    def restore(self, config: Mapping[str, Any]) -> Policy:
        """The policy that `config`, as in config.json, describes; its weights are still to be loaded.

        Raises BenchError if the configuration is not one of this family."""
        try:
            # JSON has no tuples.
            sizes = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in config["architecture"].items()
            }
            policy: Policy = importlib.import_module(self.family).restore({**config, "architecture": sizes})
        except BenchError:
            raise
        except Exception as error:  # a broken tokenizer raises just that
            raise BenchError(f"config.json: {error!r:.200} does not describe {self.name}") from None
        return policy


@dataclass(frozen=True)
class PublishedSpec(PolicySpec):
    """A policy at its published size, from a folder as its authors publish it or as this project stores it."""

    published: ClassVar[bool] = True
    checkpoint: str = ""
    """Module with `load_published(folder, name, unnorm_key)`; empty where a folder must be converted first."""

    def create(self, embodiment: Embodiment, vocabulary: Sequence[str], seed: int = 0) -> Policy:
        """Raises BenchError: billions of random numbers are no policy."""
        raise BenchError(f"base: 'scratch'; {self.name} starts from a published folder, pass its path: {self.source}")

    def load(self, folder: Path | str, unnorm_key: str | None = None) -> Policy:
        """The policy stored in `folder`; `unnorm_key` picks the training data whose action scales it uses.

        At this size gradients recompute what they need instead of keeping it.
        """
        if (Path(folder) / "hashes.json").exists():
            if unnorm_key is not None:
                raise BenchError(f"unnorm_key: {unnorm_key!r}; {folder} has its scales already, leave it out")
            policy = super().load(folder)
        elif not self.checkpoint:
            raise BenchError(f"base: {folder} has no hashes.json; {self.name} takes {self.source}")
        else:
            policy = importlib.import_module(self.checkpoint).load_published(folder, self.name, unnorm_key)
        policy.checkpointed = True
        return policy
