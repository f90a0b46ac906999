import dataclasses
import json

import pytest

from vlarl_bench import cli, registry
from vlarl_bench.errors import BenchError
from vlarl_bench.records import EpisodeLog, read_rows
from vlarl_bench.report.leaderboard import make_page
from vlarl_bench.report.methods import base_of, compared_methods
from vlarl_bench.report.render import to_json
from vlarl_bench.report.runs import find_runs, read_all
from vlarl_bench.report.submit import Sender, submit
from vlarl_bench.report.table import summary_table
from vlarl_bench.sealed import read_sealed, write_sealed

SUITE = registry.get("suite", "libero_object")
PROTOCOL = SUITE.protocol("state")
SENDER = Sender("Some Lab (X)", "lab@example.org", "CC-BY-4.0", "")


@pytest.fixture
def finished(make_run, outcomes):
    """Writes a finished run of one real task; `manifest` and `config` change what these say."""

    def make(name, manifest=None, **options):
        given = {"base": outcomes["half"], "final": outcomes["always"], "tasks": (SUITE.tasks[0].key,)} | options
        folder = make_run(name, protocol=given.pop("protocol", PROTOCOL), **given)
        whole = read_sealed(folder / "manifest.json")
        whole["suite"], whole["evaluation"]["suite_tasks"] = "libero_object", len(SUITE.tasks)
        for key, value in (manifest or {}).items():
            whole[key] = whole[key] | value if isinstance(value, dict) else value
        write_sealed(folder / "manifest.json", whole)
        return folder

    return make


def test_good_runs_are_added_and_shown_as_theirs(finished, tmp_path):
    ours, theirs = finished("results/ours"), finished("theirs")
    control = finished("control", config={"rewards": "shuffled"})
    pack, notes = submit([theirs, control], SENDER, tmp_path / "results")
    assert pack == tmp_path / "results" / "some-lab-x"
    assert any("1 training seed(s)" in note for note in notes)
    # The same experiment and seed as ours, and yet not another seed of our method, nor in its place.
    runs = find_runs(tmp_path / "results")
    methods = compared_methods(runs)
    labels = sorted(method.label for method in methods)
    assert len(labels) == 5 and sum("submitted by Some Lab (X)" in label for label in labels) == 3
    assert any("CONTROL" in label and "submitted" in label for label in labels)
    for method in methods:
        if not method.is_base:
            assert base_of(method, methods).submitted_by == method.submitted_by
    cells = json.loads(to_json(summary_table(runs)))["cells"]
    assert {(cell["submitted"] or {}).get("contact") for cell in cells} == {None, "lab@example.org"}
    assert "fpo, submitted by Some Lab (X)" in {line[0] for line in summary_table(runs).lines}
    page = make_page(runs, [])
    assert "submitted by Some Lab (X)" in page and '"licence":"CC-BY-4.0"' in page
    assert len(read_all([ours])) == 1


def test_again_adds_nothing_and_a_stranger_cannot_add(finished, tmp_path):
    theirs = finished("theirs")
    for _ in range(2):
        pack, _ = submit([theirs], SENDER, tmp_path / "results")
        assert len(read_all([pack])) == 1
    assert submit([finished("more")], Sender("some lab x", "c", "l", ""), tmp_path / "results") == (
        None, [f"by: {pack} holds results of Some Lab (X); submit under another name"],
    )  # fmt: skip
    none, (line,) = submit([theirs], Sender("Copyists", "c", "l", ""), tmp_path / "results")
    assert none is None and "has the episodes of" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"skip": (30,)}, "not finished, 2 evaluation episodes are missing"),
        ({"manifest": {"suite": "libero_objekt"}}, "'libero_objekt' is not registered"),
        ({"manifest": {"evaluation": {"suite_tasks": 3}}}, "libero_object has 10 tasks, not 3"),
        ({"manifest": {"fingerprint": {"cpu": "another"}}}, "fingerprint has another hash"),
        ({"manifest": {"base_checkpoint": "1" * 12}}, "not of checkpoint 111111111111"),
        ({"manifest": {"algorithm": "ppo"}}, "another algorithm than ppo"),
        ({"config": {"rewards": "bribed"}}, "no way to reward"),
        ({"config": {"protocol": "openpi"}}, "'openpi' shows camera images"),
        ({"protocol": dataclasses.replace(PROTOCOL, settle_steps=3)}, "privileged state) is not tiny-state@2 ("),
        ({"steps": 201}, "longer than the horizon"),
        ({"decoding": "explore"}, "played while exploring"),
        ({"tasks": ("libero_object/juggle",)}, "libero_object has no task libero_object/juggle"),
    ],
)
def test_each_fault_is_one_line_and_nothing_is_added(finished, tmp_path, options, words):
    good, bad = finished("good"), finished("bad", **options)
    pack, lines = submit([good, bad], SENDER, tmp_path / "results")
    assert pack is None and len(lines) == 1 and words in lines[0] and str(bad) in lines[0]
    assert not (tmp_path / "results").exists()


def test_damage_is_one_line_too(finished, tmp_path):
    folder = finished("damaged")
    text = (folder / "episodes.jsonl").read_text()
    (folder / "episodes.jsonl").write_text(text.replace('"success":false', '"success":true ', 1))
    pack, (line,) = submit([folder], SENDER, tmp_path / "results")
    assert pack is None and "damaged line" in line


def test_rows_without_noise_are_of_the_same_base_policy(finished, tmp_path, outcomes):
    folder = finished("theirs", noiseless=(outcomes["half"], outcomes["always"]))
    assert submit([folder], SENDER, tmp_path / "results")[0] is not None
    rows = read_rows(folder / "episodes.jsonl")
    (folder / "episodes.jsonl").unlink()
    with EpisodeLog(folder / "episodes.jsonl") as log:
        for row in rows:
            other = (row.phase, row.decoding) == ("base", "zero-noise")
            log.append(dataclasses.replace(row, checkpoint="2" * 12) if other else row)
    pack, (line,) = submit([folder], SENDER, tmp_path / "others")
    assert pack is None and "not of checkpoint" in line


@pytest.mark.parametrize(("field", "value"), [("by", ""), ("by", "???"), ("contact", "two\nlines"), ("licence", " ")])
def test_the_sender_is_named_in_full(field, value):
    with pytest.raises(BenchError, match=f"^{field}: "):
        _ = Sender(**{**vars(SENDER), field: value}).pack


def test_the_command(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    who = ["--by", "Lab", "--contact", "lab@example.org", "--licence", "CC0"]
    assert cli.main(["submit", str(finished("bad", steps=0)), *who]) == 1
    assert "refused: " in capsys.readouterr().out
    assert cli.main(["submit", str(finished("good")), *who]) == 0
    assert "results/lab: added, submitted by Lab" in capsys.readouterr().out
    assert cli.main(["submit", "good", "--by", "Lab"]) == 2
    assert cli.main(["submit", *who]) == 2
