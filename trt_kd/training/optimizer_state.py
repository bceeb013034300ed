"""The optimizer's state on disk, the same bytes for any number of processes and any sharding.

One safetensors file holds every tensor whole, named ``PLACE.NAME`` after the parameter's place
among the optimizer's groups. A process that holds a shard of a parameter reads that shard only.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

STATE = "optimizer.safetensors"
RATES = "learning_rate.json"


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` on the CPU, gathered if it is sharded; every process has to call it."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().contiguous()


def write_state(optimizer: Any, scheduler: Any, folder: Path, *, write: bool) -> None:
    """Gather the state and, where ``write`` is set, put it into ``folder``.

    Every process has to call it; one of them writes.
    """
    tensors = {}
    for place, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            gathered = whole(value)
            if write:
                tensors[f"{place}.{name}"] = gathered
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / STATE)
        rates = {
            "groups": [group["lr"] for group in optimizer.param_groups],
            "scheduler": scheduler.state_dict(),
        }
        (folder / RATES).write_text(json.dumps(rates) + "\n", encoding="utf-8")


def read_state(optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Put what ``write_state`` wrote back into ``optimizer`` and ``scheduler``."""
    parameters = _parameters(optimizer)
    with safe_open(folder / STATE, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - the file is no mapping
            place, _, name = key.partition(".")
            parameter = parameters[int(place)]
            optimizer.state[parameter][name] = _own_part(file, key, parameter)
    rates = json.loads((folder / RATES).read_text(encoding="utf-8"))
    for group, rate in zip(optimizer.param_groups, rates["groups"], strict=True):
        group["lr"] = rate
    scheduler.load_state_dict(rates["scheduler"])


def _parameters(optimizer: Any) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _own_part(file: Any, key: str, parameter: Tensor) -> Tensor:
    """The tensor ``key``, as much of it as this process holds of ``parameter``."""
    if not isinstance(parameter, DTensor) or tuple(file.get_slice(key).get_shape()) != tuple(
        parameter.shape
    ):
        value: Tensor = file.get_tensor(key)
        return value.to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    if any(isinstance(p, Shard) and p.dim != 0 for p in placements):
        raise ValueError(f"{key}: shards along {placements} cannot be read one by one")
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    local = file.get_slice(key)[offset[0] : offset[0] + shape[0]]
    return DTensor.from_local(
        local.to(parameter.device),
        mesh,
        placements,
        run_check=False,
        shape=parameter.shape,
        stride=torch.empty(parameter.shape, device="meta").stride(),
    )
