import csv
import dataclasses
import io
import json
import re
import shutil

import pytest

from vlarl_bench.errors import BenchError
from vlarl_bench.files import write_json_atomic
from vlarl_bench.protocol import Protocol
from vlarl_bench.records import EpisodeLog, read_rows
from vlarl_bench.report.lint import lint_runs
from vlarl_bench.report.render import print_table, to_csv, to_json, to_markdown
from vlarl_bench.report.rows import Rows
from vlarl_bench.report.runs import read_run, read_runs
from vlarl_bench.report.table import comparison_table, summary_table
from vlarl_bench.sealed import read_sealed, write_sealed
from vlarl_bench.stats import wilson_interval


def gains_first_task(task, state, repeat):
    return task.endswith("pick_it_up") or repeat == 0


def test_comparison_counts_by_hand(make_run, outcomes):
    run = read_run(make_run("r", base=outcomes["half"], final=gains_first_task, train=((1, True), (1, True))))
    table = comparison_table(run)
    first, second, total = table.records
    # two tasks x four states x two repeats; `half` wins 4 of 8
    assert (first["task"], first["base_successes"], first["successes"], first["episodes"]) == ("pick_it_up", 4, 8, 8)
    assert (second["base_successes"], second["successes"], second["difference"]) == (4, 4, 0.0)
    assert (total["base_successes"], total["successes"], total["episodes"]) == (8, 12, 16)
    assert total["difference"] == pytest.approx(4 / 16)
    assert (total["low"], total["high"]) == pytest.approx(wilson_interval(12, 16))
    assert (total["n_clusters"], total["gained"], total["lost"]) == (8, 4, 0)
    assert total["p_value"] == pytest.approx(2 / 16)  # four clusters gained 1 each, four did not change
    assert table.columns == ("task", "base", "fpo", "change, pp [95%]", "p")
    assert table.lines[2][0] == "all 2 tasks"
    assert table.lines[2][1].startswith("8/16 50% [")
    assert table.lines[2][4] == "0.1250"
    assert total["complete"]


def test_the_notes_say_what_stands_behind_the_numbers(make_run, outcomes):
    run = read_run(make_run("r", base=outcomes["half"], final=outcomes["always"]))
    text = to_markdown(comparison_table(run))
    for words in (
        "2 of 20 tasks of suite", run.manifest["protocol"]["label"], "privileged", "sampled", "4-7", "2 episode(s)",
        "seed 0", "16 base and 16 scored episodes", "Wilson",
    ):  # fmt: skip
        assert words in text


def test_training_rows_never_count(make_run, outcomes):
    without = make_run("a", base=outcomes["half"], final=outcomes["half"])
    with_them = make_run("b", base=outcomes["half"], final=outcomes["half"], train=((1, True),) * 8)
    a, b = (comparison_table(read_run(folder)) for folder in (without, with_them))
    assert a.lines == b.lines
    assert a.notes[:-1] == b.notes[:-1]  # the last says what training took


@pytest.mark.parametrize("skipped", [1, 4])
def test_missing_episodes_are_seen(make_run, outcomes, skipped):
    folder = make_run("r", base=outcomes["half"], final=outcomes["always"], skip=(4, 5, 6, 7)[:skipped])
    table = comparison_table(read_run(folder))
    assert not table.records[-1]["complete"]
    shown = "12/12 100% INCOMPLETE (12 of 16)" if skipped == 1 else "not run"
    assert table.lines[-1][2] == shown
    if skipped == 1:
        assert table.lines[-1][3:] == ("+50.0 INCOMPLETE", "-")
        assert table.records[-1]["low"] is table.records[-1]["p_value"] is table.records[-1]["mcnemar_p"] is None
    assert any("--resume" in note for note in table.notes)
    assert json.loads(to_json(table))["cells"][0]["complete"] is False


def test_only_the_latest_final_iteration_counts(make_run, outcomes):
    run = read_run(make_run("r", base=outcomes["half"], final=outcomes["always"]))
    earlier = [
        dataclasses.replace(row, iteration=1, success=False, return_=0.0) for row in run.rows if row.phase == "final"
    ]
    both = dataclasses.replace(run, rows=Rows.of([*run.rows, *earlier]))
    assert comparison_table(both).records[-1]["successes"] == 16


def test_an_evaluation_alone_has_no_base(make_run, outcomes):
    run = read_run(make_run("r", evaluated=outcomes["half"]))
    table = comparison_table(run)
    assert table.columns == ("task", "pi0-tiny")
    assert table.records[-1]["successes"] == 8
    assert table.records[-1]["complete"]
    assert summary_table([run]).lines[0][6:] == ("-", "8/16 50% [28, 72]", "-", "-")


def some(*states):
    """Succeeds from these initial states only."""
    return lambda task, state, repeat: state in states


def test_what_was_played_without_noise_stands_apart(make_run, outcomes):
    run = read_run(make_run("r", base=outcomes["half"], final=outcomes["always"], noiseless=(some(4, 5, 6), some(4))))
    assert run.missing == 0
    table = comparison_table(run)
    assert table.totals == 2
    assert [record["decoding"] for record in table.records[-2:]] == ["sampled", "zero-noise"]
    both, quiet = table.lines[-2:]
    assert both[:4] == ("all 2 tasks", "8/16 50% [28, 72]", "16/16 100% [81, 100]", "+50.0 [+3.1, +76.9]")
    assert quiet[0] == "all 2 tasks, without noise"
    assert quiet[1].startswith("6/8 75%") and quiet[2].startswith("2/8 25%") and quiet[3].startswith("-50.0 [")
    (cell,) = table.cells
    assert (cell["episodes"], cell["noiseless"]["episodes"], cell["noiseless"]["difference"]) == (16, 8, -0.5)
    assert any(note.startswith("Without noise: ") for note in table.notes)
    (line,) = summary_table([run]).lines
    assert line[-1].startswith("6/8 to 2/8, -50.0 [")


def test_without_noise_over_seeds_resamples_seeds(make_run, outcomes):
    afters = (some(4), some(4, 5), some(4, 5, 6))
    folders = [
        make_run(f"r{i}", base=outcomes["half"], final=outcomes["always"], noiseless=(some(4), after), seed=i)
        for i, after in enumerate(afters)
    ]
    table = summary_table(read_runs(folders))
    assert [line[-1].partition(",")[0] for line in table.lines] == [
        "2/8 to 2/8",
        "2/8 to 4/8",
        "2/8 to 6/8",
        "6/24 to 12/24",
    ]
    half = 4.302653 * 0.25 / 3**0.5
    assert table.lines[-1][-1] == f"6/24 to 12/24, +25.0 [{25 - 100 * half:+.1f}, {25 + 100 * half:+.1f}]"
    # One that did not play so leaves the experiment without a score of that kind.
    folders.append(make_run("older", base=outcomes["half"], final=outcomes["always"], seed=3))
    table = summary_table(read_runs(folders))
    assert [line[-1] == "-" for line in table.lines] == [False, False, False, True, True]


def test_episodes_without_noise_that_are_missing_are_seen(make_run, outcomes):
    whole = read_run(make_run("r", base=outcomes["half"], final=outcomes["always"], noiseless=(some(4), some(4, 5))))
    sampled, final = whole.rows.column("decoding") == "sampled", whole.rows.column("phase") == "final"
    part = sampled | ~(final & (whole.rows.column("init_state") == 4))
    for kept, missing, text in ((part, 2, "2/8 to 2/6, +33.3 INCOMPLETE"), (sampled, 16, "not run")):
        run = dataclasses.replace(whole, rows=whole.rows.where(kept))
        assert run.missing == missing
        assert summary_table([run]).lines[-1][-1] == text
        for table in (comparison_table(run), summary_table([run])):
            assert any(note.startswith("INCOMPLETE") for note in table.notes)
        assert any("fpo lacks some of those without noise" in each for each in lint_runs([run]))
    assert comparison_table(run).lines[-1][1:3] == ("not run", "not run")
    assert not any("lacks" in each for each in lint_runs([whole]))


@pytest.mark.parametrize(("protocol", "phase", "decoding"), [
    ("sampled", "eval", "zero-noise"), ("zero-noise", "final", "sampled"), ("zero-noise", "base", "sampled"),
])  # fmt: skip
def test_scores_that_are_decoded_otherwise_than_the_protocol_says_are_refused(
    make_run, outcomes, protocol, phase, decoding
):
    told = Protocol("p", 1, "state", {"suite_a": 200}, 10, 8, (0, 1), (4, 5), decoding=protocol)
    played = (
        {"evaluated": outcomes["half"]} if phase == "eval" else {"base": outcomes["half"], "final": outcomes["half"]}
    )
    run = read_run(make_run("r", protocol=told, **played))
    rows = [dataclasses.replace(row, decoding=decoding) if row.phase == phase else row for row in run.rows]
    with pytest.raises(BenchError, match=f"is {decoding}, but the protocol decodes {protocol}"):
        dataclasses.replace(run, rows=Rows.of(rows))


def test_suites_of_a_group_have_cells_of_their_own(make_run, outcomes):
    tasks = ("suite_a/x", "suite_b/x")
    run = read_run(make_run("r", base=outcomes["never"], final=lambda t, s, r: t == "suite_a/x", tasks=tasks))
    for table in (comparison_table(run), summary_table([run])):
        assert [(c["suite"], c["successes"], c["episodes"], c["seeds"]) for c in table.cells] == [
            ("suite_a", 8, 8, [0]),
            ("suite_b", 0, 8, [0]),
        ]
    assert comparison_table(run).lines[0][0] == "suite a/x"


def seeds(make_run, outcomes, **more):
    finals = [gains_first_task, outcomes["always"], outcomes["half"]]
    return [make_run(f"{more}{i}", base=outcomes["half"], final=f, seed=i, **more) for i, f in enumerate(finals)]


def test_seeds_are_listed_and_summed_up(make_run, outcomes):
    table = summary_table(read_runs(seeds(make_run, outcomes)))
    assert [line[4] for line in table.lines] == ["0", "1", "2", "all 3 seeds"]
    (cell,) = table.cells
    assert (cell["seeds"], cell["episodes"], cell["successes"]) == ([0, 1, 2], 48, 12 + 16 + 8)
    assert (cell["base_episodes"], cell["base_successes"]) == (48, 24)
    assert cell["difference"] == pytest.approx(0.25)  # of 0.25, 0.5 and 0
    half = 4.302653 * 0.25 / 3**0.5
    assert cell["difference_low"] == pytest.approx(0.25 - half, abs=1e-6)
    assert len(cell["runs"]) == 3
    assert cell["difference_resamples"] == "seeds" and cell["low"] is cell["resamples"] is None
    assert {(run["resamples"], run["difference_resamples"]) for run in cell["runs"]} == {("episodes", "initial states")}


def test_seeds_of_which_one_lacks_episodes_have_no_interval_together(make_run, outcomes):
    folders = seeds(make_run, outcomes)
    part = make_run("part", base=outcomes["half"], final=outcomes["always"], seed=3, skip=(4,))
    table = summary_table(read_runs([*folders, part]))
    assert table.lines[-1][4] == "all 4 seeds" and table.lines[-1][-2].endswith(" INCOMPLETE")
    assert table.cells[0]["difference_low"] is table.cells[0]["p_value"] is None


def test_what_training_took_stands_beside_the_score(make_run, outcomes):
    rounds = (((1, True), (1, False)), ((1, True),))
    made = [make_run(f"r{i}", base=outcomes["half"], final=outcomes["half"], seed=i, train=each, gradient_steps=5)
            for i, each in enumerate(rounds)]  # fmt: skip
    table = summary_table(read_runs(made))
    assert [line[3] for line in table.lines] == ["200 / 5", "100 / 5", "150 / 5"]
    assert (table.cells[0]["env_steps"], table.cells[0]["train_episodes"]) == (150, 1.5)
    note = comparison_table(read_run(made[0])).notes[-1]
    assert note == f"Base policy pi0-tiny {'0' * 12}. Training: 2 episodes, 200 steps, 5 gradient steps."


def test_another_base_policy_is_another_experiment(make_run, outcomes):
    """As after a prior was trained anew: its runs are no seeds of the older one's."""
    made = [make_run(f"r{i}", base=outcomes["half"], final=outcomes["always"], seed=i) for i in range(2)]
    write_sealed(made[1] / "manifest.json", read_sealed(made[1] / "manifest.json") | {"base_checkpoint": "1" * 12})
    assert [cell["seeds"] for cell in summary_table(read_runs(made)).cells] == [[0], [1]]


def test_other_settings_are_another_experiment(make_run, outcomes):
    real = seeds(make_run, outcomes, config={"rewards": "success"})
    control = make_run("control", base=outcomes["half"], final=outcomes["half"], config={"rewards": "shuffled"})
    table = summary_table(read_runs([*real, control]))
    assert [(cell["settings"], cell["seeds"]) for cell in table.cells] == [
        ("rewards=success", [0, 1, 2]),  # the better one
        ("rewards=shuffled", [0]),
    ]
    assert table.columns[3] == "settings"


def test_what_a_budget_has_for_others_is_no_other_experiment(make_run, outcomes):
    """Who learns from its own episodes reads no number of demonstrations; who learns from these plays none."""
    numbers = {"tasks": 2, "iterations": 6, "episodes": 72, "demos": 25, "gradient_steps": 180, "batch_size": 256}

    def settings(name, learner=False, **changes):
        budget = {"budget": numbers | changes}
        run = read_run(make_run(name, base=outcomes["half"], final=outcomes["always"], config=budget))
        given = {"demonstrations": {"digest": "d" * 12}} if learner else {}
        return dataclasses.replace(run, manifest=run.manifest | given).settings()

    same = settings("a")
    assert settings("b", demos=3, gradient_steps=1, batch_size=2) == same != settings("c", episodes=1)
    learned = settings("d", learner=True)
    assert settings("e", learner=True, episodes=1) == learned != settings("f", learner=True, gradient_steps=1)


def test_a_narrow_terminal_says_what_is_the_same_once_and_keeps_p(make_run, outcomes, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    screen = io.StringIO()
    screen.isatty = lambda: True
    print_table(summary_table(read_runs(seeds(make_run, outcomes))), screen)
    text = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    assert f"base policy: pi0-tiny {'0' * 12}, in every line." in text and " 0.0078 " in text
    assert max(map(len, text.splitlines()[:20])) <= 80


def test_an_algorithm_s_settings_are_named_as_its_page_names_them(make_run, outcomes):
    folders = [make_run(f"r{clip}", base=outcomes["half"], final=outcomes["half"], config={"settings": {"clip": clip}})
               for clip in (0.1, 0.2)]  # fmt: skip
    assert [cell["settings"] for cell in summary_table(read_runs(folders)).cells] == ["clip=0.1", "clip=0.2"]


def test_algorithms_are_not_told_apart_by_their_own_settings(make_run, outcomes):
    fpo = make_run("a", base=outcomes["half"], final=outcomes["half"], config={"settings": {"clip": 0.1}})
    sft = make_run("b", base=outcomes["half"], final=outcomes["half"], algorithm="sft", config={"settings": {"lr": 1}})
    table = summary_table(read_runs([fpo, sft]))
    assert [cell["algorithm"] for cell in table.cells] == ["fpo", "sft"]
    assert "settings" not in table.columns


def test_a_seed_counts_once(make_run, outcomes):
    folder = make_run("r", base=outcomes["half"], final=outcomes["half"])
    assert len(read_runs([folder, str(folder)])) == 1
    shutil.copytree(folder, folder.parent / "copy")
    with pytest.raises(BenchError, match=r"r and .*copy are seed 0 of the same experiment"):
        summary_table(read_runs([folder, folder.parent / "copy"]))


def test_a_folder_that_holds_runs_is_told_so(make_run, outcomes, tmp_path):
    folder = make_run("r", base=outcomes["half"])
    with pytest.raises(BenchError, match=f"; 1 of these below it: name {folder}$"):
        read_runs([tmp_path])


def test_protocols_do_not_mix(make_run, outcomes):
    first = make_run("a", base=outcomes["half"])
    run = read_run(first)
    other = Protocol("tiny-state", 2, "state", {"suite_a": 100}, 10, 8, (0, 1), (4, 5))
    second = make_run("b", base=outcomes["half"], protocol=other)
    with pytest.raises(BenchError, match="do not compare") as caught:
        read_runs([first, second])
    assert run.manifest["protocol"]["label"] in str(caught.value)
    assert other.label in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"protocol": "0" * 12}, "has protocol 000000000000, but the manifest says"),
        ({"task": "another"}, "of a task that the manifest does not list"),
        ({"init_state": 0}, "does not hold out"),
    ],
)
def test_rows_that_contradict_the_manifest_are_refused(make_run, outcomes, fields, words):
    folder = make_run("r", base=outcomes["half"])
    run = read_run(folder)
    with pytest.raises(BenchError, match=words):
        dataclasses.replace(run, rows=Rows.of([dataclasses.replace(run.rows[0], **fields)]))


def test_an_unfinished_last_line_is_told(make_run, outcomes):
    folder = make_run("torn", base=outcomes["half"], final=outcomes["always"])
    assert not any("unfinished" in note for note in comparison_table(read_run(folder)).notes)
    log = folder / "episodes.jsonl"
    log.write_bytes(log.read_bytes()[:-1])
    for table in (comparison_table(read_run(folder)), summary_table(read_runs([folder]))):
        (note,) = [note for note in table.notes if "unfinished" in note]
        assert note.startswith(f"{log}: its last line is unfinished and left out")
        assert f"vlarl-bench run --resume {folder}" in note


def test_training_on_a_held_out_state_is_refused(make_run, outcomes):
    folder = make_run("leak", base=outcomes["never"], final=outcomes["always"], train=((1, True),))
    leak = dataclasses.replace(read_rows(folder / "episodes.jsonl")[-1], init_state=5)
    with EpisodeLog(folder / "episodes.jsonl") as log:
        log.append(leak)
    with pytest.raises(BenchError, match="trains on an initial state"):
        read_run(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 7}, "seed is 7 in manifest.json and 0"),
        ({"run": "other"}, "is of the run"),
        ({"policy": "huge"}, "'huge'"),
    ],
)
def test_a_manifest_that_was_altered_is_refused(make_run, outcomes, change, words):
    folder = make_run("altered", base=outcomes["never"], final=outcomes["always"])
    manifest = read_sealed(folder / "manifest.json")
    write_sealed(folder / "manifest.json", manifest | change)
    with pytest.raises(BenchError, match=words):
        read_run(folder)
    write_sealed(folder / "manifest.json", manifest | {"protocol": manifest["protocol"] | {"settle_steps": 3}})
    with pytest.raises(BenchError, match="does not have the hash it claims"):
        read_run(folder)


def test_a_control_says_that_it_is_one(make_run, outcomes, tmp_path):
    shuffled = make_run("control", base=outcomes["half"], final=outcomes["half"], config={"rewards": "shuffled"})
    true = make_run("true", base=outcomes["half"], final=outcomes["half"], config={"rewards": "success"})
    assert "CONTROL" in comparison_table(read_run(shuffled)).title
    assert "CONTROL" not in comparison_table(read_run(true)).title


def test_what_is_not_a_run_folder_is_named(tmp_path, make_run, outcomes):
    with pytest.raises(BenchError, match="not a run folder"):
        read_run(tmp_path / "nothing")
    folder = make_run("r", base=outcomes["half"])
    write_json_atomic(folder / "manifest.json", {"run": "r"})
    with pytest.raises(BenchError, match="not of this version; algorithm is missing"):
        read_run(folder)
    with pytest.raises(BenchError, match="none given"):
        summary_table([])


def test_renderers_agree(make_run, outcomes):
    table = summary_table(read_runs(seeds(make_run, outcomes)))
    drawn = io.StringIO()
    print_table(table, drawn)
    markdown = to_markdown(table)
    for line in table.lines:
        assert "| " + " | ".join(line) + " |" in markdown
        assert all(text in drawn.getvalue() for text in line)
    for note in table.notes:
        assert note in markdown
        assert note[:60] in drawn.getvalue()
    parsed = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [int(row["successes"]) for row in parsed] == [12, 16, 8, 36]
    cells = json.loads(to_json(table))["cells"]
    assert {"algorithm", "policy", "suite", "seeds", "episodes", "successes"} <= cells[0].keys()
