import dataclasses
import json
from pathlib import Path

import pytest

from vlarl_bench import cli
from vlarl_bench.errors import BenchError
from vlarl_bench.protocol import Protocol
from vlarl_bench.records import EpisodeLog, read_rows
from vlarl_bench.report.lint import average_off, impossible, lint, lint_published, lint_runs
from vlarl_bench.report.published import read_published
from vlarl_bench.report.render import to_json
from vlarl_bench.report.rows import Rows
from vlarl_bench.report.runs import read_run, read_runs
from vlarl_bench.report.table import summary_table
from vlarl_bench.stats import wilson_interval

PUBLISHED = Path(__file__).parents[2] / "results" / "published"


def test_impossible_percentages():
    assert impossible(43.8, 500) == "" == impossible(43.93, 1500)
    assert "219 (43.80%) or 220 (44.00%)" in impossible(43.9, 500)
    assert impossible(101, None) == "no percentage" == impossible(-1, 10)
    assert impossible(66.7, 3) == "" == impossible(97.0, 500)
    assert impossible(66.6, 3)


def test_averages_that_do_not_follow():
    assert "average 87.3" in average_off([97.2, 97.3, 89.4, 65.3], 87.2)
    assert average_off([97.2, 97.3, 89.4, 65.3], 87.3) == ""
    assert average_off([96.8, 98.8, 95.8, 85.2], 94.15) == ""
    assert average_off([65.3, 64.4, 49.8, 51.2], 57.6) == ""  # 57.675 printed short: the parts may have been rounded
    assert average_off([50.0, 60.0], None) == ""


def test_what_is_known_to_be_wrong_in_print_is_found():
    findings = lint_published(read_published(PUBLISHED))
    assert any("pi0-FPO" in each and "87.2" in each for each in findings)
    assert any("43.9" in each and "impossible with 500 episodes" in each for each in findings)
    assert any("protocols: they do not compare" in each for each in findings)
    assert any("94 against 93.8 of piRL Flow-Noise, PPO from pi0, few-shot SFT (57.6)" in each for each in findings)


def test_the_ablation_of_the_fpo_paper_is_carried():
    """Of one task, so not among the scores of the whole suite."""
    scores = [e.scores for e in read_published(PUBLISHED) if e.source == "arXiv 2510.09976, Table II"]
    assert [list(each.values()) for each in scores] == [[78.5], [32.4], [45.1], [61.7], [71.2]]
    assert all("libero_90" not in each for each in scores)


def entry(**changed):
    return {
        "method": "M",
        "kind": "RL",
        "base_policy": "B",
        "protocol": "P",
        "source": "S",
        "scores": {"a": 50.0},
    } | changed


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"method": ""}, "method is ''"),
        ({"kind": "IL"}, "kind is 'IL'"),
        ({"scores": {}}, "scores is {}"),
        ({"scores": {"a": "x"}}, "scores is"),
        ({"printed_average": "x"}, "printed_average is 'x'"),
        ({"episodes": 0}, "episodes is 0"),
        ({"extra": 1}, "extra is unknown"),
    ],
)
def test_published_files_are_checked(tmp_path, changed, words):
    def shown(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k} = {shown(v)}" for k, v in value.items()) + "}"
        return json.dumps(value)

    text = "[[result]]\n" + "".join(f"{name} = {shown(value)}\n" for name, value in entry(**changed).items())
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(BenchError, match="result 1.*" + words):
        read_published(tmp_path)
    (tmp_path / "p.toml").write_text("[[result\n")
    with pytest.raises(BenchError, match="not valid TOML"):
        read_published(tmp_path)


def test_runs_that_are_right_have_no_findings(make_run, outcomes):
    folders = [
        make_run(f"r{seed}", base=outcomes["half"], final=outcomes["half"], seed=seed, train=((1, True),))
        for seed in range(3)
    ]
    assert lint_runs(read_runs(folders)) == []


def test_mixed_protocols(make_run, outcomes):
    other = Protocol("tiny-state", 2, "state", {"suite_a": 100}, 10, 8, (0, 1), (4, 5))
    runs = [
        read_run(make_run("a", evaluated=outcomes["half"])),
        read_run(make_run("b", evaluated=outcomes["half"], protocol=other)),
    ]
    (found,) = [each for each in lint_runs(runs) if "mixed protocols" in each]
    assert "tiny-state@1" in found and "tiny-state@2" in found and str(runs[1].folder) in found


def test_train_rows_in_an_evaluation(make_run, outcomes):
    run = read_run(make_run("r", evaluated=outcomes["half"]))
    explored = dataclasses.replace(run, rows=Rows.of(dataclasses.replace(row, decoding="explore") for row in run.rows))
    assert any("16 scored rows were played while exploring" in each for each in lint_runs([explored]))
    overlapping = Protocol("openpi", 1, "state", {"suite_a": 200}, 10, 8, (4, 5), (4, 5, 6, 7))
    leaky = read_run(make_run("leaky", evaluated=outcomes["half"], protocol=overlapping))
    assert any("evaluates on 2 initial states" in each for each in lint_runs([leaky]))
    folder = make_run("altered", evaluated=outcomes["half"])
    rows = [dataclasses.replace(row, init_state=0, repeat=9) for row in read_rows(folder / "episodes.jsonl")[:1]]
    with EpisodeLog(folder / "episodes.jsonl") as log:
        log.append_all(rows)
    assert any("does not hold out" in each for each in lint([str(folder)]))


def test_unequal_budgets(make_run, outcomes):
    few, many = ((1, True),), ((1, True),) * 8
    runs = [
        read_run(make_run(name, base=outcomes["half"], final=outcomes["half"], algorithm=name, train=train))
        for name, train in (("frugal", few), ("lavish", many))
    ]
    (found,) = [each for each in lint_runs(runs) if "unequal budgets" in each]
    assert "train episodes a run: 1 of frugal; 8 of lavish" in found


def test_a_base_policy_that_two_runs_do_not_agree_on(make_run, outcomes):
    """Of one seed: what another seed's noise led to is no contradiction."""
    runs = [
        read_run(make_run(f"{name}{seed}", base=base, final=outcomes["half"], algorithm=name, seed=seed))
        for name, base in (("a", outcomes["half"]), ("b", outcomes["never"]))
        for seed in (0, 1)
        if seed == 0 or name == "a"
    ]
    (found,) = [each for each in lint_runs(runs) if "ended otherwise" in each]
    assert "base policy: 8 of 32 episodes, of seed 0, ended otherwise in another of its runs" in found


def test_too_few_for_a_claim(make_run, outcomes):
    runs = read_runs([
        make_run(f"{name}{seed}", base=outcomes["half"], final=lambda t, s, r, n=wins[seed]: 2 * (s - 4) + r < n,
                 seed=seed, algorithm=name)
        for name, wins in (("a", (4, 6, 5)), ("b", (5, 6, 6))) for seed in range(3)
    ])  # fmt: skip
    (found,) = lint_runs(runs)  # one line for all pairs, those with the base policy among them
    assert "3 pair(s) differ and are not separated" in found and "more episodes of these would not" in found
    assert "a and b by 8.3 points" in found
    alone = lint_runs([runs[0], runs[3]])
    assert any("1 training seed(s), and a claim about a method takes 3: a, b" in each for each in alone)
    assert any("2 pair(s) differ, by up to 12.5 points, and are not tested" in each for each in alone)


def test_tables_in_json(make_run, outcomes, tmp_path):
    table = json.loads(to_json(summary_table(read_runs([
        make_run(f"r{seed}", base=outcomes["half"], final=outcomes["always"], seed=seed) for seed in range(2)
    ]))))  # fmt: skip
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    assert lint([str(path)]) == []
    for name, value, words in (
        ("successes", 99, "99 successes of 32"),
        ("successes", 31, "successes 31, but its runs add up to 32"),
        ("rate", 0.5, "rate 0.5, but 32/32 is 1"),
        ("seeds", [], "no seeds"),
        ("low", "12%", "low '12%' and high"),
        ("runs", 3, "runs is 3; it must be a list"),
    ):
        path.write_text(json.dumps({"cells": [table["cells"][0] | {name: value}]}))
        assert any(words in each for each in lint([str(path)])), name
    low, high = wilson_interval(1, 32)
    path.write_text(json.dumps({"cells": [table["cells"][0] | {"low": low, "high": high}]}))
    assert any("outside its interval" in each for each in lint([str(path)]))
    path.write_text(json.dumps({"cells": [table["cells"][0] | {"best": True}]}))
    assert any("called best with 2 training seed(s); a claim takes 3" in each for each in lint([str(path)]))
    several = [table["cells"][0] | {"algorithm": name, "train_episodes": n} for name, n in (("a", 8), ("b", 9.0))]
    path.write_text(json.dumps({"cells": several}))
    assert any("unequal budgets, train episodes a run: 8 of a; 9 of b" in each for each in lint([str(path)]))
    path.write_text(json.dumps({"cells": [table["cells"][0], table["cells"][0] | {"protocol": "0"}]}))
    assert any("mixed protocols" in each for each in lint([str(path)]))


def test_the_command_has_a_status(tmp_path, capsys):
    assert cli.main(["lint", str(PUBLISHED)]) == 1
    assert "87.2" in capsys.readouterr().out
    good = tmp_path / "good.toml"
    good.write_text('[[result]]\nmethod="M"\nkind="RL"\nbase_policy="B"\nprotocol="P"\nsource="S"\nscores={a=12.5}\n')
    assert cli.main(["lint", str(good)]) == 0
    assert cli.main(["lint", str(tmp_path / "nothing.csv")]) == 2
    assert cli.main(["lint"]) == 2
