"""What the leaderboard says of each method: what it is, its settings, and where its notes are."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .. import registry
from ..errors import BenchError
from .runs import RunFolder

NOTES = Path("docs/methods")
"""Of this project, where the page is made in a checkout of it."""


def method_pages(runs: Sequence[RunFolder], site: Path | None) -> list[dict[str, Any]]:
    """One entry for each registered algorithm, and for each that runs name and nobody registered here; by name."""
    known = {*registry.names("algorithm"), *(run.method for run in runs if run.method)}
    return [_page(name, [run for run in runs if run.manifest["algorithm"] == name], site) for name in sorted(known)]


def _page(name: str, runs: Sequence[RunFolder], site: Path | None) -> dict[str, Any]:
    page: dict[str, Any] = {"name": name, "notes": f"{NOTES}/{name}.md", "link": None}
    if site is not None and (NOTES / f"{name}.md").is_file():
        page["link"] = link(NOTES / f"{name}.md", site)
    defaults: dict[str, Any] = {}
    try:
        algorithm = registry.get("algorithm", name)
    except BenchError:
        page["summary"] = "Not installed where this page was made; what follows is from its runs."
    else:
        page |= {"summary": f"{algorithm.summary}.", "learns_from": algorithm.learns_from}
        page["requires"] = ", ".join(sorted(algorithm.requires))
        page["policies"] = ", ".join(policy for policy in registry.names("policy") if registry.runs_on(name, policy))
        defaults = {field.name: field.default for field in dataclasses.fields(algorithm.Settings)}
    used: dict[str, dict[str, None]] = {}
    for run in sorted(runs, key=lambda run: (run.manifest["seed"], str(run.folder))):
        settings = run.config.get("settings")
        for setting, value in settings.items() if isinstance(settings, dict) else ():
            used.setdefault(setting, {})[_text(value)] = None
    page["settings"] = [
        [setting, _text(defaults[setting]) if setting in defaults else "", ", ".join(used.get(setting, ()))]
        for setting in dict.fromkeys([*defaults, *used])
    ]
    return page


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def link(target: Path, site: Path) -> str:
    """The address of a file as seen from a page in the folder `site`."""
    return quote(Path(os.path.relpath(target.resolve(), site.resolve())).as_posix())
