"""One's own data for R-Probe: `read_samples` understands what people have, `write_jsonl` is our format."""

from llava_patch.data.readers.jsonl import read_jsonl, write_jsonl
from llava_patch.data.readers.read import read_samples
from llava_patch.data.readers.samples import Samples

__all__ = ["Samples", "read_jsonl", "read_samples", "write_jsonl"]
