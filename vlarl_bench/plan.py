"""What a run will do: its parts, resolved by name and checked against each other before anything heavy starts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import registry
from .config import EvalConfig, RunConfig, select_tasks
from .errors import BenchError
from .files import read_json
from .provenance import code_version, fingerprint_hash
from .records import EpisodeRow, Key, Phase
from .rollout import Episode, Job, episode_seed

if TYPE_CHECKING:
    from .policies.base import Policy
    from .policies.spec import PolicySpec
    from .protocol import Decoding, Protocol
    from .suite import Suite, Task


Spent = dict[str, int]
"""What training has cost, by the names that rows give it."""
NOTHING: Spent = {"env_steps": 0, "gradient_steps": 0, "flops": 0}


@dataclass(frozen=True)
class Plan:
    """A run's parts, resolved and checked, before anything heavy starts."""

    config: RunConfig | EvalConfig
    algorithm: str
    """Name that the rows carry."""
    suite: Suite
    spec: PolicySpec
    protocol: Protocol
    tasks: tuple[Task, ...]
    base: Path | None
    """Policy folder to start from; None for random weights."""
    states: int
    """Held-out initial states per task."""
    repeats: int
    """Episodes per task and held-out initial state."""
    noiseless: bool
    """Whether evaluations play each state once more without noise. A method may gain by drawing less noise alone, which
    that tells from learning."""

    @property
    def decodings(self) -> tuple[Decoding, ...]:
        """How evaluations decode, in turn."""
        return (self.protocol.decoding, *(("zero-noise",) if self.noiseless else ()))

    @property
    def name(self) -> str:
        """Run id: the name of its folder."""
        return Path(self.config.out).resolve().name

    def load_base(self) -> Policy:
        """The base policy. Raises BenchError if it does not fit the suite's robot or the protocol's chunks."""
        assert self.base is not None
        key = {"unnorm_key": self.config.unnorm_key} if self.config.unnorm_key else {}
        policy = self.spec.load(self.base, **key)
        if isinstance(self.config, RunConfig):
            lacks = registry.get("algorithm", self.algorithm).requires - policy.capabilities
            if lacks:
                raise BenchError(
                    f"base: the policy in {self.base} has no {', '.join(sorted(lacks))}, which {self.algorithm!r} needs"
                )
        if policy.action_dim != self.suite.action_dim:
            raise BenchError(
                f"base: the policy in {self.base} gives {policy.action_dim} numbers an action, but a robot of "
                f"{self.suite.name!r} takes {self.suite.action_dim}; train another with --algo sft --base scratch"
            )
        if policy.chunk < self.protocol.execute:
            raise BenchError(
                f"base: the policy in {self.base} plans {policy.chunk} actions, but protocol {self.protocol.label} "
                f"executes {self.protocol.execute} before it looks again"
            )
        unseen = [camera for camera in policy.cameras if camera not in self.protocol.cameras]
        if unseen:
            shown = ", ".join(self.protocol.cameras) or "no camera"
            raise BenchError(
                f"base: the policy in {self.base} looks at {', '.join(policy.cameras)}, "
                f"but protocol {self.protocol.label} shows {shown}"
            )
        return policy

    def learned_from(self) -> list[int]:
        """Initial states that the base policy was trained on, as its card says; none where it does not."""
        if self.base is None or not _ours(self.base):
            return []
        found = _listed(self.base, "train_states")
        if not all(type(state) is int for state in found):
            raise BenchError(f"base: {self.base / 'config.json'}: train_states is {found!r}; it must list numbers")
        return found

    def learned_tasks(self) -> list[str]:
        """Keys of all tasks that the base policy was trained on, also before it was last fine-tuned."""
        if self.base is None or not _ours(self.base):
            return []
        found = _listed(self.base, "learned_tasks") or _listed(self.base, "tasks")  # older cards have the last alone
        if not all(isinstance(key, str) for key in found):
            raise BenchError(f"base: {self.base / 'config.json'}: the tasks are {found!r}; it must list names")
        return found

    @property
    def trained(self) -> dict[str, Any] | None:
        """Of a base policy that a run fine-tuned: the `base_checkpoint` that this began with, its `seed`, and its
        `settings`, flat; None for one that came from random weights, or of which nothing is known."""
        return None if self.base is None else trained_from(self.base)

    def check_held_out(self) -> None:
        """Raises BenchError where the base policy learned from states that the protocol says it holds out."""
        if self.config.protocol == "tuning":
            return  # it chooses settings among states that training may use, and claims nothing
        both = set(self.protocol.eval_states[: self.states]) & set(self.learned_from())
        if not both or set(self.protocol.train_states) & set(self.protocol.eval_states):
            return  # where a protocol judges on what it trains on its label says so
        assert self.base is not None
        trained = self.learned_tasks()
        if known := [task.key for task in self.tasks if task.key in trained]:
            raise BenchError(
                f"protocol: {self.protocol.label} holds out initial states that the policy in {self.base} learned from "
                f"({len(both)} of {self.states}, such as {min(both)} of {known[0]}); take the protocol of its training"
            )

    def eval_jobs(self, decoding: Decoding) -> list[Job]:
        """The held-out episodes; the same before and after. Of those besides the protocol's there are no repeats."""
        return [
            Job(task, state, repeat, episode_seed(self.config.seed, "eval", task.key, state, repeat))
            for repeat in range(self.repeats if decoding == self.protocol.decoding else 1)
            for task in self.tasks
            for state in self.protocol.eval_states[: self.states]
        ]

    def train_jobs(self, iteration: int, episodes: int, weights: np.ndarray | None = None, group: int = 1) -> list[Job]:
        """One round's episodes: tasks in turn, from where the round before stopped, or drawn by `weights`; each over a
        fresh shuffle of the training states, `group` episodes a state. Where `episodes` is no multiple of that, the
        last group is smaller."""
        rng = np.random.default_rng(episode_seed(self.config.seed, "train", iteration))
        order = {task: rng.permutation(self.protocol.train_states) for task in self.tasks}
        groups = -(-episodes // group)
        if weights is None:
            picks = [((iteration - 1) * groups + i) % len(self.tasks) for i in range(groups)]
        else:
            picks = rng.choice(len(self.tasks), size=groups, p=weights).tolist()
        jobs: list[Job] = []
        for i, pick in enumerate(picks):
            task, turn = self.tasks[pick], picks[:i].count(pick)
            state, first = int(order[task][turn % len(order[task])]), turn // len(order[task]) * group
            for repeat in range(first, first + group):
                seed = episode_seed(self.config.seed, "train", iteration, task.key, state, repeat)
                jobs.append(Job(task, state, repeat, seed))
        return jobs[:episodes]

    def key(self, phase: Phase, iteration: int, job: Job, decoding: Decoding) -> Key:
        """Of the row that this episode gets."""
        return (self.name, phase, iteration, job.task.suite, job.task.name, job.init_state, job.repeat, decoding)

    def row(
        self,
        episode: Episode,
        phase: Phase,
        iteration: int,
        checkpoint: str,
        decoding: Decoding | Literal["explore"],
        spent: Spent,
    ) -> EpisodeRow:
        """What is kept of an episode that the policy with hash `checkpoint` played."""
        job = episode.job
        return EpisodeRow(
            run=self.name,
            phase=phase,
            iteration=iteration,
            algorithm=self.algorithm,
            policy=self.config.policy,
            checkpoint=checkpoint,
            suite=job.task.suite,
            task=job.task.name,
            init_state=job.init_state,
            repeat=job.repeat,
            seed=job.seed,
            decoding=decoding,
            observation=self.protocol.observation,
            success=episode.success,
            steps=episode.steps,
            return_=float(episode.success),
            protocol=self.protocol.hash,
            fingerprint=fingerprint_hash(),
            code=code_version(),
            **spent,
        )


def plan_run(config: RunConfig) -> Plan:
    """Finds every part by name and checks that they fit.

    Raises:
        BenchError: naming what does not.
    """
    registry.check_compatible(config.algorithm, config.policy)
    suite, spec = registry.get("suite", config.suite), registry.get("policy", config.policy)
    protocol = suite.protocol(spec.observation, config.protocol)
    config.budget.check_protocol(protocol)
    _check_images(config, spec, protocol)
    if not protocol.train_states:
        raise BenchError(f"protocol: {protocol.label} has no states to train on; it only serves `vlarl-bench eval`")
    base = _base_folder(config, spec, suite)
    learns_from = registry.get("algorithm", config.algorithm).learns_from
    if base is None and learns_from == "rollouts":
        raise BenchError(f"base: 'scratch'; {config.algorithm!r} learns from its own episodes and needs a prior")
    if config.rewards != "success" and learns_from == "demonstrations":
        raise BenchError(f"rewards: {config.rewards!r}; {config.algorithm!r} learns from demonstrations, leave it out")
    count = min(config.budget.tasks, len(suite.tasks))  # ALOHA has two, and is tried with any budget all the same
    if config.tasks or base is None or not _ours(base):
        tasks = select_tasks(suite, config.tasks, count)
    else:
        known = set(_listed(base, "tasks"))
        tasks = tuple(task for task in suite.tasks if task.key in known)
        if 0 < len(tasks) < count:
            raise BenchError(
                f"budget.tasks: {config.budget.tasks}; the base policy in {base} was trained on {len(tasks)} tasks of "
                f"{suite.name!r}; ask for at most that many, or name tasks with --tasks"
            )
        tasks = tasks[:count]
        if not tasks:
            raise BenchError(
                f"suite: the base policy in {base} was trained on no task of {suite.name!r}; "
                "train another with --algo sft, or name tasks with --tasks to try anyway"
            )
    states, repeats = config.budget.eval_states, _repeats(config.budget.eval_repeats, protocol)
    noiseless = protocol.decoding == "sampled"
    plan = Plan(config, config.algorithm, suite, spec, protocol, tasks, base, states, repeats, noiseless)
    plan.check_held_out()
    return plan


def plan_evaluation(config: EvalConfig) -> Plan:
    """As `plan_run`, for an evaluation alone; rows carry the algorithm that made the policy."""
    suite, spec = registry.get("suite", config.suite), registry.get("policy", config.policy)
    protocol = suite.protocol(spec.observation, config.protocol)
    if config.decoding != "protocol":
        protocol = dataclasses.replace(protocol, decoding=config.decoding)
    config.check_protocol(protocol)
    _check_images(config, spec, protocol)
    base = _base_folder(config, spec, suite)
    if base is None:
        raise BenchError("base: 'scratch'; a policy with random weights has no vocabulary and nothing to evaluate")
    algorithm = str(read_json(base / "config.json").get("algorithm", "base"))
    tasks = select_tasks(suite, config.tasks, len(suite.tasks))
    repeats = _repeats(config.repeats, protocol)
    plan = Plan(config, algorithm, suite, spec, protocol, tasks, base, config.states, repeats, noiseless=False)
    plan.check_held_out()
    return plan


def _repeats(asked: int, protocol: Protocol) -> int:
    """Repeats that differ: one where nothing is drawn."""
    return asked if protocol.decoding == "sampled" else 1


def _check_images(config: RunConfig | EvalConfig, spec: PolicySpec, protocol: Protocol) -> None:
    missing = [camera for camera in spec.cameras if camera not in protocol.cameras]
    if missing or (spec.image_size != protocol.image_size and not spec.resizes):
        wanted = f"{', '.join(spec.cameras) or 'images'} at {spec.image_size} x {spec.image_size}"
        shown = f"{', '.join(protocol.cameras) or 'images'} at {protocol.image_size} x {protocol.image_size}"
        raise BenchError(f"policy: {config.policy!r} looks at {wanted}, but protocol {protocol.label} shows {shown}")


def _base_folder(config: RunConfig | EvalConfig, spec: PolicySpec, suite: Suite) -> Path | None:
    if config.base == "scratch" and not spec.published:
        _check_unnorm_key(config, spec, None)
        return None
    if spec.published and config.base in ("prior", "scratch"):
        raise BenchError(f"base: {config.base!r}; {config.policy!r} needs --base FOLDER: {spec.source}")
    folder: Path | None = spec.prior_folder(suite.benchmark) if config.base == "prior" else Path(config.base)
    if folder is None or not (folder / "config.json").is_file():
        none = f"{config.policy!r} ships no prior for {suite.benchmark}"
        missing = none if config.base == "prior" else "there is no policy"
        if spec.published:
            raise BenchError(f"base: {config.base!r}; there is no config.json; {config.policy!r} takes {spec.source}")
        raise BenchError(
            f"base: {config.base!r}; {missing}; train one with `vlarl-bench run --algo sft --base scratch "
            f"--policy {config.policy} --suite {config.suite}` and pass its `policy` folder"
        )
    if not _ours(folder) and (folder / "policy").is_dir():
        raise BenchError(f"base: {folder} is a run folder; pass {folder / 'policy'}")
    if not isinstance(read_json(folder / "config.json"), dict):
        raise BenchError(f"base: {folder / 'config.json'} does not describe a policy")
    _check_unnorm_key(config, spec, folder)
    return folder


def _listed(base: Path, field: str) -> list[Any]:
    """A list of the card in a policy folder; empty where it has none."""
    found = read_json(base / "config.json").get(field, [])
    if not isinstance(found, list):
        raise BenchError(f"base: {base / 'config.json'}: {field} is {found!r}; it must be a list")
    return found


def trained_from(folder: Path) -> dict[str, Any] | None:
    """What the card of a policy folder says of how it was fine-tuned (`Plan.trained`)."""
    found = read_json(folder / "config.json").get("trained") if _ours(folder) else None
    if found is None:
        return None
    kinds = {"base_checkpoint": str, "seed": int, "settings": dict}
    if not isinstance(found, dict) or any(type(found.get(name)) is not kind for name, kind in kinds.items()):
        raise BenchError(f"base: {folder / 'config.json'}: trained must have {', '.join(kinds)}, as a run writes them")
    return None if found["base_checkpoint"] == "scratch" else found


def _ours(folder: Path) -> bool:
    """Whether this project wrote the policy folder: only then are there hashes, and a list of tasks."""
    return (folder / "hashes.json").exists()


def _check_unnorm_key(config: RunConfig | EvalConfig, spec: PolicySpec, folder: Path | None) -> None:
    if config.unnorm_key and not (spec.published and folder is not None and not _ours(folder)):
        raise BenchError(f"unnorm_key: {config.unnorm_key!r}; only a published folder has scales to choose from")
