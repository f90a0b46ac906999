"""Episode rows as columns: what a report reads a million of."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

from ..records import EpisodeRow, field_types


class Rows(Sequence[EpisodeRow]):
    """Rows in the order of writing: a sequence of `EpisodeRow`, each made when it is asked for, over one array [N] for
    each of its fields. Reports that see many rows ask for `column` and `where`."""

    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        self._columns = {name: columns[name] for name in field_types()}
        self._source: Rows | None = None
        self._chosen: np.ndarray | slice = slice(None)

    @classmethod
    def of(cls, rows: Iterable[EpisodeRow]) -> "Rows":
        """Rows that are there one by one. Equal texts are kept once."""
        rows, seen = list(rows), dict[str, str]()
        columns: dict[str, np.ndarray] = {}
        for name, (kind, _) in field_types().items():
            values = [getattr(row, name) for row in rows]
            if kind is str:
                values = [seen.setdefault(value, value) for value in values]
            try:
                columns[name] = np.array(values, dtype=object if kind is str else kind)
            except OverflowError:  # more FLOPs than 63 bits hold
                columns[name] = np.array(values, dtype=object)
        return cls(columns)

    @staticmethod
    def joined(parts: Sequence["Rows"]) -> "Rows":
        """All rows of several."""
        if not parts:
            return Rows.of(())
        return Rows({name: np.concatenate([part.column(name) for part in parts]) for name in field_types()})

    def column(self, name: str) -> np.ndarray:
        """[N] values of a field of `EpisodeRow`; texts are objects."""
        if name not in self._columns and self._source is not None:
            self._columns[name] = self._source.column(name)[self._chosen]
        return self._columns[name]

    def where(self, chosen: np.ndarray | slice) -> "Rows":
        """The rows that a mask [N], indices or a slice choose. A column is only copied when it is asked for."""
        rows = Rows.__new__(Rows)
        rows._columns, rows._source, rows._chosen = {}, self, chosen
        return rows

    def as_one_suite(self, name: str) -> "Rows":
        """The same rows as if all tasks were of one suite, in which they are called SUITE/NAME."""
        columns = {field: self.column(field) for field in field_types()}
        keys = [f"{suite}/{task}" for suite, task in zip(columns["suite"], columns["task"], strict=True)]
        columns["suite"] = np.full(len(self), name, dtype=object)
        columns["task"] = np.array(keys, dtype=object)
        return Rows(columns)

    def __len__(self) -> int:
        return len(self.column("phase"))

    def __iter__(self) -> Iterator[EpisodeRow]:
        return (EpisodeRow(*values) for values in zip(*(self.column(n).tolist() for n in field_types()), strict=True))

    @overload
    def __getitem__(self, index: int) -> EpisodeRow: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows": ...
    def __getitem__(self, index: Any) -> Any:
        return self.where(index) if isinstance(index, slice) else next(iter(self.where(np.array([index]))))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows):
            return NotImplemented
        return all(np.array_equal(self.column(name), other.column(name)) for name in field_types())

    __hash__ = None  # type: ignore[assignment]
