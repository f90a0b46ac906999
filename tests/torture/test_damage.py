"""Changed bytes, files cut short, and pickles: each is named, none is taken for what was written, none is run."""

import dataclasses
import io
import os
import pickle
import random
import sys

import pytest
import torch
from torture import count

from vlarl_bench.attempts import newest, read_attempt
from vlarl_bench.checkpoint import load_checkpoint, load_latest
from vlarl_bench.errors import BenchError
from vlarl_bench.policies.store import read_policy
from vlarl_bench.records import EpisodeLog, LostLog, MetricsLog
from vlarl_bench.report.runs import read_run
from vlarl_bench.report.table import comparison_table
from vlarl_bench.sealed import read_sealed
from vlarl_bench.sweep import read_sweep
from vlarl_bench.sweep_jobs import prepare
from vlarl_bench.sweep_slurm import submitted_cell
from vlarl_bench.training import check_whole

pytestmark = pytest.mark.torture
UNREAD = {"README.md", "table.md", "curve.png"}
"""Made for people; no command reads them back. So are logs/*.log."""


def of_logs(copy, path):
    """A log as `run --resume` and `table` read it."""
    found = []
    run = read_run(copy.run)
    found += [f"{copy.run / name}: unfinished" for name in run.torn]
    if not all(record["complete"] for record in comparison_table(run).records):
        found.append(f"{path}: INCOMPLETE")
    with EpisodeLog(copy.run / "episodes.jsonl") as log, MetricsLog(copy.run / "metrics.jsonl") as metrics:
        found += [f"{each.path}: {each.torn} bytes removed" for each in (log, metrics) if each.torn]
        check_whole(load_latest(copy.run / "checkpoints"), log, metrics)
    return found


def of_losses(copy, path):
    with LostLog(path) as log:
        lost = 2 - len(log.lines)
        return [f"{path}: {log.torn} bytes removed"] * bool(log.torn) + [f"{path}: a loss less"] * bool(lost)


READERS = {
    "config.json": lambda copy, path: read_run(copy.run) and [],
    "manifest.json": lambda copy, path: read_run(copy.run) and [],
    "stopped.json": lambda copy, path: read_run(copy.run) and [],
    "cancelled.json": lambda copy, path: read_sealed(path) and [],
    "episodes.jsonl": of_logs,
    "metrics.jsonl": of_logs,
    "lost.jsonl": of_losses,
    "checkpoints": lambda copy, path: load_checkpoint(path.parent) and [],
    "policy": lambda copy, path: read_policy(path.parent) and [],
    "cells": lambda copy, path: prepare(read_sweep(copy.file), read_sweep(copy.file).cells),
    "attempts": lambda copy, path: [read_attempt(each) for each in newest(copy.out / "attempts").values()] and [],
    "submissions": lambda copy, path: submitted_cell(copy.out, path.stem) and [],
}
"""Name of a file, or of the folder that it is in -> how a command reads it; what that says without refusing it."""


def reader(copy, path):
    inner = path.relative_to(copy.out).parts
    return next(READERS[part] for part in inner if part in READERS)


def injure(data, rng):
    """The bytes with one bit turned, or without their end; and what was done."""
    at = rng.randrange(len(data))
    if rng.random() < 0.3:
        return data[:at], f"cut to {at} bytes"
    bit = 1 << rng.randrange(8)
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :], f"byte {at} ^ {bit}"


def test_whatever_is_changed_in_a_sweeps_folder_is_named(copy, monkeypatch, record_property):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    files = [path for path in sorted(copy.out.rglob("*")) if path.is_file() and path.name not in UNREAD]
    files = [path for path in files if path.suffix != ".log"]
    assert {part for path in files for part in path.relative_to(copy.out).parts} >= set(READERS)
    for path in files:
        assert not reader(copy, path)(copy, path), "whole, nothing is said"
    rng, times, kinds = random.Random(0), count(70, 500), {"refused": 0, "told": 0}
    for i in range(times):
        path = files[i % len(files)]
        whole = path.read_bytes()
        damaged, what = injure(whole, rng)
        path.write_bytes(damaged)
        try:
            said = reader(copy, path)(copy, path)
            kinds["told"] += 1
        except BenchError as error:
            said = [str(error)]
            kinds["refused"] += 1
        assert any(str(path) in line for line in said), f"{path}: {what}: {said}"
        assert all("\n" not in line for line in said)
        path.write_bytes(whole)
    record_property("torture", f"{times} changed bytes and cuts in {len(files)} files: {kinds}, 0 unnoticed")


def rows_of(file):
    """Cell -> all that decides its rows."""
    return {cell.name: dataclasses.replace(cell.config, workers=1, video=False) for cell in read_sweep(file).cells}


def test_a_changed_sweep_file_is_refused_or_means_other_cells(copy, record_property):
    """It is its user's own text and has no digest. But a cell's name is made of all that decides its rows."""
    whole, rng, times = copy.file.read_bytes(), random.Random(1), count(30, 500)
    before = rows_of(copy.file)
    kinds = {"refused": 0, "other cells": 0, "the same rows": 0}
    for _ in range(times):
        damaged, what = injure(whole, rng)
        copy.file.write_bytes(damaged)
        try:
            after = rows_of(copy.file)
        except BenchError as error:
            line = str(error)
            kinds["refused"] += 1
            assert line.startswith(f"{copy.file}: ") and "\n" not in line, what
            continue
        kinds["the same rows" if after == before else "other cells"] += 1
        assert after == before or not after.keys() & before.keys(), what
    record_property("torture", f"{times} changed bytes and cuts of a sweep file: {kinds}")


class Evil:
    def __init__(self, order):
        self.order = order

    def __reduce__(self):
        return os.system, (self.order,)


def pickles(order):
    """As Python and torch write them, and as older ones did."""
    archive = io.BytesIO()
    torch.save(Evil(order), archive)
    return [pickle.dumps(Evil(order), 0), pickle.dumps(Evil(order)), archive.getvalue()]


def test_pickles_are_never_run(copy, tmp_path, monkeypatch, record_property):
    """In the place of each file, and beside them under the names that torch and submitit use."""
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    owned, opened = tmp_path / "owned", []
    sys.addaudithook(lambda event, arguments: opened.append(arguments) if event == "pickle.find_class" else None)
    files = [path for path in sorted(copy.out.rglob("*")) if path.is_file() and path.name not in UNREAD]
    files = [path for path in files if path.suffix != ".log"]
    (copy.out / "slurm").mkdir()
    kinds = pickles(f"touch {owned}")
    for evil in kinds:
        for name in ("slurm/7_0_submitted.pkl", "slurm/7_0_0_result.pkl", "cells/x.pkl", "attempts/x.0001.pkl"):
            (copy.out / name).write_bytes(evil)
        for name in ("checkpoints/000002/optimizer.pt", "policy/pytorch_model.bin", "state.pt", "episodes.pkl"):
            (copy.run / name).write_bytes(evil)
        for path in files:
            whole = path.read_bytes()
            assert not reader(copy, path)(copy, path)
            path.write_bytes(evil)
            try:
                said = reader(copy, path)(copy, path)
            except BenchError as error:
                said = [str(error)]
            assert any(str(path) in line for line in said)
            path.write_bytes(whole)
    assert not opened
    assert not owned.exists()
    pickle.loads(kinds[0])  # they do run if something unpickles them
    assert owned.exists()
    record_property("torture", f"{len(kinds) * (len(files) + 8)} malicious pickles, 0 run")
