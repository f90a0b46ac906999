"""The FPO paper's analyses of run folders: figures, and `analysis.json` with every number in them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import MOST_WORKERS, check_range
from ..doctor import require_gl
from ..errors import BenchError
from ..files import write_json_atomic
from ..progress import Progress
from .convergence import METRIC, convergence, draw_convergence
from .figures import write_figure
from .latents import check_installed, describe
from .methods import compared_methods
from .runs import RunFolder


def write_analysis(folder: str | os.PathLike[str], runs: Sequence[RunFolder], states: int, workers: int) -> list[str]:
    """Writes what the runs allow; returns a line for each file, and one for each thing that they do not allow.

    With `states` 0 nothing is played. Raises BenchError if nothing at all can be drawn.
    """
    check_range("workers", workers, 1, MOST_WORKERS)
    names = [run.folder.resolve().name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise BenchError(f"runs: two folders are called {name!r}; their figures would be, too; rename one")
    protocol = runs[0].manifest["protocol"]
    label, most = protocol["label"], len(protocol["train_states"])
    if states > most:
        raise BenchError(f"states: {states}; {label} has {most} to train on")
    if states:
        check_installed()
        require_gl()
    methods = compared_methods(runs)
    curves = convergence(methods)
    written = write_figure(folder, "convergence", "Convergence of the CFM objective", draw_convergence, curves)
    silent = sorted({m.label for m in methods if not m.is_base} - {curve["method"] for curve in curves})
    missing = [f"no convergence of {', '.join(silent)}: {METRIC} was not logged"] if silent else []
    latents: dict[str, Any] = {}
    for name, run in sorted(zip(names, runs, strict=True), key=lambda pair: pair[0]) if states else ():
        try:
            latents[name] = _latents(run, states, workers)
        except BenchError as error:
            missing.append(f"no latents of {name}: {error}")
            continue
        title = f"{run.title}, protocol {label}"
        written += _latent_figures(folder, name, title, latents[name])
    if not written:
        raise BenchError(f"analyze: nothing can be drawn; {'; '.join(missing)}")
    path = Path(folder) / "analysis.json"
    write_json_atomic(path, {"protocol": label, "convergence": curves, "states": states, "latents": latents})
    return [*map(str, written), str(path), *missing]


def _latents(run: RunFolder, states: int, workers: int) -> dict[str, Any]:
    from ..replay import replay

    with Progress() as progress:
        return describe(replay(run, states, workers, progress))


def _latent_figures(folder: str | os.PathLike[str], name: str, title: str, found: dict[str, Any]) -> list[Path]:
    from .latent_figures import draw_dispersion, draw_embeddings, draw_groups

    parts = {"embeddings": draw_embeddings, "dispersion": draw_dispersion, "groups": draw_groups}
    return [path for part, draw in parts.items() for path in write_figure(folder, f"{part}-{name}", title, draw, found)]
