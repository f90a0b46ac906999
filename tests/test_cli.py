import json
import os
import subprocess
import sys

import pytest

from vlarl_bench import registry
from vlarl_bench.cli import main

RUN = ["run", "--algo", "fpo", "--suite", "libero", "--no-video"]
HEAVY = ("torch", "transformers", "mujoco", "libero", "robosuite", "scipy", "matplotlib", "pandas")


def command(*args, **options):
    code = "import sys; from vlarl_bench.cli import main; sys.exit(main())"
    return subprocess.Popen([sys.executable, "-c", code, *args], text=True, **options)


@pytest.mark.parametrize("args", [["list"], ["list", "--json"], ["run", "--help"], ["run", "--algo", "fpo", "--help"]])
def test_quick_commands_import_nothing_heavy(args):
    code = (
        "import sys; from vlarl_bench.cli import main\n"
        "try: status = main()\n"
        "except SystemExit as stop: status = stop.code\n"
        f"assert not status; assert not [m for m in {HEAVY} if m in sys.modules]"
    )
    subprocess.run([sys.executable, "-c", code, *args], check=True, stdout=subprocess.DEVNULL)


def test_list_json(capsys):
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"algorithms", "policies", "suites"}
    assert [item["name"] for item in found["algorithms"]] == list(registry.names("algorithm"))
    for item in found["algorithms"]:
        assert item["requires"] == sorted(registry.get("algorithm", item["name"]).requires)
        assert item["summary"]
    libero = next(item for item in found["suites"] if item["name"] == "libero")
    assert libero["tasks"] == [task.key for task in registry.get("suite", "libero").tasks]


def test_list_says_what_runs_on_what(capsys):
    assert main(["list"]) == 0
    last = capsys.readouterr().out.split("which algorithm runs on which policy")[1]
    (line,) = [line for line in last.splitlines() if line.split()[:1] == ["fpo"]]
    assert "pi0-tiny, pi0-tiny-pixels" in line
    assert "openvla" not in line


def test_help_shows_defaults_units_and_the_preset(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "--algo", "fpo", "--budget", "smoke", "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "--algo.clip-eps FLOAT" in shown
    assert "Training episodes per iteration, over all tasks. (default: 4)" in shown


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["rnu"], "command: 'rnu' is unknown; did you mean 'run'?"),
        (["run", "--suite", "libero"], "algo: missing; add --algo with one of: "),
        (["run", "--algo", "fop", "--suite", "libero"], "algorithm: 'fop' is not registered; did you mean 'fpo'?"),
        (["run", "--algo", "fpo", "--suite", "libreo"], "suite: 'libreo' is not registered; did you mean 'libero'?"),
        ([*RUN, "--policy", "pi0-tny"], "policy: 'pi0-tny' is not registered; did you mean 'pi0-tiny'?"),
        ([*RUN, "--budget", "quik"], "budget: 'quik' is not a preset; did you mean 'quick'?"),
        ([*RUN, "--algo.clip-esp", "0.1"], "Unrecognized options: --algo.clip-esp, 0.1; did you mean --algo.clip-eps?"),
        ([*RUN, "--algo.clip-eps", "wide"], "Error parsing --algo.clip-eps: could not convert string to float: 'wide'"),
        ([*RUN, "--algo.clip-eps", "nan"], "algo.clip_eps: nan; it must be finite"),
        ([*RUN, "--algo.clip-eps", "-1"], "algo.clip_eps: -1.0; "),
        ([*RUN, "--budget.iterations", "0"], "budget.iterations: 0; it must be at least 1"),
        ([*RUN, "--budget.iterations", "2.5"], "Error parsing --budget.iterations: "),
        ([*RUN, "--seed", "-1"], "seed: -1; it must be in [0, 2147483647]"),
        ([*RUN, "--workers", "0"], "workers: 0; it must be in [1, 256]"),
        ([*RUN, "--slots", "100000"], "slots: 100000; it must be in [1, 4096]"),
        ([*RUN, "--device", "gpu"], "device: 'gpu'; it must be cpu, cuda, or one GPU such as cuda:1"),
        (["eval", "--suite", "libero", "--device", "cuda:x"], "device: 'cuda:x'; it must be cpu, cuda, or one GPU"),
        (
            ["video", "--suite", "libero_goal", "--expert", "--device", "cuda"],
            "device: 'cuda'; the expert is no policy",
        ),
        ([*RUN, "--protocol", "tinny"], "protocol: 'tinny' is not one of LIBERO's; did you mean 'tiny'?"),
        ([*RUN, "--protocol", "openpi"], "protocol: 'openpi' shows camera images; "),
        (
            ["eval", "--suite", "libero", "--protocol", "openpi", "--policy", "pi0-tiny-pixels"],
            "policy: 'pi0-tiny-pixels' looks at images at 64 x 64, but protocol openpi@1 ",
        ),
        (["demos", "--suite", "libero", "--mode", "pixels", "--protocol", "openpi"], "protocol: openpi@1 "),
        (["video", "--suite", "libero_goal", "--task", "fly"], "task: 'fly' is not in suite 'libero_goal'; "),
        (["video", "--suite", "libero_goal", "--task", "a,b"], "task: 'a,b'; one task is filmed; give one name"),
        (["video", "--suite", "libero_goal", "--init-state", "50"], "init_state: 50; tiny-state@2 "),
        (["video", "--suite", "libero_goal", "--expert", "--init-state", "-1"], "init_state: -1; tiny-pixels@2 "),
        (["video", "--suite", "libero_goal", "--out", "/"], "out: / is a folder; give the film's name"),
        (["video", "--suite", "libero_goal", "--expert", "--protocol", "tinny"], "protocol: 'tinny' is not one of "),
        (["video", "--suite", "libero_goal", "--expert", "--base", "x"], "base: 'x'; the expert is no policy"),
        (
            ["video", "--suite", "libero_goal", "--expert", "--policy", "octo-tiny"],
            "policy: 'octo-tiny'; the expert is",
        ),
        ([*RUN, "--algo", "sft", "--rewards", "shuffled"], "rewards: 'shuffled'; 'sft' learns from demonstrations"),
        ([*RUN, "--tasks", "pick_up_the_moon"], "tasks: 'pick_up_the_moon' is not in suite 'libero'; "),
        (["eval", "--suite", "libero", "--states", "0"], "states: 0; it must be at least 1"),
        (["eval", "--suite", "libero", "--decoding", "best"], "invalid choice 'best' for argument '--decoding'."),
        (["demos", "--suite", "libero", "--episodes", "999"], "episodes: 999; "),
        (["demos", "--suite", "libero", "--mode", "video"], "invalid choice 'video' for argument '--mode'."),
        (["table"], "runs: missing; "),
        (["list", "--jsno"], "list: unknown option '--jsno'; did you mean '--json'?"),
        (["doctor", "--fix"], "doctor: unknown option '--fix'; "),
        (["run", "--resume", "no-such-run"], "resume: no-such-run is not a run folder; it has no config.json"),
        (["sweep"], "algo: missing; name a sweep file, or give --algo, --suite and --out in its place"),
        (["sweep", "--algo", "fpo", "--suite", "libero"], "out: missing; name a sweep file"),
        (["sweep", "x.toml", "--seeds", "1", "2"], "seeds: only without a sweep file; write it into x.toml"),
        (["sweep", "--algo", "fpoo", "--suite", "libero", "--out", "x"], "algorithms[0]: algorithm: 'fpoo' is not "),
        (["run", "--resume", "x", "--algo", "fpo"], "Unrecognized options: --algo, fpo"),
    ],
)
def test_a_mistake_is_one_clear_line(args, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vlarl-bench: error: {line}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_line_is_the_same_in_every_encoding(encoding):
    process = command(
        *RUN, "--algo.clip-esp", "1", stderr=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": encoding}
    )
    _, error = process.communicate(timeout=60)
    expected = "Unrecognized options: --algo.clip-esp, 1; did you mean --algo.clip-eps?; see vlarl-bench run --help"
    assert error == f"vlarl-bench: error: {expected}\n"


def test_a_folder_that_holds_something_is_left_alone(capsys, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    assert main([*RUN, "--base", "scratch", "--algo", "sft", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"vlarl-bench: error: out: {tmp_path} exists")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("out", ["file/run", "/proc/run"])
def test_a_folder_that_cannot_be_made(out, capsys, tmp_path, monkeypatch):
    """Also as root, whom permissions do not stop: under a file, and in a file system that takes no folders."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main([*RUN, "--base", "scratch", "--algo", "sft", "--out", out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vlarl-bench: error: ")
    assert out in error
    assert error.count("\n") == 1


def test_more_tasks_than_the_prior_knows(capsys, tmp_path):
    args = ["--policy", "pi0-tiny-pixels", "--suite", "libero_object", "--budget.tasks", "10", "--out", str(tmp_path)]
    assert main(["run", "--algo", "fpo", "--no-video", *args]) == 2
    assert "budget.tasks: 10; the base policy" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["run", "--algo", "fpo", "--no-video"], ["eval"], ["demos"]], ids=lambda a: a[0])
def test_without_a_gl_library_nothing_starts(args, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    monkeypatch.chdir(tmp_path)
    assert main([*args, "--suite", "libero"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vlarl-bench: error: MUJOCO_GL: 'nonsense' cannot render here (")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--seed", "-1"], "seed: -1; it must be in"),
        (["--out", ""], "out: ''; it must not be empty"),
        (["--out", "file/x"], "file/x: a file is where a folder should be"),
    ],
)
def test_demonstrations_are_not_begun_on_bad_options(args, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["demos", "--suite", "libero", *args]) == 2
    assert capsys.readouterr().err.startswith(f"vlarl-bench: error: {line}")


def test_a_run_folder_is_not_a_policy_and_an_evaluation_does_not_resume(capsys, tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "config.json").write_text('{"states": 25}')
    assert main(["eval", "--suite", "libero", "--base", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert f"is a run folder; pass {tmp_path / 'policy'}" in capsys.readouterr().err
    assert main(["run", "--resume", str(tmp_path)]) == 2
    assert "is an evaluation, and only runs resume" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("")
    assert main(["run", "--resume", str(tmp_path)]) == 2
    assert "killed before it began; remove the folder and start again" in capsys.readouterr().err


def test_a_deleted_working_directory_and_a_closed_output(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    code = "import os, sys; os.rmdir(os.getcwd()); from vlarl_bench.cli import main; sys.exit(main(['list']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=gone, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "vlarl-bench: error: working directory: it has been deleted; change to one that exists\n"
    closed = command("list", stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert closed.communicate(timeout=60)[1] == ""
    assert closed.returncode == 0


def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        process = command("list", stdout=full, stderr=subprocess.PIPE)
        _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert error.startswith("vlarl-bench: error: output: the disk is full")
    assert "Traceback" not in error


def test_a_reader_that_leaves_is_no_error():
    process = command("list", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == ""
