"""The command line: `vlarl-bench COMMAND`; `COMMANDS` has them all.

Whatever is heavy is imported by the command that needs it; `list` and the overview import next to nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import registry, sweep_commands
from .errors import BenchError
from .report import commands as report

if TYPE_CHECKING:
    from .config import RunConfig
    from .options import Run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 1 (doctor or lint found something), 2 (a mistake, told in one
    line) or 130 (Ctrl-C)."""
    args = list(sys.argv[1:] if argv is None else argv)
    if sys.stdout is None:  # closed by the caller, as `>&-` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        if not _has_folder():
            raise BenchError("working directory: it has been deleted; change to one that exists")
        if not args or args[0] in ("-h", "--help"):
            print(_overview())
            return 0 if args else 2
        if args[0] == "sweep-cell":  # for executors, not for people
            return sweep_commands.sweep_cell(args[1:])
        if args[0] not in COMMANDS:
            raise BenchError(f"command: {args[0]!r} is unknown; {registry.did_you_mean(args[0], COMMANDS)}")
        with _interrupts():
            status = COMMANDS[args[0]][0](args[1:])
        sys.stdout.flush()
        return status
    except BenchError as error:
        print(f"vlarl-bench: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader left, as `head` does. Nothing more can be printed, also not by the interpreter's last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        from .files import explain_oserror

        if error.filename is None and error.strerror is None:
            raise
        print(f"vlarl-bench: error: {explain_oserror(error, error.filename or 'output')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vlarl-bench: interrupted", file=sys.stderr)
        return 130


def _run(args: list[str]) -> int:
    from .config import MOST_PROCESSES, RunConfig, check_range
    from .distributed import joined, launch, started
    from .options import Resume, parse, parse_run
    from .trackers import check_tracker

    resuming = any(arg.split("=")[0] == "--resume" for arg in args)
    if resuming:
        from .sealed import read_sealed

        resume = parse(Resume, args, "vlarl-bench run")
        file = Path(resume.resume) / "config.json"
        if not file.is_file():
            raise BenchError(f"resume: {resume.resume} is not a run folder; it has no config.json")
        if not file.stat().st_size:
            raise BenchError(f"resume: {resume.resume}: killed before it began; remove the folder and start again")
        stored = read_sealed(file, older=True)
        if "states" in stored:
            raise BenchError(f"resume: {resume.resume} is an evaluation, and only runs resume; evaluate again")
        changes = {"workers": resume.workers} if resume.workers else {}
        config = RunConfig.from_dict({**stored, **changes, "out": resume.resume})
        tracker, keep, processes, base_from = resume.tracker, resume.keep, resume.processes, ""
    else:
        options = parse_run(args)
        config, tracker = run_config(options), options.tracker
        keep, processes, base_from = options.keep, options.processes, options.base_from
    check_range("processes", processes, 1, MOST_PROCESSES)
    check_tracker(tracker)
    if keep < 1:
        raise BenchError(f"keep: {keep}; it must be at least 1, the checkpoint to go on from")
    registry.check_compatible(config.algorithm, config.policy)
    _check(config.suite, config.tasks)
    ranks = started()
    if processes not in (1, ranks) and ranks > 1:
        raise BenchError(f"processes: {processes}; a launcher has started {ranks} already (WORLD_SIZE)")
    try:
        if processes > 1 and ranks == 1:
            named = resuming or options.out  # else by the time, which each of them would read
            return launch(processes, ["run", *args, *([] if named else ["--out", config.out])])
        from .run import run

        with joined():
            run(config, resume=resuming, tracker=tracker, keep=keep, base_from=base_from)
    except KeyboardInterrupt:
        if ranks > 1:
            return 130  # the launcher tells
        again = f"continue with: vlarl-bench run --resume {shlex.quote(config.out)}"
        begun = (Path(config.out) / "config.json").is_file()
        print(f"vlarl-bench: interrupted; {again if begun else 'nothing was started'}", file=sys.stderr)
        return 130
    return 0


def run_config(options: Run[Any]) -> RunConfig:
    """The run that the options of `run` ask for."""
    from .config import RunConfig, check_settings

    check_settings(options.settings)
    return RunConfig(
        algorithm=options.algo,
        suite=options.suite,
        policy=options.policy,
        budget=options.numbers,
        settings=options.settings,
        out=options.out or _fresh(options.algo, options.suite, f"seed{options.seed}"),
        base=options.base,
        unnorm_key=options.unnorm_key,
        freeze=_split(options.freeze),
        lora=options.lora,
        tasks=_split(options.tasks),
        protocol=options.protocol,
        seed=options.seed,
        workers=options.workers,
        slots=options.slots,
        threads=options.threads,
        device=options.device,
        demos=options.demos,
        rewards=options.rewards,
        video=options.video,
    )


def _eval(args: list[str]) -> int:
    from .config import EvalConfig
    from .options import Eval, parse

    options = parse(Eval, args, "vlarl-bench eval")
    seed = options.seed if options.seed is not None else _seed_of(Path(options.base))
    out = options.out or _fresh("eval", options.policy, options.suite, f"seed{seed}")
    config = EvalConfig(**{**vars(options), "seed": seed, "tasks": _split(options.tasks), "out": out})
    _check(config.suite, config.tasks)
    from .run import evaluate

    evaluate(config)
    return 0


def _seed_of(base: Path) -> int:
    """The seed of the run that fine-tuned a policy, so that seeds stay apart and meet their base policy's; else 0."""
    from .plan import trained_from

    trained = trained_from(base) if (base / "config.json").is_file() else None
    return int(trained["seed"]) if trained else 0


def _reproduce(args: list[str]) -> int:
    from .options import Reproduce, parse
    from .reproduce import reproduce

    return 0 if reproduce(parse(Reproduce, args, "vlarl-bench reproduce")) else 1


def _demos(args: list[str]) -> int:
    from .config import MOST_WORKERS, check_range, select_tasks
    from .demonstrations import make_demonstrations
    from .doctor import require_gl
    from .files import explained
    from .options import Demos, parse
    from .progress import Progress

    options = parse(Demos, args, "vlarl-bench demos")
    suite = registry.get("suite", options.suite)
    tasks = select_tasks(suite, _split(options.tasks), len(suite.tasks))
    check_range("workers", options.workers, 1, MOST_WORKERS)
    check_range("seed", options.seed, 0, 2**31 - 1)
    if options.episodes < 1:
        raise BenchError(f"episodes: {options.episodes}; it must be at least 1")
    if not options.out:
        raise BenchError("out: ''; it must not be empty")
    protocol = suite.protocol(options.mode, options.protocol)
    if not protocol.train_states:
        raise BenchError(f"protocol: {protocol.label} has no states to learn from; it only serves `vlarl-bench eval`")
    if options.episodes > len(protocol.train_states):
        raise BenchError(
            f"episodes: {options.episodes}; {protocol.label} has {len(protocol.train_states)} to learn from"
        )
    require_gl()
    with explained(options.out):
        Path(options.out).mkdir(parents=True, exist_ok=True)

    with Progress() as progress, progress.phase("expert", options.episodes * len(tasks), "demonstrations") as phase:
        make_demonstrations(
            suite,
            tasks,
            protocol,
            options.episodes,
            Path(options.out),
            options.workers,
            options.seed,
            lambda made: phase.advance(episodes=made),
        )
    return 0


def _video(args: list[str]) -> int:
    from .config import EvalConfig, check_range, select_tasks
    from .doctor import require_gl
    from .options import DEFAULT_POLICY, Video, parse

    options = parse(Video, args, "vlarl-bench video")
    check_range("seed", options.seed, 0, 2**31 - 1)
    suite = registry.get("suite", options.suite)
    if "," in options.task:
        raise BenchError(f"task: {options.task!r}; one task is filmed; give one name")
    task = select_tasks(suite, (options.task,) if options.task else (), 1, "task")[0]
    if options.out and Path(options.out).is_dir():
        raise BenchError(f"out: {options.out} is a folder; give the film's name, such as film.mp4")
    if options.expert:
        for name, left_out in (("policy", ""), ("base", "prior"), ("unnorm_key", ""), ("device", "cpu")):
            if (given := getattr(options, name)) != left_out:
                raise BenchError(f"{name}: {given!r}; the expert is no policy and has no weights, leave it out")
        protocol = suite.protocol("pixels", options.protocol)
        if not protocol.train_states:
            raise BenchError(f"protocol: {protocol.label} has no states to learn from, and the expert plays no other")
        require_gl()
        state = _init_state(options.init_state, protocol.train_states, protocol)
        path = options.out or f"videos/{task.suite}-{task.name}-expert-state{state}-seed{options.seed}.mp4"
        from .film import film_expert

        steps = film_expert(path, suite, protocol, task, state, options.seed)
        print(f"{path}: success in {steps} steps")
        return 0
    require_gl()
    from .device import find_device
    from .film import film_policy
    from .plan import plan_evaluation
    from .pool import Pool
    from .rollout import Job, episode_seed

    name = options.policy or DEFAULT_POLICY
    config = EvalConfig(
        options.suite,
        name,
        options.out or "videos",
        base=options.base,
        unnorm_key=options.unnorm_key,
        tasks=(task.key,),
        protocol=options.protocol,
        states=1,
        seed=options.seed,
        device=options.device,
    )
    device = find_device(config.device)
    plan = plan_evaluation(config)
    state = _init_state(options.init_state, plan.protocol.eval_states, plan.protocol)
    who = f"{name} {plan.algorithm}"
    path = options.out or f"videos/{task.suite}-{task.name}-{who.replace(' ', '-')}-state{state}-seed{options.seed}.mp4"
    policy = plan.load_base().to(device)
    job = Job(task, state, 0, episode_seed(options.seed, "eval", task.key, state, 0))
    with Pool(plan.suite, plan.protocol, workers=1, video=True) as pool:
        success = film_policy(path, pool, plan.suite, plan.protocol, policy, job, config.slots, who)
    print(f"{path}: {'success' if success else 'failure'}")
    return 0


def _init_state(wanted: int | None, default: Sequence[int], protocol: Any) -> int:
    known = sorted({*protocol.train_states, *protocol.eval_states})
    if wanted is None:
        return default[0]
    if wanted not in known:
        raise BenchError(f"init_state: {wanted}; {protocol.label} has {known[0]} to {known[-1]}")
    return wanted


def _list(args: list[str]) -> int:
    as_json = _flag(args, "list", "--json", "print JSON")
    found: dict[registry.Kind, dict[str, Any]] = {kind: {} for kind in registry.GROUPS}
    broken = []
    for kind in registry.GROUPS:
        for name in registry.names(kind):
            try:
                found[kind][name] = registry.get(kind, name)
            except BenchError as error:
                broken.append(str(error))
    for line in broken:
        print(f"vlarl-bench: warning: {line}", file=sys.stderr)
    algorithms, policies, suites = found["algorithm"], found["policy"], found["suite"]
    if as_json:
        shown = {
            "algorithms": [
                {"name": name, "summary": found.summary, "requires": sorted(found.requires)}
                for name, found in algorithms.items()
            ],
            "policies": [
                {
                    "name": name,
                    "summary": found.summary,
                    "capabilities": sorted(found.capabilities),
                    "observation": found.observation,
                    "needs_base": found.published,
                }
                for name, found in policies.items()
            ],
            "suites": [
                {"name": name, "summary": found.summary, "tasks": [task.key for task in found.tasks]}
                for name, found in suites.items()
            ],
        }
        print(json.dumps(shown, indent=2))
        return 0
    _section("algorithms", [(name, found.summary) for name, found in algorithms.items()])
    _section("policies", [(name, _described(found)) for name, found in policies.items()])
    _section("suites", [(name, found.summary) for name, found in suites.items()])
    trains = {name: [p for p in policies if registry.runs_on(name, p)] for name in algorithms}
    _section("which algorithm runs on which policy", [(name, ", ".join(on) or "none") for name, on in trains.items()])
    return 0


def _doctor(args: list[str]) -> int:
    _flag(args, "doctor")
    from .doctor import doctor

    return doctor()


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "run": (_run, "fine-tune a policy: evaluate, train, evaluate again on the same held-out episodes"),
    "eval": (_eval, "evaluate a policy without training it"),
    "demos": (_demos, "make demonstrations with the suite's scripted expert"),
    "video": (_video, "film one episode of a policy or of the scripted expert"),
    "reproduce": (_reproduce, "run a published run again and say whether it comes to the same"),
    "tune": (sweep_commands.tune, "try settings on training states, as many trials for every algorithm"),
    "table": (report.table, "print one table of several runs, from their rows on disk"),
    "sweep": (
        sweep_commands.sweep,
        "run algorithms x policies x suites x ablations x seeds, here or on SLURM",
    ),
    "status": (sweep_commands.status, "show which cells of a sweep are done, running, failed or missing"),
    "cancel": (sweep_commands.cancel, "stop the cells of a sweep; `sweep` goes on with them"),
    "figures": (report.figures, "draw several runs: learning curves, tasks, profiles, gain against cost"),
    "analyze": (report.analyze, "draw how the CFM loss converged and how latents moved, from what runs kept"),
    "leaderboard": (report.leaderboard, "write the leaderboard, one HTML page of all runs"),
    "pack": (report.pack, "put finished runs into one small folder, to publish them"),
    "submit": (report.submit, "check another group's runs, and add them to results/ as theirs"),
    "lint": (report.lint, "say what is wrong with results, in rows, tables and published numbers"),
    "power": (report.power, "say how many episodes and seeds tell two success rates apart"),
    "list": (_list, "show what is installed: algorithms, policies, suites, and which run on which"),
    "doctor": (_doctor, "say what this machine has, and what to do about what is missing"),
}


def _check(suite: str, tasks: tuple[str, ...]) -> None:
    """What can be found wrong before anything heavy is imported; `run` checks the rest."""
    from .config import select_tasks
    from .doctor import require_gl

    select_tasks(registry.get("suite", suite), tasks, 0)
    require_gl()  # also where nothing is rendered: the simulators load a GL library when they are imported


def _has_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _flag(args: list[str], command: str, flag: str = "", meaning: str = "") -> bool:
    """Whether the one flag of a small command was given. By hand, since importing tyro takes longer than `list`."""
    known = [flag] if flag else []
    if {"-h", "--help"} & set(args):
        print(f"usage: vlarl-bench {command} [-h]{f' [{flag}]' if flag else ''}\n\n{COMMANDS[command][1]}")
        if flag:
            print(f"\n  {flag}  {meaning} (default: no)")
        raise SystemExit(0)
    for arg in args:
        if arg not in known:
            raise BenchError(f"{command}: unknown option {arg!r}; {registry.did_you_mean(arg, known)}")
    return bool(args)


def _split(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",")) if names else ()


def _fresh(*parts: str) -> str:
    """A folder under runs/ that no earlier run has."""
    return "runs/" + "-".join([*parts, time.strftime("%Y%m%d-%H%M%S")])


def _section(title: str, rows: list[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    print("\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows)]), end="\n\n")


def _described(policy: Any) -> str:
    return f"{policy.summary}; needs --base FOLDER" if policy.published else policy.summary


def _overview() -> str:
    rows = [f"  {name:<13}{meaning}" for name, (_, meaning) in COMMANDS.items()]
    head = "usage: vlarl-bench COMMAND [OPTIONS]\n\nCompare RL fine-tuning methods for vision-language-action policies."
    return "\n".join([head, "", *rows, "", "vlarl-bench COMMAND --help shows its options, their defaults and units."])


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """The first Ctrl-C stops the command; one that follows at once must not cut short how it cleans up."""
    last = -1e9

    def stop(_signal: int, _frame: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 5:
            last = now
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        # Once interrupted, the process is on its way out, and a second Ctrl-C must not kill it on the last metres.
        signal.signal(signal.SIGINT, before if last < 0 else signal.SIG_IGN)
