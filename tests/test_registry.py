import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlarl_bench import registry
from vlarl_bench.errors import BenchError

SOURCE = Path(__file__).parent / "thirdparty"


@pytest.fixture(scope="session")
def python_with_acme(tmp_path_factory):
    """Runs Python where the third-party package is installed beside ours, by pip, in a folder of its own."""
    source, target = tmp_path_factory.mktemp("acme-source") / "acme", tmp_path_factory.mktemp("acme")
    shutil.copytree(SOURCE, source)  # setuptools leaves a build folder behind
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", target, source], check=True, capture_output=True)

    def run(*args):
        env = {**os.environ, "PYTHONPATH": str(target)}
        return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, timeout=60)

    return run


def vlarl_bench(python, *args):
    return python("-c", "import sys; from vlarl_bench.cli import main; sys.exit(main())", *args)


def test_a_third_party_package_adds_an_algorithm_a_policy_and_a_suite(python_with_acme):
    done = vlarl_bench(python_with_acme, "list", "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    named = {kind: {item["name"]: item for item in items} for kind, items in found.items()}
    assert named["algorithms"]["acme-rl"]["requires"] == ["acme"]
    assert named["policies"]["acme-policy"]["capabilities"] == ["acme"]
    assert named["suites"]["acme-suite"]["tasks"] == ["acme-suite/lift"]
    assert set(registry.names("algorithm")) <= named["algorithms"].keys()


def test_broken_plugins_are_named_and_spare_the_others(python_with_acme):
    warnings = vlarl_bench(python_with_acme, "list", "--json").stderr.splitlines()
    expected = [
        "algorithm: 'acme-abstract' (acme_vla:Abstract of acme-vla 1.2) does not define __init__, load_state_dict,",
        "algorithm: 'acme-broken' (acme_vla.broken:Broken of acme-vla 1.2) cannot be loaded; ModuleNotFoundError: "
        "No module named 'a_package_that_is_not_installed'",
        "policy: 'acme-renamed' (acme_vla:POLICY of acme-vla 1.2) calls itself 'acme-policy'",
        "suite: 'libero_spatial' is claimed by ",
    ]
    assert len(warnings) == len(expected)
    for warning, start in zip(warnings, expected, strict=True):
        assert warning.startswith(f"vlarl-bench: warning: {start}")
    assert "acme-vla 1.2" in warnings[-1]
    assert "vlarl-bench 0" in warnings[-1]


def test_its_settings_are_options(python_with_acme):
    done = vlarl_bench(python_with_acme, "run", "--algo", "acme-rl", "--help")
    assert "--algo.strength FLOAT" in done.stdout
    assert "How hard to push (unitless). (default: 1.0)" in " ".join(done.stdout.replace("│", "").split())


def test_a_capability_that_the_policy_lacks(python_with_acme):
    done = vlarl_bench(python_with_acme, "run", "--algo", "acme-rl", "--suite", "acme-suite", "--policy", "pi0-tiny")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "policy: 'pi0-tiny' lacks acme, which algorithm 'acme-rl' requires" in line
    assert "'acme-rl' runs on: acme-policy;" in line
    trainers = ", ".join(name for name in registry.names("algorithm") if registry.runs_on(name, "pi0-tiny"))
    assert line.endswith(f"'pi0-tiny' is trained by: {trainers}")


def test_only_the_asked_entry_is_imported():
    code = (
        "import sys; from vlarl_bench import registry; registry.names('algorithm'); registry.get('algorithm', 'sft'); "
        "assert 'vlarl_bench.algorithms.sft' in sys.modules; assert 'vlarl_bench.algorithms.fpo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("kind", "name", "line"),
    [
        ("algorithm", "fop", "algorithm: 'fop' is not registered; did you mean 'fpo'? known: "),
        ("policy", "pi0tiny", "policy: 'pi0tiny' is not registered; did you mean 'pi0-tiny'? known: "),
        ("suite", "libreo", "suite: 'libreo' is not registered; did you mean 'libero'? known: "),
        ("suite", "qqq", "suite: 'qqq' is not registered; known: "),
    ],
)
def test_unknown_names(kind, name, line):
    with pytest.raises(BenchError) as error:
        registry.get(kind, name)
    assert str(error.value).startswith(line)


def test_compatible_pairs_pass():
    registry.check_compatible("fpo", "pi0-tiny")
