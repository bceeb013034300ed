"""Data sets of the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trt_kd.data.lazy import LazyTexts
from trt_kd.data.source import DataSource, digest_of_files
from trt_kd.errors import DataError
from trt_kd.optional import require

if TYPE_CHECKING:
    from datasets import Dataset


class HubDataset(DataSource):
    """A data set of the Hugging Face hub, or a local folder in one of its file formats."""

    kind: Literal["hf_dataset"] = "hf_dataset"
    name: str
    """Hub id such as ``Salesforce/wikitext``, or a local folder."""
    config: str | None = None
    """Configuration of a data set that has several."""
    split: str = "train"
    """Split to read; ``train[:1%]`` reads a part of it."""
    field: str = "text"
    """Column that holds the text."""
    revision: str | None = None
    """Commit or tag; without one a changed data set goes unnoticed by ``run``."""

    def documents(self) -> LazyTexts:
        """Texts in the order of the data set, which stays on disk; what is no text is empty."""
        rows = self._load()
        if self.field not in rows.column_names:
            raise DataError(
                f"{self.name} has no column {self.field!r}; it has {', '.join(rows.column_names)}",
                hint="name the column that holds the text as data.source.field",
            )
        column = rows.select_columns([self.field])

        def read(numbers: Sequence[int]) -> list[str]:
            texts: list[Any] = column[list(numbers)][self.field]
            return [text.strip() if isinstance(text, str) else "" for text in texts]

        return LazyTexts(read, range(len(column)))

    def fingerprint(self) -> str:
        """Name and revision, or sha256 of the files of a local folder."""
        folder = Path(self.name)
        if folder.is_dir():
            return digest_of_files(sorted(path for path in folder.rglob("*") if path.is_file()))
        return f"{self.name}@{self.revision or 'latest'}"

    def _load(self) -> "Dataset":
        datasets = require("datasets", extra="compress")
        datasets.disable_progress_bars()
        try:
            return datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"data set {self.name!r} cannot be loaded: {reason}",
                hint="check name, config and split, and that the hub can be reached "
                "(HF_HUB_OFFLINE, HTTPS_PROXY)",
            ) from error
