"""Text that a teacher wrote: what ``trt-kd generate`` makes."""

from pathlib import Path
from typing import ClassVar, Literal

from trt_kd.artifacts import Artifact
from trt_kd.data.jsonl import JsonLines
from trt_kd.data.source import DataSource, Traced, digest_of_files

TEXTS = "generated.jsonl"


class GeneratedText(DataSource):
    """Texts that a teacher wrote with ``trt-kd generate``: sequence-level distillation."""

    holds_traces: ClassVar[bool] = True

    kind: Literal["generated"] = "generated"
    artifact: str
    """Folder that ``trt-kd generate`` wrote, relative to the folder the command runs in."""

    def documents(self) -> list[str]:
        """Prompts with what follows them, in the order they were written."""
        return JsonLines(files=[str(self._file())]).documents()

    def traced(self) -> dict[str, Traced]:
        """Parts of the texts that were kept as traces; none of them where no traces were asked.

        Where the chat template opens the trace, the prompt is given without that.
        """
        wanted = self._opened().manifest.config.get("traces")
        if not wanted:
            return {}
        return {
            text: Traced(_unopened(row["prompt"], wanted["open"]), row["thought"], row["answer"])
            for text, row in JsonLines(files=[str(self._file())]).rows()
        }

    def fingerprint(self) -> str:
        """Key of the artifact and sha256 of its texts."""
        return f"{self._opened().key} {digest_of_files([self._file()])}"

    def _opened(self) -> Artifact:
        return Artifact.open(Path(self.artifact), expect="text")

    def _file(self) -> Path:
        return self._opened().path / TEXTS


def _unopened(prompt: str, mark: str) -> str:
    """The prompt without what begins a trace at its end."""
    plain = prompt.rstrip()
    return plain.removesuffix(mark) if plain.endswith(mark) else prompt
