"""Short runs on a tiny HF LLaVA with trainers that know nothing of llava_patch: transformers' own, and TRL's."""

import json

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, Trainer, TrainingArguments

from tests.support.tiny_train import make_data

STEPS = 4
VALUES = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS, "learning_rate": 1e-2,
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False,
}  # fmt: skip


def write_rows(root):
    """Write the tiny LLaVA's files and rows.json, conversations as TRL takes them: (the folder, its HF model)."""
    _, files = make_data(root)
    rows = [
        {"images": [str(root / f"{i}.png")], "messages": [
            {"role": "user", "content": "What is the number?"}, {"role": "assistant", "content": str(100 + 7 * i)}]}
        for i in range(32)
    ]  # fmt: skip
    (root / "rows.json").write_text(json.dumps(rows))
    return root, files.hf


class Rows(torch.utils.data.Dataset):
    """The rows as a plain Trainer's data set."""

    def __init__(self, root):
        self._rows = json.loads((root / "rows.json").read_text())

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        row = self._rows[index]
        question, answer = (turn["content"] for turn in row["messages"])
        image = Image.open(row["images"][0]).convert("RGB")
        return {"image": image, "text": f"USER: <image>\n{question} ASSISTANT: {answer}"}


def _collator(processor):
    def collate(rows):
        batch = processor(
            text=[r["text"] for r in rows], images=[r["image"] for r in rows], padding=True, return_tensors="pt"
        )
        ids = batch["input_ids"]
        ignored = (ids == processor.tokenizer.pad_token_id) | (ids == processor.image_token_id)
        return {**batch, "labels": ids.masked_fill(ignored, -100)}

    return collate


def trainer(kind, data, out, *, model=None, peft_config=None, **more):
    """A trainer of a kind ("transformers" or "trl"), with evaluation data, on a freshly loaded model."""
    root, base = data
    model = model or LlavaForConditionalGeneration.from_pretrained(base, torch_dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(base, use_fast=False)
    values = {**VALUES, **more}
    if kind == "transformers":
        arguments = TrainingArguments(str(out), **values, remove_unused_columns=False)
        rows = Rows(root)
        evaluated = torch.utils.data.Subset(rows, range(4))
        return Trainer(model, arguments, _collator(processor), rows, evaluated)
    from datasets import Dataset
    from datasets import Image as Images
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list(json.loads((root / "rows.json").read_text())).cast_column("images", [Images()])
    return SFTTrainer(
        model, SFTConfig(str(out), max_length=None, **values), train_dataset=rows, eval_dataset=rows.select(range(4)),
        processing_class=processor, peft_config=peft_config,
    )  # fmt: skip


def losses(trainer):
    """What it has logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
