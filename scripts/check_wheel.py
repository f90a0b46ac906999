"""Checks that a wheel holds every tracked file of the package, and no top-level name but the package's. For .ci/run."""

import argparse
import subprocess
import sys
import zipfile
from fnmatch import fnmatch

FOLDERS = {"vlarl_bench/": "vlarl_bench/", "algorithms/": "vlarl_bench/algorithms/", "tasks/": "vlarl_bench/tasks/"}
MUST_HAVE = [
    "vlarl_bench/algorithms/*.py",
    "vlarl_bench/tasks/*/tasks.json",
    "vlarl_bench/policies/priors/*/*/model.safetensors",
]


def main() -> int:
    """Returns 1 and says what is wrong, or 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("wheel", help="the file")
    wheel = parser.parse_args().wheel
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = set(archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        parser.error(f"wheel: {error}")
    tracked = subprocess.run(["git", "ls-files", *FOLDERS], check=True, capture_output=True, text=True).stdout.split()
    expected = {
        new + name.removeprefix(old) for old, new in FOLDERS.items() for name in tracked if name.startswith(old)
    }
    found = [f"not in the wheel: {name}" for name in sorted(expected - inside)]
    found += [f"nothing in the wheel matches {p}" for p in MUST_HAVE if not any(fnmatch(name, p) for name in inside)]
    top = {name.split("/")[0] for name in inside}
    found += [f"top-level name: {name}" for name in sorted(top) if name != "vlarl_bench" and ".dist-info" not in name]
    print(f"{wheel}: {len(inside)} files", *found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
