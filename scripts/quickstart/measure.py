"""What the closing table needs of one checkpoint: exact match with its controls, and the prefill time ratio.

`python -m quickstart.measure CHECKPOINT BASE OUT.json`
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from .data import TrainingData
from .fileset import write_atomically
from .score import exact_match, read_rows

DEPTH, WIDTH, HEADS, SPLIT = 32, 256, 4, 18  # LLaVA-1.5 7B's depth and split at a sixteenth of its width


def load(checkpoint: Path) -> tuple[Any, Any, Any]:
    """A llava checkpoint through llava's own loader, in float32: it loads in half precision, which CPUs are slow at."""
    from llava.model.builder import load_pretrained_model

    tokenizer, model, image_processor, _ = load_pretrained_model(
        str(checkpoint), None, "llava-v1.5-small", device_map="cpu", device="cpu"
    )
    model.float().get_vision_tower().float()
    return model.eval(), tokenizer, image_processor


def reading(checkpoint: Path, base: Path, rows: int) -> dict[str, Any]:
    """Exact match on held-out strings, with the controls that a routed model must beat.

    Args:
        checkpoint: llava checkpoint, stock or patched.
        base: folder that holds the test rows and images.
        rows: how many of them.

    Returns:
        "exact_match"; "exact_match_other_image": every row with another row's image; for a routed model
        "exact_match_side_other_image": only the side branch sees another row's image; "trainable": what trains.
    """
    import llava_patch

    model, tokenizer, image_processor = load(checkpoint)
    data = TrainingData.at(base)
    test = read_rows(data.read_test)[:rows]
    arguments = (model, (tokenizer, image_processor), test, data.images)
    record: dict[str, Any] = {
        "exact_match": exact_match(*arguments),
        "exact_match_other_image": exact_match(*arguments, shuffled=True),
        "rows": len(test),
    }
    handle = llava_patch.get_handle(model)
    if handle is not None:
        record["trainable"] = handle.report()
        branch = getattr(handle.anatomy.decoder, "side_branch", None)
        if branch is not None:
            # Equal prompts share a batch, so the neighbour's image states fit in position and number.
            hook = branch[0].register_forward_pre_hook(lambda _, args: (args[0].roll(1, 0), *args[1:]))
            try:
                record["exact_match_side_other_image"] = exact_match(*arguments)
            finally:
                hook.remove()
    return record


@torch.no_grad()
def measure_prefill(model: Any, inputs: dict[str, Any], routing: Any, repeats: int = 7) -> dict[str, Any]:
    """Prefill time of a routed model over the stock model: pairs of measurements after a warm-up pair, interleaved.

    "stock_ms" and "routed_ms" are medians; "ratio" of the two (below 1 is faster); its "spread" the lowest and highest
    ratio of a pair; "tokens" of the prompt, image positions included. The vision tower counts.
    """
    from llava_patch.tools.bench.measure import Clock, Row, ratio
    from llava_patch.tools.bench.methods import patched

    stock, routed, tokens = Row("stock"), Row("routed"), 0
    for number in range(repeats + 1):
        for row, settings in ((stock, None), (routed, routing)):
            with patched(model, {"routing": settings} if settings else None), Clock(model.device) as clock:
                out = model(**inputs, use_cache=True, logits_to_keep=1)
            if number:
                row.prefill_ms.append(clock.ms)
            tokens = int(out.past_key_values.get_seq_length()) if settings is None else tokens
    times = {f"{row.method}_ms": statistics.median(row.prefill_ms) for row in (stock, routed)}
    compared = ratio(routed, stock, "prefill_ms")
    assert compared is not None
    return {**times, "ratio": compared[0], "spread": compared[1:], "tokens": tokens}


def prefill() -> dict[str, Any]:
    """Prefill ratio at LLaVA-1.5's token counts (576 image + 64 text) and depth, at reduced width."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from llava_patch import Routing

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=1024, hidden_size=WIDTH, intermediate_size=WIDTH * 43 // 16, num_hidden_layers=DEPTH,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=2048,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=1023, image_seq_length=576)
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(3, 1000, (1, 64))
    ids = torch.cat([ids[:, :35], torch.full((1, 576), 1023), ids[:, 35:]], dim=1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 336, 336)}
    return {**measure_prefill(model, inputs, Routing(split=SPLIT)), "depth": DEPTH, "width": WIDTH, "split": SPLIT}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prefill", action="store_true", help="also measure the prefill time ratio")
    args = parser.parse_args()
    record = reading(args.checkpoint, args.base, args.rows)
    if args.prefill:
        record["prefill"] = prefill()
    write_atomically(args.out, (json.dumps(record, indent=2) + "\n").encode())
    print(json.dumps(record))


if __name__ == "__main__":
    main()
