import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from vlarl_bench import cli
from vlarl_bench.errors import BenchError
from vlarl_bench.records import MetricsLog, read_metrics, read_rows
from vlarl_bench.report.pack import PACK, metric_lines, read_pack
from vlarl_bench.report.packing import pack
from vlarl_bench.report.runs import find_runs, read_all, read_run
from vlarl_bench.sealed import read_sealed, write_sealed

LINES = [{"iteration": 1, "loss": 0.1, "flops": 2**53 + 1, "kl": None}, {"iteration": 2, "loss": 1.0}]


@pytest.fixture
def folders(make_run, outcomes):
    """Three seeds of a method, a stopped run of another, and an evaluation."""
    train = ((1, False), (1, True), (2, True))
    made = [
        make_run(f"fpo{seed}", base=outcomes["half"], final=outcomes["always"], seed=seed, train=train)
        for seed in range(3)
    ]
    made.append(make_run("grpo", base=outcomes["half"], final=outcomes["half"], algorithm="grpo", train=train))
    made.append(make_run("eval", evaluated=outcomes["half"]))
    with MetricsLog(made[0] / "metrics.jsonl") as log:
        for line in LINES:
            log.append(line)
    write_sealed(made[3] / "stopped.json", {"iteration": 1, "reason": "the policy fell apart"})
    return [str(folder) for folder in made]


def printed(capsys, *args):
    status = cli.main([*map(str, args)])
    assert status in (0, 1)
    return capsys.readouterr().out


def test_reports_of_a_pack_are_those_of_its_folders_to_the_byte(folders, tmp_path, capsys):
    pack(folders, tmp_path / "packed")
    for command in (
        ("table", "--format", "json"), ("table", "--layout", "paper"), ("table", "--layout", "aggregate"), ("lint",)
    ):  # fmt: skip
        of_folders, of_pack = printed(capsys, *command, *folders), printed(capsys, *command, tmp_path / "packed")
        assert of_pack == of_folders
    assert "the policy fell apart" in printed(capsys, "table", tmp_path / "packed")
    pages = []
    for name, paths in (("a", folders), ("b", [tmp_path / "packed"])):
        printed(capsys, "leaderboard", *paths, "--published", "", "--out", tmp_path / name)
        pages.append((tmp_path / name / "index.html").read_bytes())
    assert pages[0] == pages[1]
    assert printed(capsys, "table", tmp_path / "packed" / "fpo1") == printed(capsys, "table", folders[1])


def test_what_is_read_is_what_was_packed(folders, tmp_path):
    pack(folders, tmp_path / "packed")
    packed = {run.folder.name: run for run in read_all([tmp_path / "packed"])}
    for folder in folders:
        run = read_run(folder)
        other = packed[run.folder.name]
        assert list(other.rows) == read_rows(run.folder / "episodes.jsonl")
        assert (other.manifest, other.stopped) == (run.manifest, run.stopped)
        assert other.config == run.config | {"out": run.folder.name}  # where it lay is nobody's business
    entry = next(entry for entry in read_pack(tmp_path / "packed") if entry.name == "fpo0")
    assert metric_lines(entry.metrics) == LINES == read_metrics(folders[0] + "/metrics.jsonl")
    for name in entry.sha256.keys() - {"config.json"}:  # anyone can check the folder that a pack was made from
        sha256 = entry.sha256[name]
        assert hashlib.sha256((Path(folders[0]) / name).read_bytes()).hexdigest() == sha256


@pytest.mark.parametrize(
    ("asked", "packed"),
    [
        (["--out", "/home/me/x"], ["--out", "fpo0"]),
        (["--out=x"], ["--out=fpo0"]),
        (["--base", "/home/me/runs/x/policy"], ["--base", "x/policy"]),
        (["--base=runs/x/policy"], ["--base=runs/x/policy"]),
        (["--base-from", "/home/me/runs", "--out=x"], ["--out=fpo0"]),
        (["--out=x", "--base-from=/home/me/runs"], ["--out=fpo0"]),
        (["--demos", "/home/me/runs/demos"], ["--demos", "runs/demos"]),
    ],
)
def test_the_command_of_a_packed_run_names_no_place(folders, tmp_path, asked, packed):
    manifest, config = (read_sealed(Path(folders[0]) / name) for name in ("manifest.json", "config.json"))
    write_sealed(Path(folders[0]) / "manifest.json", manifest | {"argv": ["run", *asked, "--seed", "0"]})
    write_sealed(
        Path(folders[0]) / "config.json", config | {"base": "/home/me/runs/x/policy", "demos": "/home/me/demos"}
    )
    pack(folders[:1], tmp_path / "packed")
    (run,) = read_all([tmp_path / "packed"])
    assert run.manifest["argv"] == ["run", *packed, "--seed", "0"] and run.config["base"] == "x/policy"
    assert run.config["demos"] == "me/demos"


def test_a_pack_grows_and_the_order_of_runs_changes_nothing(folders, tmp_path):
    assert pack(folders[:2], tmp_path / "grown")[:2] == (2, 0)
    assert pack(folders[1:], tmp_path / "grown")[:2] == (3, 2)
    assert pack(folders, tmp_path / "grown")[:2] == (0, 5)
    pack([tmp_path / "grown"], tmp_path / "copied")
    pack(folders[::-1], tmp_path / "whole")
    content = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("grown", "whole", "copied")
    ]
    assert content[0] == content[1] == content[2] and len(content[0]) == 3
    assert len(find_runs(tmp_path)) == 5 + 3 * 5  # folders and packs


def test_some_runs_of_a_pack_become_another_pack(folders, tmp_path):
    pack(folders, tmp_path / "whole")
    names = sorted(Path(folder).name for folder in folders)
    assert (
        pack([tmp_path / "whole" / "fpo*"], tmp_path / "some")[0] == sum(name.startswith("fpo") for name in names) > 1
    )
    assert pack([tmp_path / "whole" / names[0]], tmp_path / "one")[0] == 1
    pack([tmp_path / "whole" / name for name in names], tmp_path / "again")
    assert (tmp_path / "again" / PACK).read_bytes() == (tmp_path / "whole" / PACK).read_bytes()
    with pytest.raises(BenchError, match=r"absent\*: .*whole has no run of that name"):
        pack([tmp_path / "whole" / "absent*"], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_contradiction_is_refused_and_the_pack_stays_as_it_was(folders, make_run, outcomes, tmp_path):
    pack(folders, tmp_path / "packed")
    before = (tmp_path / "packed" / PACK).read_bytes()
    (tmp_path / "elsewhere").mkdir()
    make_run("fresh", base=outcomes["half"], final=outcomes["half"])
    other = make_run("elsewhere/fpo0", base=outcomes["half"], final=outcomes["never"], seed=7)
    with pytest.raises(BenchError, match=r"already has a run fpo0 with another .*rename"):
        pack([tmp_path / "fresh", other], tmp_path / "packed")
    assert (tmp_path / "packed" / PACK).read_bytes() == before


def test_unfinished_runs_and_foreign_folders_are_refused(make_run, outcomes, tmp_path):
    part = make_run("part", base=outcomes["half"], final=outcomes["half"], skip=(5, 6))
    with pytest.raises(BenchError, match="not finished, 8 evaluation episodes are missing"):
        pack([part], tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    whole = make_run("whole", base=outcomes["half"], final=outcomes["half"])
    with pytest.raises(BenchError, match="is there and no pack"):
        pack([whole], part)
    with pytest.raises(BenchError, match="not a run folder"):
        pack([tmp_path / "nothing"], tmp_path / "packed")


def test_damage_is_found(folders, tmp_path):
    pack(folders, tmp_path / "packed")
    file = tmp_path / "packed" / PACK
    text = file.read_text()
    for old, new, words in (
        ('"seed": 1', '"seed": 2', "manifest.json does not have the SHA-256 it claims"),
        ('"rows": 35', '"rows": 34', "do not add up"),
        ("pack 1", "pack 9", "format is 'vlarl-bench pack 9', expected"),
        ('"runs"', '"ruins"', "not a pack"),
        ('"submitted": null', '"submitted": {"by": "them"}', "submitted must have by, contact, licence, source"),
    ):
        assert old in text
        file.write_text(text.replace(old, new, 1))
        with pytest.raises(BenchError, match=words):
            read_all([tmp_path / "packed"])
    file.write_text(text)
    assert len(read_all([tmp_path / "packed" / "fpo*"])) == 3
    with pytest.raises(BenchError, match="has no run of that name"):
        read_all([tmp_path / "packed" / "ppo*"])
    (episodes,) = (tmp_path / "packed").glob("episodes-*.parquet")
    content = bytearray(episodes.read_bytes())
    content[len(content) // 2] ^= 1
    episodes.write_bytes(content)
    with pytest.raises(BenchError, match=r"episodes-.*SHA-256 that pack.json names"):
        read_all([tmp_path / "packed"])
    episodes.unlink()
    with pytest.raises(BenchError, match="no such file"):
        read_all([tmp_path / "packed"])


def test_rows_that_no_run_writes_are_refused(folders, tmp_path):
    """A pack whose digests are right, and whose rows are not."""
    pack(folders[:1], tmp_path / "packed")
    (file,) = (tmp_path / "packed").glob("episodes-*.parquet")
    table = pq.read_table(file)
    document = json.loads((tmp_path / "packed" / PACK).read_text())
    column = table.schema.get_field_index("phase")
    twice = table.take([0, *range(len(table) - 1)])
    for altered, words in (
        (table.set_column(column, table.schema.field("phase"), [["practice"] * len(table)]), "phase is one of"),
        (table.drop_columns(["steps"]), "columns are"),
        (twice, "is there twice"),
    ):
        file.unlink()
        pq.write_table(altered, tmp_path / "altered")
        sha256 = hashlib.sha256((tmp_path / "altered").read_bytes()).hexdigest()
        file = (tmp_path / "altered").rename(tmp_path / "packed" / f"episodes-{sha256[:12]}.parquet")
        document["sha256"]["episodes"] = sha256
        (tmp_path / "packed" / PACK).write_text(json.dumps(document))
        with pytest.raises(BenchError, match=words):
            read_all([tmp_path / "packed"])


def test_the_command(folders, tmp_path, capsys):
    assert "5 runs, 5 of them new, 0.0" in printed(capsys, "pack", *folders, "--out", tmp_path / "packed")
    assert cli.main(["pack", "--out", str(tmp_path / "packed")]) == 2
    assert "name one or more run folders" in capsys.readouterr().err
