"""Both files of the metrics recorder, kept in step, whatever the disk does."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from foreshock.records.metrics_file import CsvRows, JsonRows
from foreshock.records.metrics_row import Row, RowTexts, texts_of


class MetricsStore:
    """Appends rows to the array and to the table beside it; what goes wrong is told, not raised.

    The table never holds a row that the array lacks. Of a table that lacks rows the next store that
    is opened here makes a whole one again.

    Args:
        directory: of the two files; it is created if missing.
        take_in: is given the rows that are there already, batch by batch.

    Attributes:
        problem: why one of the files, or both, are not written at all; None if they are.
    """

    def __init__(self, directory: Path, take_in: Callable[[list[Row]], object]) -> None:
        self.problem: str | None = None
        self._json: JsonRows | None = None
        self._csv: CsvRows | None = None
        names: dict[str, None] = {}

        def take_in_and_name(rows: list[Row]) -> None:
            names.update(dict.fromkeys(name for row in rows for name in row.names))
            take_in(rows)

        path = directory / "training_metrics.json"
        try:
            self._json = JsonRows(path, take_in_and_name)
            path = directory / "training_metrics.csv"
            self._csv = CsvRows(path, self._json, names)
        except Exception as error:
            self.problem = _spelt_out(error, path)

    def append(self, rows: Sequence[Row]) -> str | None:
        """Appends rows to both files.

        Returns:
            None if they are in both; else why they are not.

        Raises:
            BaseException: only what is no Exception (Ctrl-C); the rows are then in neither.
        """
        if self._json is None:
            return self.problem
        texts = [texts_of(row) for row in rows]
        self._widen(texts)
        json_mark = self._json.mark()
        csv_mark = None if self._csv is None else self._csv.mark()
        path = self._json.path
        try:
            self._json.append(texts)
            if self._csv is not None:
                path = self._csv.path
                self._csv.append(texts)
        except Exception as error:
            return _spelt_out(error, path)
        except BaseException:
            with contextlib.suppress(OSError):
                self._json.cut_back(json_mark)
                if self._csv is not None and csv_mark is not None:
                    self._csv.cut_back(csv_mark)
            raise
        return self.problem

    def history(self) -> Iterable[bytes]:
        """The text of the array of all rows, in pieces."""
        return (b"[]",) if self._json is None else self._json.blocks()

    def close(self) -> str | None:
        """Syncs and closes both files.

        Returns:
            None, or why they could not be synced.
        """
        problem = None
        for file in (self._json, self._csv):
            if file is None:
                continue
            try:
                file.sync()
            except OSError as error:
                problem = _spelt_out(error, file.path)
            with contextlib.suppress(OSError):
                file.close()
        return problem

    def _widen(self, rows: Sequence[RowTexts]) -> None:
        if self._csv is None:
            return
        try:
            self._csv.widen(rows)
        except Exception as error:  # not to be tried again every interval: it costs a pass
            self.problem = _spelt_out(error, self._csv.path)
            with contextlib.suppress(OSError):
                self._csv.close()
            self._csv = None


def _spelt_out(error: Exception, path: Path) -> str:
    said = str(error)
    return said if str(path) in said else f"{path}: {said or repr(error)}"
