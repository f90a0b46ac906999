"""Executor `slurm`: a sweep's cells as array jobs, through submitit; and what the scheduler says of them."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import BenchError
from .sealed import read_sealed, write_sealed
from .sweep import Cell, Resources, Sweep

COMMAND = (sys.executable, "-P", "-m", "vlarl_bench")
"""This program, whatever is first on the path of whoever starts it."""


def submit(sweep: Sweep, cells: Sequence[tuple[Cell, int]]) -> list[str]:
    """Executor `slurm`: array jobs through submitit, in chunks that the cluster's MaxArraySize allows. Returns their
    ids. With a limit on parallel cells, each array begins when the one before it has ended.

    What an array runs is a plain command. submitit would pickle a Python function into its folder and have the job
    unpickle it; nothing of a sweep is read that way.
    """
    groups: dict[Resources, list[tuple[Cell, int]]] = {}
    for cell, seen in cells:
        groups.setdefault(cell.row.resources, []).append((cell, seen))
    most, submitted = _max_array_size(), list[str]()
    for resources, members in groups.items():
        for start in range(0, len(members), most):
            after = submitted[-1] if submitted and sweep.file.parallel else ""
            submitted.append(_submit_array(sweep, resources, members[start : start + most], after))
    return submitted


def _submit_array(sweep: Sweep, resources: Resources, members: Sequence[tuple[Cell, int]], after: str) -> str:
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    token = secrets.token_hex(4)
    path = sweep.out / "submissions" / f"{token}.json"
    record = {"job": "", "cells": [cell.name for cell, _ in members], "seen": [seen for _, seen in members]}
    write_sealed(path, record)
    scripts = sweep.out.absolute() / "slurm"
    try:
        scripts.mkdir(exist_ok=True)
        executor = submitit.SlurmExecutor(scripts)
    except RuntimeError:
        raise BenchError("executor: 'slurm'; there is no srun on this machine; log in where SLURM is") from None
    executor.update_parameters(
        job_name=_job_name(token),
        nodes=resources.nodes,
        ntasks_per_node=1,
        time=resources.minutes,
        cpus_per_task=resources.cpus,
        mem=f"{round(resources.memory_gib * 1024)}M",
        gpus_per_node=resources.gpus or None,
        partition=resources.partition or None,
        account=resources.account or None,
        dependency=f"afterany:{after}" if after else None,
        array_parallelism=sweep.file.parallel or len(members),
        stderr_to_stdout=True,
        use_srun=False,
        additional_parameters={"signal": f"B:USR2@{min(90, resources.minutes * 15)}", "requeue": True},
    )
    executor.parameters["map_count"] = len(members)
    command = shlex.join([*COMMAND, "sweep-cell", str(sweep.out.absolute()), token])
    try:
        # exec: signals of the scheduler must reach the command, not a shell that waits for it.
        job = executor._submit_command(f"exec {command}")
    except (FailedJobError, FailedSubmissionError, subprocess.SubprocessError, OSError) as error:
        path.unlink()
        lines = [line.strip() for line in str(error).splitlines() if "error" in line.lower()] or [str(error)]
        raise BenchError(f"sbatch: {lines[-1]}") from None
    write_sealed(path, {**record, "job": job.job_id})
    return str(job.job_id)


def across(nodes: int, processes: int, arguments: Sequence[str]) -> list[str]:
    """Starts a run on the nodes of the job that this process is in: a torchrun on each, with so many processes."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if not job.isdigit():
        raise BenchError(f"resources.nodes: {nodes}; more than one need --executor slurm")
    first = ask(["scontrol", "show", "hostnames"]).split()[0]
    # Where SLURM itself reaches that node; its name need not be one that the network knows.
    address = ask(["sinfo", "--noheader", f"--nodes={first}", "--format=%o"]).split()[0]
    each = [f"--nnodes={nodes}", f"--nproc-per-node={processes}", f"--rdzv-id={job}", "--rdzv-backend=c10d"]
    meet = f"--rdzv-endpoint={address}:{20000 + int(job) % 20000}"  # a port that other jobs of the node do not take
    steps = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", *each, meet, "--no-python"]
    return [*steps, *torchrun, *COMMAND, *arguments]


def submitted_cell(out: Path, token: str) -> tuple[str, int]:
    """The cell that this job's index in its SLURM array names, and the newest attempt that was known of it."""
    path = out / "submissions" / f"{token}.json"
    record, index = read_sealed(path), os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if not index.isdigit() or int(index) >= len(record["cells"]):
        raise BenchError(f"SLURM_ARRAY_TASK_ID: {index!r}; {path} has {len(record['cells'])} cells")
    return record["cells"][int(index)], record["seen"][int(index)]


def _job_name(token: str) -> str:
    return f"vlarl-{token}"


def _max_array_size() -> int:
    shown = ask(["scontrol", "show", "config"])
    for line in shown.splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "MaxArraySize" and value.strip().isdigit():
            return max(1, int(value))
    raise BenchError("slurm: `scontrol show config` tells no MaxArraySize")


def queued(out: Path, names: Iterable[str]) -> dict[str, str]:
    """Cell -> SLURM job (with its index) that waits or runs, for those of `names` that have one."""
    wanted = set(names)
    submissions: dict[str, tuple[str, dict[str, int]]] = {}
    for path in sorted((out / "submissions").glob("[0-9a-f]*.json")):
        record = read_sealed(path)
        indices = {name: i for i, name in enumerate(record["cells"]) if name in wanted}
        if indices:
            submissions[_job_name(path.stem)] = (record["job"], indices)
    if not submissions or shutil.which("squeue") is None:
        return {}
    # By name as well as by id: a cluster that was set up anew counts from 1 again.
    try:
        shown = ask(["squeue", "--noheader", "--array", f"--name={','.join(submissions)}", "--format=%j %F %K"])
    except BenchError as error:  # whether a cell still waits there, only the cluster knows
        raise BenchError(
            f"{error} - cells of this sweep were given to a cluster, which must be asked about them: set what reaches "
            f"it (SLURM_CONF); if it is gone for good, delete {out / 'submissions'}"
        ) from None
    live = {tuple(line.split()) for line in shown.splitlines()}
    found = {}
    for job_name, (job, indices) in submissions.items():
        for cell, index in indices.items():
            if (job_name, job, str(index)) in live:
                found[cell] = f"{job}_{index}"
    return found


def ask(command: Sequence[str]) -> str:
    """What a command of SLURM prints. Raises BenchError if it fails or does not answer within a minute."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"slurm: {command[0]} does not answer: {error}") from None
    if done.returncode:
        raise BenchError(f"slurm: {command[0]}: {' '.join(done.stderr.split())}")
    return done.stdout


def job_here() -> str:
    """Id of the SLURM job that this process belongs to, an array's with its index; empty elsewhere."""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID", "")
