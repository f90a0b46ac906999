"""Interrupts and damages everything as often as the project promises, and keeps what came of it in docs/torture.md.

Called by `make torture`, which takes some 25 minutes on two idle cores, as root for real mounts and a real SLURM.
TORTURE=0.2 does a fifth of it. The tests are those marked `torture`; CI runs them at small counts.
"""

import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

from vlarl_bench.files import write_text_atomic
from vlarl_bench.provenance import code_version

PAGE = Path("docs/torture.md")
HEAD = """# Torture

What `make torture` printed last; [sweeps](sweeps.md#interruptions) says what is promised. Not by hand: the command
writes this page, also when something fails. Each line is a test that CI runs at small counts.
"""


def main() -> int:
    """Runs the tests and writes the page; returns pytest's exit status."""
    share = os.environ.get("TORTURE", "1")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "torture", "--benchmark-disable", f"--junitxml={report}"]
        # Only the files that have some: importing all the others takes longer than many a test.
        files = [str(path) for path in sorted(Path("tests").rglob("test_*.py")) if "mark.torture" in path.read_text()]
        command += ["-n", "2", "--dist", "loadfile", *files, *sys.argv[1:]]
        environment = {**os.environ, "TORTURE": share, "OMP_NUM_THREADS": "1"}
        status = subprocess.run(command, env=environment, check=False).returncode
        lines = [line(case) for case in ElementTree.parse(report).iter("testcase")]
    asked = "make torture" if share == "1" else f"TORTURE={share} make torture"
    asked += f" with `{shlex.join(sys.argv[1:])}`" if sys.argv[1:] else ""
    told = (
        f"{asked}: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {code_version()}, {(time.monotonic() - begun) / 60:.0f} "
        f"minutes, load {os.getloadavg()[2]:.0f} on {os.cpu_count()} cores, Python {platform.python_version()}: "
        f"{sum(outcome == 'passed' for _, outcome, *_ in lines)} of {len(lines)} passed."
    )
    told += " It was interrupted: what it had not come to is missing." if status == 2 else ""
    table = ["| test | outcome | s | what was done |", "|---|---|---|---|"]
    table += [f"| {' | '.join(cells)} |" for cells in lines]
    write_text_atomic(PAGE, "\n".join([HEAD, told, "", *table, ""]))
    print(told)
    return status


def line(case: ElementTree.Element) -> tuple[str, str, str, str]:
    """A test's name, its outcome, its seconds and what it says that it did, or why not."""
    outcome, told = "passed", [p.get("value", "") for p in case.iter("property") if p.get("name") == "torture"]
    for kind in ("failure", "error", "skipped"):
        for found in case.iter(kind):
            outcome, told = kind, [found.get("message", "").partition("\n")[0]]
    text = re.sub(r"(/\S+)+/", "", "; ".join(told)).replace("|", "\\|")
    name = case.get("name", "").removeprefix("test_").replace("_", " ")
    return name, outcome, f"{float(case.get('time', '0')):.0f}", text


if __name__ == "__main__":
    sys.exit(main())
