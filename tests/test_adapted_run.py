"""Runs that freeze parts or train adapters, through the command line: what is stored, and what it is called."""

import json
import shutil

import pytest
import torch
from toy_suite import installed

from vlarl_bench.checkpoint import load_latest
from vlarl_bench.cli import main
from vlarl_bench.policies.adapt import add_lora, merge_lora
from vlarl_bench.policies.presets import PI0_TINY
from vlarl_bench.policies.store import content_hash
from vlarl_bench.records import read_rows

FROZEN = "model.model.dit.layers.0"
SMALL = ("--algo", "rwfm", "--suite", "toy-arm", "--tasks", "one", "--budget", "smoke", "--budget.eval-states", "1")
SMALL += ("--algo.gradient-steps", "2", "--algo.minibatch", "8", "--threads", "1", "--workers", "1")


@pytest.fixture(scope="module", autouse=True)
def toy():
    with installed():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of one round that trains adapters in two layers of three."""
    folder = tmp_path_factory.mktemp("runs") / "adapted"
    assert main(["run", *SMALL, "--lora", "4", "--freeze", FROZEN, "--no-video", "--out", str(folder)]) == 0
    return folder


def test_only_what_adapters_stand_beside_is_changed(folder):
    before = PI0_TINY.load(PI0_TINY.prior_folder("libero")).state_dict()
    after = PI0_TINY.load(folder / "policy").state_dict()
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    layers = {name.rpartition(".")[0] for name in changed}
    assert layers == {
        f"model.model.dit.layers.{i}.{layer}"
        for i in (1, 2)
        for layer in [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    }
    assert all(name.endswith(".weight") for name in changed)


def test_rows_name_the_policy_that_played(folder):
    rows = read_rows(folder / "episodes.jsonl")
    names = {phase: {row.checkpoint for row in rows if row.phase == phase} for phase in ("base", "train", "final")}
    base = content_hash(PI0_TINY.load(PI0_TINY.prior_folder("libero")))
    assert names["base"] == names["train"] == {base}  # fresh adapters add nothing
    assert names["final"] == {content_hash(PI0_TINY.load(folder / "policy"))} != {base}


def test_the_stored_policy_is_the_checkpoint_s_merged(folder):
    policy = PI0_TINY.load(PI0_TINY.prior_folder("libero"))
    policy.frozen = (FROZEN,)
    add_lora(policy, 4)
    policy.load_state_dict(load_latest(folder / "checkpoints").state["policy"])
    merge_lora(policy)
    assert content_hash(policy) == content_hash(PI0_TINY.load(folder / "policy"))


def test_a_resumed_run_stores_the_same(folder, tmp_path):
    again = tmp_path / "adapted"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "policy")
    lines = (again / "episodes.jsonl").read_text().splitlines(keepends=True)
    (again / "episodes.jsonl").write_text("".join(lines[:-1]))  # the final evaluation, too, is to be done again
    assert main(["run", "--resume", str(again)]) == 0
    for file in ("policy/hashes.json", "episodes.jsonl"):
        assert (again / file).read_text() == (folder / file).read_text()
    assert json.loads((again / "config.json").read_text())["lora"] == 4


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--freeze", "vision"), "freeze: 'vision' is no part of the policy; there are model, object_in, object_out"),
        (("--freeze", "model"), "freeze: model; nothing is left that an algorithm may train"),
        (("--freeze", "model", "--lora", "4"), "lora: rank 4, targets ["),
        (("--freeze", "model,model"), "freeze: 'model'; names must be distinct"),
        (("--lora", "-1"), "lora: -1; it must be at least 0"),
        (("--unnorm-key", "libero"), "unnorm_key: 'libero'; only a published folder has scales to choose from"),
    ],
)
def test_what_cannot_be(options, line, tmp_path, capsys):
    assert main(["run", *SMALL, *options, "--out", str(tmp_path / "run")]) == 2
    (told,) = [row for row in capsys.readouterr().err.splitlines() if "error" in row]
    assert told.startswith(f"vlarl-bench: error: {line}")
    assert not (tmp_path / "run").exists()
