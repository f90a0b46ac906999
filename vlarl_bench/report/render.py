"""A table as Markdown, CSV, LaTeX, JSON or terminal output."""

import csv
import io
import json
import sys
from collections.abc import Iterable
from typing import TextIO

from .table import Record, Table

BEST = " *"
"""What the text of a cell ends with where it is separated above all others."""


def to_markdown(table: Table) -> str:
    """GitHub Markdown, notes below."""
    lines = [f"**{table.title}**", "", _row(table.columns), _row(["---"] * len(table.columns))]
    for i, line in enumerate(table.lines):
        total = i >= len(table.lines) - table.totals
        lines.append(_row([f"**{text}**" if total or text.endswith(BEST) else text for text in line]))
    return "\n".join([*lines, "", *(f"{note}  " for note in table.notes)]).rstrip() + "\n"


def to_latex(table: Table) -> str:
    """A booktabs `table*`, no wider than the page; needs `\\usepackage{booktabs,graphicx}`. Best cells are bold, copied
    lines have a rule above."""
    lines = [
        "\\begin{table*}",
        "\\centering",
        f"\\caption{{{_tex(table.title)}}}",
        "\\resizebox{\\ifdim\\width>\\textwidth\\textwidth\\else\\width\\fi}{!}{%",
        f"\\begin{{tabular}}{{{'l' * len(table.columns)}}}",
        "\\toprule",
        _tex_row(table.columns),
        "\\midrule",
    ]
    for i, line in enumerate(table.lines):
        if i and i in (len(table.lines) - table.totals, len(table.lines) - table.copied):
            lines.append("\\midrule")
        lines.append(_tex_row(line))
    lines += ["\\bottomrule", "\\end{tabular}}"]
    lines += [f"\\par\\footnotesize {_tex(note)}" for note in table.notes]
    return "\n".join([*lines, "\\end{table*}"]) + "\n"


def _tex_row(texts: tuple[str, ...]) -> str:
    return " & ".join(f"\\textbf{{{_tex(text)}}}" if text.endswith(BEST) else _tex(text) for text in texts) + r" \\"


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)


_TEX = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
}


def _row(texts: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def to_csv(table: Table) -> str:
    """The numbers of each line in full precision; a title row, then one row a line."""
    parts = [item for record in table.records for item in record.items() if isinstance(item[1], dict)]
    named = {name for name, found in parts if "value" not in found}
    records = [_flat({k: v for k, v in each.items() if v is not None or k not in named}) for each in table.records]
    columns = list(dict.fromkeys(name for record in records for name in record))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def _flat(record: Record) -> Record:
    """`mean: {value, low, high}` as `mean`, `mean_low` and `mean_high`; numbers in a list with spaces between."""
    flat: Record = {}
    for name, found in record.items():
        if isinstance(found, dict):
            flat |= {name if part == "value" else f"{name}_{part}": value for part, value in found.items()}
        else:
            flat[name] = " ".join(map(str, found)) if isinstance(found, list) else found
    return flat


def to_json(table: Table) -> str:
    """`{"title", "notes", "cells": [{"algorithm", "policy", "suite", "seeds", "episodes", "successes", ...}]}`."""
    document = {"title": table.title, "notes": table.notes, "cells": table.cells}
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _style(text: str) -> str:
    if "INCOMPLETE" in text or text == "not run":
        return "bold red"
    return "bold" if text.endswith(BEST) else ""


def print_table(table: Table, file: TextIO | None = None) -> None:
    """Draws the table on a terminal; without one, in plain lines wide enough for every cell."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawing
    from rich.text import Text

    console = Console(file=file or sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = 200
    shown, notes = list(range(len(table.columns))), list(table.notes)
    if len(table.lines) > 1 and sum(map(_width, zip(table.columns, *table.lines, strict=True))) > console.width:
        same = [i for i in shown if len({line[i] for line in table.lines}) == 1]
        shown = [i for i in shown if i not in same]
        notes = [*(f"{table.columns[i]}: {table.lines[0][i]}, in every line." for i in same), *notes]
    if not console.is_terminal:
        console.width = max(
            console.width, sum(_width([table.columns[i], *(line[i] for line in table.lines)]) for i in shown)
        )
    drawing = Drawing(title=Text(table.title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i in shown:
        cells = [table.columns[i], *(line[i] for line in table.lines)]
        drawing.add_column(table.columns[i], overflow="fold", min_width=min(_width(cells) - 3, 7))
    for i, line in enumerate(table.lines):
        if i and i in (len(table.lines) - table.totals, len(table.lines) - table.copied):
            drawing.add_section()
        drawing.add_row(*(Text(line[i], _style(line[i])) for i in shown))
    console.print(drawing)
    for note in notes:
        console.print(Text(note, "dim"))


def _width(cells: Iterable[str]) -> int:
    """What a column of these takes of a line."""
    return max(map(len, cells)) + 3
