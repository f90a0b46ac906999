"""How an evaluation is done, as one value with a hash: two scores compare only if their protocols are equal."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .errors import BenchError
from .registry import did_you_mean

Decoding = Literal["sampled", "zero-noise"]
"""How a policy decodes where it is judged: from noise that it draws, or from none: flows and diffusion from zero noise,
tokens each the likeliest."""


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
    """Initial states that training and demonstrations may use; none where a protocol only evaluates."""
    eval_states: tuple[int, ...]
    """Initial states that are evaluated on. Where training uses them too, as some papers do, `label` says so."""
    cameras: tuple[str, ...] = ()
    image_size: int = 0
    """Side in pixels of the square images that the policy is shown; 0 in `state` mode."""
    decoding: Decoding = "sampled"
    render_size: tuple[int, int] | None = None
    """Height and width that are rendered and then resized, with black borders where the shape differs; None renders
    at `image_size`."""
    mirrored: bool = False
    """Whether images are swapped left and right: what "rotated by 180 degrees" comes to, since LIBERO's renderer
    hands them out upside down."""
    resize: Literal["bilinear", "lanczos"] = "bilinear"
    msaa: bool = True
    """Whether edges are antialiased (4 samples a pixel), as the simulators do unless told otherwise."""
    shadows: bool = True

    @property
    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 of the canonical JSON.

        A field that came later counts only where it departs from its default, so that rows keep their hash.
        """
        fields = dataclasses.asdict(self)
        for field in dataclasses.fields(self):
            if field.name in _LATER and fields[field.name] == field.default:
                del fields[field.name]
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """Name, version and hash, as shown beside every number; says what keeps it from being a fair test."""
        remarks = [self.hash]
        if self.observation == "state":
            remarks.append("privileged state")
        if set(self.train_states) & set(self.eval_states):
            remarks.append("evaluates on training states")
        return f"{self.name}@{self.version} ({', '.join(remarks)})"


TUNING = "-tuning"
"""How the names of protocols for choosing settings end."""


def for_tuning(protocol: Protocol) -> Protocol:
    """The same protocol without its held-out states: settings are chosen on the last two fifths of the training states
    after learning from the first three."""
    cut = 3 * len(protocol.train_states) // 5
    return dataclasses.replace(
        protocol,
        name=f"{protocol.name}{TUNING}",
        train_states=protocol.train_states[:cut],
        eval_states=protocol.train_states[cut:],
    )


def check_choice(observation: str, name: str, published: Iterable[str], whose: str) -> None:
    """Raises BenchError unless there is such a protocol: `tiny` and `tuning` for both ways of observing, published ones
    for pixels."""
    if observation not in ("state", "pixels"):
        raise BenchError(f"observation: {observation!r}; {whose} has 'state' and 'pixels'")
    known = ["tiny", "tuning", *published]
    if name not in known:
        raise BenchError(f"protocol: {name!r} is not one of {whose}'s; {did_you_mean(name, known)}")
    if name not in ("tiny", "tuning") and observation == "state":
        raise BenchError(f"protocol: {name!r} shows camera images; a policy that sees object poses takes 'tiny'")


_LATER = ("render_size", "mirrored", "resize", "msaa", "shadows")
