"""The files of a LLaVA-1.5 release, small: what the hub has under four repository names, in four folders.

    OUT/clip-vit-small-56/      the vision tower          (openai/clip-vit-large-patch14-336)
    OUT/vicuna-small/           the language model        (lmsys/vicuna-7b-v1.5)
    OUT/mm_projector.bin        the stage-1 projector     (liuhaotian/llava-v1.5-mlp2x-336px-pretrain-…)
    OUT/llava-v1.5-small/       the finished model        (liuhaotian/llava-v1.5-7b)
    OUT/llava-1.5-small-hf/     the same weights for HF   (llava-hf/llava-1.5-7b-hf)

The files are written without any `save_pretrained`, so they do not depend on the installed transformers.
"""

import io
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from . import hub_files, tokenizer
from .hub_files import json_bytes
from .model import SMALL_TEXT, SMALL_VISION, SmallLlava


@dataclass(frozen=True)
class FileSet:
    """Absolute paths of one written file set."""

    tower: Path
    language_model: Path
    projector: Path
    llava: Path
    hf: Path

    @classmethod
    def at(cls, out: str | os.PathLike, image_size: int = SMALL_VISION["image_size"]) -> "FileSet":
        """The paths under `out`, whether or not they exist.

        Args:
            out: the folder that holds the set.
            image_size: of the tower, in pixels; it is part of the folder's name, as on the hub.
        """
        root = Path(out).resolve()
        return cls(
            tower=root / f"clip-vit-small-{image_size}",
            language_model=root / "vicuna-small",
            projector=root / "mm_projector.bin",
            llava=root / "llava-v1.5-small",
            hf=root / "llava-1.5-small-hf",
        )

    def paths(self) -> tuple[Path, ...]:
        """All of them."""
        return (self.tower, self.language_model, self.projector, self.llava, self.hf)

    def complete(self) -> bool:
        """True if everything is there."""
        return all(path.exists() for path in self.paths())


def split_state(model: SmallLlava) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of `model` as `write_fileset` takes them.

    Returns:
        "vision": keys of a CLIP checkpoint ("vision_model.…"); "projector": "0.weight", "0.bias", "2.weight",
        "2.bias"; "language": keys of a Llama checkpoint ("model.…", "lm_head.weight").
    """
    vision = {
        k if k.startswith("vision_model.") else f"vision_model.{k}": v for k, v in model.tower.state_dict().items()
    }
    vision = {k: v for k, v in vision.items() if not k.endswith("position_ids")}
    language = {k: v for k, v in model.language.state_dict().items() if not k.endswith("inv_freq")}
    return {"vision": vision, "projector": dict(model.projector.state_dict()), "language": language}


def write_fileset(
    out: str | os.PathLike,
    *,
    vision: dict | None = None,
    text: dict | None = None,
    state: dict[str, dict[str, torch.Tensor]] | None = None,
    vocab_size: int = tokenizer.DEFAULT_VOCAB_SIZE,
    tokenizer_model: bytes | None = None,
    seed: int = 0,
) -> FileSet:
    """Writes the whole set; each folder appears complete or not at all, and replaces an older one.

    Args:
        out: folder to write into, made if need be.
        vision: keyword arguments of `CLIPVisionConfig`; None for `model.SMALL_VISION`.
        text: keyword arguments of `LlamaConfig`; None for `model.SMALL_TEXT`.
        state: trained weights as from `split_state`; None for random ones.
        vocab_size: pieces of the tokenizer, if it is trained here.
        tokenizer_model: content of a trained `tokenizer.model`; None trains one.
        seed: of the random weights and the tokenizer's corpus.
    """
    vision = dict(SMALL_VISION if vision is None else vision)
    text = dict(SMALL_TEXT if text is None else text)
    if tokenizer_model is None:
        tokenizer_model = tokenizer.train_tokenizer(vocab_size, seed)
    if state is None:
        state = split_state(SmallLlava(vision, text, vocab_size, seed))
    rows = state["language"]["lm_head.weight"].shape[0]
    if rows != vocab_size:
        raise ValueError(f"state has {rows} tokens in lm_head.weight, but vocab_size is {vocab_size}")

    files = FileSet.at(out, vision["image_size"])
    root = files.projector.parent
    root.mkdir(parents=True, exist_ok=True)
    half = {part: {k: v.detach().half().contiguous() for k, v in weights.items()} for part, weights in state.items()}
    projector = {f"model.mm_projector.{k}": v for k, v in half["projector"].items()}
    text_config = hub_files.text_config(text, vocab_size)
    length = text_config["max_position_embeddings"]
    slow = tokenizer.slow_tokenizer_files(tokenizer_model, length)
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    generation |= {"max_length": length, "transformers_version": "4.31.0"}
    llama = {"generation_config.json": json_bytes(generation), **slow}
    contents = {
        files.tower: {
            "config.json": json_bytes(hub_files.vision_config(vision)),
            "preprocessor_config.json": json_bytes(hub_files.hub_preprocessor(vision["image_size"])),
            # Single precision, as OpenAI's; llava casts it when it loads it.
            "pytorch_model.bin": _torch_bytes({k: v.detach().clone() for k, v in state["vision"].items()}),
        },
        files.language_model: {
            "config.json": json_bytes(text_config),
            "pytorch_model.bin": _torch_bytes(half["language"]),
            **llama,
        },
        files.llava: {
            "config.json": json_bytes(hub_files.llava_config(text_config, vision, files.tower)),
            "pytorch_model.bin": _torch_bytes({**half["language"], **projector}),
            **llama,
        },
        files.hf: {
            **hub_files.hf_files(half, vision, text_config),
            **tokenizer.fast_tokenizer_files(tokenizer_model, length),
        },
    }
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as partial:
        for folder, named in contents.items():
            fresh = Path(partial) / folder.name
            fresh.mkdir()
            for name, content in named.items():
                (fresh / name).write_bytes(content)
            if folder.exists():
                os.replace(folder, Path(partial) / f"old-{folder.name}")
            os.replace(fresh, folder)
        write_atomically(files.projector, _torch_bytes(projector))
    return files


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name in its folder, then renames it.

    Args:
        path: the final name.
        content: everything in it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_fileset(files: FileSet) -> None:
    """Removes what `write_fileset` wrote, if anything is there."""
    for path in files.paths():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _torch_bytes(weights: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()
