"""Trains the small LLaVA-1.5 until it reads, and writes it with its data.

    python -m quickstart.base OUT

Writes the files that `fileset` and `data` describe, and OUT/base.json with the settings and what was measured. Run
again with the same settings it does nothing; interrupted, it leaves no half-written file set.
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import data, fileset, questions, tokenizer, training
from .model import SMALL_TEXT, SMALL_VISION, SmallLlava
from .prompts import PromptEncoder

RECORD = "base.json"
TOWER_STAGE = training.Stage(steps=1400, learning_rate=3e-3)
# Smaller batches: what takes time is to find out where to look, and that takes steps rather than samples.
ANSWER_STAGE = training.Stage(steps=620, batch_size=32)
SHARES = {kind: share for kind, share in questions.DEFAULT_SHARES.items() if kind != "text"}


@dataclass(frozen=True)
class BaseSettings:
    """Everything that decides how the base comes out.

    Attributes:
        seed: of the weights, the training samples and the data.
        tower_stage: the tower on patch labels.
        answer_stage: projector, language model and, after `frozen_steps`, the tower on answers.
        frozen_steps: of the answer stage, without the tower.
        tower_rate: factor on the tower's learning rate in the answer stage.
        shares: kind of question -> share in the answer stage. Without the text-only rows that the data files have:
            their long, unpredictable answers hide what there is to learn from images.
        caption_share: share of samples that are image and caption alone, as stage 1 has them.
        system_prompt_share: share of batches in llava's wording; the others as the HF chat template has them.
        vision, text: keyword arguments of `CLIPVisionConfig` and `LlamaConfig`.
        vocab_size: pieces of the tokenizer.
        num_plain, num_v1, num_test: rows of the data files.
    """

    seed: int = 0
    tower_stage: training.Stage = TOWER_STAGE
    answer_stage: training.Stage = ANSWER_STAGE
    frozen_steps: int = 100
    tower_rate: float = 0.2
    shares: dict[str, float] = field(default_factory=lambda: dict(SHARES))
    system_prompt_share: float = 0.4
    caption_share: float = 0.08
    vision: dict = field(default_factory=lambda: dict(SMALL_VISION))
    text: dict = field(default_factory=lambda: dict(SMALL_TEXT))
    vocab_size: int = tokenizer.DEFAULT_VOCAB_SIZE
    num_plain: int = 1024
    num_v1: int = 4096
    num_test: int = 512

    def as_dict(self) -> dict:
        """The settings as JSON can hold them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def train_base(out: str | os.PathLike, settings: BaseSettings | None = None, *, num_threads: int = 2) -> dict:
    """Trains the base and writes its files, unless OUT already holds them for the same settings.

    Args:
        out: folder to write into, made if need be.
        settings: None for the defaults.
        num_threads: of torch; the weights may differ in the last bits between numbers of threads.

    Returns:
        The content of base.json: "settings"; "folder"; "seconds" of each part, wall clock; "cpu_seconds"; "steps";
        "threads"; "parameters"; on held-out strings "exact_match", its control "exact_match_shuffled",
        "exact_match_without_system", and the "accuracy" of the other kinds of question.
    """
    settings = BaseSettings() if settings is None else settings
    root = Path(out).resolve()
    record = finished(root, settings)
    if record is not None:
        return record
    root.mkdir(parents=True, exist_ok=True)
    # From here on the folder is not finished; the record is written back last.
    (root / RECORD).unlink(missing_ok=True)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        record = _train_and_write(root, settings)
    finally:
        torch.set_num_threads(threads_before)
    return record


def finished(out: str | os.PathLike, settings: BaseSettings) -> dict | None:
    """The record of an earlier run, if its settings and its folder are the same and its files are all there.

    Args:
        out: the folder.
        settings: what the run should have had.
    """
    root = Path(out).resolve()
    path = root / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except ValueError:  # damaged: it is made again
        return None
    # The llava checkpoint names its tower by an absolute path, so a moved folder has to be written again.
    same = record.get("settings") == settings.as_dict() and record.get("folder") == str(root)
    files = fileset.FileSet.at(root, settings.vision["image_size"])
    return record if same and files.complete() and data.TrainingData.at(root).complete() else None


def _train_and_write(root: Path, settings: BaseSettings) -> dict:
    started, cpu_started = time.perf_counter(), time.process_time()
    seconds: dict[str, float] = {}
    with _progress() as bar:
        task = bar.add_task("tokenizer", total=None, loss="")
        tokenizer_model = tokenizer.train_tokenizer(settings.vocab_size, settings.seed)
        encoder = _encoder(tokenizer_model)
        seconds["tokenizer"] = time.perf_counter() - started
        bar.remove_task(task)

        image_size = settings.vision["image_size"]
        model = SmallLlava(settings.vision, settings.text, settings.vocab_size, settings.seed)
        rng = np.random.default_rng([settings.seed, 0])
        sampler = questions.Sampler(rng, settings.shares, held_out=False, image_size=image_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            on_step = _stage_bar(bar, "patch labels", settings.tower_stage)
            seconds["tower_stage"] = training.pretrain_tower(model, sampler, settings.tower_stage, on_step)
            on_step = _stage_bar(bar, "answers", settings.answer_stage)
            seconds["answer_stage"] = training.train_answers(
                model,
                encoder,
                sampler,
                settings.answer_stage,
                frozen_steps=settings.frozen_steps,
                tower_rate=settings.tower_rate,
                system_prompt_share=settings.system_prompt_share,
                caption_share=settings.caption_share,
                on_step=on_step,
            )
        # The files hold half-precision weights: measure those.
        for module in (model.language, model.projector, model.tower):
            module.half().float()
        task = bar.add_task("held-out strings", total=None, loss="")
        measured_from = time.perf_counter()
        measured = _measure(model, encoder, settings)
        seconds["measure"] = time.perf_counter() - measured_from

        bar.update(task, description="files")
        written_from = time.perf_counter()
        data.write_data(
            root,
            num_plain=settings.num_plain,
            num_v1=settings.num_v1,
            num_test=settings.num_test,
            image_size=image_size,
            seed=settings.seed,
        )
        fileset.write_fileset(
            root,
            vision=settings.vision,
            text=settings.text,
            state=fileset.split_state(model),
            vocab_size=settings.vocab_size,
            tokenizer_model=tokenizer_model,
        )
        seconds["files"] = time.perf_counter() - written_from
        bar.remove_task(task)
    seconds["total"] = time.perf_counter() - started
    record = {
        "folder": str(root),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        # Of all threads: on a busy machine it tells more than the wall clock.
        "cpu_seconds": round(time.process_time() - cpu_started, 1),
        "steps": {"tower_stage": settings.tower_stage.steps, "answer_stage": settings.answer_stage.steps},
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
        **measured,
        "settings": settings.as_dict(),
    }
    fileset.write_atomically(root / RECORD, (json.dumps(record, indent=2) + "\n").encode())
    return record


def _measure(model: SmallLlava, encoder: PromptEncoder, settings: BaseSettings) -> dict:
    """Exact match and the accuracy of every other kind of question, on images of held-out strings."""
    rng = np.random.default_rng([settings.seed, 4])
    sampler = questions.Sampler(rng, held_out=True, image_size=settings.vision["image_size"])
    read = [sampler.draw("read") for _ in range(settings.num_test)]
    kinds = sorted(kind for kind, share in settings.shares.items() if share > 0 and kind not in ("read", "text"))
    others = {kind: [sampler.draw(kind) for _ in range(settings.num_test // 2)] for kind in kinds}
    return {
        "exact_match": training.accuracy(model, encoder, read),
        "exact_match_shuffled": training.accuracy(model, encoder, read, shuffled=True),
        "exact_match_without_system": training.accuracy(model, encoder, read, with_system=False),
        "accuracy": {kind: training.accuracy(model, encoder, samples) for kind, samples in others.items()},
    }


def _encoder(tokenizer_model: bytes) -> PromptEncoder:
    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        file.write(tokenizer_model)
        file.flush()
        return PromptEncoder(file.name)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:>16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )


def _stage_bar(bar: Progress, description: str, stage: training.Stage) -> Callable[[int, float], None]:
    task = bar.add_task(description, total=stage.steps, loss="")
    smoothed = None
    started = time.perf_counter()

    def on_step(step: int, loss: float) -> None:
        nonlocal smoothed
        smoothed = loss if smoothed is None else 0.95 * smoothed + 0.05 * loss
        bar.update(task, completed=step, loss=f"loss {smoothed:.3f}")
        # A bar leaves no trace in a log file, so there it gets a line every tenth of the way.
        if not bar.console.is_terminal and step * 10 // stage.steps > (step - 1) * 10 // stage.steps:
            seconds = time.perf_counter() - started
            print(f"{description}: step {step}/{stage.steps}, loss {smoothed:.3f}, {seconds:.0f} s", flush=True)

    return on_step


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--seed", type=int, default=BaseSettings.seed)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--tower-steps", type=int, default=TOWER_STAGE.steps)
    parser.add_argument("--answer-steps", type=int, default=ANSWER_STAGE.steps)
    args = parser.parse_args()
    settings = BaseSettings(
        seed=args.seed,
        tower_stage=dataclasses.replace(TOWER_STAGE, steps=args.tower_steps),
        answer_stage=dataclasses.replace(ANSWER_STAGE, steps=args.answer_steps),
    )
    if finished(args.out, settings) is not None:
        print(f"{args.out}: already there with these settings")
    record = train_base(args.out, settings, num_threads=args.threads)
    print(f"exact match on held-out strings {record['exact_match']:.3f}", end=" ")
    print(f"(another row's image: {record['exact_match_shuffled']:.3f}), {record['seconds']['total']:.0f} s")
    for kind, value in record["accuracy"].items():
        print(f"accuracy of {kind!r} questions {value:.3f}")


if __name__ == "__main__":
    main()
