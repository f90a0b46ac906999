"""Whole runs from the shipped prior, as a user starts them: through the command line. On the real simulator, but for
what has nothing to do with it, which is played on the toy suite."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import pytest
from sweeps import environment
from toy_suite import installed

from vlarl_bench import film, run, training
from vlarl_bench.cli import main
from vlarl_bench.config import RunConfig
from vlarl_bench.errors import Diverged
from vlarl_bench.plan import plan_run
from vlarl_bench.records import LostLog, read_metrics, read_rows
from vlarl_bench.report.runs import read_run
from vlarl_bench.sealed import read_sealed, write_sealed

COMMAND = [str(Path(sys.executable).parent / "vlarl-bench")]
ROUNDS = ["--budget", "smoke", "--budget.episodes", "3", "--budget.eval-states", "1", "--slots", "3", "--threads", "1"]
SMALL = ["run", "--algo", "fpo", "--suite", "libero", *ROUNDS, "--budget.iterations", "2", "--algo.critic-steps", "20"]
TOY = ["run", "--algo", "rwfm", "--suite", "toy-arm", "--tasks", "one", *ROUNDS, "--budget.iterations", "3"]
TOY += ["--algo.gradient-steps", "3", "--algo.minibatch", "8", "--no-video"]


def vlarl(*arguments, check=True):
    """A command in this process, which has torch already; what is killed below is a process of its own."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    done = SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())
    if check:
        assert done.returncode == 0, done.stderr[-2000:]
    return done


def outcome(folder):
    """What must not depend on how the run went: its rows, metrics and weights."""
    drop = ("run", "crc", "seconds", "cpu_seconds")
    rows = [{k: v for k, v in row.to_json().items() if k not in drop} for row in read_rows(folder / "episodes.jsonl")]
    metrics = [{k: v for k, v in line.items() if k not in drop} for line in read_metrics(folder / "metrics.jsonl")]
    hashes = json.loads((folder / "policy" / "hashes.json").read_text())
    return rows, metrics, hashes["model.safetensors"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from beginning to end, without films, which cost more than all the rest of it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = vlarl(*SMALL, "--keep", "3", "--no-video", "--out", folder)
    return folder, done


@pytest.fixture(scope="module")
def toy():
    with installed():
        yield


@pytest.fixture(scope="module")
def calm(toy, tmp_path_factory):
    """An undisturbed run on the toy suite."""
    folder = tmp_path_factory.mktemp("toys") / "calm"
    vlarl(*TOY, "--out", folder)
    assert len({row.checkpoint for row in read_rows(folder / "episodes.jsonl")}) == 4  # each round has learned
    return folder


def test_a_policy_that_breaks_down_when_it_is_judged_is_scored_as_it_was_a_round_before(calm, tmp_path, monkeypatch):
    """Also if it is killed in the midst of that."""
    folder, judged, before = tmp_path / "broken", [], read_rows(calm / "episodes.jsonl")
    played = run.run_shared

    def broken(pool, policy, jobs, *rest, **options):
        judged.append(len(jobs))
        if len(judged) == 3:  # base, base without noise, final
            raise Diverged("the policy decided on actions that are not finite")
        if len(judged) == 4:
            raise KeyboardInterrupt
        return played(pool, policy, jobs, *rest, **options)

    monkeypatch.setattr(run, "run_shared", broken)
    assert vlarl(*TOY, "--out", folder, check=False).returncode == 130
    vlarl("run", "--resume", folder)
    assert read_sealed(folder / "stopped.json")["iteration"] == 3
    final = [row for row in read_rows(folder / "episodes.jsonl") if row.phase == "final"]
    acted = {row.checkpoint for row in before if (row.phase, row.iteration) == ("train", 3)}
    assert {(row.iteration, row.checkpoint) for row in final} == {(2, *acted)}
    trained = [row for row in read_rows(folder / "episodes.jsonl") if row.phase == "train"]
    assert [row.iteration for row in trained] == [row.iteration for row in before if row.phase == "train"]
    assert {row.env_steps for row in final} == {sum(row.steps for row in trained)}  # with those of the last round
    assert "stopped in round 3" in (folder / "table.md").read_text()


def test_what_is_filmed_is_told_by_episodes_as_the_protocol_decodes(calm):
    """Not by those without noise, which come later in the log."""
    rows = read_rows(calm / "episodes.jsonl")
    first = next(row for row in rows if row.phase == "base")
    judged = [
        dataclasses.replace(
            first, phase=phase, decoding=decoding, init_state=state, success=(phase == "final") == (state == lost)
        )
        for decoding, lost in (("sampled", 3), ("zero-noise", 2))
        for phase in ("base", "final")
        for state in (2, 3)
    ]
    config = RunConfig.from_dict(read_sealed(calm / "config.json"))
    budget = dataclasses.replace(config.budget, eval_states=2)
    plan = plan_run(dataclasses.replace(config, budget=budget))
    assert plan.protocol.eval_states[:2] == (2, 3)
    assert film.telling(plan, judged).init_state == 3
    assert film.telling(plan, []).init_state == 2


def test_a_run_begun_by_older_code_plays_on_what_it_owed(toy, tmp_path, monkeypatch):
    """Before evaluations were played without noise, too. Resumed when it is finished, it adds nothing."""
    folder = tmp_path / "older"
    with monkeypatch.context() as older:
        older.setattr(run, "plan_run", lambda config: dataclasses.replace(plan_run(config), noiseless=False))
        vlarl(*TOY, "--out", folder)
    manifest, rows = read_sealed(folder / "manifest.json"), read_rows(folder / "episodes.jsonl")
    del manifest["evaluation"]["noiseless"]
    write_sealed(folder / "manifest.json", manifest)
    assert read_run(folder).missing == 0 and not any(row.decoding == "zero-noise" for row in rows)
    vlarl("run", "--resume", folder)
    assert read_rows(folder / "episodes.jsonl") == rows


def test_a_run_leaves_everything(whole):
    folder, done = whole
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        *("config.json", "manifest.json", "episodes.jsonl", "metrics.jsonl", "checkpoints", "policy"),
        *("table.md", "curve.png"),
    }
    played = [(row.phase, row.decoding) for row in read_rows(folder / "episodes.jsonl")]
    judged = [(phase, decoding) for phase in ("base", "final") for decoding in ("sampled", "zero-noise")]
    assert played == [*judged[:2], *[("train", "explore")] * 6, *judged[2:]]
    table = (folder / "table.md").read_text()
    assert "1 of 40 tasks" in table
    assert "privileged state" in table
    assert "fpo" in done.stdout
    for word in ("base evaluation", "base evaluation without noise", "fine-tuning", "env steps/s"):
        assert word in done.stderr
    assert "\x1b" not in done.stderr  # plain lines when piped


def test_the_policies_that_it_kept_are_played_again_for_analysis(whole, tmp_path):
    folder, _ = whole
    vlarl("analyze", folder, "--states", "1", "--workers", "1", "--out", tmp_path / "analysis")
    found = json.loads((tmp_path / "analysis" / "analysis.json").read_text())["latents"][folder.name]
    rows = read_rows(folder / "episodes.jsonl")
    # A round is collected by the policy that the one before had made: its checkpoint must be that policy, to the bit.
    acted = [
        {row.checkpoint for row in rows if (row.phase, row.iteration) == key}
        for key in (("base", 0), ("train", 2), ("final", 2))
    ]
    assert [policy["iteration"] for policy in found["policies"]] == [0, 1, 2]
    assert [{policy["checkpoint"]} for policy in found["policies"]] == acted
    assert all(policy["chunks"] > 0 and policy["episodes"] == 1 for policy in found["policies"])
    assert (tmp_path / "analysis" / f"embeddings-{folder.name}.png").stat().st_size > 10_000

    copy = tmp_path / folder.name
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("policy", "checkpoints"))
    assert "it kept no policy" in vlarl("analyze", copy, "--out", tmp_path / "rows").stdout
    write_sealed(copy / "manifest.json", read_sealed(copy / "manifest.json") | {"base_checkpoint": "0123456789ab"})
    shutil.copytree(folder / "policy", copy / "policy")
    assert "the run's was 0123456789ab" in vlarl("analyze", copy, "--out", tmp_path / "other").stdout


def test_the_ratio_was_one_on_the_first_pass_and_training_never_saw_held_out_states(whole):
    folder, _ = whole
    rows = read_rows(folder / "episodes.jsonl")
    assert all(row.init_state < 25 for row in rows if row.phase == "train")
    assert all(row.init_state >= 25 for row in rows if row.phase != "train")
    base, final = ([row for row in rows if row.phase == phase] for phase in ("base", "final"))
    assert [row.seed for row in base] == [row.seed for row in final]
    assert {row.checkpoint for row in base}.isdisjoint({row.checkpoint for row in final})


def test_every_row_says_what_training_had_cost(whole):
    folder, _ = whole
    rows, lines = read_rows(folder / "episodes.jsonl"), read_metrics(folder / "metrics.jsonl")
    spent = {0: (0, 0, 0)} | {x["iteration"]: (x["env_steps"], x["gradient_steps"], x["flops"]) for x in lines}
    assert len(spent) == 3
    for name in range(3):
        assert [spent[i][name] for i in range(3)] == sorted({spent[i][name] for i in range(3)})
    assert spent[2][0] == sum(row.steps for row in rows if row.phase == "train")
    for row in rows:
        done = row.iteration - (row.phase == "train")
        assert (row.env_steps, row.gradient_steps, row.flops) == spent[done]
    card = json.loads((folder / "policy" / "config.json").read_text())
    assert card["spent"]["flops"] == spent[2][2]
    assert set(card["tasks"]) < set(card["learned_tasks"])  # its base policy's, too
    for name in ("seconds", "cpu_seconds"):
        taken = [line[name] for line in lines]
        assert 0 < taken[0] < taken[1]


def test_a_run_that_destroys_its_policy_stops_and_counts_as_it_was(toy, tmp_path):
    folder = tmp_path / "destroyed"
    done = vlarl(*TOY, "--algo.lr", "1e30", "--workers", "1", "--out", folder)
    stopped = json.loads((folder / "stopped.json").read_text())
    assert stopped["iteration"] == 1
    assert stopped["reason"].startswith("the gradient of model.")
    assert "is not finite at gradient step 2" in stopped["reason"]
    assert f"stopped in round 1 of 3: {stopped['reason']}" in done.stderr
    assert stopped["seconds"] > 0 < stopped["cpu_seconds"]
    base, final = (
        [row for row in read_rows(folder / "episodes.jsonl") if row.phase == phase] for phase in ("base", "final")
    )
    assert [(row.checkpoint, row.success, row.iteration) for row in base] == [
        (row.checkpoint, row.success, row.iteration) for row in final
    ]
    (line,) = {(row.env_steps, row.gradient_steps, row.flops > 0) for row in final}  # what was spent in vain, too
    trained = [row.steps for row in read_rows(folder / "episodes.jsonl") if row.phase == "train"]
    assert line == (sum(trained), 1, True)
    note = f"destroyed was stopped in round 1, and is scored as it was before: {stopped['reason']}."
    assert note in (folder / "table.md").read_text()
    before = outcome(folder)
    vlarl("run", "--resume", folder)
    assert outcome(folder) == before


def test_a_collapsed_policy_counts_with_its_cost_and_the_one_that_last_succeeded_stays(toy, tmp_path, monkeypatch):
    folder, rounds, played = tmp_path / "collapsed", [], training.run_shared

    def failing(*given, **options):
        episodes = played(*given, **options)
        rounds.append(episodes)
        for episode in episodes:
            episode.success = len(rounds) == 1
        return episodes

    monkeypatch.setattr(training, "run_shared", failing)
    monkeypatch.setattr(training, "COLLAPSED", 5)
    vlarl(*TOY, "--out", folder)
    stopped = read_sealed(folder / "stopped.json")
    assert stopped["iteration"] == 3
    assert stopped["reason"].endswith("the policy that last succeeded is checkpoint 0")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["000000", "000001", "000002"]
    rows = read_rows(folder / "episodes.jsonl")
    trained = [row for row in rows if row.phase == "train"]
    assert {row.iteration for row in trained} == {1, 2, 3}
    final = [row for row in rows if row.phase == "final"]
    assert {(row.iteration, row.env_steps) for row in final} == {(2, sum(row.steps for row in trained))}
    before = outcome(folder)
    vlarl("run", "--resume", folder)
    assert outcome(folder) == before


def test_killed_and_resumed_equals_undisturbed(whole, tmp_path):
    folder = tmp_path / "killed"
    command = [*COMMAND, *SMALL, "--no-video", "--workers", "1", "--out", str(folder)]  # the rows must not care
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (folder / "checkpoints" / "000001").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "policy").exists()
    vlarl("run", "--resume", folder)
    mine, theirs = outcome(folder), outcome(whole[0])
    assert mine[0] == theirs[0]
    assert mine[1] == theirs[1]
    assert mine[2] == theirs[2]


def test_a_run_whose_workers_are_killed_equals_undisturbed_and_tells_it(calm, tmp_path, monkeypatch):
    folder, save = tmp_path / "lost", training.save_checkpoint
    others = multiprocessing.active_children()

    def save_and_kill(checkpoints, iteration, *more):
        save(checkpoints, iteration, *more)
        if iteration == 1:
            workers = [process for process in multiprocessing.active_children() if process not in others]
            assert len(workers) == 2
            for worker in workers:
                os.kill(worker.pid, signal.SIGKILL)

    monkeypatch.setattr(training, "save_checkpoint", save_and_kill)
    told = vlarl(*TOY, "--out", folder).stderr
    assert outcome(folder) == outcome(calm)
    with LostLog(folder / "lost.jsonl") as log:
        losses = log.lines
    assert [loss["number"] for loss in losses] == [1, 2]
    for loss in losses:
        assert loss["why"].startswith("was killed by SIGKILL")
        assert f"loss {loss['number']}, see lost.jsonl: {loss['suite']}/{loss['task']}" in told
    assert not (calm / "lost.jsonl").exists()


def test_ctrl_c_twice_says_how_to_go_on_and_leaves_no_process(tmp_path):
    folder, slow = tmp_path / "stopped", tmp_path / "slow"
    slow.touch()
    process = subprocess.Popen(
        [*COMMAND, *TOY, "--out", str(folder)],
        env=environment(tmp_path, TOY_SLOW=str(slow)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not (folder / "checkpoints" / "000000").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    # To the whole group, as a terminal does; the second while the first is being dealt with.
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"vlarl-bench run --resume {folder}" in errors
    deadline = time.monotonic() + 30  # multiprocessing's own tracker ends a moment after its parent
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline, "processes outlived the run"
        time.sleep(0.1)


def test_a_finished_policy_can_be_evaluated_and_tabled(whole, tmp_path, monkeypatch):
    folder, _ = whole
    monkeypatch.setattr(film, "EVERY", 10)  # few frames: rendering costs more than all the rest
    task = json.loads((folder / "manifest.json").read_text())["evaluation"]["tasks"][0]
    out = tmp_path / "eval"
    vlarl(
        *("eval", "--suite", "libero", "--base", folder / "policy", "--tasks", task.split("/")[1]),
        *("--states", 1, "--slots", 3, "--video", "--out", out),
    )
    (row,) = read_rows(out / "episodes.jsonl")
    (final,) = read_run(folder).evaluated
    assert row.phase == "eval"
    assert (row.success, row.steps, row.seed, row.checkpoint) == (
        final.success,
        final.steps,
        final.seed,
        final.checkpoint,
    )
    run, evaluated = (json.loads((f / "manifest.json").read_text()) for f in (folder, out))
    assert evaluated["trained"]["base_checkpoint"] == run["base_checkpoint"] != evaluated["base_checkpoint"]
    assert evaluated["seed"] == evaluated["trained"]["seed"] == run["seed"]  # by default
    assert read_run(out).settings() == read_run(folder).settings() and read_run(out).method == "fpo"
    assert len(imageio.imread(out / "eval.mp4")) == -(-row.steps // 10) + 1 + 2
    assert "fpo" in vlarl("table", folder, "--format", "markdown").stdout
    vlarl(
        *("eval", "--suite", "libero", "--base", folder / "policy", "--tasks", task.split("/")[1]),
        *("--states", 1, "--repeats", 2, "--slots", 3, "--decoding", "zero-noise", "--out", tmp_path / "zero"),
    )
    (row,), (noiseless,) = read_rows(tmp_path / "zero" / "episodes.jsonl"), read_run(folder).noiseless[1]
    assert (row.success, row.steps, row.checkpoint) == (noiseless.success, noiseless.steps, noiseless.checkpoint)
    assert row.steps != final.steps or row.success != final.success  # of this run: else this would show nothing


def test_damaged_and_foreign_policies_are_named(whole, tmp_path):
    folder, _ = whole
    weights = (folder / "policy" / "model.safetensors").read_bytes()
    for name, data in {
        "truncated": weights[: len(weights) // 2],
        "flipped": weights[:5000] + bytes([weights[5000] ^ 1]) + weights[5001:],
    }.items():
        broken = tmp_path / name
        broken.mkdir()
        for file in (folder / "policy").iterdir():
            (broken / file.name).write_bytes(data if file.name == "model.safetensors" else file.read_bytes())
        done = vlarl(*SMALL, "--base", broken, "--out", tmp_path / "out", check=False)
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        assert "model.safetensors" in line and "damaged" in line


def test_a_damaged_checkpoint_is_passed_over_and_a_foreign_folder_refused(calm, tmp_path):
    folder = tmp_path / calm.name
    shutil.copytree(calm, folder)
    newest = max((folder / "checkpoints").iterdir())
    state = newest / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-10])
    done = vlarl("run", "--resume", folder)
    assert "passed over" in done.stderr and newest.name in done.stderr
    assert outcome(folder)[2] == outcome(calm)[2]
    shutil.rmtree(folder / "checkpoints")  # as in a folder of which only the rows were kept
    before = (folder / "episodes.jsonl").read_bytes()
    kept = vlarl("run", "--resume", folder, check=False)
    assert kept.returncode == 2
    assert "no checkpoint to go on from" in kept.stderr
    assert (folder / "episodes.jsonl").read_bytes() == before
    for name in ("base_checkpoint", "run"):  # another prior is installed now; the folder was renamed
        manifest = read_sealed(folder / "manifest.json")
        write_sealed(folder / "manifest.json", manifest | {name: "0123456789ab"})
        changed = vlarl("run", "--resume", folder, check=False)
        assert changed.returncode == 2
        assert "was 0123456789ab and is now" in changed.stderr.splitlines()[-1]
        write_sealed(folder / "manifest.json", manifest)
    empty = tmp_path / "empty"
    empty.mkdir()
    refused = vlarl("run", "--resume", empty, check=False)
    assert refused.returncode == 2
    assert "not a run folder" in refused.stderr or "config.json" in refused.stderr


def test_demonstrations_that_are_too_few_are_added_to_and_the_manifest_says_what_was_learned_from(
    toy, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    few = ["--suite", "toy-arm", "--tasks", "one", "--workers", "1"]
    sft = ["run", "--algo", "sft", "--base", "scratch", *few, "--budget", "smoke", "--budget.gradient-steps", "2"]
    sft += ["--budget.batch-size", "8", "--threads", "1"]
    sft += ["--budget.eval-states", "1", "--budget.iterations", "1", "--no-video"]

    def manifest(demos, *arguments):
        out = tmp_path / f"run{demos}{len(arguments)}"
        vlarl(*sft, "--budget.demos", demos, "--out", out, *arguments)
        return json.loads((out / "manifest.json").read_text())["demonstrations"]

    one, two = manifest(1), manifest(2)
    assert (one["episodes"], two["episodes"]) == (1, 2)
    assert one["digest"] != two["digest"]
    assert one["source"] == "vlarl-bench"
    assert manifest(1, "--demos", "demos/toy-arm") == one
    (tmp_path / "demos/toy-arm/meta/vlarl_bench.json").unlink()  # now it is somebody else's LeRobotDataset
    foreign = manifest(2, "--demos", "demos")
    assert foreign["digest"] == two["digest"]
    assert foreign["source"] == "LeRobotDataset"
    assert "cannot be checked" in foreign["held_out"]
