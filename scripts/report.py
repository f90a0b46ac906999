"""Makes again what is shown of published runs: `python scripts/report.py` (`make report`), from the repository's root.

Writes into results/report the tables and figures of each of PACKS, the curve of DEMO and the page of all results, and
fills the blocks of PAGES that begin with a command and end with a mark:

    <!-- vlarl-bench table results/main --layout gains --pool --format markdown -->
    ...
    <!-- end -->

`--check` writes nothing, names each file that is not what the rows say, and exits with status 1 if there is one.
"""

import contextlib
import io
import re
import shlex
import sys
import tempfile
from pathlib import Path

from vlarl_bench import cli
from vlarl_bench.report.curve import write_curve
from vlarl_bench.report.runs import read_all

PACKS: dict[str, list[str]] = {"results/main": ["--pool"]}
"""With what asks for the suites of a group as one, where several were played; scores (`paper`) have a column each."""
DEMO = "results/demo"
LAYOUTS = ("gains", "paper", "aggregate", "cost")
PAGES = ("README.md", "docs/findings.md", "docs/runs.md", "docs/statistics.md")
OUT = Path("results/report")
BLOCK = re.compile(r"(<!-- vlarl-bench (?P<command>.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def output_of(command: list[str]) -> str:
    """What a command prints. Raises SystemExit if it fails."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = cli.main(command)
    if status:
        sys.exit(f"vlarl-bench {shlex.join(command)}: exit status {status}")
    return out.getvalue()


def filled(page: str) -> str:
    """A page with the output of each block's command in it."""
    return BLOCK.sub(lambda found: f"{found[1]}{_shown(found['command'])}{found[3]}", page)


def _shown(command: str) -> str:
    """A Markdown table with its notes folded away; of other commands the lines as a terminal has them."""
    out = output_of(shlex.split(command))
    table, _, notes = out.rpartition("|\n\n")
    if not table:
        lines = "\n".join(line.rstrip() for line in out.splitlines())
        return f"```\n$ vlarl-bench {command}\n{lines}\n```\n"
    return f"{table}|\n\n<details><summary>What stands behind these numbers</summary>\n\n{notes}\n</details>\n"


def write_report(out: Path) -> None:
    """Writes tables, figures (SVG), curve and page into a folder."""
    for pack, pool in PACKS.items():
        folder = out / Path(pack).name
        folder.mkdir(parents=True, exist_ok=True)
        for layout in LAYOUTS:
            command = ["table", pack, "--layout", layout, *(() if layout == "paper" else pool), "--format", "markdown"]
            made_by = f"<!-- made by `vlarl-bench {shlex.join(command)}` -->\n"
            (folder / f"{layout}.md").write_text(made_by + output_of(command))
        output_of(["figures", pack, *pool, "--out", str(folder)])
        for drawn in folder.glob("*.png"):  # the same again, and heavier
            drawn.unlink()
    write_curve(out / "demo.png", read_all([DEMO])[0])
    output_of(["leaderboard", "--out", str(out)])


def stale(made: Path) -> list[str]:
    """The files that differ from those just made, or are missing or one too many."""
    names = {path.relative_to(folder) for folder in (made, OUT) for path in folder.rglob("*") if path.is_file()}
    new, old = ({name: (f / name).read_bytes() for name in names if (f / name).is_file()} for f in (made, OUT))
    found = [str(OUT / name) for name in sorted(names) if new.get(name) != old.get(name)]
    return found + [page for page in PAGES if filled(Path(page).read_text()) != Path(page).read_text()]


def main(arguments: list[str]) -> int:
    """Makes the report, or compares it; returns the exit status."""
    if arguments not in ([], ["--check"]):
        sys.exit(f"report: {shlex.join(arguments)}: unknown; there is --check, or nothing")
    if not arguments:
        write_report(OUT)
        for page in PAGES:
            Path(page).write_text(filled(Path(page).read_text()))
        return 0
    with tempfile.TemporaryDirectory(dir=OUT.parent, prefix=".") as made:  # as far from docs/, for the page's links
        write_report(Path(made))
        found = stale(Path(made))
    for name in found:
        print(f"{name}: not what the rows say; `make report` makes it again")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
