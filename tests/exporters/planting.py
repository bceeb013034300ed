"""Faults that tests plant in exports: each is a function of the folder that it spoils."""

import json

from safetensors.torch import load_file, save_file


def in_settings(change, name="config.json"):
    """A fault that ``change`` makes in a JSON file."""

    def plant(out):
        content = json.loads((out / name).read_text())
        change(content)
        (out / name).write_text(json.dumps(content))

    return plant


def setting(*path, value):
    """A fault that sets the key at ``path`` of ``config.json``."""
    return in_settings(lambda config: _holder(config, path).update({path[-1]: value}))


def without(*path):
    """A fault that leaves the key at ``path`` of ``config.json`` out."""
    return in_settings(lambda config: _holder(config, path).pop(path[-1]))


def _holder(config, path):
    for key in path[:-1]:
        config = config[key]
    return config


def tensors(change, rank=0):
    """A fault that ``change`` makes in the tensors of one rank's file."""

    def plant(out):
        file = out / f"rank{rank}.safetensors"
        loaded = load_file(file)
        change(loaded)
        save_file(loaded, file, {"format": "pt"})

    return plant


def in_graph(change):
    """A fault that ``change`` makes in the graph of ``model.onnx``."""

    def plant(out):
        import onnx

        model = onnx.load(out / "model.onnx", load_external_data=False)
        change(model.graph)
        (out / "model.onnx").write_bytes(model.SerializeToString())

    return plant
