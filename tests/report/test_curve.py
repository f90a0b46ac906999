import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from vlarl_bench.errors import BenchError
from vlarl_bench.report.curve import AFTER, BASE, TRAIN, write_curve
from vlarl_bench.report.runs import read_run
from vlarl_bench.stats import wilson_interval


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved while the test runs."""
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_the_curve_shows_what_the_rows_say(tmp_path, make_run, outcomes, drawn):
    train = ((1, False), (1, True), (2, True), (2, True), (2, True))
    run = read_run(make_run("r", base=outcomes["half"], final=outcomes["always"], train=train))
    write_curve(tmp_path / "curve.png", run)
    axes = drawn[0].axes[0]
    training = next(line for line in axes.lines if line.get_color() == TRAIN)
    assert training.get_xydata().tolist() == [[200, 50], [500, 100]]  # 100 steps an episode, cumulative
    (base, after) = axes.containers
    assert base.lines[0].get_xydata().tolist() == [[0, 50]]
    assert after.lines[0].get_xydata().tolist() == [[500, 100]]
    low, high = wilson_interval(8, 16)
    ends = base.lines[2][0].get_segments()[0]
    assert np.sort(ends[:, 1]) == pytest.approx([100 * low, 100 * high])
    assert axes.get_xlabel() == "training (environment steps)"
    assert axes.get_ylabel() == "success rate (%)"
    assert "fpo on pi0-tiny, suite, seed 0" in axes.get_title()
    assert "privileged state" in axes.get_title()
    labels = axes.get_legend_handles_labels()[1]
    assert "training episodes (exploring, initial states 0-3)" in labels
    assert any("held-out initial states 4-7: 8/16" in label for label in labels)
    pixels = matplotlib.image.imread(tmp_path / "curve.png")[..., :3]
    for colour in (TRAIN, BASE, AFTER):
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (np.abs(pixels - rgb).max(axis=-1) < 0.02).sum() > 20


def test_a_method_that_never_plays_shows_its_evaluations_side_by_side(tmp_path, make_run, outcomes, drawn):
    run = read_run(make_run("r", base=outcomes["half"], final=outcomes["always"], algorithm="sft"))
    write_curve(tmp_path / "curve.png", run)
    base, after = drawn[0].axes[0].containers
    assert base.lines[0].get_xdata()[0] < after.lines[0].get_xdata()[0]
    assert drawn[0].axes[0].get_xlabel() == "no training episodes (environment steps: 0)"


def test_an_interrupted_run_still_has_a_curve(tmp_path, make_run):
    write_curve(tmp_path / "curve.png", read_run(make_run("r")))
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_a_folder_that_cannot_be_made_is_explained(tmp_path, make_run, outcomes):
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="a file is where a folder should be"):
        write_curve(tmp_path / "file" / "curve.png", read_run(make_run("r", base=outcomes["half"])))
