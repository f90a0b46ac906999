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

from . import registry
from .errors import BenchError

if TYPE_CHECKING:
    from .config import RunConfig
    from .options import Run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 1 (doctor or lint found something), 2 (a mistake, told in one
    line) or 130 (Ctrl-C)."""
    args = list(sys.argv[1:] if argv is None else argv)
    if sys.stdout is None:  # closed by the caller, as `>&-` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
    try:
        if not _has_folder():
            raise BenchError("working directory: it has been deleted; change to one that exists")
        if not args or args[0] in ("-h", "--help"):
            print(_overview())
            return 0 if args else 2
        if args[0] == "sweep-cell":  # for executors, not for people
            return _sweep_cell(args[1:])
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
        from .records import explain_oserror

        if error.filename is None and error.strerror is None:
            raise
        print(f"vlarl-bench: error: {explain_oserror(error, error.filename or 'output')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vlarl-bench: interrupted", file=sys.stderr)
        return 130


def _run(args: list[str]) -> int:
    from .config import RunConfig
    from .options import Resume, parse, parse_run
    from .trackers import check_tracker

    resuming = any(arg.split("=")[0] == "--resume" for arg in args)
    if resuming:
        from .records import read_json

        resume = parse(Resume, args, "vlarl-bench run")
        file = Path(resume.resume) / "config.json"
        if not file.is_file():
            raise BenchError(f"resume: {resume.resume} is not a run folder; it has no config.json")
        stored = read_json(file)
        if not isinstance(stored, dict):
            raise BenchError(f"resume: {file} does not hold a configuration")
        if "states" in stored:
            raise BenchError(f"resume: {resume.resume} is an evaluation, and only runs resume; evaluate again")
        changes = {"workers": resume.workers} if resume.workers else {}
        config, tracker = RunConfig.from_dict({**stored, **changes, "out": resume.resume}), resume.tracker
    else:
        options = parse_run(args)
        config, tracker = run_config(options), options.tracker
    check_tracker(tracker)
    registry.check_compatible(config.algorithm, config.policy)
    _check(config.suite, config.tasks)
    from .run import run

    try:
        run(config, resume=resuming, tracker=tracker)
    except KeyboardInterrupt:
        again = f"continue with: vlarl-bench run --resume {shlex.quote(config.out)}"
        started = (Path(config.out) / "config.json").is_file()
        print(f"vlarl-bench: interrupted; {again if started else 'nothing was started'}", file=sys.stderr)
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
        demos=options.demos,
        rewards=options.rewards,
        video=options.video,
    )


def _eval(args: list[str]) -> int:
    from .config import EvalConfig
    from .options import Eval, parse

    options = parse(Eval, args, "vlarl-bench eval")
    out = options.out or _fresh("eval", options.policy, options.suite, f"seed{options.seed}")
    config = EvalConfig(**{**vars(options), "tasks": _split(options.tasks), "out": out})
    _check(config.suite, config.tasks)
    from .run import evaluate

    evaluate(config)
    return 0


def _tune(args: list[str]) -> int:
    import dataclasses

    from .config import BUDGETS
    from .options import MISSING, Tune, parse

    trial = dataclasses.replace(BUDGETS["quick"], eval_states=10, eval_repeats=3)
    options = parse(Tune, args, "vlarl-bench tune", Tune(algo=MISSING, numbers=trial))
    registry.check_compatible(options.algo, options.policy)
    _check(options.suite, ())
    from .tune import Tuning, tune

    tune(
        Tuning(
            algorithm=options.algo,
            policy=options.policy,
            suite=options.suite,
            budget=options.numbers,
            trials=options.trials,
            out=options.out,
            base=options.base,
            seed=options.seed,
            workers=options.workers,
        )
    )
    return 0


def _demos(args: list[str]) -> int:
    from .config import MOST_WORKERS, check_range, select_tasks
    from .demonstrations import make_demonstrations
    from .doctor import require_gl
    from .options import Demos, parse
    from .progress import Progress
    from .records import explained

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
    from .options import Video, parse

    options = parse(Video, args, "vlarl-bench video")
    check_range("seed", options.seed, 0, 2**31 - 1)
    suite = registry.get("suite", options.suite)
    task = select_tasks(suite, _split(options.task), 1)[0]
    require_gl()
    if options.expert:
        protocol = suite.protocol("pixels")
        state = _init_state(options.init_state, protocol.train_states, protocol)
        path = options.out or f"videos/{task.suite}-{task.name}-expert-state{state}-seed{options.seed}.mp4"
        from .film import film_expert

        steps = film_expert(path, suite, task, state, options.seed)
        print(f"{path}: success in {steps} steps")
        return 0
    from .film import film_policy
    from .plan import plan_evaluation
    from .pool import Pool
    from .rollout import Job, episode_seed

    config = EvalConfig(
        options.suite,
        options.policy,
        options.out or "videos",
        base=options.base,
        unnorm_key=options.unnorm_key,
        tasks=(task.key,),
        protocol=options.protocol,
        states=1,
        seed=options.seed,
    )
    plan = plan_evaluation(config)
    state = _init_state(options.init_state, plan.protocol.eval_states, plan.protocol)
    who = f"{options.policy} {plan.algorithm}"
    path = options.out or f"videos/{task.suite}-{task.name}-{who.replace(' ', '-')}-state{state}-seed{options.seed}.mp4"
    policy = plan.load_base()
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


def _table(args: list[str]) -> int:
    from .options import Table, parse

    options = parse(Table, args, "vlarl-bench table")
    if not options.runs:
        raise BenchError("runs: missing; name one or more run folders")
    if options.published and options.layout != "paper":
        raise BenchError(f"published: published numbers go with --layout paper, not {options.layout}")
    if not 0 < options.threshold <= 1:
        raise BenchError(f"threshold: {options.threshold:g}; it must be above 0 and at most 1, such as 0.8")
    from .report.paper import aggregate_table, paper_table
    from .report.published import read_published
    from .report.render import print_table, to_csv, to_json, to_latex, to_markdown
    from .report.runs import read_runs
    from .report.table import comparison_table, summary_table

    runs = read_runs(options.runs)
    if options.layout == "paper":
        table = paper_table(runs, read_published(options.published) if options.published else ())
    elif options.layout == "aggregate":
        table = aggregate_table(runs, options.threshold)
    else:
        table = comparison_table(runs[0]) if len(runs) == 1 else summary_table(runs)
    if options.format == "text":
        print_table(table)
    else:
        written = {"markdown": to_markdown, "csv": to_csv, "latex": to_latex, "json": to_json}
        print(written[options.format](table), end="")
    return 0


def _figures(args: list[str]) -> int:
    from .options import Figures, parse

    options = parse(Figures, args, "vlarl-bench figures")
    if not options.runs:
        raise BenchError("runs: missing; name one or more run folders")
    if not options.out:
        raise BenchError("out: ''; it must not be empty")
    from .report.figures import write_figures
    from .report.runs import read_runs

    for path in write_figures(options.out, read_runs(options.runs)):
        print(path)
    return 0


def _leaderboard(args: list[str]) -> int:
    from .options import Leaderboard, parse

    options = parse(Leaderboard, args, "vlarl-bench leaderboard")
    if not options.out:
        raise BenchError("out: ''; it must not be empty")
    from .report.leaderboard import find_runs, write_leaderboard
    from .report.published import read_published
    from .report.runs import read_run

    runs = [read_run(folder) for folder in dict.fromkeys(options.runs)] if options.runs else find_runs("results")
    published = read_published(options.published) if options.published else []
    if not runs and not published:
        raise BenchError("runs: none given and none in results/; name at least one run folder")
    path = Path(options.out) / "index.html"
    size = write_leaderboard(path, runs, published)
    print(f"{path}: {len(runs)} runs, {len(published)} published results, {size / 1e6:.2f} MB")
    return 0


def _lint(args: list[str]) -> int:
    from .options import Lint, parse

    options = parse(Lint, args, "vlarl-bench lint")
    if not options.paths:
        raise BenchError("paths: missing; name run folders, tables (.json) or published numbers (.toml)")
    from .report.lint import lint

    findings = lint(options.paths)
    print("\n".join(findings) or "nothing found")
    return 1 if findings else 0


def _power(args: list[str]) -> int:
    from .options import Power, parse
    from .power import check_rates, episodes_needed, pairs_needed, seeds_needed, z_test_power

    asked = parse(Power, args, "vlarl-bench power")
    test = (asked.first, asked.second, asked.power, asked.alpha)
    check_rates(*test)
    n, pairs = episodes_needed(*test), pairs_needed(*test, asked.agreement)
    seeds = seeds_needed(asked.first, asked.second, asked.episodes, asked.seed_sd, asked.power, asked.alpha)
    print(
        f"{asked.first:g} against {asked.second:g}, two-sided alpha {asked.alpha:g}, power {asked.power:g}; for each:\n"
        f"  two policies      {n:,} episodes, all independent "
        f"(z-test; exact power {z_test_power(asked.first, asked.second, n, asked.alpha):.3f})\n"
        f"  the same, paired  {pairs.n:,} pairs of episodes whose outcomes correlate by {asked.agreement:g} "
        f"(exact McNemar test; power {pairs.power:.3f})\n"
        f"  two methods       {seeds.n:,} seeds with {asked.episodes:,} episodes each and a deviation of "
        f"{asked.seed_sd:g} between seeds (t-test; power {seeds.power:.3f})"
    )
    return 0


def _sweep(args: list[str]) -> int:
    from .options import Sweep, parse
    from .progress import Progress
    from .sweep import read_sweep
    from .sweep_jobs import choose, count, prepare, read_states, run_here, run_local, submit
    from .sweep_table import print_plan, summary
    from .trackers import check_tracker

    options = parse(Sweep, args, "vlarl-bench sweep")
    sweep = read_sweep(options.file)
    states = read_states(sweep)
    if options.dry_run:
        print_plan(sweep, states)
        return 0
    if all(state.word == "impossible" for state in states):
        raise BenchError(f"{options.file}: no cell can run: {states[0].note}")
    check_tracker(sweep.file.tracker)
    chosen = choose(sweep, states, options.retry_failed)
    prepare(sweep, [cell for cell, _ in chosen])
    if chosen and options.executor == "slurm":
        for job in submit(sweep, chosen):
            print(f"submitted job {job}")
    elif chosen:
        if options.executor == "local":
            with Progress() as progress:
                run_local(sweep, chosen, sweep.file.parallel or 1, progress.say)
        else:
            run_here(sweep, chosen)
    states = read_states(sweep)
    print(summary(states))
    for cell, state in zip(sweep.cells, states, strict=True):
        if state.word == "failed":
            log = f"; log: {sweep.out / state.attempt.log}" if state.attempt and state.attempt.log else ""
            print(f"failed: {cell.name}: {state.note}{log}")
    return 1 if "failed" in count(states) else 0


def _status(args: list[str]) -> int:
    from .options import Status, parse
    from .sweep import read_sweep
    from .sweep_jobs import read_states
    from .sweep_table import print_plan, watch

    options = parse(Status, args, "vlarl-bench status")
    sweep = read_sweep(options.file)
    if options.once or not sys.stdout.isatty():
        print_plan(sweep, read_states(sweep))
    else:
        watch(sweep)
    return 0


def _cancel(args: list[str]) -> int:
    from .options import Cancel, parse
    from .sweep import read_sweep
    from .sweep_jobs import cancel

    sweep = read_sweep(parse(Cancel, args, "vlarl-bench cancel").file)
    print("\n".join(cancel(sweep)) or "nothing runs or waits")
    return 0


def _sweep_cell(args: list[str]) -> int:
    """What an executor starts: one cell by its name, or that of a SLURM array's index."""
    from .sweep_jobs import run_cell, run_submitted

    match args:
        case [out, token]:
            return run_submitted(Path(out), token)
        case [out, name, seen] if seen.isdigit():
            return run_cell(Path(out), name, int(seen))
    raise BenchError("sweep-cell: only `vlarl-bench sweep` calls this")


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
    "tune": (_tune, "try settings of one algorithm on training states, as many trials for each algorithm"),
    "table": (_table, "print one table of several runs, from their rows on disk"),
    "sweep": (_sweep, "run many cells: algorithms x policies x suites x ablations x seeds, here or on SLURM"),
    "status": (_status, "show which cells of a sweep are done, running, failed or missing"),
    "cancel": (_cancel, "stop the cells of a sweep; `sweep` goes on with them"),
    "figures": (_figures, "draw several runs: learning curves, tasks, profiles, gain against cost"),
    "leaderboard": (_leaderboard, "write the leaderboard, one HTML page of all runs"),
    "lint": (_lint, "say what is wrong with results, in rows, tables and published numbers"),
    "power": (_power, "say how many episodes and seeds tell two success rates apart"),
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
