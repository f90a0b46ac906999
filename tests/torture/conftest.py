"""A toy sweep of one cell, run to its end: files of every kind, to be injured."""

import shutil
from types import SimpleNamespace

import pytest
from sweeps import TOY, environment, here, toml
from toy_suite import installed

from vlarl_bench.records import LostLog
from vlarl_bench.sealed import write_sealed


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Environment of processes that know the toy suite."""
    return environment(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The sweep file."""
    file = tmp_path_factory.mktemp("finished") / "mine.toml"
    file.write_text(toml({**TOY, "seeds": [0]}))
    here("sweep", file, "--executor", "debug")
    return file


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of it to injure, with what else runs and sweeps may leave."""
    shutil.copytree(finished.parent, tmp_path / "copy")
    out = tmp_path / "copy" / finished.stem
    (run,) = (out / "runs").iterdir()
    (out / "submissions").mkdir()
    write_sealed(out / "submissions" / "0123abcd.json", {"job": "7", "cells": [run.name], "seen": [0]})
    write_sealed(out / "cancelled.json", {"token": "0123456789abcdef"})
    write_sealed(run / "stopped.json", {"iteration": 2, "reason": "the gradient is not finite"})
    with LostLog(run / "lost.jsonl") as log:
        log.append({"why": "was killed by SIGKILL"})
        log.append({"why": "was stopped"})
    with installed():
        yield SimpleNamespace(file=tmp_path / "copy" / finished.name, out=out, run=run)
