import dataclasses
import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from vlarl_bench import cli
from vlarl_bench.records import STOPPED, MetricsLog
from vlarl_bench.report.figures import (
    FIGURES,
    ablation,
    gains,
    learning_curves,
    looks,
    pareto,
    profiles,
    task_heat_map,
    wall_time_curves,
    write_figures,
)
from vlarl_bench.report.methods import compared_methods, titles
from vlarl_bench.report.rows import Rows
from vlarl_bench.report.runs import read_runs
from vlarl_bench.sealed import write_sealed


def at_most(limit):
    return lambda task, state, repeat: 2 * (state - 4) + repeat < limit


def test_a_seed_that_was_stopped_stays_where_it_ended(make_run):
    """And does not cut the others' curves."""
    whole = [((1, False), (2, True), (3, True)), ((1, False), (2, False), (3, True))]
    made = [
        make_run(f"r{i}", base=at_most(2), final=at_most(4), seed=i, train=rounds) for i, rounds in enumerate(whole)
    ]
    stopped = make_run("r2", base=at_most(2), final=at_most(1), seed=2, train=((1, False),))
    write_sealed(stopped / STOPPED, {"iteration": 2, "reason": "collapsed"})
    figure = Figure()
    FigureCanvasAgg(figure)
    assert learning_curves(figure, compared_methods(read_runs([*made, stopped])), "suite_a")
    (line,) = figure.axes[0].get_lines()
    assert line.get_xdata()[-1] == 300
    assert line.get_ydata()[-1] == pytest.approx(200 / 3)


def test_bands_are_drawn_from_three_seeds_on(make_run):
    made = [
        make_run(f"r{i}", base=at_most(2), final=at_most(4 + i), seed=i, train=((1, False), (2, i > 0)))
        for i in range(3)
    ]
    for draw in (learning_curves, profiles):
        for seeds in (2, 3):
            figure = Figure()
            FigureCanvasAgg(figure)
            assert draw(figure, compared_methods(read_runs(made[:seeds])), "suite_a")
            assert bool(figure.axes[0].collections) == (seeds == 3)


@pytest.fixture
def folders(make_run):
    return [
        make_run(f"{name}{seed}", base=at_most(2), final=at_most(limit - seed), seed=seed, algorithm=name,
                 train=((1, False), (1, True), (2, True), (2, True))[: 2 + 2 * (name == "strong")])
        for seed in range(2) for name, limit in (("strong", 8), ("weak", 4))
    ]  # fmt: skip


@pytest.fixture
def other(make_run):
    """`strong` under another setting, with less gain; its training took 3 gradient steps and 70 operations."""
    return make_run("other", base=at_most(2), final=at_most(3), algorithm="strong", train=((1, False), (2, True)),
                    config={"rewards": "shuffled"}, gradient_steps=3, flops=70)  # fmt: skip


def timed(folders):
    """The folders, with metrics: each round took a minute and half a CPU hour, and the second seed's twice that."""
    for i, folder in enumerate(folders):
        with MetricsLog(folder / "metrics.jsonl") as log:
            for iteration in (1, 2):
                times = iteration * (1 + i // 2)
                log.append({"iteration": iteration, "seconds": 60.0 * times, "cpu_seconds": 1800.0 * times})
    return folders


def drawn(draw, folders, *more):
    figure = Figure((7.2, 4.4), layout="constrained")
    assert draw(figure, compared_methods(read_runs(folders)), "suite_a", *more)
    return figure.axes[0]


def test_all_are_written_and_repeat_bitwise(folders, other, tmp_path):
    folders = [*timed(folders), other]
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


def test_wall_time_is_in_minutes_and_names_the_machine(folders):
    axes = drawn(wall_time_curves, timed(folders))
    strong, weak = axes.lines
    assert strong.get_xdata()[[0, -1]].tolist() == [
        2,
        2,
    ]  # where both seeds are: minutes 1-2 and 2-4
    assert weak.get_ydata()[-1] == pytest.approx(50)
    (cpu,) = {run.manifest["fingerprint"]["cpu"] for run in read_runs(folders)}
    assert cpu.split()[0] in axes.get_xlabel()


def test_without_metrics_there_is_no_wall_time(folders):
    assert not wall_time_curves(Figure(), compared_methods(read_runs(folders)), "suite_a")


def test_settings_of_one_algorithm_are_bars(folders, other):
    axes = drawn(ablation, [*folders, other])
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([100 * (15 / 16 - 1 / 4), 100 * (3 - 2) / 8])
    assert [bool(bar.get_hatch()) for bar in axes.patches] == [False, True]
    low, high = axes.containers[0].lines[2][0].get_segments()[0][:, 0]
    assert low < axes.patches[0].get_width() < high
    assert not ablation(Figure(), compared_methods(read_runs(folders)), "suite_a")  # `weak` has one setting only


def test_the_heat_map_has_the_rates(folders):
    (image,) = drawn(task_heat_map, folders).images
    assert image.get_array().tolist() == [[25, 25], [93.75, 93.75], [43.75, 43.75]]  # a method a row


def test_a_profile_falls_from_all_to_none(folders):
    for line in drawn(profiles, folders).lines:
        heights = line.get_ydata()
        assert (heights[0], heights[-1]) == (100, 0)
        assert (heights[1:] <= heights[:-1]).all()


def test_gains_are_sorted_and_say_seeds_and_counts(folders, other):
    axes = drawn(gains, [*folders, other])
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([100 * 11 / 16, 100 * 3 / 16, 100 / 8])
    told = [text.get_text() for text in axes.texts]
    assert told[0].startswith("+68.8 [") and told[0].endswith(", 2 seeds, 30/32")
    assert told[2].endswith(", 1 seed, 6/16")
    assert [bool(bar.get_hatch()) for bar in axes.patches] == [False, False, True]


def test_a_gain_has_that_without_noise_as_a_diamond(make_run, folders):
    noiseless = (at_most(8), at_most(2))  # of the four states of a task, all before and one after
    quiet = make_run("q", base=at_most(2), final=at_most(8), algorithm="narrow", noiseless=noiseless)
    axes = drawn(gains, [*folders, quiet])
    assert [line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() == "D"] == [-75]
    assert "diamond: the same without noise" in axes.get_xlabel()
    assert "diamond" not in drawn(gains, folders).get_xlabel()


def test_gains_with_missing_episodes_are_hollow_and_have_no_interval(folders, make_run):
    part = make_run("part", base=at_most(2), final=at_most(8), algorithm="part", skip=(4,))
    axes = drawn(gains, [*folders, part])
    (found,) = [text.get_text() for text in axes.texts if "INCOMPLETE" in text.get_text()]
    assert "[" not in found and found.endswith("12/12")
    assert sorted(bar.get_facecolor()[3] > 0 for bar in axes.patches) == [False, True, True]
    assert "part INCOMPLETE" in drawn(pareto, [*folders, part]).get_legend_handles_labels()[1]


def test_the_front_begins_at_the_base_policy_and_leaves_out_what_lost(make_run):
    folders = [
        make_run(name, base=at_most(4), final=at_most(limit), algorithm=name, train=((1, True),) * spent)
        for name, limit, spent in (("lost", 1, 1), ("cheap", 5, 2), ("worse", 4, 3), ("best", 8, 4))
    ]  # fmt: skip
    (front,) = [line for line in drawn(pareto, folders).lines if line.get_drawstyle() == "steps-post"]
    assert front.get_xydata().tolist() == [[0, 0], [200, 12.5], [400, 50], [400, 50]]
    alone = drawn(pareto, folders[:1]).lines  # whoever only lost is no front
    assert not [line for line in alone if line.get_drawstyle() == "steps-post"]


def test_many_methods_look_different_and_their_legend_fits(make_run):
    seen = [tuple(look.values()) for look in itertools.islice(looks(), 40)]
    assert len(set(seen)) == 40
    folders = [
        make_run(f"m{i}", base=at_most(2), final=at_most(i % 8), algorithm=f"a-long-name-{i}", train=((1, True),))
        for i in range(26)
    ]  # fmt: skip
    figure = drawn(pareto, folders).figure
    FigureCanvasAgg(figure).draw()
    legend, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_tightbbox()
    assert figure.axes[0].get_window_extent().height > 2.9 * figure.dpi  # not at the cost of the panel
    assert legend.y1 <= axes.y0 + 1 and legend.x0 >= 0 and legend.x1 <= figure.bbox.x1


def test_policies_are_named_where_there_are_several(folders):
    runs = read_runs(folders)
    other = dataclasses.replace(
        runs[0],
        manifest=runs[0].manifest | {"policy": "q", "base_checkpoint": "1" * 12},
        rows=Rows.of(dataclasses.replace(row, policy="q") for row in runs[0].rows),
    )
    titles_ = titles(compared_methods([*runs, other])).values()
    assert {"strong on q", "strong on pi0-tiny", "base policy on q"} <= set(titles_)
    moved = dataclasses.replace(runs[0], manifest=runs[0].manifest | {"base_checkpoint": "1" * 12})
    assert f"base policy on pi0-tiny {'1' * 12}" in titles(compared_methods([*runs, moved])).values()
    assert "strong" in titles(compared_methods(runs)).values()


def test_figures_with_intervals_say_what_these_resample(folders, other):
    runs = timed([*folders, other])
    for draw, words in ((learning_curves, "training seeds"), (wall_time_curves, "training seeds"),
                        (profiles, "training seeds"), (pareto, "initial states"), (gains, "initial states"),
                        (ablation, "initial states")):  # fmt: skip
        label = drawn(draw, runs).get_xlabel()
        assert "95% interval" in label and words in label


def test_gain_stands_against_cost(folders):
    strong, weak = drawn(pareto, folders).containers
    assert strong.lines[0].get_xydata().tolist() == [[400, 100 * (15 / 16 - 1 / 4)]]
    assert weak.lines[0].get_xydata().tolist() == [[200, 100 * (7 / 16 - 1 / 4)]]


@pytest.mark.parametrize(("cost", "spent"), [("gradient_steps", 3), ("flops", 70)])
def test_gain_stands_against_other_costs(folders, other, cost, spent):
    (point,) = drawn(pareto, [*folders, other], cost).containers  # rows of the others say that they spent none
    assert point.lines[0].get_xydata()[0, 0] == spent


def test_gain_stands_against_cpu_hours_of_those_that_say(folders, other):
    strong, weak = drawn(pareto, [*timed(folders), other], "cpu_hours").containers
    for point in (strong, weak):
        assert point.lines[0].get_xdata()[0] == pytest.approx((1 + 2) / 2)
    assert not pareto(Figure(), compared_methods(read_runs([other])), "suite_a", "cpu_hours")


def test_the_command(folders, tmp_path, capsys, make_run):
    assert cli.main(["figures", *map(str, folders), "--out", str(tmp_path / "f")]) == 0
    assert "pareto-suite_a.svg" in capsys.readouterr().out
    assert cli.main(["figures", str(make_run("empty")), "--out", str(tmp_path / "g")]) == 2
    assert "no scored episode" in capsys.readouterr().err
    assert cli.main(["figures"]) == 2
