"""The commands that read rows: table, figures, analyze, leaderboard, pack, submit, lint and power."""

from __future__ import annotations

from pathlib import Path

from ..errors import BenchError


def table(args: list[str]) -> int:
    """Prints one table of several runs."""
    from ..options import Table, parse

    options = parse(Table, args, "vlarl-bench table")
    if not options.runs:
        raise BenchError("runs: missing; name one or more run folders")
    if options.published and options.layout != "paper":
        raise BenchError(f"published: published numbers go with --layout paper, not {options.layout}")
    if not 0 < options.threshold <= 1:
        raise BenchError(f"threshold: {options.threshold:g}; it must be above 0 and at most 1, such as 0.8")
    from .cost import cost_table
    from .gains import gains_table
    from .paper import aggregate_table, paper_table
    from .published import read_published
    from .render import print_table, to_csv, to_json, to_latex, to_markdown
    from .runs import pooled, read_runs
    from .table import comparison_table, summary_table

    runs = read_runs(options.runs)
    runs = [pooled(run) for run in runs] if options.pool else runs
    if options.layout == "paper":
        table = paper_table(runs, read_published(options.published) if options.published else ())
    elif options.layout == "aggregate":
        table = aggregate_table(runs, options.threshold)
    elif options.layout == "cost":
        table = cost_table(runs, options.threshold)
    elif options.layout == "gains":
        table = gains_table(runs)
    else:
        table = comparison_table(runs[0]) if len(runs) == 1 else summary_table(runs)
    if options.format == "text":
        print_table(table)
    else:
        written = {"markdown": to_markdown, "csv": to_csv, "latex": to_latex, "json": to_json}
        print(written[options.format](table), end="")
    return 0


def figures(args: list[str]) -> int:
    """Draws several runs, and prints the files."""
    from ..options import Figures, parse

    options = parse(Figures, args, "vlarl-bench figures")
    if not options.runs:
        raise BenchError("runs: missing; name one or more run folders")
    if not options.out:
        raise BenchError("out: ''; it must not be empty")
    from .figures import write_figures
    from .runs import pooled, read_runs

    runs = read_runs(options.runs)
    for path in write_figures(options.out, [pooled(run) for run in runs] if options.pool else runs):
        print(path)
    return 0


def analyze(args: list[str]) -> int:
    """Draws how training converged and how latents moved, writes the numbers, and prints the files."""
    from ..options import Analyze, parse

    options = parse(Analyze, args, "vlarl-bench analyze")
    if not options.runs:
        raise BenchError("runs: missing; name one or more run folders")
    if not options.out:
        raise BenchError("out: ''; it must not be empty")
    if options.states < 0:
        raise BenchError(f"states: {options.states}; it must be at least 0")
    from .analyze import write_analysis
    from .runs import read_runs

    for line in write_analysis(options.out, read_runs(options.runs), options.states, options.workers):
        print(line)
    return 0


def leaderboard(args: list[str]) -> int:
    """Writes the page, and prints where it is."""
    from ..options import Leaderboard, parse

    options = parse(Leaderboard, args, "vlarl-bench leaderboard")
    if not options.out:
        raise BenchError("out: ''; it must not be empty")
    from .leaderboard import write_leaderboard
    from .published import read_published
    from .runs import find_runs, read_all

    runs = read_all(options.runs) if options.runs else find_runs("results")
    default = options.published == Leaderboard.published and not Path(options.published).exists()  # not of a checkout
    published = read_published(options.published) if options.published and not default else []
    if not runs and not published:
        raise BenchError("runs: none given and none in results/; name at least one run folder")
    path = Path(options.out) / "index.html"
    size = write_leaderboard(path, runs, published)
    print(f"{path}: {len(runs)} runs, {len(published)} published results, {size / 1e6:.2f} MB")
    return 0


def pack(args: list[str]) -> int:
    """Puts runs into a pack, and says how large it is."""
    from ..options import Pack, parse

    options = parse(Pack, args, "vlarl-bench pack")
    if not options.runs:
        raise BenchError("runs: missing; name one or more run folders")
    if not options.out:
        raise BenchError("out: ''; it must not be empty")
    from .packing import pack as add

    added, before, size = add(options.runs, options.out)
    print(f"{options.out}: {before + added} runs, {added} of them new, {size / 1e6:.2f} MB")
    return 0


def submit(args: list[str]) -> int:
    """Adds another group's runs and prints where they are; or prints why not, with exit status 1."""
    from ..options import Submit, parse

    options = parse(Submit, args, "vlarl-bench submit")
    if not options.runs:
        raise BenchError("runs: missing; name one or more run folders")
    from .submit import Sender
    from .submit import submit as take_in

    sender = Sender(options.by, options.contact, options.licence, options.source)
    pack, lines = take_in(options.runs, sender, options.out)
    for line in lines:
        print(f"{'note' if pack else 'refused'}: {line}")
    if pack:
        print(f"{pack}: added, submitted by {sender.by}")
    return 0 if pack else 1


def lint(args: list[str]) -> int:
    """Prints findings; the exit status is 1 if there are any."""
    from ..options import Lint, parse

    options = parse(Lint, args, "vlarl-bench lint")
    if not options.paths:
        raise BenchError("paths: missing; name run folders, tables (.json) or published numbers (.toml)")
    from .lint import lint as find

    findings = find(options.paths)
    print("\n".join(findings) or "nothing found")
    return 1 if findings else 0


def power(args: list[str]) -> int:
    """Prints how much it takes to tell two rates apart, or how much of finished runs would have told."""
    if any(arg.split("=")[0] == "--sequential" for arg in args):
        return _sequential(args)
    from ..options import Power, parse
    from ..power import check_rates, episodes_needed, pairs_needed, seeds_needed, z_test_power

    asked = parse(Power, args, "vlarl-bench power")
    test = (asked.first, asked.second, asked.power, asked.alpha)
    check_rates(*test)
    n, pairs = episodes_needed(*test), pairs_needed(*test, asked.agreement)
    seeds = seeds_needed(asked.first, asked.second, asked.episodes, asked.seed_sd, asked.power, asked.alpha)
    print(
        f"{asked.first:g} against {asked.second:g}, two-sided alpha {asked.alpha:g}, power {asked.power:g}; for each:\n"
        f"  two policies      {n:,} episodes, all independent "
        f"(z-test; exact power {z_test_power(asked.first, asked.second, n, asked.alpha):.3f})\n"
        f"  the same, paired  {pairs.n:,} pairs of episodes whose outcomes correlate by {asked.agreement:g} "
        f"(exact McNemar test; power {pairs.power:.3f})\n"
        f"  two methods       {seeds.n:,} seeds with {asked.episodes:,} episodes each and a deviation of "
        f"{asked.seed_sd:g} between seeds (t-test paired by seed; power {seeds.power:.3f})\n"
        "For one comparison. Reports correct for all pairs of a suite (Holm), which takes more: ask with --alpha "
        "divided by the number of pairs."
    )
    return 0


def _sequential(args: list[str]) -> int:
    from ..options import Sequential, parse

    options = parse(Sequential, args, "vlarl-bench power")
    if not options.sequential:
        raise BenchError("sequential: missing; name one or more run folders")
    if not 0 < options.alpha < 1:
        raise BenchError(f"alpha: {options.alpha:g}; it must be between 0 and 1, such as 0.05")
    from .runs import read_all
    from .sequential import replay

    for run in read_all(options.sequential):
        found = replay(run, options.alpha)
        after = f"stops after {found.used:,}" if found.stopped else "does not stop in"
        after += " of" if found.stopped else ""
        print(
            f"{run.folder.name}: {after} {found.pairs:,} pairs of episodes, {found.pairs - found.used:,} saved "
            f"({100 * (1 - found.used / found.pairs):.0f}%); of the initial states seen {found.gained:,} were gained "
            f"and {found.lost:,} lost, e = {found.e_value:.3g} (stops at {1 / options.alpha:g})"
        )
    return 0
