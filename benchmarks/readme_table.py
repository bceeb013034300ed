"""Write the README's result table from the committed record of the quickstart.

    python benchmarks/readme_table.py runs/quickstart/report/report.json

keeps a copy of that report as ``results/quickstart.json`` and puts its table between the README's
markers. A test holds README and record together.
"""

import sys
from pathlib import Path

from trt_kd.reporting.model import Report
from trt_kd.reporting.tables import comparison, markdown

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "quickstart.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def section(record: Path) -> str:
    """The README's lines about the report in ``record``."""
    report = Report.model_validate_json(record.read_bytes())
    return (
        f"{BEGIN}\n\n{markdown(comparison(report))}\n"
        f"Verdict of the recipe's gates: {report.verdict}. The record is "
        f"[{RECORD.relative_to(ROOT).as_posix()}]({RECORD.relative_to(ROOT).as_posix()}); "
        f"make your own with `make quickstart`.\n\n{END}"
    )


def replaced(readme: str, text: str) -> str:
    """``readme`` with what stands between the markers replaced by ``text``."""
    before, _, rest = readme.partition(BEGIN)
    return before + text + rest.partition(END)[2]


if __name__ == "__main__":
    RECORD.write_bytes(Path(sys.argv[1]).read_bytes())
    README.write_text(
        replaced(README.read_text(encoding="utf-8"), section(RECORD)), encoding="utf-8"
    )
