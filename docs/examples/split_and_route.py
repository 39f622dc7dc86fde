"""Find the layer from which the image can leave the decoder, and route it around the layers behind.

    python split_and_route.py [CKPT] [DATA]

CKPT is a LLaVA checkpoint of either host (default: a tiny one whose layer 3 alone reads the image), DATA what the
diagnostics take: LLaVA's JSON, images, pages (default: rendered pages).
"""

import sys
import time

import torch
from tiny import tiny_llava

import llava_patch
from llava_patch import Routing, Saturation, patch

checkpoint = sys.argv[1] if len(sys.argv) > 1 else tiny_llava(reads_at=3)
data = sys.argv[2] if len(sys.argv) > 2 else ""

subject = llava_patch.load_subject(checkpoint)
model = subject.model
samples = subject.samples(data, count=8)  # keyword arguments of model.forward, one at a time

# 1. Where does text stop reading the image?
found = llava_patch.measure_saturation(model, samples, Saturation(max_samples=8), progress=False)
print("layer  answers lose (nats) without the image from there on, the last layer excepted")
for layer, lost in enumerate(found.curves.fused_kl):
    print(f"{layer:5}  {lost:.4f}")
split = found.recommendation.split
print(f"recommended split: {split}\n  {found.recommendation.reason}")
if split is None:
    sys.exit("no split to recommend on this model and data")


def prefill(repeats: int = 5) -> tuple[torch.Tensor, float]:
    """The last position's logits, and the median milliseconds of a forward pass that reads nothing else."""
    sample = {**samples[0], "use_cache": True}
    if "pixel_values" in sample:  # Hugging Face's forward; llava's computes all logits
        sample["logits_to_keep"] = 1
    taken = []
    with torch.no_grad():
        for _ in range(1 + repeats):  # the first warms up
            began = time.perf_counter()
            logits = model(**sample).logits[:, -1].cpu()
            taken.append(1000 * (time.perf_counter() - began))
    return logits, sorted(taken[1:])[repeats // 2]


# 2. Route: image tokens leave at the split, pass a one-layer side branch, come back at the last layer.
stock, stock_ms = prefill()
with patch(model, routing=Routing(variant="lf", split=split)):
    routed, routed_ms = prefill()
    cost = llava_patch.measure_flops(model)  # in closed form, of the model as it is patched
row = cost.main_row()
kl = torch.nn.functional.kl_div(routed.log_softmax(-1), stock.log_softmax(-1), log_target=True, reduction="sum")
print(f"answer: KL to the stock model's {kl:.2g} nats (the side branch is not trained yet)")
print(f"prefill FLOPs: {cost.saved(row, 'prefill'):.1%} saved, tower and projector counted")
print(f"KV cache: {1 - row.cache_bytes / cost.rows[0][0].cache_bytes:.1%} saved")
print(f"prefill time: {stock_ms:.2f} ms stock, {routed_ms:.2f} ms routed")

# 3. Undo: the block's end took the patch off.
print(f"after undo: same logits: {torch.equal(prefill(1)[0], stock)}")
