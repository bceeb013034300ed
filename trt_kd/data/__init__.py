"""Text: where it comes from, how it is split and packed into blocks of tokens.

To add a source: write a module here with a subclass of ``DataSource``, add one line below.
"""

from typing import TYPE_CHECKING

from trt_kd.registry import Registry

if TYPE_CHECKING:
    from trt_kd.data.source import DataSource

DATA: Registry["type[DataSource]"] = Registry(
    "data source",
    {
        "stdlib_docstrings": "trt_kd.data.docstrings:StdlibDocstrings",
        "text": "trt_kd.data.text:TextFiles",
        "jsonl": "trt_kd.data.jsonl:JsonLines",
        "generated": "trt_kd.data.generated:GeneratedText",
        "hf_dataset": "trt_kd.data.hub:HubDataset",
    },
)
