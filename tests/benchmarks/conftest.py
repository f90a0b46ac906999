"""After pytest-benchmark's table one of ratios: ours against stock, and how near it is to what bounds it.

A benchmark says in `benchmark.extra_info` what it is: `role` is "ours", "stock" (or whatever ours is held against) or
"bound". Those of one group are compared. "ours" adds its targets: `ratio` (stock / ours) and `share` (bound / ours).
"""

import pytest

COLUMNS = "{:<52} {:>10} {:>10} {:>7} {:>7} {:>10} {:>7} {:>7}"


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    groups = {}
    for benchmark in session.benchmarks if session else []:
        if "role" in benchmark.extra_info and not benchmark.has_error:
            groups.setdefault(benchmark.group, {})[benchmark.extra_info["role"]] = benchmark
    rows = [row(group, roles) for group, roles in groups.items() if "ours" in roles]
    if rows:
        terminalreporter.section("ratios (of the fastest rounds)")
        heads = ("what", "ours", "stock", "ratio", "target", "bound", "share", "target")
        for line in (heads, *rows):
            terminalreporter.write_line(COLUMNS.format(*line))


def row(group, roles):
    """The cells of one line of the table; empty where there is nothing to compare with."""
    fastest = {role: benchmark.stats.min for role, benchmark in roles.items()}
    info = roles["ours"].extra_info
    ratio = fastest["stock"] / fastest["ours"] if "stock" in fastest else None
    share = fastest["bound"] / fastest["ours"] if "bound" in fastest else None
    return (
        group,
        seconds(fastest["ours"]),
        seconds(fastest.get("stock")),
        "" if ratio is None else f"{ratio:.1f}x",
        f">={info['ratio']}x" if "ratio" in info else "",
        seconds(fastest.get("bound")),
        "" if share is None else f"{share:.0%}",
        f">={info['share']:.0%}" if "share" in info else "",
    )


def seconds(value):
    if value is None:
        return ""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"
