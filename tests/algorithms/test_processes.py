"""An update by 1, 2 or 4 processes is one and the same, for every method."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import CASES

from vlarl_bench import registry

SAME = {"pi0-fast"}
"""Methods that are another one's class under another name."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Number of processes -> case -> weights and metrics."""
    out, script = tmp_path_factory.mktemp("processes"), Path(__file__).with_name("processes.py")
    done = subprocess.run([sys.executable, script, out, "2", "4"], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return {count: torch.load(out / str(count)) for count in (1, 2, 4)}


def test_every_method_is_tried():
    assert {case.split()[0] for case in CASES} == set(registry.names("algorithm")) - SAME


@pytest.mark.parametrize("case", CASES)
def test_updates_by_several_processes_agree_within_rounding(found, case):
    alone = found[1][case]
    for count in (2, 4):
        shared = found[count][case]
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(shared["weights"][name], weight, rtol=1e-5, atol=1e-6)
        for line, expected in zip(shared["lines"], alone["lines"], strict=True):
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert (line["flops"], line["gradient_steps"]) == (expected["flops"], expected["gradient_steps"])
