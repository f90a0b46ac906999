"""A pack: many finished runs in one folder of three files, for publishing. Reports read it as they read run folders.

`pack.json` names each run with its manifest, config and number of rows, and with SHA-256 digests.
`episodes-*.parquet` has the rows of all of them and `metrics-*.parquet` their metrics, in the order of the runs. These
two are named by their content and `pack.json` is written last, so a pack that grows is always the old or the new one.
"""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import BenchError
from ..files import atomic_file, explained, read_json_object, write_text_atomic
from ..records import field_types, log_line
from ..sealed import seal
from .rows import Rows

PACK = "pack.json"
FORMAT = "vlarl-bench pack 1"

_ARROW: dict[type, pa.DataType] = {str: pa.string(), int: pa.int64(), bool: pa.bool_(), float: pa.float64()}
SCHEMAS = {
    "episodes": pa.schema(
        [pa.field(name.rstrip("_"), _ARROW[kind], nullable=False) for name, (kind, _) in field_types().items()]
    ),
    "metrics": pa.schema(
        [
            pa.field("iteration", pa.int64(), nullable=False),
            pa.field("name", pa.string(), nullable=False),
            pa.field("number", pa.float64()),
            pa.field("integer", pa.int64()),
        ]
    ),
}
"""Columns of the Parquet files. Episodes: the fields of a row, as `episodes.jsonl` names them. Metrics: a line for each
number of `metrics.jsonl`, in `number` or, where it was written without a point, in `integer`; null was null."""

SENDER = {"by", "contact", "licence", "source"}
"""What is kept of who submitted a run."""


@dataclass(frozen=True)
class Entry:
    """One run of a pack."""

    name: str
    """Of its folder."""
    manifest: dict[str, Any]
    config: dict[str, Any]
    stopped: dict[str, Any] | None
    submitted: dict[str, str] | None
    """Who sent it, as `SENDER` has it; None where it is our own."""
    sha256: dict[str, str]
    """Of each file of its folder, as this project writes them; of the JSON files with the run's name as its place."""
    rows: Rows
    metrics: pa.Table


def meant(path: Path) -> tuple[Path, str] | None:
    """The pack, and the pattern of its runs' names, that a path means: a pack all of its runs, PACK/NAME those of that
    name, in which * and ? stand for others. None for what is no pack."""
    if (path / PACK).is_file():
        return path, "*"
    return (path.parent, path.name) if not path.is_dir() and (path.parent / PACK).is_file() else None


def make_entry(
    name: str,
    manifest: dict[str, Any],
    config: dict[str, Any],
    stopped: dict[str, Any] | None,
    rows: Rows,
    metrics: Iterable[Mapping[str, Any]],
) -> Entry:
    """An entry of one of our run folders, with its digests. Raises BenchError for metrics that are no numbers."""
    metrics = list(metrics)
    logs: dict[str, list[Any]] = {"episodes.jsonl": [row.to_json() for row in rows], "metrics.jsonl": metrics}
    sha256 = _json_digests(manifest, config, stopped)
    sha256 |= {file: _digest(b"".join(map(log_line, lines))) for file, lines in logs.items()}
    return Entry(name, manifest, config, stopped, None, sha256, rows, _metrics_table(name, metrics))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json_digests(manifest: Any, config: Any, stopped: Any) -> dict[str, str]:
    documents = {"manifest.json": manifest, "config.json": config, "stopped.json": stopped}
    return {
        file: _digest((json.dumps(seal(document), indent=2) + "\n").encode())
        for file, document in documents.items()
        if document is not None
    }


def _metrics_table(name: str, lines: Iterable[Mapping[str, Any]]) -> pa.Table:
    columns: dict[str, list[Any]] = {column: [] for column in SCHEMAS["metrics"].names}
    for line in lines:
        for metric, value in line.items():
            if not (value is None or type(value) in (int, float)):
                raise BenchError(f"{name}: metric {metric} is {value!r}; a pack holds numbers only")
            columns["iteration"].append(line["iteration"])
            columns["name"].append(metric)
            columns["number"].append(value if type(value) is float else None)
            columns["integer"].append(value if type(value) is int else None)
    return pa.table(columns, SCHEMAS["metrics"])


def metric_lines(table: pa.Table) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` that an entry's metrics were made from."""
    lines: dict[int, dict[str, Any]] = {}
    for iteration, name, number, integer in zip(*(column.to_pylist() for column in table.columns), strict=True):
        lines.setdefault(iteration, {})[name] = number if integer is None else integer
    return list(lines.values())


def write_pack(folder: str | os.PathLike[str], entries: Sequence[Entry]) -> int:
    """Writes a pack, in place of one that is there; returns its size in bytes. Equal entries give equal bytes."""
    folder, entries = Path(folder), sorted(entries, key=lambda entry: entry.name)
    tables = {
        "episodes": _episodes_table(entries),
        "metrics": pa.concat_tables([SCHEMAS["metrics"].empty_table(), *(entry.metrics for entry in entries)]),
    }
    files, size = {}, 0
    for kind, table in tables.items():
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", compression_level=19)
        content = buffer.getvalue()
        files[kind] = _digest(content)
        size += len(content)
        with atomic_file(_file(folder, kind, files[kind])) as temporary:
            temporary.write_bytes(content)
    runs = [_described(entry) for entry in entries]
    text = f'{{"format": {json.dumps(FORMAT)},\n"sha256": {json.dumps(files)},\n"runs": [\n'
    text += ",\n".join(json.dumps(run, allow_nan=False) for run in runs) + "\n]}\n"
    write_text_atomic(folder / PACK, text)
    current = {_file(folder, kind, sha256) for kind, sha256 in files.items()}
    for old in {path for kind in files for path in folder.glob(f"{kind}-*.parquet")} - current:
        old.unlink(missing_ok=True)
    return size + len(text.encode())


def _file(folder: Path, kind: str, sha256: str) -> Path:
    return folder / f"{kind}-{sha256[:12]}.parquet"


def _described(entry: Entry) -> dict[str, Any]:
    described = {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}
    return described | {"rows": len(entry.rows), "metrics": len(entry.metrics)}


def _episodes_table(entries: Sequence[Entry]) -> pa.Table:
    rows = Rows.joined([entry.rows for entry in entries])
    try:
        arrays = [
            pa.array(rows.column(name), schema_field.type)
            for name, schema_field in zip(field_types(), SCHEMAS["episodes"], strict=True)
        ]
    except (OverflowError, pa.ArrowInvalid) as error:
        raise BenchError(f"pack: a number of a row does not fit 64 bits ({error})") from None
    return pa.Table.from_arrays(arrays, schema=SCHEMAS["episodes"])


def read_pack(folder: str | os.PathLike[str]) -> list[Entry]:
    """Reads a whole pack; raises BenchError for what is missing, altered or of another format."""
    folder = Path(folder)
    path = folder / PACK
    document = read_json_object(path)
    if document.get("format") != FORMAT:
        raise BenchError(f"{path}: format is {document.get('format')!r}, expected {FORMAT!r}")
    try:
        runs, sha256 = document["runs"], document["sha256"]
        files = {kind: _open(folder, kind, sha256[kind]) for kind in SCHEMAS}
        rows, metrics = _rows(files["episodes"], _file(folder, "episodes", sha256["episodes"])), files["metrics"].read()
        entries, row, metric = [], 0, 0
        for run in runs:
            fields = {field.name: run[field.name] for field in dataclasses.fields(Entry)}
            named = _json_digests(fields["manifest"], fields["config"], fields["stopped"])
            for file in named.keys() | ({"stopped.json"} & run["sha256"].keys()):
                if named.get(file) != run["sha256"].get(file):
                    raise BenchError(f"{path}: {run['name']}: {file} does not have the SHA-256 it claims; altered?")
            sender = fields["submitted"]
            if sender is not None and ({*sender} != SENDER or not all(type(text) is str for text in sender.values())):
                raise BenchError(f"{path}: {run['name']}: submitted must have {', '.join(sorted(SENDER))}, all texts")
            fields["rows"] = rows.where(slice(row, row + run["rows"]))
            fields["metrics"] = metrics.slice(metric, run["metrics"])
            row, metric = row + run["rows"], metric + run["metrics"]
            entries.append(Entry(**fields))
            _check_unique(entries[-1], folder)
    except (KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"{path}: not a pack ({error!r}); restore it from a copy") from None
    if (row, metric) != (len(rows), len(metrics)) or len({entry.name for entry in entries}) < len(entries):
        raise BenchError(f"{path}: its runs do not add up to the rows and metrics beside it; restore it from a copy")
    return entries


def _open(folder: Path, kind: str, sha256: str) -> pq.ParquetFile:
    path = _file(folder, kind, sha256)
    with explained(path):
        content = path.read_bytes()
    if _digest(content) != sha256:
        raise BenchError(f"{path}: does not have the SHA-256 that {PACK} names; restore it from a copy")
    texts = [field.name for field in SCHEMAS["episodes"] if field.type == pa.string()]
    try:
        file = pq.ParquetFile(pa.BufferReader(content), read_dictionary=texts if kind == "episodes" else None)
    except (pa.ArrowException, OSError) as error:
        raise BenchError(f"{path}: not a Parquet file ({error})") from None
    names, types = file.schema_arrow.names, file.schema_arrow.types
    plain = [pa.string() if pa.types.is_dictionary(each) else each for each in types]
    if (names, plain) != (SCHEMAS[kind].names, SCHEMAS[kind].types):
        raise BenchError(f"{path}: columns are {names}, expected {SCHEMAS[kind].names} as {FORMAT} types them")
    return file


def _rows(file: pq.ParquetFile, path: Path) -> Rows:
    columns = {}
    for name, (kind, allowed) in field_types().items():  # one at a time, to hold little twice
        column = file.read([name.rstrip("_")]).column(0)
        if column.null_count:
            raise BenchError(f"{path}: {column.null_count} rows have no {name.rstrip('_')}")
        if kind is not str:
            columns[name] = column.to_numpy()
            continue
        parts = [np.empty(0, dtype=object)]
        for chunk in column.chunks:
            words = np.array(chunk.dictionary.to_pylist(), dtype=object)
            if allowed and not set(words) <= set(allowed):
                raise BenchError(f"{path}: {name} is one of {sorted(words)}, expected {list(allowed)}")
            parts.append(words[chunk.indices.to_numpy()])
        columns[name] = np.concatenate(parts)
    return Rows(columns)


def _check_unique(entry: Entry, folder: Path) -> None:
    key = ("phase", "iteration", "suite", "task", "init_state", "repeat", "decoding")
    again = pd.DataFrame({name: entry.rows.column(name) for name in key}).duplicated().to_numpy()
    if again.any():
        raise BenchError(f"{folder}: {entry.name}: episode {entry.rows[int(again.argmax())].key} is there twice")
