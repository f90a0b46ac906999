import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import vlarl_bench
from vlarl_bench.protocol import Protocol
from vlarl_bench.provenance import code_version, fingerprint, fingerprint_hash, make_manifest


def test_fingerprint_names_what_is_installed(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    values = fingerprint()
    assert values["numpy"] == importlib.metadata.version("numpy")
    assert values["libero"].startswith("libero")
    assert values["MUJOCO_GL"] == "osmesa"
    before = fingerprint_hash()
    monkeypatch.setenv("MUJOCO_GL", "egl")
    assert fingerprint_hash() != before
    assert fingerprint_hash(values) == before
    assert len(before) == 12


def test_fingerprint_imports_nothing_heavy():
    code = (
        "import sys; from vlarl_bench.provenance import fingerprint; fingerprint();"
        "assert not {'torch', 'mujoco', 'numpy', 'libero', 'transformers'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_code_version_names_commit_and_dirt(tmp_path):
    package = tmp_path / "repo" / "vlarl_bench"
    shutil.copytree(Path(vlarl_bench.__file__).parent, package, ignore=shutil.ignore_patterns("priors", "__pycache__"))

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package.parent), "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def version() -> str:
        code = "from vlarl_bench.provenance import code_version; print(code_version())"
        command = [sys.executable, "-B", "-c", code]
        return subprocess.run(command, cwd=package.parent, check=True, capture_output=True, text=True).stdout.strip()

    assert version() == vlarl_bench.__version__
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    clean = f"{vlarl_bench.__version__}+g{git('rev-parse', '--short=12', 'HEAD')}"
    assert version() == clean
    (package / "errors.py").open("a").write("#\n")
    assert version() == clean + ".dirty"
    assert code_version().startswith(vlarl_bench.__version__)


def test_manifest_is_json_and_owes_the_evaluation():
    protocol = Protocol("p", 1, "state", {"s": 9}, 1, 2, (0,), (1, 2))
    manifest = make_manifest(
        run="r", argv=["vlarl-bench", "run"], algorithm="fpo", policy="pi0-tiny", suite="s", seed=0,
        base_checkpoint="0" * 12, protocol=protocol, tasks=["s/a", "s/b"], suite_tasks=10, init_states=[1, 2],
        repeats=3, noiseless=True,
    )  # fmt: skip
    again = json.loads(json.dumps(manifest))
    assert again["protocol"]["hash"] == protocol.hash
    owed = {"tasks": ["s/a", "s/b"], "suite_tasks": 10, "init_states": [1, 2], "repeats": 3, "noiseless": True}
    assert again["evaluation"] == owed
    assert again["fingerprint"]["hash"] == fingerprint_hash()
