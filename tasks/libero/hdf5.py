"""LIBERO's own demonstrations: `<task>_demo.hdf5`, as its scripts/create_dataset.py writes them.

    data                      attributes: bddl_file_name, problem_info, env_args, ...
    data/demo_0/actions       [T, 7] float64
    data/demo_0/states        [T, 1 + nq + nv] float64: time, qpos, qvel before each action
    data/demo_0/obs/ee_pos    [T, 3] and ee_ori, gripper_states, agentview_rgb [T, 128, 128, 3], eye_in_hand_rgb, ...
    data/demo_0               attribute model_file: the scene as MJCF, with where that episode's fixtures stood

What `obs` holds was seen after the action of its row, not before, in one image size, and without object poses. So the
observations are made again from `states`, by the simulator that also evaluates, with the episode's fixtures in place;
`obs/ee_pos` then shows whether it is the same scene.
"""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np

from vlarl_bench.errors import BenchError
from vlarl_bench.protocol import Protocol
from vlarl_bench.suite import Demonstration, Task

from .simulator import LiberoSimulator

NEAR = 0.01
"""How far the hand may be (m) from where the file says: stock LIBERO reports it a physics step late, 4 mm at most at
the arm's highest speed."""


def read(folder: Path, task: Task, protocol: Protocol, limit: int | None) -> list[Demonstration]:
    """The first `limit` demonstrations of `task`. Raises BenchError that names the file and what is wrong in it."""
    import h5py

    path = folder / f"{task.name}_demo.hdf5"
    if not path.is_file():
        raise BenchError(f"{path}: missing; LIBERO calls the demonstrations of {task.key} so")
    try:
        with h5py.File(path, "r") as file:
            data = file["data"]
            problem = Path(str(data.attrs["bddl_file_name"])).stem  # its instruction is worded in another way
            if problem != task.name:
                raise BenchError(f"{path}: data.bddl_file_name: {problem!r}; wanted: {task.name!r}")
            names = sorted((name for name in data if name.startswith("demo_")), key=lambda name: int(name[5:]))
            episodes = {name: _episode(path, data[name], name) for name in names[:limit]}
    except (OSError, KeyError, ValueError, TypeError, ElementTree.ParseError) as error:
        reason = str(error).splitlines()[0].strip("\"'")
        raise BenchError(f"{path}: not a file of LIBERO demonstrations, or damaged ({reason})") from error
    if not episodes:
        return []
    simulator = LiberoSimulator(task, protocol, render=protocol.observation == "pixels")
    try:
        return [_replay(path, name, simulator, task, episode) for name, episode in episodes.items()]
    finally:
        simulator.close()


def _episode(path: Path, group: Any, name: str) -> dict[str, Any]:
    """Arrays and scene of one demonstration, checked."""
    found = {"actions": group["actions"][()], "states": group["states"][()], "ee_pos": group["obs/ee_pos"][()]}
    length = len(found["actions"])
    for field, width in (("actions", 7), ("states", None), ("ee_pos", 3)):
        values = found[field]
        if values.ndim != 2 or len(values) != length or (width and values.shape[1] != width) or not length:
            wanted = f"({length or 'T'}, {width or '1 + nq + nv'})"
            raise BenchError(f"{path}: {name}/{field}: shape {values.shape}; wanted: {wanted}")
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            raise BenchError(f"{path}: {name}/{field}: not finite numbers")
    return found | {"scene": ElementTree.fromstring(group.attrs["model_file"])}


def _replay(path: Path, name: str, simulator: LiberoSimulator, task: Task, episode: dict[str, Any]) -> Demonstration:
    """Looks at each state of a demonstration."""
    states, width = episode["states"], 1 + simulator.model.nq + simulator.model.nv
    if states.shape[1] != width:
        raise BenchError(f"{path}: {name}/states: shape {states.shape}; {task.key} has {width} numbers a state")
    _place_fixtures(simulator, episode["scene"])
    observations = []
    for state in states:
        simulator.show(state)
        observations.append(simulator.observe())
    seen = np.stack([observation.proprio[:3] for observation in observations])
    error = float(np.abs(seen[1:] - episode["ee_pos"][:-1]).max(initial=0))
    if error > NEAR:
        raise BenchError(
            f"{path}: {name}/obs/ee_pos: {error:.3f} m from where the states put the hand; is it of {task.key}?"
        )
    return Demonstration(task, -1, True, tuple(observations), episode["actions"].astype(np.float32))


def _place_fixtures(simulator: LiberoSimulator, scene: ElementTree.Element) -> None:
    """LIBERO puts fixtures where it likes at each reset, which is in no state, only in the model."""
    bodies = {body.get("name"): body for body in scene.iter("body")}
    for fixture in simulator.env.fixtures_dict.values():
        body = bodies.get(fixture.root_body)
        if body is not None:
            index = simulator.model.body(fixture.root_body).id
            simulator.model.body_pos[index] = np.array(body.get("pos", "0 0 0").split(), float)
            simulator.model.body_quat[index] = np.array(body.get("quat", "1 0 0 0").split(), float)
