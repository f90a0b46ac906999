"""The example in CONTRIBUTING.md is a package that installs, is found by its entry point and conforms."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def block(language, containing):
    """The one fenced block of that language with that text."""
    (found,) = [code for code in re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL) if containing in code]
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The variables of a process that has the example installed, laid out as pip would."""
    site = tmp_path_factory.mktemp("site")
    (site / "filtered_bc.py").write_text(block("python", "class FilteredBC"), encoding="utf-8")
    document = tomllib.loads(block("toml", "[project]"))
    project = document["project"]
    assert document["tool"]["setuptools"]["py-modules"] == ["filtered_bc"]
    info = site / f"filtered_bc-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return {**os.environ, "PYTHONPATH": str(site)}


def test_it_is_listed_without_a_change_here(environment):
    command = [Path(sys.executable).with_name("vlarl-bench"), "list", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    listed = {algorithm["name"]: algorithm for algorithm in json.loads(done.stdout)["algorithms"]}
    assert listed["filtered-bc"]["requires"] == ["sft"]


def test_it_conforms(environment):
    """The conformance tests run on it as on every registered algorithm; here on one policy of chunks, one of tokens."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/conformance/test_algorithms.py"]
    command += ["-k", "filtered-bc and (pi0-tiny or openvla-tiny) and not pixels"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    counted = re.search(r"(\d+) passed", done.stdout)
    assert counted
    assert int(counted[1]) >= 8
    assert "skipped" not in done.stdout


def test_the_example_obeys_the_house_rules(environment):
    path = Path(environment["PYTHONPATH"]) / "filtered_bc.py"
    config = ["--config", str(ROOT / "pyproject.toml")]
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, *config, str(path)]
        done = subprocess.run(ruff, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
