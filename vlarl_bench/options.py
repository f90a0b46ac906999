"""The options of each command, as tyro reads them, and the parse itself.

`--algo` and `--budget` are picked out first, so that tyro can then offer that algorithm's settings as `--algo.*` and
that preset's numbers as the defaults of `--budget.*`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro

from . import registry
from .config import BUDGETS, Budget, RunConfig
from .errors import BenchError
from .tune import SUITE

Settings = TypeVar("Settings")
Parsed = TypeVar("Parsed")

DEFAULT_POLICY = "pi0-tiny"

_SOME = tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)")
Runs = Annotated[tyro.conf.Positional[tuple[str, ...]], _SOME]
SweepFile = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]


@dataclass(frozen=True)
class Run(Generic[Settings]):
    """Fine-tune a policy with one algorithm: evaluate, train, evaluate again on the same held-out episodes.

    `--resume DIR` in place of these options continues an interrupted run."""

    algo: str
    """Algorithm; `vlarl-bench list` shows them. With it, --help shows its settings as --algo.*"""
    suite: str
    """Suite of tasks; `vlarl-bench list` shows them."""
    settings: Annotated[Settings, tyro.conf.arg(name="algo")]
    budget: str = "quick"
    """Preset: smoke (a minute), quick (some ten minutes) or standard (hours), on two CPU cores."""
    numbers: Annotated[Budget, tyro.conf.arg(name="budget")] = BUDGETS["quick"]
    policy: str = DEFAULT_POLICY
    """Policy to fine-tune; `vlarl-bench list` shows which algorithm runs on which."""
    base: str = "prior"
    """Weights to start from: prior (shipped with the policy), scratch (random) or a policy folder."""
    unnorm_key: str = ""
    """Training data whose action scales to use, where a published folder has several."""
    freeze: str = ""
    """Comma-separated parts of the policy that nothing trains, such as network.vision_backbone."""
    lora: int = 0
    """Rank of LoRA adapters, trained in place of the weights beside them; 0 trains the weights."""
    tasks: str = ""
    """Comma-separated task names; empty takes the first --budget.tasks that the base policy was trained on."""
    protocol: str = "tiny"
    """How it is evaluated: tiny (this project's own), tuning (tiny without its held-out states), or a published one of
    the suite, such as openpi (docs/suites)."""
    seed: int = 0
    """Seeds the policy's noise, the algorithm and the choice of episodes."""
    workers: int = 2
    """Simulator processes; changes the speed, never the rows."""
    slots: int = 16
    """Episodes in flight, decoded as one batch; another number gives results that differ in rounding."""
    threads: int = 2
    """CPU threads of the learner; another number gives results that differ in rounding."""
    device: str = "cpu"
    """Where the policy computes: cpu, cuda, or one GPU such as cuda:1; results differ in rounding."""
    demos: str = ""
    """Folder of demonstrations: of `vlarl-bench demos`, another LeRobotDataset v3, or LIBERO's HDF5 files; empty makes
    those that are missing in demos/ first, if the algorithm learns from them."""
    rewards: Literal["success", "shuffled"] = "success"
    """What the learner is told: shuffled permutes outcomes within each task, a control that must not learn."""
    video: bool = True
    """Film one episode before and one after."""
    tracker: str = ""
    """Where metrics are shown besides the run folder: wandb (offline), tensorboard or trackio."""
    keep: int = 2
    """Newest checkpoints that stay, of one per round, besides that of the policy that last succeeded in training;
    `vlarl-bench analyze` shows the policy of each."""
    base_from: str = ""
    """Folder of runs, of which one may have played the same base evaluation on this code and machine: it is then taken
    from there, as the cells of a sweep do."""
    processes: int = 1
    """Processes that share the run, each with --workers, --slots and --threads of its own; torchrun starts them on
    several machines. Another number gives results that differ in rounding."""
    out: str = ""
    """Run folder, which must not exist; empty names one under runs/ by algorithm, suite, seed and time."""


@dataclass(frozen=True)
class Resume:
    """Continue an interrupted run."""

    resume: str
    """Run folder to continue; its own configuration is used."""
    workers: int = 0
    """Simulator processes; 0 keeps the run's number. Changes the speed, never the rows."""
    tracker: str = ""
    """Where metrics are shown besides the run folder: wandb (offline), tensorboard or trackio."""
    keep: int = 2
    """Newest checkpoints that stay, of one per round, besides that of the policy that last succeeded in training;
    `vlarl-bench analyze` shows the policy of each."""
    processes: int = 1
    """Processes that share the run from here on; it need not be the number that began it."""


@dataclass(frozen=True)
class Eval:
    """Evaluate a policy without training it."""

    suite: str
    """Suite of tasks; `vlarl-bench list` shows them."""
    policy: str = DEFAULT_POLICY
    """Policy to evaluate."""
    base: str = "prior"
    """Its weights: prior (shipped with the policy) or a policy folder."""
    unnorm_key: str = ""
    """Training data whose action scales to use, where a published folder has several."""
    tasks: str = ""
    """Comma-separated task names; empty takes all tasks of the suite."""
    protocol: str = "tiny"
    """How it is evaluated: tiny (this project's own), tuning (tiny without its held-out states), or a published one of
    the suite, such as openpi (docs/suites)."""
    states: int = 25
    """Held-out initial states per task."""
    repeats: int = 1
    """Episodes per task and initial state; where decoding draws no noise, one: it would repeat itself."""
    decoding: Literal["protocol", "sampled", "zero-noise"] = "protocol"
    """Whether the policy's noise is drawn or zero (tokens: drawn or the likeliest); `protocol` does as that says."""
    seed: int | None = None
    """Seeds the policy's noise; by default that of the run which fine-tuned it, and 0 for others."""
    workers: int = 2
    """Simulator processes; changes the speed, never the rows."""
    slots: int = 16
    """Episodes in flight, decoded as one batch; another number gives results that differ in rounding."""
    device: str = "cpu"
    """Where the policy computes: cpu, cuda, or one GPU such as cuda:1; results differ in rounding."""
    video: bool = False
    """Film one episode."""
    out: str = ""
    """Run folder, which must not exist; empty names one under runs/ by policy, suite, seed and time."""


@dataclass(frozen=True)
class Demos:
    """Make demonstrations with the suite's scripted expert, on the initial states that training may use."""

    suite: str
    """Suite of tasks; `vlarl-bench list` shows them."""
    mode: Literal["state", "pixels"] = "state"
    """What is recorded: object poses (privileged) or camera images."""
    tasks: str = ""
    """Comma-separated task names; empty takes all tasks of the suite."""
    protocol: str = "tiny"
    """Whose observations, horizons and training states they follow."""
    episodes: int = 25
    """Episodes per task."""
    seed: int = 0
    """Seeds the expert's variation."""
    workers: int = 2
    """Simulator processes; changes the speed, never the demonstrations."""
    out: str = "demos"
    """Folder that they go to: a LeRobotDataset v3 for each suite."""


@dataclass(frozen=True)
class Video:
    """Film one episode of a policy, or of the scripted expert; instruction, step and outcome are drawn in."""

    suite: str
    """Suite of tasks; `vlarl-bench list` shows them."""
    task: str = ""
    """Task name; empty takes the suite's first."""
    expert: bool = False
    """Film the suite's scripted expert in place of a policy."""
    policy: str = ""
    """Policy to film; empty takes pi0-tiny."""
    base: str = "prior"
    """Its weights: prior (shipped with the policy) or a policy folder."""
    unnorm_key: str = ""
    """Training data whose action scales to use, where a published folder has several."""
    protocol: str = "tiny"
    """How it is played: tiny (this project's own) or a published protocol of the suite, such as openpi."""
    init_state: int | None = None
    """Initial state; empty takes the first held-out one, and for the expert the first to train on."""
    seed: int = 0
    """Seeds the policy's noise, or the expert's variation."""
    device: str = "cpu"
    """Where the policy computes: cpu, cuda, or one GPU such as cuda:1."""
    out: str = ""
    """MP4 file, replaced if it exists; empty names one under videos/ by suite, task, player, state and seed."""


@dataclass(frozen=True)
class Table:
    """Print a table of runs, from their rows on disk."""

    runs: Runs
    """Run folders, packs, or runs of packs as PACK/NAME: one shows each task, several one line per run and suite."""
    format: Literal["text", "markdown", "csv", "latex", "json"] = "text"
    """How to print it; csv and json carry full precision, latex needs booktabs and graphicx."""
    layout: Literal["runs", "gains", "paper", "aggregate", "cost"] = "runs"
    """runs: a line per run, or per task of one; gains: a line per method, before and after; paper: methods down, suites
    across; aggregate: mean, IQM, optimality gap, chance to improve, ranks and sample efficiency over seeds and tasks;
    cost: steps, operations and CPU hours to a success rate in training."""
    published: str = ""
    """Folder of numbers that others published, such as results/published: shown below the measured ones of a paper
    layout, never mixed with them."""
    threshold: float = 0.8
    """Success rate in training whose steps the layouts aggregate and cost count."""
    pool: bool = False
    """Show the suites of a group, such as libero's four, as one: what each method scores on all of its tasks."""


@dataclass(frozen=True)
class Figures:
    """Draw runs under one protocol: learning curves, tasks, performance profiles, gain against cost."""

    runs: Runs
    """Run folders, packs, or runs of packs as PACK/NAME."""
    out: str = "figures"
    """Folder that the SVG and PNG files go to."""
    pool: bool = False
    """Draw the suites of a group, such as libero's four, as one."""


@dataclass(frozen=True)
class Analyze:
    """Draw how the CFM objective converged, and how a run's latents moved from its base policy to its last one: the
    policies that the run kept play training states once more. Numbers go to analysis.json beside the figures."""

    runs: Runs
    """Run folders."""
    states: int = 8
    """Training states of each task that every policy plays; 0 plays nothing and draws convergence alone."""
    workers: int = 2
    """Simulator processes; changes the speed, never the numbers."""
    out: str = "analysis"
    """Folder that the SVG and PNG files and analysis.json go to."""


@dataclass(frozen=True)
class Leaderboard:
    """Write the leaderboard: one HTML page of all runs, that loads nothing from elsewhere."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[RUN ...]")] = ()
    """Run folders, packs, or runs of packs as PACK/NAME; empty takes all in results/."""
    published: str = "results/published"
    """Folder of numbers that others published; empty leaves them out."""
    out: str = "site"
    """Folder that index.html goes to."""


@dataclass(frozen=True)
class Pack:
    """Put finished runs into a pack: one folder of three files, with all rows and metrics as compressed Parquet. Every
    report reads it as it reads run folders. A run that is in the pack already is left alone."""

    runs: Runs
    """Run folders, other packs, or runs of these as PACK/NAME, where NAME may have * and ? (in quotes)."""
    out: str
    """The pack: a folder that does not exist yet, or a pack to add to, such as results/NAME."""


@dataclass(frozen=True)
class Submit:
    """Check another group's runs and add them to results/, as a pack of theirs that every report shows as submitted.
    All are added or none; exit status 1 with a line for each reason. More: docs/contributing-results.md."""

    runs: Runs
    """Run folders or packs, finished."""
    by: str
    """Group or person whose results they are."""
    contact: str
    """Where questions go: an address or a page."""
    licence: str
    """Under which the rows may be used, such as CC-BY-4.0."""
    source: str = ""
    """Paper, page or commit that tells more, if any."""
    out: str = "results"
    """Folder of results that the pack goes to."""


@dataclass(frozen=True)
class Lint:
    """Say what is wrong with results: rows, tables in JSON, and numbers that others published. Exit status 1 if any."""

    paths: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PATH [PATH ...]", help_behavior_hint="(required)")
    ]
    """Run folders and packs; .json files of `table --format json`; .toml files of published numbers, or their
    folders."""


@dataclass(frozen=True)
class Power:
    """How many episodes and seeds tell two success rates apart.

    `--sequential DIR...` in place of these options says where a test that may stop early would have stopped."""

    first: Annotated[tyro.conf.Positional[float], tyro.conf.arg(metavar="RATE")]
    """One success rate, between 0 and 1."""
    second: Annotated[tyro.conf.Positional[float], tyro.conf.arg(metavar="RATE")]
    """The other."""
    power: float = 0.8
    """Chance to see the difference."""
    alpha: float = 0.05
    """Chance to see one where there is none; two-sided."""
    agreement: float = 0.0
    """Correlation of the two outcomes of one initial state, for paired episodes."""
    seed_sd: float = 0.05
    """Standard deviation of the success rate between training seeds."""
    episodes: int = 150
    """Episodes played of each seed."""


@dataclass(frozen=True)
class Sequential:
    """Replay finished runs, pair by pair, with a test that may stop early."""

    sequential: tuple[str, ...]
    """Run folders, packs, or runs of packs as PACK/NAME; each is tested by itself, before against after."""
    alpha: float = 0.05
    """Chance to see a difference where there is none, however often one looks; two-sided."""


@dataclass(frozen=True)
class Tune:
    """Try settings on training states only: as many trials for every algorithm. The trials are the cells of a sweep,
    whose file is written first; the same command again, or the file's name, goes on with it and tells what was best."""

    numbers: Annotated[Budget, tyro.conf.arg(name="budget")]
    """What each trial may use."""
    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[FILE]")] = ""
    """A file that this command wrote, in place of what follows up to --out."""
    algo: tuple[str, ...] = ()
    """Algorithms; their own files say which settings are searched, over which values."""
    policy: tuple[str, ...] = (DEFAULT_POLICY,)
    """Policies to fine-tune."""
    suite: str = SUITE
    """The tuning suite; keep to it, or methods were not tuned alike."""
    base: str = "prior"
    """Weights to start from: prior (shipped with the policy) or a policy folder."""
    trials: int = 8
    """Runs of each algorithm on each policy, the first of them with the defaults."""
    seed: int = 0
    """Seeds the choice of settings, and every trial alike."""
    workers: int = 2
    """Simulator processes of each trial; changes the speed, never the rows."""
    threads: int = 2
    """CPU threads of each trial's tensor work."""
    device: str = "cpu"
    """Where the trials' policies compute: cpu, cuda, or one GPU such as cuda:1; results differ in rounding."""
    parallel: int = 1
    """Trials at a time."""
    out: str = "tuning"
    """Folder that the trials go to; the file is written beside it, as OUT.toml."""
    executor: Literal["local", "slurm", "debug"] = "local"
    """Where trials run, as for `sweep`. With slurm: come back with the same command when the jobs have ended."""
    retry_failed: bool = False
    """Try again the trials that failed."""


@dataclass(frozen=True)
class Reproduce:
    """Run a published run again, from the same weights, and say whether it comes to the same. Exit status 1 if not."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder, or a run of a pack as PACK/NAME. Of a whole pack, one run is chosen at random."""
    smoke: bool = False
    """In less than a minute: whether it still runs, not whether it comes to the same."""
    demos: str = ""
    """Demonstrations, where the method learns from any; empty makes what is missing in demos/."""
    workers: int = 2
    """Simulator processes; changes the speed, never the rows."""
    device: str = "cpu"
    """Where the policy computes: cpu, cuda, or one GPU such as cuda:1."""
    out: str = ""
    """Run folder, which must not exist; empty takes runs/again-NAME."""


@dataclass(frozen=True)
class Sweep:
    """Run what is missing of a sweep: algorithms x policies x suites x ablations x seeds. docs/sweeps.md tells what
    its file holds. The same command again goes on where the last one stopped.

    `--algo`, `--suite` and `--out` in place of a file write the file that they stand for, and go on with it."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[FILE]")] = ""
    """Sweep file (TOML)."""
    algo: tuple[str, ...] = ()
    """Algorithms to run (without a file)."""
    policy: tuple[str, ...] = (DEFAULT_POLICY,)
    """Policies to run (without a file)."""
    suite: tuple[str, ...] = ()
    """Suites to run (without a file)."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds of each combination (without a file)."""
    budget: str = "quick"
    """Preset of the budget of each run: smoke, quick or standard (without a file)."""
    out: str = ""
    """Folder of the sweep; the file is written beside it, as OUT.toml (without a file)."""
    executor: Literal["local", "slurm", "debug"] = "local"
    """Where cells run: processes of this machine, array jobs of a SLURM cluster, or this very process, one by one."""
    dry_run: bool = False
    """Print the plan and stop: what is done, running, failed and missing, what it may cost, what is impossible."""
    retry_failed: bool = False
    """Try again the cells that failed, from their newest checkpoints."""


@dataclass(frozen=True)
class Status:
    """Show the cells of a sweep: a live table in a terminal, until nothing runs any more."""

    file: SweepFile
    """Sweep file (TOML)."""
    once: bool = False
    """Print the table once and stop; so it is without a terminal, too."""


@dataclass(frozen=True)
class Cancel:
    """Stop the cells of a sweep that run, and take those that wait out of the queue. `sweep` goes on with them."""

    file: SweepFile
    """Sweep file (TOML)."""


@dataclass(frozen=True)
class NoSettings:
    """Stands in for an algorithm's settings where --help is asked without --algo."""


def parse_run(args: list[str]) -> Run[Any]:
    """Reads the options of `run`.

    Raises:
        BenchError: for an unknown option, algorithm or preset (with the nearest one), or an unreadable value.
    """
    algorithm, preset = _option(args, "--algo"), _option(args, "--budget") or "quick"
    if preset not in BUDGETS:
        raise BenchError(f"budget: {preset!r} is not a preset; {registry.did_you_mean(preset, BUDGETS)}")
    if algorithm is None and not {"-h", "--help"} & set(args):
        raise BenchError(f"algo: missing; add --algo with one of: {', '.join(registry.names('algorithm'))}")
    settings: Any = registry.get("algorithm", algorithm).Settings if algorithm is not None else NoSettings
    default = Run(
        algo=algorithm or tyro.MISSING,
        suite=tyro.MISSING,
        settings=settings(),
        budget=preset,
        numbers=BUDGETS[preset],
    )
    return parse(Run[settings], args, "vlarl-bench run", default)


def to_arguments(config: RunConfig) -> list[str]:
    """The command that asks for this run: `parse_run` reads the same run back. Defaults are left out."""
    args = ["run", "--algo", config.algorithm, "--suite", config.suite]
    numbers = dataclasses.asdict(config.budget)
    preset = min(BUDGETS, key=lambda name: len(_differing(numbers, dataclasses.asdict(BUDGETS[name]))))
    args += ["--budget", preset]
    for name, value in _differing(numbers, dataclasses.asdict(BUDGETS[preset])).items():
        args += _argument(f"budget.{name}", value)
    defaults = dataclasses.asdict(type(config.settings)())
    for name, value in _differing(dataclasses.asdict(config.settings), defaults).items():
        args += _argument(f"algo.{name}", value)
    for field in dataclasses.fields(Run):
        if field.name in (
            "algo",
            "suite",
            "settings",
            "budget",
            "numbers",
            "tracker",
            "keep",
            "processes",
            "base_from",
        ):
            continue
        value = getattr(config, field.name)
        if field.name in ("freeze", "tasks"):
            value = ",".join(value)
        if value != field.default:
            args += _argument(field.name, value)
    return args


def _differing(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value != defaults[name]}


def _argument(name: str, value: Any) -> list[str]:
    group, _, last = name.replace("_", "-").rpartition(".")
    flag = f"--{group}.{last}" if group else f"--{last}"
    if isinstance(value, bool):
        return [flag if value else (f"--{group}.no-{last}" if group else f"--no-{last}")]
    if isinstance(value, tuple):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"] if str(value).startswith("-") or not str(value) else [flag, str(value)]


def parse(kind: type[Parsed], args: list[str], prog: str, default: Parsed | None = None) -> Parsed:
    """tyro, with its errors as one line."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            if default is None:
                return tyro.cli(kind, args=args, prog=prog)
            return tyro.cli(kind, args=args, prog=prog, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise BenchError(f"{_one_line(shown.getvalue())}; see {prog} --help") from None


def _one_line(box: str) -> str:
    """The message of tyro's error box and the first option that it suggests.

    The box is drawn with lines where stdout speaks UTF-8; elsewhere a ruler parts its title from the message.
    """
    sections: list[list[str]] = [[]]
    for row in (line.strip().strip("│").strip() for line in box.splitlines()):
        if row and set(row) <= set("─-"):
            sections.append([])
        elif row and row[0] not in "╭╰":
            sections[-1].append(row)
    titled = "╭" not in box and len(sections) > 1
    message = " ".join(sections[1 if titled else 0])
    suggestion = re.search(r"you meant.*?(--[\w.-]+)", box, re.DOTALL)
    return message + (f"; did you mean {suggestion[1]}?" if suggestion else "")


def _option(args: list[str], flag: str) -> str | None:
    """The value of `--flag value` or `--flag=value`; the last one counts, as for tyro."""
    value = None
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            value = args[i + 1]
        elif arg.startswith(f"{flag}="):
            value = arg.removeprefix(f"{flag}=")
    return value
