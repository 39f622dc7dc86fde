"""One's own data for R-Probe: `read_samples` understands what people have, `write_jsonl` is our format."""

from llava_patch.probe.data.jsonl import read_jsonl, write_jsonl
from llava_patch.probe.data.read import read_samples
from llava_patch.probe.data.samples import Samples

__all__ = ["Samples", "read_jsonl", "read_samples", "write_jsonl"]
