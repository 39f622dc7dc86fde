"""Probe two checkpoints with R-Probe and compare: whose image tokens hold more of the pixels?

    python probe_and_compare.py [CKPT_A CKPT_B] [DATA]

The checkpoints are LLaVA's of either host (default: two tiny ones; B's projector lets 4 of 64 channels through), DATA
is any source of `llava-patch rprobe` (default: rendered pages).
"""

import sys
import warnings

from tiny import tiny_llava

import llava_patch
from llava_patch import RProbe

if len(sys.argv) > 2:
    checkpoints, settings = sys.argv[1:3], RProbe()
else:
    checkpoints = [tiny_llava(), tiny_llava(channels=4)]
    settings = RProbe(steps=60, batch_size=16, train_pages=200, heldout_pages=40, maps=0, store=False)
samples = llava_patch.read_samples(sys.argv[3]) if len(sys.argv) > 3 else None

warnings.simplefilter("ignore", UserWarning)  # what a reader of the figures must know is printed below
results = {}
for name, checkpoint in zip("AB", checkpoints):
    subject = llava_patch.load_subject(checkpoint)
    # The same settings and data for both, or they cannot be compared.
    results[name] = llava_patch.run_rprobe(
        subject.model, subject.image_processor, subject.tokenizer, settings, samples, progress=False
    )
    print(f"{name}: {results[name]}")

# Paired: both are measured on the same held-out documents, so what makes one hard for both cancels out.
compared = llava_patch.compare_probes(results)
a, b = compared.lines
value, low, high = b.difference
print(f"B's error minus A's: {value:+.4f}, paired 95 % interval [{low:+.4f}, {high:+.4f}]")
if low > 0:
    print("A's tokens hold more of the pixels than B's")
elif high < 0:
    print("B's tokens hold more of the pixels than A's")
else:
    print("undecided: the interval holds 0; take more held-out documents")
for note in compared.notes:
    print(f"note: {note}")
