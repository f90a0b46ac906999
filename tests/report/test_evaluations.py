"""Evaluations of policies that runs fine-tuned, beside evaluations of what they began with, as lines of comparisons."""

import json

import pytest

from vlarl_bench import cli
from vlarl_bench.errors import BenchError
from vlarl_bench.report.gains import gains_table
from vlarl_bench.report.lint import lint_runs
from vlarl_bench.report.paper import paper_table
from vlarl_bench.report.runs import read_run, read_runs

BASE = "0" * 12
ELSEWHERE = ("suite_b/one", "suite_b/two")


@pytest.fixture
def evaluate(make_run, outcomes):
    """Writes an evaluation of the prior, or of what a run made of it."""

    def make(name, seed, success="always", tasks=ELSEWHERE, algorithm="fpo", trained=True, config=None, **settings):
        flat = {"algorithm": algorithm, "base": BASE, "budget.demos": 3, **settings}
        lineage = {"base_checkpoint": BASE, "seed": seed, "settings": flat}
        return make_run(name, evaluated=outcomes[success], seed=seed, tasks=tasks, algorithm=algorithm, config=config,
                        trained=lineage if trained else None, env_steps=900 if trained else 0)  # fmt: skip

    return make


def test_they_are_seeds_of_their_method_and_pair_with_the_priors(evaluate):
    folders = [evaluate(f"fpo{seed}", seed) for seed in range(3)]
    folders += [evaluate(f"prior{seed}", seed, "half", algorithm="sft", trained=False) for seed in range(4)]
    (record,) = gains_table(read_runs(folders)).records
    assert record["algorithm"] == "fpo" and record["seeds"] == [0, 1, 2] and record["suite"] == "suite_b"
    assert (record["base_successes"], record["base_episodes"]) == (24, 48)  # of seeds 0 to 2
    assert (record["successes"], record["episodes"], record["gain"]["value"]) == (48, 48, 0.5)
    base, fpo = paper_table(read_runs(folders)).lines
    assert base[0] == "base policy" and base[2] == "none" and fpo[2] == "900 steps"


def test_several_suites_are_one_line_with_one_base_policy(evaluate):
    other = ("suite_a/one",)
    folders = [evaluate(f"fpo{seed}-{len(on)}", seed, tasks=on) for seed in (0, 1) for on in (ELSEWHERE, other)]
    folders += [evaluate(f"prior-{len(on)}", 0, "half", on, trained=False) for on in (ELSEWHERE, other)]
    table = paper_table(read_runs(folders))
    assert [line[0] for line in table.lines] == ["base policy", "fpo"]
    assert [(cell["episodes"], cell["expected"]) for cell in table.cells] == [(8, 8), (16, 16), (16, 16), (32, 32)]


def test_a_suite_that_some_of_the_seeds_played_is_theirs_alone(evaluate, tmp_path):
    """As where runs of several seeds are published with one seed's evaluations elsewhere."""
    played = [(0, ELSEWHERE), (1, ELSEWHERE), (1, ("suite_a/one",))]
    folders = [evaluate(f"fpo{seed}-{len(on)}", seed, tasks=on) for seed, on in played]
    folders += [evaluate(f"prior{seed}-{len(on)}", seed, "half", on, trained=False) for seed, on in played]
    for table in (paper_table(read_runs(folders)), gains_table(read_runs(folders))):
        found = {(cell["algorithm"], cell["suite"]): cell for cell in table.records or table.cells}
        assert found["fpo", "suite_b"]["seeds"] == [0, 1] and found["fpo", "suite_a"]["seeds"] == [1]
    assert {line[3] for line in paper_table(read_runs(folders)).lines} == {"1 or 2"}
    assert {line[4] for line in gains_table(read_runs(folders)).lines} == {"1", "2"}
    shown = {(cell["algorithm"], cell["suite"]): cell["rate"] for cell in paper_table(read_runs(folders)).cells}
    assert shown["base policy", "suite_a"] == 0.5 and shown["fpo", "suite_a"] == 1
    assert cli.main(["leaderboard", *map(str, folders), "--published", "", "--out", str(tmp_path / "page")]) == 0


def test_beside_the_runs_that_made_them(evaluate, make_run, outcomes):
    run = make_run("run", base=outcomes["half"], final=outcomes["always"], train=((1, True),) * 3,
                   config={"budget": {"demos": 3, "eval_states": 4, "eval_repeats": 2}})  # fmt: skip
    settings = {name: value for name, value in read_run(run).settings().items() if name != "base"}
    folders = [run, evaluate("fpo", 0, **settings), evaluate("prior", 0, "half", trained=False)]
    base, fpo = paper_table(read_runs(folders)).lines
    assert base[0] == "base policy" and fpo[0] == "fpo"
    assert fpo[2] == "3 episodes, 300 steps"  # of the run, which has them
    with pytest.raises(BenchError, match="same experiment; give one"):
        paper_table(read_runs([*folders, evaluate("again", 0, tasks=("suite_a/pick_it_up",), **settings)]))


def test_how_many_episodes_a_suite_was_judged_by_makes_no_other_method(evaluate):
    """As where a look at another suite takes fewer states than the comparison."""
    other, fewer = ("suite_a/one",), {"states": 2}
    folders = [evaluate("here", 0), evaluate("there", 0, tasks=other, config=fewer),
               evaluate("prior-here", 0, "half", trained=False),
               evaluate("prior-there", 0, "half", other, trained=False, config=fewer)]  # fmt: skip
    assert [line[0] for line in paper_table(read_runs(folders)).lines] == ["base policy", "fpo"]
    assert {line[1] for line in gains_table(read_runs(folders)).lines} == {"fpo"}
    again = evaluate("again", 1, config=fewer)  # on a suite that others were judged on by more
    assert [line[0] for line in paper_table(read_runs([*folders, again])).lines[1:]] == [
        "fpo", "fpo (budget.eval_states=2)", "fpo (budget.eval_states=4)"]  # fmt: skip


def test_settings_tell_them_apart_and_a_control_is_one(evaluate):
    folders = [evaluate("a", 0, rewards="success"), evaluate("b", 0, "never", rewards="shuffled"),
               evaluate("prior", 0, "half", trained=False)]  # fmt: skip
    assert [line[1] for line in gains_table(read_runs(folders)).lines] == [
        "fpo (rewards=success)", "fpo CONTROL (rewards=shuffled)"]  # fmt: skip
    assert "fpo on pi0-tiny" in read_run(folders[0]).title and "CONTROL" in read_run(folders[1]).title


def test_without_the_prior_there_is_no_gain(evaluate, capsys):
    folder = evaluate("fpo", 0)
    assert gains_table(read_runs([folder])).lines == ()
    assert cli.main(["table", str(folder), str(evaluate("other", 1)), "--format", "markdown"]) == 0
    assert f"| fpo (evaluation) | pi0-tiny {BASE} | suite_b |" in capsys.readouterr().out


def test_few_seeds_are_found_by_lint(evaluate):
    found = lint_runs(read_runs([evaluate("fpo", 0), evaluate("prior", 0, "half", trained=False)]))
    assert any("1 training seed(s)" in each and "fpo" in each for each in found)


def test_a_manifest_that_does_not_say_where_it_came_from(make_run, outcomes):
    folder = make_run("r", evaluated=outcomes["half"], trained={"seed": 0})
    with pytest.raises(BenchError, match=r"of this version; trained\.base_checkpoint is missing, trained\.settings is"):
        read_run(folder)
    with pytest.raises(BenchError, match=r"not of this version; trained\.base_checkpoint is missing"):
        read_run(make_run("s", evaluated=outcomes["half"], trained={1: 2}))


@pytest.mark.parametrize(("trained", "seed"), [({"base_checkpoint": BASE}, 7), ({"base_checkpoint": "scratch"}, 0)])
def test_the_noise_is_of_the_run_s_seed_unless_that_began_from_nothing(tmp_path, trained, seed):
    card = {"trained": {"seed": 7, "settings": {}, **trained}}
    for name, content in (("config.json", card), ("hashes.json", {})):
        (tmp_path / name).write_text(json.dumps(content))
    assert cli._seed_of(tmp_path) == seed
    (tmp_path / "config.json").write_text(json.dumps({"trained": {"seed": "7"}}))
    with pytest.raises(BenchError, match="trained must have base_checkpoint, seed, settings"):
        cli._seed_of(tmp_path)
