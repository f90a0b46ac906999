"""Expert episodes: made in parallel worker processes, kept as one verified safetensors file a task.

File format (`<folder>/<suite>/<task>.safetensors`): the arrays of all episodes one after another, and in the
safetensors metadata one JSON document that says how to cut them, what made them, and the hash of it all.

    actions            [N, A] float32
    proprio            [N, P] float32
    objects            [N, len(names), 7] float32   (`state` mode)
    images/<camera>    [N, S, S, 3] uint8           (`pixels` mode)
"""

import hashlib
import json
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .errors import BenchError
from .protocol import Protocol
from .suite import Demonstration, Observation, Suite, Task

FORMAT = 1
ROUNDS = 4
"""Give up on a task after this many attempts per wanted demonstration."""

Progress = Callable[[int], None]
"""Called with the number of demonstrations that are newly there: a task's whole number when its file was kept."""


def demonstration_path(folder: Path, task: Task) -> Path:
    """Where one task's demonstrations are kept."""
    return folder / task.suite / f"{task.name}.safetensors"


def make_demonstrations(
    suite: Suite,
    tasks: Sequence[Task],
    protocol: Protocol,
    per_task: int,
    folder: Path,
    workers: int = 2,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> list[Path]:
    """Makes `per_task` successful expert episodes of every task on the protocol's train states.

    Attempt j starts from train state j mod n with seed `seed` + j // n, so a file is a pure function of the suite, the
    task, the protocol and the seed, whatever `workers` is. Files that already hold that, or more of it, are kept;
    damaged ones and those of another seed are replaced. Returns the tasks' files. Raises BenchError when the expert
    cannot do a task, when the folder cannot be written, and rather than replace a file of another protocol.
    """
    for name, value in (("per_task", per_task), ("workers", workers)):
        if value < 1:
            raise BenchError(f"{name}: {value}; must be at least 1")
    progress = on_progress or (lambda _: None)
    missing = []
    for task in tasks:
        if _is_complete(folder, task, protocol, per_task, seed, suite.expert_version):
            progress(per_task)
        else:
            missing.append(task)
    if missing:
        _run_workers(suite, missing, protocol, per_task, folder, min(workers, len(missing)), seed, progress)
    return [demonstration_path(folder, task) for task in tasks]


def load_demonstrations(
    folder: Path, tasks: Sequence[Task], protocol: Protocol, limit: int | None = None
) -> list[Demonstration]:
    """Reads the demonstrations of `tasks`, at most `limit` of each, in the order in which they were made.

    Raises BenchError when a file is missing, damaged, foreign, made under another protocol, or holds an initial state
    that the protocol does not give to training.
    """
    demonstrations: list[Demonstration] = []
    for task in tasks:
        path = demonstration_path(folder, task)
        found = _read(path, task, protocol)[1]
        if limit is not None and len(found) < limit:
            advice = _advice(task, protocol, limit)
            raise BenchError(f"{path}: holds {len(found)} demonstrations, {limit} are wanted; {advice}")
        demonstrations += found[:limit]
    return demonstrations


# Files


class _OtherProtocol(BenchError):
    pass


def write_demonstrations(
    folder: Path,
    task: Task,
    protocol: Protocol,
    seed: int,
    expert_version: int,
    demonstrations: Sequence[Demonstration],
) -> Path:
    """Writes one task's file, atomically and hashed. All must be successful."""
    observations = [observation for episode in demonstrations for observation in episode.observations]
    names, cameras = list(observations[0].objects), list(observations[0].images)
    arrays = {
        "actions": np.concatenate([episode.actions for episode in demonstrations]).astype(np.float32),
        "proprio": np.stack([observation.proprio for observation in observations]).astype(np.float32),
    }
    if names:
        arrays["objects"] = np.stack([[o.objects[name] for name in names] for o in observations]).astype(np.float32)
    for camera in cameras:
        arrays[f"images/{camera}"] = np.stack([observation.images[camera] for observation in observations])
    header = {
        "format": FORMAT,
        "suite": task.suite,
        "task": task.name,
        "instruction": task.instruction,
        "protocol": protocol.hash,
        "seed": seed,
        "expert_version": expert_version,
        "init_states": [episode.init_state for episode in demonstrations],
        "lengths": [len(episode.actions) for episode in demonstrations],
        "objects": names,
        "cameras": cameras,
    }
    path = demonstration_path(folder, task)
    # One key only: safetensors writes several in random order, and equal demonstrations should be equal files.
    text = json.dumps({**header, "sha256": _digest(header, arrays)}, sort_keys=True)
    _write_atomically(path, save(arrays, {"demonstrations": text}))
    return path


def _read(path: Path, task: Task, protocol: Protocol) -> tuple[dict[str, Any], list[Demonstration]]:
    advice = _advice(task, protocol)
    if not path.is_file():
        raise BenchError(f"{path}: no demonstrations of {task.key}; {advice}")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        header = json.loads(metadata["demonstrations"])
        if header.pop("sha256") != _digest(header, arrays):
            raise ValueError("its content does not match its hash")
        if header["format"] != FORMAT:
            raise ValueError(f"it has format {header['format']}, this version reads {FORMAT}")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = "it is not a file of ours" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise BenchError(f"{path}: unreadable ({reason}); delete it, then {advice}") from error
    if (header["suite"], header["task"]) != (task.suite, task.name):
        raise BenchError(f"{path}: holds {header['suite']}/{header['task']}, not {task.key}; {advice}")
    forbidden = sorted(set(header["init_states"]) - set(protocol.train_states))
    if forbidden:
        raise BenchError(f"{path}: init states {forbidden} are not train states of {protocol.label}; {advice}")
    if header["protocol"] != protocol.hash:
        raise _OtherProtocol(
            f"{path}: made under protocol {header['protocol']}, not {protocol.label}; use another folder"
        )
    return header, _cut(header, arrays, task)


def _cut(header: dict[str, Any], arrays: dict[str, np.ndarray], task: Task) -> list[Demonstration]:
    demonstrations, start = [], 0
    for init_state, length in zip(header["init_states"], header["lengths"], strict=True):
        observations = tuple(
            Observation(
                task.instruction,
                arrays["proprio"][row],
                {name: arrays["objects"][row, column] for column, name in enumerate(header["objects"])},
                {camera: arrays[f"images/{camera}"][row] for camera in header["cameras"]},
            )
            for row in range(start, start + length)
        )
        actions = arrays["actions"][start : start + length]
        demonstrations.append(Demonstration(task, init_state, True, observations, actions))
        start += length
    return demonstrations


def _is_complete(folder: Path, task: Task, protocol: Protocol, per_task: int, seed: int, expert_version: int) -> bool:
    try:
        header, _ = _read(demonstration_path(folder, task), task, protocol)
    except _OtherProtocol:
        raise
    except BenchError:
        return False
    same = (header["seed"], header["expert_version"]) == (seed, expert_version)
    return same and len(header["init_states"]) >= per_task


def _digest(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".partial", delete=False) as file:
            temporary = file.name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise BenchError(f"{path}: cannot be written ({error.strerror}); choose a folder that can") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def _advice(task: Task, protocol: Protocol, episodes: int | None = None) -> str:
    observation = "" if protocol.observation == "state" else f" --observation {protocol.observation}"
    count = "" if episodes is None else f" --episodes {episodes}"
    return f"run `vlarl-bench demos --suite {task.suite}{observation}{count}`"


# Workers. A worker makes whole tasks, one simulator at a time, and sends each episode to the parent, which alone
# writes: so a worker can be killed at any time.


def _run_workers(
    suite: Suite,
    tasks: Sequence[Task],
    protocol: Protocol,
    per_task: int,
    folder: Path,
    workers: int,
    seed: int,
    progress: Progress,
) -> None:
    context = multiprocessing.get_context("spawn")
    waiting = list(tasks)
    busy: dict[Connection, tuple[Task, list[Demonstration]]] = {}
    processes = []

    def give_work(connection: Connection) -> None:
        if waiting:
            task = waiting.pop(0)
            busy[connection] = task, []
            connection.send(task)
        else:
            connection.close()

    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, suite, protocol, per_task, seed), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            give_work(ours)
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                task, done = busy[connection]
                try:
                    message = connection.recv()
                except EOFError:
                    reason = "died, perhaps out of memory (a task needs up to 2 GB)"
                    raise BenchError(f"workers: {workers}; one {reason} at {task.key}; try fewer") from None
                if isinstance(message, BenchError):
                    raise message
                done.append(message)
                progress(1)
                if len(done) == per_task:
                    write_demonstrations(folder, task, protocol, seed, suite.expert_version, done)
                    del busy[connection]
                    give_work(connection)
    finally:
        for connection in busy:
            connection.close()
        if busy:  # something went wrong; a worker in the middle of an episode has nothing worth keeping
            for process in processes:
                process.kill()
        for process in processes:
            process.join()


def _work(connection: Connection, suite: Suite, protocol: Protocol, per_task: int, seed: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    threading.Thread(target=_die_with_parent, daemon=True).start()
    states = protocol.train_states
    try:
        while True:
            task = connection.recv()
            simulator = suite.open(task, protocol)
            try:
                solved = 0
                for attempt in range(ROUNDS * per_task):
                    turn, index = divmod(attempt, len(states))
                    demonstration = suite.demonstrate(simulator, task, states[index], seed + turn)
                    solved += demonstration.success
                    if demonstration.success:
                        connection.send(demonstration)
                    if solved == per_task:
                        break
                else:
                    count = f"{solved} of {ROUNDS * per_task}"
                    raise BenchError(f"{task.key}: the expert solved {count} attempts, not {per_task}; ask for fewer")
            finally:
                simulator.close()
    except EOFError:
        return
    except BenchError as error:
        connection.send(error)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
