import csv
import dataclasses
import io
import json

import numpy as np
import pytest

from vlarl_bench import cli
from vlarl_bench.errors import BenchError
from vlarl_bench.records import EpisodeLog, MetricsLog, read_rows
from vlarl_bench.report.cost import cost_table
from vlarl_bench.report.methods import base_of, cell, compared_methods, scores
from vlarl_bench.report.paper import aggregate_table, paper_table
from vlarl_bench.report.published import read_published
from vlarl_bench.report.render import print_table, to_csv, to_json, to_latex, to_markdown
from vlarl_bench.report.rows import Rows
from vlarl_bench.report.runs import read_run, read_runs
from vlarl_bench.report.table import summary_table
from vlarl_bench.sealed import read_sealed, write_sealed
from vlarl_bench.stats import wilson_interval


def at_most(limit):
    """Succeeds on the first `limit` of the eight episodes of a task."""
    return lambda task, state, repeat: 2 * (state - 4) + repeat < limit


@pytest.fixture
def folders(make_run):
    """Three seeds each of a strong and a weak method, from one base policy."""
    made = []
    for seed in range(3):
        for name, limit in (("strong", 7), ("weak", 3)):
            made.append(
                make_run(
                    f"{name}{seed}", base=at_most(2), final=at_most(limit - seed % 2), seed=seed, algorithm=name,
                    train=((1, False), (1, True), (2, True), (2, True)),
                )
            )  # fmt: skip
    return made


def test_methods_are_grouped_and_bases_counted_once(folders):
    base, strong, weak = compared_methods(read_runs(folders))
    assert (base.is_base, strong.name, weak.name) == (True, "strong", "weak")
    assert base.played("suite_a").sum() == 3 * 16  # of six runs, two a seed that played the same episodes
    assert strong.seeds_on("suite_a") == (0, 1, 2)
    assert base_of(strong, [base]) is base and base_of(base, [base]) is None
    assert strong.budget() == {"train_episodes": 4, "env_steps": 400}
    assert scores(strong, "suite_a").tolist() == [[7 / 8, 7 / 8], [6 / 8, 6 / 8], [7 / 8, 7 / 8]]


def test_random_weights_of_any_seed_are_one_start_and_other_demonstrations_another_experiment(make_run):
    def trained(name, seed, digest):
        folder = make_run(name, final=at_most(4), seed=seed, algorithm="sft", config={"base": "scratch"})
        manifest = read_sealed(folder / "manifest.json") | {"demonstrations": {"digest": digest}}
        write_sealed(folder / "manifest.json", manifest | {"base_checkpoint": f"{seed:012d}"})
        return folder

    made = [trained(f"a{seed}", seed, "one") for seed in range(3)]
    (method,) = compared_methods(read_runs(made))
    assert (method.seeds_on("suite_a"), method.checkpoint) == ((0, 1, 2), "scratch")
    several = compared_methods(read_runs([*made, trained("b", 3, "two")]))
    assert [one.seeds_on("suite_a") for one in several] == [(0, 1, 2), (3,)]


def test_a_curve_is_of_one_suite(make_run):
    """With both suites' tasks in one run; training episodes are of the first."""
    both = ("suite_a/one", "suite_b/one")
    run = make_run("r", base=at_most(2), final=at_most(4), tasks=both, train=((1, False), (2, True)))
    areas = {record["suite"]: record["area"] for record in aggregate_table(read_runs([run])).cells if record["area"]}
    assert set(areas) == {"suite_a"}


def test_a_manifest_that_lacks_something_is_named(folders):
    manifest = read_sealed(folders[0] / "manifest.json")
    for lost, named in ((("argv",), "argv"), (("evaluation", "repeats"), "evaluation.repeats")):
        fewer = json.loads(json.dumps(manifest))
        inner = fewer if len(lost) == 1 else fewer[lost[0]]
        del inner[lost[-1]]
        write_sealed(folders[0] / "manifest.json", fewer)
        with pytest.raises(BenchError, match=f"not of this version; {named} is missing"):
            read_run(folders[0])


@pytest.mark.parametrize("value", [7, [1, "x"], {"tasks": 3}])
def test_a_manifest_or_config_with_anything_in_the_place_of_something_is_told_in_one_line(folders, value):
    """Somebody else's, say; also within the tables that they have."""
    for name in ("manifest.json", "config.json"):
        whole = read_sealed(folders[0] / name)
        inside = [(outer, inner) for outer, found in whole.items() if isinstance(found, dict) for inner in found]
        for keys in [(outer,) for outer in whole] + inside:
            changed = json.loads(json.dumps(whole))
            place = changed if len(keys) == 1 else changed[keys[0]]
            place[keys[-1]] = value
            write_sealed(folders[0] / name, changed)
            assert cli.main(["lint", str(folders[0])]) in (0, 1, 2), keys
        write_sealed(folders[0] / name, whole)


def test_a_cell_over_seeds_has_students_interval_and_one_seed_wilsons(folders):
    _, strong, _ = compared_methods(read_runs(folders))
    found = cell(strong, "suite_a")
    assert (found["episodes"], found["successes"], found["rate"]) == (48, 40, pytest.approx(40 / 48))
    error = np.std([7 / 8, 6 / 8, 7 / 8], ddof=1) / 3**0.5
    assert found["low"] == pytest.approx(40 / 48 - 4.302653 * error)
    assert found["resamples"] == "seeds"
    alone = cell(compared_methods(read_runs(folders[:1]))[1], "suite_a")
    assert (alone["low"], alone["high"]) == pytest.approx(wilson_interval(14, 16))
    assert alone["resamples"] == "episodes"


def test_the_best_is_marked(make_run):
    folders = [
        make_run(f"{name}{seed}", base=at_most(1), final=at_most(limit), seed=seed, algorithm=name)
        for seed, limits in enumerate([(8, 2), (7, 2), (8, 3), (7, 2)])
        for name, limit in zip(("strong", "weak"), limits, strict=True)
    ]
    table = paper_table(read_runs(folders))
    marked = [line for line in table.lines if line[-1].endswith(" *")]
    assert [line[0] for line in marked] == ["strong"]
    assert f"**{marked[0][-1]}**" in to_markdown(table)
    assert f"\\textbf{{{marked[0][-1]}}}" in to_latex(table)
    assert [each["best"] for each in json.loads(to_json(table))["cells"]] == [False, True, False]


def test_lines_are_sorted_by_result_below_their_base(make_run, outcomes):
    folders = [
        make_run(f"{policy}{name}", base=outcomes["half"], final=at_most(limit), algorithm=name, policy=policy)
        for policy in ("p", "q") for name, limit in (("a", 3), ("b", 7), ("c", 5))
    ]  # fmt: skip
    for folder in folders:
        if folder.name.startswith("q"):
            manifest = read_sealed(folder / "manifest.json")
            write_sealed(folder / "manifest.json", manifest | {"policy": "q", "base_checkpoint": "1" * 12})
        else:
            write_sealed(folder / "manifest.json", read_sealed(folder / "manifest.json") | {"policy": "p"})
    runs = read_runs(folders)
    assert [line[0] for line in paper_table(runs).lines] == ["base policy", "b", "c", "a"] * 2
    assert [line[1] for line in aggregate_table(runs).lines] == ["base policy", "b", "c", "a"] * 2
    assert {line[2] for line in paper_table(runs).lines[::4]} == {"none"}


def test_a_stopped_run_does_not_cut_the_curves_of_others(folders):
    whole = aggregate_table(read_runs(folders)).records[1]["area"]
    runs = read_runs(folders)
    collapsed = [row for row in runs[-1].rows if row.phase != "train" or row.iteration == 1]
    runs[-1] = dataclasses.replace(runs[-1], rows=Rows.of(collapsed), stopped={"iteration": 1, "reason": "collapsed"})
    table = aggregate_table(runs)
    assert table.records[1]["area"] == whole
    assert any("(400 on suite_a)" in note for note in table.notes)


LAYOUTS = {"runs": summary_table, "paper": paper_table, "aggregate": aggregate_table, "cost": cost_table}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_row_order_and_duplicates_change_nothing(folders, layout):
    for folder in folders:
        with MetricsLog(folder / "metrics.jsonl") as log:
            log.append({"iteration": 1, "env_steps": 200, "gradient_steps": 5, "flops": 7e9})
    before = to_json(layout(read_runs(folders)))
    for folder in folders:
        rows = read_rows(folder / "episodes.jsonl")
        (folder / "episodes.jsonl").unlink()
        with EpisodeLog(folder / "episodes.jsonl") as log:
            log.append_all([*reversed(rows), *rows])
        text = (folder / "episodes.jsonl").read_text()
        (folder / "episodes.jsonl").write_text(text + text)
    assert to_json(layout(read_runs([*reversed(folders), folders[0]]))) == before


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_record_names_base_protocol_budget_and_counts(folders, layout):
    """And every interval in it what it resamples: a CSV file has no notes."""
    for folder in folders:
        with MetricsLog(folder / "metrics.jsonl") as log:
            log.append({"iteration": 1, "env_steps": 200, "gradient_steps": 5, "flops": 7e9})
    lines = list(csv.DictReader(io.StringIO(to_csv(layout(read_runs(folders))))))
    assert lines
    for line in lines:
        for name in ("base_checkpoint", "protocol", "episodes", "successes"):
            assert line[name], name
        assert "seed" in line or line["seeds"]
        assert line.get("env_steps") or line.get("env_steps_whole")
        for low in (name for name in line if name.endswith("low") and line[name]):
            assert line.get(f"{low.removesuffix('low')}resamples") or line["resamples"], low


def test_missing_cells_are_shown(make_run, outcomes):
    whole = make_run("a", base=outcomes["half"], final=outcomes["always"])
    part = make_run("b", base=outcomes["half"], final=outcomes["always"], algorithm="grpo", skip=(4,))
    none = make_run("c", base=outcomes["half"], algorithm="sft")
    other = make_run("d", base=outcomes["half"], final=outcomes["half"], algorithm="dppo", tasks=("suite_b/x",))
    table = paper_table(read_runs([whole, part, none, other]))
    assert table.columns[4:] == ("suite_a", "suite_b", "average")
    shown = {line[0].split(" (")[0]: line[4:] for line in table.lines if not line[0].startswith("base")}
    assert shown["grpo"][0] == "100.0 12/12 INCOMPLETE (12 of 16)"
    assert shown["sft"][0] == "not run"
    assert shown["fpo"][1:] == ("-", "-")
    assert shown["dppo"][1].endswith("4/8")
    assert any("LINT" in note and "12 of 16 episodes" in note for note in table.notes)


def test_the_notes_say_what_is_resampled(folders):
    notes = " ".join(paper_table(read_runs(folders)).notes)
    for words in ("resample training seeds", "Wilson", "Holm", "sign-flip", "suite_a", "Protocol tiny-state@1"):
        assert words in notes


def test_published_numbers_stand_apart(make_run, outcomes, tmp_path):
    run = read_run(make_run("r", base=outcomes["half"], final=outcomes["always"]))
    (tmp_path / "p.toml").write_text(
        '[[result]]\nmethod="M"\nkind="RL"\nbase_policy="B"\nprotocol="P"\nsource="S"\nscores={suite_a=12.5}\n'
        '[[result]]\nmethod="N"\nkind="RL"\nbase_policy="B"\nprotocol="P"\nsource="S"\nscores={elsewhere=1}\n'
    )
    table = paper_table([run], read_published(tmp_path / "p.toml"))
    assert table.copied == 1
    assert table.lines[-1] == ("M, copied", "B", "S; P", "-", "12.5 (copied)")
    assert all(cell["algorithm"] != "M" for cell in table.cells)
    assert any("Copied lines" in note for note in table.notes)
    drawn = io.StringIO()
    print_table(table, drawn)
    assert "M, copied" in drawn.getvalue()
    assert to_latex(table).count("\\midrule") == 2


def test_latex_is_escaped():
    from vlarl_bench.report.table import Table

    text = to_latex(Table("50% & more_", ("a^b ~ c\\d <p>",), ("x#",), (("$1 {y}",),), 0, (), ()))
    assert r"50\% \& more\_" in text
    assert r"x\#" in text and r"\$1 \{y\}" in text
    assert r"a\textasciicircum{}b \textasciitilde{} c\textbackslash{}d $<$p$>$" in text


def test_aggregates_by_hand(folders):
    table = aggregate_table(read_runs(folders), threshold=0.75)
    base, strong, weak = table.records
    assert strong["mean"]["value"] == pytest.approx(40 / 48)
    assert strong["iqm"]["value"] == pytest.approx((6 + 7 + 7 + 7) / 4 / 8)  # 6 6 7 7 7 7 without the ends
    assert strong["improvement"]["value"] == 1.0
    assert weak["improvement"]["value"] == pytest.approx(2 / 3 + 1 / 6)  # 3, 2, 3 against 2: ties count half
    assert base["improvement"] is None and base["area"] is None
    # rounds of 200 steps at 50% and 100%: level to 200, then up to 400
    assert strong["area"]["value"] == pytest.approx((200 * 0.5 + 200 * 0.75) / 400)
    assert strong["rank"] == [1, 2] == weak["rank"] and base["rank"] is None
    assert strong["steps_to"]["value"] is None  # one round is not two in a row
    assert aggregate_table(read_runs(folders), threshold=0.5).lines[1][-1] == "at the start"


def test_csv_is_flat(folders):
    _, strong, _ = csv.DictReader(io.StringIO(to_csv(aggregate_table(read_runs(folders)))))
    assert float(strong["mean_low"]) < float(strong["mean"]) < float(strong["mean_high"])
    assert strong["seeds"] == "0 1 2" and not any("{" in value for value in strong.values())


def test_commands(folders, capsys):
    paths = [str(folder) for folder in folders]
    for layout in ("gains", "paper", "aggregate"):
        for form in ("text", "markdown", "csv", "latex", "json"):
            assert cli.main(["table", *paths, "--layout", layout, "--format", form]) == 0
            out = capsys.readouterr().out
            assert "strong" in out
            if form == "json":
                assert {"algorithm", "policy", "suite", "seeds", "episodes", "successes"} <= json.loads(out)["cells"][
                    0
                ].keys()
    assert cli.main(["table", *paths, "--published", "x"]) == 2
    assert "--layout paper" in capsys.readouterr().err
    with pytest.raises(BenchError, match="none given"):
        paper_table([])
