import pytest
from matplotlib.figure import Figure
from PIL import Image

from vlarl_bench import cli
from vlarl_bench.report.figures import FIGURES, learning_curves, pareto, profiles, task_heat_map, write_figures
from vlarl_bench.report.methods import compared_methods
from vlarl_bench.report.runs import read_runs


def at_most(limit):
    return lambda task, state, repeat: 2 * (state - 4) + repeat < limit


@pytest.fixture
def folders(make_run):
    return [
        make_run(f"{name}{seed}", base=at_most(2), final=at_most(limit - seed), seed=seed, algorithm=name,
                 train=((1, False), (1, True), (2, True), (2, True))[: 2 + 2 * (name == "strong")])
        for seed in range(2) for name, limit in (("strong", 8), ("weak", 4))
    ]  # fmt: skip


def drawn(draw, folders):
    figure = Figure()
    assert draw(figure, compared_methods(read_runs(folders)), "suite_a")
    return figure.axes[0]


def test_all_are_written_and_repeat_bitwise(folders, tmp_path):
    paths = write_figures(tmp_path / "a", read_runs(folders))
    again = write_figures(tmp_path / "b", read_runs(folders[::-1]))
    assert len(paths) == 2 * len(FIGURES)
    for one, two in zip(paths, again, strict=True):
        assert one.read_bytes() == two.read_bytes()
        if one.suffix == ".png":
            assert Image.open(one).width > 500
        else:
            assert "tiny-state@1" in one.read_text()


def test_a_curve_is_the_mean_over_seeds(folders):
    strong, _weak = drawn(learning_curves, folders).lines
    # rounds of 200 steps at 50% and 100%
    assert strong.get_xdata()[[0, -1]].tolist() == [200, 400]
    assert strong.get_ydata()[[0, -1]].tolist() == pytest.approx([50, 100])


def test_the_heat_map_has_the_rates(folders):
    (image,) = drawn(task_heat_map, folders).images
    assert image.get_array().tolist() == [[25, 93.75, 43.75]] * 2


def test_a_profile_falls_from_all_to_none(folders):
    for line in drawn(profiles, folders).lines:
        heights = line.get_ydata()
        assert (heights[0], heights[-1]) == (100, 0)
        assert (heights[1:] <= heights[:-1]).all()


def test_gain_stands_against_cost(folders):
    strong, weak = drawn(pareto, folders).containers
    assert strong.lines[0].get_xydata().tolist() == [[400, 100 * (15 / 16 - 1 / 4)]]
    assert weak.lines[0].get_xydata().tolist() == [[200, 100 * (7 / 16 - 1 / 4)]]


def test_the_command(folders, tmp_path, capsys, make_run):
    assert cli.main(["figures", *map(str, folders), "--out", str(tmp_path / "f")]) == 0
    assert "pareto-suite_a.svg" in capsys.readouterr().out
    assert cli.main(["figures", str(make_run("empty")), "--out", str(tmp_path / "g")]) == 2
    assert "no scored episode" in capsys.readouterr().err
    assert cli.main(["figures"]) == 2
