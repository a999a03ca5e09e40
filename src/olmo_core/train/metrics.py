"""``metrics.jsonl``: one line a step, the same lines whether a run was interrupted or not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Metrics:
    """Rows of a run in memory and, line by line, in a file.

    :param path: the file; its rows up to ``step`` are kept, later ones and a half-written last
        line are removed.
    :param step: of the checkpoint that the run goes on from; 0 starts the file anew.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        self.rows = [row for row in read_metrics(path) if row["step"] <= step] if step else []
        hidden = path.with_name(f".{path.name}")
        hidden.write_text("".join(_line(row) for row in self.rows))
        os.replace(hidden, path)

    def append(self, rows: Iterable[Row]) -> None:
        rows = list(rows)
        self.rows += rows
        with self.path.open("a") as file:
            file.write("".join(_line(row) for row in rows))


def read_metrics(path: Path) -> list[Row]:
    """The rows of a file; none if it does not exist."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # The process was killed while it wrote this line.
        if _is_row(row):
            rows.append(row)
    return rows


def _is_row(row: object) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return False
    return all(isinstance(value, int | float) for value in row.values())


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"
