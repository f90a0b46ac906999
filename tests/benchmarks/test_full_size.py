"""The benchmark of published sizes, rehearsed at small widths: it needs a GPU for the rest."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_can_be_rehearsed():
    command = [sys.executable, ROOT / "scripts" / "bench_full_size.py", "--device", "cpu", "--narrow"]
    done = subprocess.run([*command, "--rounds", "1", "--batch", "2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("pi0-base", "openvla-7b"):
        block = (
            rf"{name}: .* GiB\n  1 chunks: ours .* ms, transformers .*x\n  8 chunks: .*x\n  training step of 2: .* s,"
        )
        assert re.search(block, done.stdout), done.stdout
