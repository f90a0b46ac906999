"""The folder of a run: claimed once, given back where nothing was started."""

import json
import os

import pytest

from vlarl_bench import registry
from vlarl_bench.config import BUDGETS, RunConfig
from vlarl_bench.errors import BenchError
from vlarl_bench.run_folder import claimed
from vlarl_bench.sealed import read_sealed


@pytest.mark.parametrize("name", [".", "run"])
def test_a_read_only_folder(name, tmp_path):
    """As somebody whom permissions stop, which root is not."""
    words = "permission denied or read-only; change its permissions or choose another place"
    settings = registry.get("algorithm", "sft").Settings()
    config = RunConfig(
        "sft", "libero", "pi0-tiny", BUDGETS["smoke"], settings, out=str(tmp_path / name), base="scratch"
    )
    tmp_path.chmod(0o555)
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(BenchError, match=words), claimed(config, resume=False):
            pass
    finally:
        os.seteuid(me)


def test_a_folder_is_taken_once_and_given_back_if_nothing_was_started(tmp_path):
    settings = registry.get("algorithm", "sft").Settings()
    config = RunConfig("sft", "libero", "pi0-tiny", BUDGETS["smoke"], settings, str(tmp_path / "run"), base="scratch")
    mine = claimed(config, resume=False)
    out = mine.__enter__()
    assert read_sealed(out / "config.json") == json.loads(json.dumps(config.to_dict()))
    with pytest.raises(BenchError, match="exists; choose another folder"):
        claimed(config, resume=False).__enter__()
    assert mine.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None) is False
    assert not list(tmp_path.iterdir())
