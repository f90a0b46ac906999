"""The sum about a large cluster: the docs show what it prints, and its numbers move as they must."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def printed(*arguments):
    command = [sys.executable, ROOT / "scripts" / "cluster_plan.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def number(table, what, after):
    line = next(line for line in table.splitlines() if line.startswith(f"| {what}"))
    return float(re.search(rf"{after}([\d,.]+)", line)[1].replace(",", ""))


def test_the_docs_show_what_it_prints():
    assert printed() in (ROOT / "docs" / "sweeps.md").read_text()


def test_more_of_what_is_short_shortens_a_round():
    calm, fast = printed(), printed("--hash-gb-s", "9.8", "--node-gb-s", "20", "--cores", "24")
    was, now = (number(table, "a round", r"\| ") for table in (calm, fast))
    hashed = 18.7 * 0.9 / 0.98 + 18.7 * 0.9 / 2 + 14 * 0.9 / 0.98  # nine tenths of hashing, writing and naming
    assert was - now > hashed * 0.95
    assert number(fast, "of a round: checkpoints", r"\| ") < number(calm, "of a round: checkpoints", r"\| ") / 3
