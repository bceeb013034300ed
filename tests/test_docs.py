"""What docs/extending.md tells is true: its code runs, its table names what exists."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from trt_kd.config import StrictModel, plugin_field, validate
from trt_kd.losses import LOSSES
from trt_kd.losses.base import KDLoss

ROOT = Path(__file__).parents[1]
EXTENDING = (ROOT / "docs/extending.md").read_text(encoding="utf-8")


def test_the_loss_of_the_page_works_by_its_import_path(tmp_path, monkeypatch):
    import torch

    (code,) = re.findall(r"```python\n# my_losses\.py\n(.*?)```", EXTENDING, re.DOTALL)
    (tmp_path / "my_losses.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    class Settings(StrictModel):
        """Settings with a loss."""

        loss: plugin_field(LOSSES, KDLoss)

    value = {"loss": {"kind": "my_losses:Jeffreys", "temperature": 2.0}}
    loss = validate(Settings, value, where="extending.md").loss
    student, teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, dtype=torch.bool)
    assert loss(student, student, mask).item() == pytest.approx(0.0, abs=1e-6)
    assert loss(student, teacher, mask).item() == pytest.approx(
        loss(teacher, student, mask).item(), rel=1e-5
    )


def test_every_family_of_the_table_exists():
    rows = re.findall(r"^\| [\w ]+ \| `(trt_kd/\w+)/`, `(\w+)` \| `(\w+)`", EXTENDING, re.MULTILINE)
    assert len(rows) >= 10
    for folder, table, base in rows:
        registry = vars(import_module(folder.replace("/", ".")))[table]
        members = [registry.load(name) for name in registry.names()]
        for member in members:
            assert base in [parent.__name__ for parent in member.__mro__], f"{table}: {member}"
