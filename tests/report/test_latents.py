import json
from pathlib import Path

import numpy as np
import pytest

from vlarl_bench import cli
from vlarl_bench.records import MetricsLog
from vlarl_bench.replay import Played
from vlarl_bench.report.analyze import write_analysis
from vlarl_bench.report.convergence import convergence
from vlarl_bench.report.latents import describe
from vlarl_bench.report.methods import compared_methods
from vlarl_bench.report.runs import read_runs

H, A, EPISODES, EACH = 2, 3, 6, 5


def played(iteration, shift, spread, won, seed):
    """Six episodes of five chunks of two actions of three numbers; only the first action is executed."""
    rng = np.random.default_rng(seed)
    chunks = shift + spread * rng.standard_normal((EPISODES * EACH, H, A))
    return Played(iteration, f"{iteration:012d}", chunks.astype(np.float32), np.full(len(chunks), 1),
                  np.repeat(np.arange(EPISODES), EACH), np.array(won, bool))  # fmt: skip


@pytest.fixture(scope="module")
def found():
    """The base policy, one that spreads twice as far, and one that is far away where it succeeds."""
    last = played(3, 0.0, 1.0, [0, 0, 0, 1, 1, 1], 2)
    last.chunks[3 * EACH :] += 10
    return describe([played(0, 0.0, 1.0, [0] * 6, 0), played(1, 0.0, 2.0, [0] * 6, 1), last])


def test_numbers_are_those_of_numpy(found):
    base, wide, last = found["policies"]
    chunks = played(0, 0.0, 1.0, [0] * 6, 0).chunks.astype(float)
    assert base["std"] == pytest.approx(np.sqrt(chunks.reshape(30, 6).var(0).mean()))
    assert base["action_norm"][1] == pytest.approx(np.median(np.linalg.norm(chunks[:, 0], axis=1)))  # as executed
    assert found["groups"]["initial"]["variance"] == pytest.approx(chunks.reshape(60, 3).var(0).tolist())
    assert wide["std"] / base["std"] == pytest.approx(2, rel=0.2)
    assert wide["hull_area"] > 2 * base["hull_area"]
    assert (base["iteration"], last["iteration"], last["successes"], found["dimensions"]) == (0, 3, 3, 6)


def test_distances_are_to_the_base_policy_s_chunks(found):
    base, wide, last = (policy["mahalanobis"][1] for policy in found["policies"])
    assert base == pytest.approx(1, abs=0.15)
    assert wide == pytest.approx(2, rel=0.25)
    assert last > 3
    assert found["groups"]["successful"]["mahalanobis"][0] > 5 > 2 > found["groups"]["failed"]["mahalanobis"][2]


def test_silhouettes_tell_what_stands_apart(found):
    base, wide, last = (policy["silhouette_against_base"] for policy in found["policies"])
    assert base is None
    assert wide == pytest.approx(0, abs=0.1)
    assert found["silhouette"]["failed_against_successful"] > 0.7
    assert found["silhouette"]["groups"] < found["silhouette"]["failed_against_successful"]
    assert last > wide


def test_the_plane_has_the_largest_variances(found):
    first, second = found["pca"]["explained_variance"]
    assert 1 > first > 0.7 > second > 0
    plane = np.array(found["pca"]["points"])
    won, stage = np.array(found["succeeded"]), np.array(found["policy_of_chunk"])
    assert len(plane) == len(won) == len(stage) == 90
    apart = abs(plane[won == 1, 0].mean() - plane[(won == 0) & (stage == 2), 0].mean())
    assert apart == pytest.approx(10 * np.sqrt(6), rel=0.15)
    assert len(found["tsne"]["points"]) == len(found["tsne"]["chunks"]) == 90


def test_few_chunks_have_no_silhouette_and_no_map():
    one = [played(i, 0.0, 1.0, [0] * 6, i) for i in range(2)]
    few = [
        Played(p.iteration, p.checkpoint, p.chunks[:3], p.executed[:3], np.zeros(3, int), p.success[:1]) for p in one
    ]
    found = describe(few)
    assert list(found["groups"]) == ["initial", "failed"]
    assert found["silhouette"]["failed_against_successful"] is None
    assert found["tsne"]["points"] is None


@pytest.fixture
def folders(make_run):
    """Three seeds of fpo that log the loss, and a method that logs none."""
    made = [
        make_run(f"{name}{seed}", base=lambda *_: False, final=lambda *_: True, seed=seed, algorithm=name)
        for name, seed in (("fpo", 0), ("fpo", 1), ("fpo", 2), ("grpo", 0))
    ]
    for seed, folder in enumerate(made):
        with MetricsLog(folder / "metrics.jsonl") as log:
            for iteration in range(1, 3 if seed == 2 else 4):
                loss = {"cfm_loss": (seed + 1) / iteration} if seed < 3 else {}
                log.append({"iteration": iteration, "gradient_steps": 10 * iteration + seed, "seconds": 1.0, **loss})
    return made


def test_convergence_is_quartiles_over_seeds(folders):
    (curve,) = convergence(compared_methods(read_runs(folders)))
    assert curve["method"] == "fpo"
    assert curve["iteration"] == [1, 2, 3]
    assert curve["seeds"] == [3, 3, 2]
    assert curve["quartiles"][0] == [1.5, 2, 2.5]
    assert curve["gradient_steps"] == pytest.approx([11, 21, 30.5])


def test_what_was_played_is_drawn_and_repeats_bitwise(folders, found, tmp_path, monkeypatch):
    def replayed(run, states, workers, progress):
        return [played(0, 0.0, 1.0, [0] * 6, 0), played(1, 0.5, 1.0, [0, 1] * 3, 1)]

    monkeypatch.setattr("vlarl_bench.replay.replay", replayed)
    runs = read_runs(folders[:1])
    lines = write_analysis(tmp_path / "a", runs, 1, 1)
    again = write_analysis(tmp_path / "b", runs, 1, 1)
    names = ["convergence", "embeddings-fpo0", "dispersion-fpo0", "groups-fpo0"]
    assert lines[-1].endswith("analysis.json")
    assert [line.rpartition("/")[2] for line in lines[:-1]] == [f"{n}.{e}" for n in names for e in ("svg", "png")]
    for one, two in zip(lines, again, strict=True):
        assert Path(one).read_bytes() == Path(two).read_bytes()
    numbers = json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert numbers["latents"]["fpo0"]["policies"][1]["successes"] == 3
    assert numbers["convergence"][0]["method"] == "fpo"


def test_what_a_run_lacks_is_said_in_a_line(folders, tmp_path, capsys):
    out = tmp_path / "analysis"
    assert cli.main(["analyze", *map(str, folders), "--states", "0", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "no convergence of grpo: cfm_loss was not logged"
    assert json.loads((out / "analysis.json").read_text())["latents"] == {}
    for words, arguments in (
        ("cfm_loss was not logged", [folders[3], "--states", "0"]),
        ("states: 9; tiny-state@1", [folders[0], "--states", "9"]),
        ("states: -1", [folders[0], "--states", "-1"]),
        ("workers: 0", [folders[0], "--workers", "0"]),
        ("runs: missing", []),
    ):
        assert cli.main(["analyze", *map(str, arguments), "--out", str(tmp_path / "none")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    assert not (tmp_path / "none").exists()
    with MetricsLog(folders[0] / "metrics.jsonl") as log:
        log.append({"iteration": 9, "cfm_loss": "low"})
    assert cli.main(["analyze", str(folders[0]), "--states", "0", "--out", str(tmp_path / "none")]) == 2
    assert "cfm_loss of round 9 is 'low'; it must be a number" in capsys.readouterr().err
