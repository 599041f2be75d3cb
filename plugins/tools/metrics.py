"""Lightning's metrics.csv with rows that are kept when a run is interrupted and resumed."""

import csv
import io
from pathlib import Path
from typing import Any

import torch

from plugins.tools.records import read_rows, write_rows


class AppendingRows:
    """Mixin for the CSVLogger of lightning or pytorch_lightning: keep the rows of an interrupted run.

    Lightning's logger deletes them.

    Args:
        folder: the folder of metrics.csv.
        epochs: number of completed epochs. Later rows are deleted, since these epochs are trained again.
    """

    def __init__(self, folder: Path, epochs: int) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=10**9)  # type: ignore[call-arg]
        self._path, self._epochs = folder / "metrics.csv", epochs

    @property
    def experiment(self) -> Any:
        """Return the writer on rank 0, created on first use, and Lightning's dummy on other ranks."""
        from lightning_utilities.core.rank_zero import rank_zero_only

        if self._experiment is None and getattr(rank_zero_only, "rank", 0) == 0:
            rows = rows_before(self._epochs, read_rows(self._path)) if self._epochs else []
            self._experiment = RowWriter(self._path, rows)
        return super().experiment  # type: ignore[misc]


class RowWriter:
    """Write metrics.csv with the interface of Lightning's writer; if the process is killed, all complete rows remain.

    Args:
        path: the file.
        rows: the first rows of the file.
    """

    def __init__(self, path: Path, rows: list[dict[str, Any]]) -> None:
        self.path = path
        self.metrics: list[dict[str, Any]] = []
        self._columns = sorted(rows[0]) if rows else []
        if rows:
            write_rows(path, self._columns, rows)
        else:
            path.unlink(missing_ok=True)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Buffer a row until the next :meth:`save`."""
        values = {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in metrics.items()}
        self.metrics.append({**values, "step": len(self.metrics) if step is None else step})

    def restore(self, row: dict[str, Any]) -> None:
        """Append a row of epoch means, unless the file has one for that epoch."""
        there = read_rows(self.path) if self.path.is_file() else []
        means = [name for name in row if name.startswith("train_")]
        if not any(old.get("epoch") == str(row["epoch"]) and any(old.get(name) for name in means) for old in there):
            self.metrics.append(dict(row))
            self.save()

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Do nothing: args.json contains the hyperparameters."""

    def save(self) -> None:
        """Append the buffered rows; rewrite the file if they have new columns."""
        if not self.metrics:
            return
        columns = sorted({*self._columns, *(key for row in self.metrics for key in row)})
        if columns == self._columns:
            text = io.StringIO(newline="")
            csv.DictWriter(text, columns).writerows(self.metrics)
            with self.path.open("a", newline="") as file:
                file.write(text.getvalue())
        else:
            write_rows(self.path, columns, [*read_rows(self.path), *self.metrics])
        self._columns, self.metrics = columns, []


def rows_before(epochs: int, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows of the first epochs; a row without an epoch, such as a learning rate, is selected by its step."""
    last = max((int(row["step"]) for row in rows if row.get("epoch") and float(row["epoch"]) < epochs), default=-1)
    return [row for row in rows if (float(row["epoch"]) < epochs if row.get("epoch") else int(row["step"]) <= last)]
