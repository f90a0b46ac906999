"""A scripted expert for LIBERO's tasks. It sees the simulator's true poses; only its actions are kept.

The expert is a generator of actions: a skill yields one clean action, the episode loop executes it (with a little
noise, so that the demonstrations also cover recovery), and the skill looks at the new state to choose the next one.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlarl_bench.errors import BenchError
from vlarl_bench.suite import Demonstration, Observation, Task

from .joints import RANGES, actuate, find_part, joint_of
from .motion import Actions
from .skills import ATTEMPTS, HAND_ROOM, Skills

if TYPE_CHECKING:
    from .simulator import LiberoSimulator

NOISE = 0.05
"""Std of the executed noise on the translation actions. More of it makes grasps miss: they need 6 mm."""
ROTATION_NOISE = 0.3 * NOISE
NOISE_RENEWAL = 0.1
"""Chance a step that a new noise is drawn; in between it stays, since white noise would average out."""

SPACING = 0.09
"""m between the middles of things that share a surface."""

Goal = tuple[str, ...]
"""A predicate in lower case and what it is about: ("in", thing, region)."""


def demonstrate(simulator: "LiberoSimulator", task: Task, init_state: int, seed: int) -> Demonstration:
    """One expert episode, at most the protocol's horizon long, from a stored initial state.

    The labels are the expert's clean actions; what is executed is the clean action plus correlated noise. The result
    is a pure function of the arguments. In `pixels` mode, where looking costs far more than stepping, the observations
    are made in a second pass that repeats the executed actions, and only when the episode succeeded.

    Raises BenchError when the task needs a skill that the expert lacks.
    """
    rng = np.random.default_rng([seed, init_state, zlib.crc32(task.key.encode())])
    simulator.show_surfaces()  # grasps are planned on visual meshes
    simulator.reset(init_state)
    horizon = simulator.protocol.horizon[task.suite]
    labels: list[np.ndarray] = []
    done: list[np.ndarray] = []
    observations: list[Observation] = []
    look_later = simulator.protocol.observation == "pixels"
    success = False
    noise = np.zeros(6)
    scale = np.repeat([NOISE, ROTATION_NOISE], 3)
    for action in Expert(simulator, task, rng).actions():
        if rng.random() < NOISE_RENEWAL:
            noise = rng.normal(size=6) * scale
        label = action.astype(np.float32)
        executed = label.copy()
        executed[:6] = np.clip(executed[:6] + noise, -1, 1)
        labels.append(label)
        done.append(executed)
        if not look_later:
            observations.append(simulator.observe())
        success = simulator.step(executed[None]).success
        if success or len(labels) == horizon:
            break
    if success and look_later:
        simulator.reset(init_state)
        for executed in done:
            observations.append(simulator.observe())
            simulator.step(executed[None])
    return Demonstration(task, init_state, success, tuple(observations), np.array(labels, np.float32).reshape(-1, 7))


class Expert:
    """Works off the goal of one task, predicate by predicate."""

    def __init__(self, simulator: "LiberoSimulator", task: Task, rng: np.random.Generator) -> None:
        self.simulator = simulator
        self.task = task
        self.skills = Skills(simulator, rng)
        self.goals = plan(simulator)

    def actions(self) -> Actions:
        """Yields clean [7] actions until the goals hold or every attempt is used up."""
        for goal in self.goals:
            yield from self._make_room(goal)
            for attempt in range(ATTEMPTS):
                if self.holds(goal):
                    break
                yield from self.achieve(goal, attempt)
        yield from self.skills.arm.hold(20)  # Objects may still be falling into place.

    def holds(self, goal: Goal) -> bool:
        """Whether LIBERO's predicate is true now."""
        return bool(self.simulator.env._eval_predicate(list(goal)))

    def achieve(self, goal: Goal, attempt: int) -> Actions:
        """One attempt at one predicate, the first being 0."""
        predicate, *names = goal
        if predicate in RANGES:
            part = find_part(self.simulator, self.skills.scene, predicate, names[0])
            yield from actuate(self.skills.arm, part, predicate, lambda: self.holds(goal))
        elif predicate == "on" and "push" in self.task.instruction.lower().split():
            yield from self.skills.push(names[0], names[1], clear=attempt > 0)
        elif predicate in ("on", "in"):
            yield from self.skills.pick_and_place(names[0], names[1], self._aside(goal))
        else:
            known = ", ".join(["on", "in", *RANGES])
            raise BenchError(f"task: {self.task.key!r} needs the skill {predicate!r}; the expert knows {known}")

    def _make_room(self, goal: Goal) -> Actions:
        """Before a drawer is opened: moves what must go into it so far away that the hand can still get at it."""
        if goal[0] != "open" or self.holds(goal):
            return
        part = find_part(self.simulator, self.skills.scene, *goal)
        if part.slides:
            for other in self.goals:
                if other[0] == "in" and joint_of(self.simulator, other[2]) == joint_of(self.simulator, goal[1]):
                    yield from self.skills.keep_away(other[1], part.swept, HAND_ROOM)

    def _aside(self, goal: Goal) -> float:
        """Where (m along x) a thing goes on a surface that several must share: side by side, the far one first."""
        sharing = [other for other in self.goals if other[0] == goal[0] == "on" and other[2] == goal[2]]
        return SPACING * ((len(sharing) - 1) / 2 - sharing.index(goal)) if goal in sharing else 0.0


def plan(simulator: "LiberoSimulator") -> list[Goal]:
    """The task's goals in an order that works, with containers opened first that something must go in."""
    goals = [(predicate.lower(), *names) for predicate, *names in simulator.env.parsed_problem["goal_state"]]
    doors = {}
    for predicate, *names in goals:
        if predicate == "in" and joint_of(simulator, names[1]) is not None:
            doors[names[1]] = _door(simulator, names[1])
    return in_order(goals, doors)


def _door(simulator: "LiberoSimulator", region: str) -> str:
    """What has to be open so that something can go into a region: a drawer is the region itself."""
    site = simulator.env.object_sites_dict[region]
    return region if getattr(site, "joints", None) else str(site.parent_name)


def in_order(goals: Sequence[Goal], doors: Mapping[str, str]) -> list[Goal]:
    """Goals ordered so that none undoes or blocks another; else the task's own order is kept.

    What a thing goes into is opened before and closed after; what carries something is put in its place first.
    `doors` names, for each region behind a door or in a drawer, what must be open; opening it becomes a goal.
    """
    waiting = list(goals)
    for _, *names in goals:
        if names[-1] in doors and ("open", doors[names[-1]]) not in waiting:
            waiting.insert(0, ("open", doors[names[-1]]))
    ordered: list[Goal] = []
    while waiting:
        free = (goal for goal in waiting if not any(_before(other, goal, doors) for other in waiting))
        goal = next(free, waiting[0])  # Goals that wait for each other in a circle: any order is as good.
        waiting.remove(goal)
        ordered.append(goal)
    return ordered


def _before(first: Goal, second: Goal, doors: Mapping[str, str]) -> bool:
    """Whether `first` has to be done before `second`."""
    if first[0] == "open" and second[0] == "in":
        return doors.get(second[2]) == first[1]
    if first[0] == "in" and second[0] == "close":
        return doors.get(first[2]) == second[1]
    return len(first) == len(second) == 3 and second[2] == first[1]
