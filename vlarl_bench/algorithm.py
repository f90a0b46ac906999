"""The algorithm seam. An algorithm sees a policy and data; it never opens an environment or a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch

    from .config import Budget
    from .policies.base import Policy, Sample


class Algorithm(ABC):
    """One fine-tuning method: settings, how it acts while collecting, and how it updates."""

    name: ClassVar[str]
    summary: ClassVar[str]
    requires: ClassVar[frozenset[str]]
    """Policy capabilities without which the method is undefined."""
    learns_from: ClassVar[Literal["rollouts", "demonstrations"]]
    Settings: ClassVar[type]
    """Frozen dataclass; each field has a default and a docstring with unit and source."""
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({})
    """Values of settings that `vlarl-bench tune` tries, the defaults among them. What learns from rollouts has some."""
    group: int = 1
    """Episodes that are collected from each initial state that is drawn, all from the very same one; methods that
    compare an episode with its siblings set more than 1."""

    @abstractmethod
    def __init__(self, settings: Any, policy: Policy, budget: Budget, seed: int) -> None:
        """Prepares critics and optimisers for `policy`; `budget` says how long the run will be, for schedules."""

    def act(self, policy: Policy, context: Any, generators: Sequence[torch.Generator] | None) -> Sample:
        """How actions are chosen while collecting; the policy's own sampling unless the method explores."""
        return policy.sample(context, generators)

    def task_weights(self, tasks: Sequence[str]) -> np.ndarray | None:
        """How often each task (its key) is to be collected from next, summing to 1; None takes them in turn."""
        return None

    @abstractmethod
    def update(self, policy: Policy, data: Any) -> dict[str, float]:
        """Trains on one `Rollout` (or on all `Demonstration`s) and returns metrics to log."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything besides the policy's weights that the next update depends on: tensors, numbers, nested dicts."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


_counted = True


@contextmanager
def uncounted() -> Iterator[None]:
    """For what an update only reports and could do without: what it costs is not the method's."""
    global _counted
    before, _counted = _counted, False
    try:
        yield
    finally:
        _counted = before


def counted() -> bool:
    """Whether what is done now is part of what a method costs."""
    return _counted
