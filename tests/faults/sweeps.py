"""Sweeps of toy cells, for tests of what surrounds them."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

from toy_suite import installed

from vlarl_bench.attempts import newest, read_attempt
from vlarl_bench.cli import main
from vlarl_bench.records import read_metrics, read_rows

HERE = Path(__file__).parent
COMMAND = [sys.executable, "-m", "vlarl_bench"]
TOY = {
    "algorithms": ["fpo"],
    "policies": ["pi0-tiny"],
    "suites": ["toy-arm"],
    "settings": {"fpo": {"critic_steps": 2, "critic_width": 8, "epochs": 1}},
    "budget": {"preset": "smoke", "iterations": 2, "episodes": 2, "eval_states": 2},
    "run": {"tasks": ["one"], "workers": 1, "slots": 2, "threads": 1},
    "resources": {"cpus": 1, "memory_gib": 0.5, "minutes": 30},
}
"""Whole runs of a few seconds, by LIBERO's prior on the toy suite."""


def toml(data, name=""):
    """The tables as TOML; JSON's texts, numbers and lists are TOML's, too."""
    plain = {key: value for key, value in data.items() if not isinstance(value, dict)}
    lines = [f"[{name}]"] if name else []
    for key, value in plain.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = f"[{', '.join(map(_inline, value))}]"
        else:
            value = json.dumps(value)
        lines.append(f"{json.dumps(key)} = {value}")
    for key, value in data.items():
        if isinstance(value, dict):
            lines.append(toml(value, f"{name}.{json.dumps(key)}" if name else json.dumps(key)))
    return "\n".join(lines) + "\n"


def _inline(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_inline(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def environment(folder, **more):
    """For processes that find the toy suite as an installed one."""
    info = folder / "site" / "vlarl_toy-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vlarl-toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vlarl_bench.suites]\ntoy-arm = toy_suite:ToySuite\n")
    path = os.pathsep.join([str(info.parent), str(HERE)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def vlarl(env, *arguments, status=0):
    """What the command told; where it was refused as wrong, what it said about it."""
    done = subprocess.run([*COMMAND, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stderr if status == 2 else done.stdout


def here(*arguments, status=0):
    """The same in this process, which has torch already."""
    out, err = io.StringIO(), io.StringIO()
    with installed(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        returned = main([str(argument) for argument in arguments])
    assert returned == status, out.getvalue()[-2000:] + err.getvalue()[-2000:]
    return err.getvalue() if status == 2 else out.getvalue()


def outcomes(out):
    """Cell -> what must not depend on how it went: rows, metrics and the hash of the weights."""
    found = {}
    for run in sorted((out / "runs").iterdir()):
        rows = [row.to_json() for row in read_rows(run / "episodes.jsonl")]
        assert rows[0]["checkpoint"] != rows[-1]["checkpoint"], "where nothing is learned, equal weights say nothing"
        hashes = json.loads((run / "policy" / "hashes.json").read_text())
        lines = read_metrics(run / "metrics.jsonl")
        metrics = [{k: v for k, v in line.items() if k not in ("seconds", "cpu_seconds")} for line in lines]
        found[run.name] = (rows, metrics, hashes["model.safetensors"])
    return found


def history(out):
    """Cell -> its newest attempt."""
    return {cell: read_attempt(path) for cell, path in newest(out / "attempts").items()}
