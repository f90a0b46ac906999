"""How an evaluation is done, as one value with a hash: two scores compare only if their protocols are equal."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Protocol:
    """Everything that decides what a success rate means, apart from the policy and the seed."""

    name: str
    version: int
    observation: Literal["state", "pixels"]
    """`state` shows the policy object poses that a real robot would not have (privileged); `pixels` shows cameras."""
    horizon: dict[str, int]
    """Longest episode in environment steps, settle steps not counted, per suite."""
    settle_steps: int
    """No-op steps after an initial state is set, before the policy looks for the first time."""
    execute: int
    """Environment steps of each action chunk that are executed before the policy looks again."""
    train_states: tuple[int, ...]
    """Initial states that training and demonstrations may use."""
    eval_states: tuple[int, ...]
    """Initial states kept for evaluation; training never sees them."""
    cameras: tuple[str, ...] = ()
    image_size: int = 0
    """Side of the square images in pixels; 0 in `state` mode."""
    decoding: Literal["sampled", "zero-noise"] = "sampled"

    @property
    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 of the canonical JSON."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """Name, version and hash, as shown beside every number; says `privileged state` where that is so."""
        privileged = ", privileged state" if self.observation == "state" else ""
        return f"{self.name}@{self.version} ({self.hash}{privileged})"
