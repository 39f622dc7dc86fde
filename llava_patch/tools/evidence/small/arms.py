"""Arms of a comparison on one trained base: patch it, train what the arm trains, answer the same held-out questions."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.measurements.flops.count import Prompt
from llava_patch.measurements.flops.result import OWN, measure_flops
from llava_patch.measurements.flops.shape import shape_of
from llava_patch.patching.patch import patch
from llava_patch.settings.methods import FastV, Routing
from llava_patch.tools.evidence.small import chain, stacked, training
from llava_patch.tools.evidence.small.training import Recipe
from llava_patch.tools.evidence.statistics import pack_bits

TEST = 512
"""Held-out questions of an arm."""
PROMPT = Prompt(text=8, image=chain.CELLS)
SIDE = Recipe(steps=120, rate=2e-3, warmup=12, decay=0.0)
BATCH = 32


def scaled(recipe: Recipe, scale: float, rate: float | None = None) -> Recipe:
    """A recipe with another number of steps, a tenth of them warm-up, and perhaps another rate."""
    steps = max(1, round(recipe.steps * scale))
    return replace(recipe, steps=steps, rate=recipe.rate if rate is None else rate, warmup=max(1, steps // 10))


@dataclass(frozen=True)
class Base:
    """A trained model and what it is asked.

    Attributes:
        weights: of `stacked.loaded`.
        steps: what training asks for; held-out questions ask for the most.
        seed: of what is drawn.
        device: where to compute.
    """

    weights: Mapping[str, Tensor]
    steps: tuple[int, ...]
    seed: int
    device: torch.device
    _cache: dict[int, Any] = field(default_factory=dict, repr=False)

    def model(self) -> Any:
        """A fresh copy."""
        return stacked.loaded(self.weights, self.device)

    def rows(self, model: Any, steps: int | None = None) -> str:
        """Which held-out questions the model answers right, packed."""
        steps = max(self.steps) if steps is None else steps
        if steps not in self._cache:
            self._cache[steps] = chain.held_out(self.seed + 1000, TEST, steps)
        return pack_bits(chain.right(model, self._cache[steps]))

    def answers(self, routing: Routing | None = None, pruning: FastV | None = None, steps: int | None = None) -> str:
        """The rows of an arm in which nothing is trained; `steps` of its questions, the most if None."""
        model = self.model()
        if routing is None and pruning is None:
            return self.rows(model, steps)
        with patch(model, routing=routing, pruning=pruning):
            return self.rows(model, steps)

    def train(self, model: Any, recipe: Recipe, batch: int = BATCH) -> dict[str, Any]:
        """Train what asks for a gradient, one question a picture, as LLaVA's second stage does."""
        task = chain.Chain(self.seed + 50, steps=self.steps)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def loss(step: int) -> Tensor:
            given = task.batch(batch).inputs(labels=True)
            return model(**{name: tensor.to(self.device) for name, tensor in given.items()}, use_cache=False).loss

        model.train()
        losses = training.fit(loss, trained, recipe)
        model.eval()
        every = sum(parameter.numel() for parameter in model.parameters())
        share = sum(parameter.numel() for parameter in trained) / every
        return {"loss": sum(losses[-20:]) / len(losses[-20:]), "trainable": share}

    def side(
        self, routing: Routing, pruning: FastV | None = None, start: str = "copy", image: str = "own",
        recipe: Recipe = SIDE, batch: int = BATCH,
    ) -> dict[str, Any]:  # fmt: skip
        """Train a side branch.

        Args:
            routing: lf, pc or kv.
            pruning: beside it, when questions are answered.
            start: "copy" of the decoder's layers, as the method has it, or "random".
            image: "own", or "other": in training and after it the side branch gets the states of the batch's next
                picture, so that what is gained comes from no image.
            recipe: how.
            batch: pictures of a step.
        """
        model = self.model()
        with patch(model, routing=routing, pruning=pruning) as handle:
            branch = handle.anatomy.decoder.side_branch
            if start == "random":
                scatter(branch, self.seed)
            with other_image(branch) if image == "other" else contextlib.nullcontext():
                found = {"untrained": self.rows(model), **self.train(model, recipe, batch)}
                return {**found, "rows": self.rows(model)}

    def companions(self, routing: Routing, recipe: Recipe = SIDE, pruning: FastV | None = None) -> dict[str, Any]:
        """A side branch trained, with what must be beside it: untrained, begun at random, and without its image."""
        own = self.side(routing, pruning, recipe=recipe)
        other = self.side(routing, pruning, image="other", recipe=recipe)
        random = self.side(routing, pruning, start="random", recipe=recipe)
        return {
            "rows": own["rows"], "untrained": own["untrained"], "other": other["rows"], "random": random["rows"],
            "trainable": own["trainable"], "loss": own["loss"], "other_loss": other["loss"],
        }  # fmt: skip

    def tuned(self, rank: int | None, recipe: Recipe = SIDE) -> dict[str, Any]:
        """The stock model tuned: LoRA of that rank on all linear layers of the decoder; None: projector and decoder."""
        model = self.model()
        if rank is None:
            model.requires_grad_(True)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("vision_tower" not in name)
            found = self.train(model, recipe)
            return {**found, "rows": self.rows(model)}
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
            wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
            found = self.train(wrapped, recipe)
        return {**found, "rows": self.rows(wrapped)}

    def cost(self, routing: Routing | None = None, pruning: FastV | None = None) -> dict[str, float]:
        """FLOPs of generation's prefill over the stock model's: of everything, and of the decoder alone."""
        table = measure_flops(shape_of(self.model()), (PROMPT,), own=(routing, pruning))
        row, stock = table.row(OWN), table.row("stock")
        assert row is not None and stock is not None
        return {
            "prefill": row.prefill.total / stock.prefill.total,
            "decoder": row.prefill.decoder / stock.prefill.decoder,
            "token": row.decode.total / stock.decode.total,
        }


@torch.no_grad()
def scatter(branch: nn.Module, seed: int) -> None:
    """Give every matrix new weights with std 1/√fan-in."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in branch.parameters():
        if parameter.ndim >= 2:
            drawn = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            parameter.copy_(drawn)


@contextlib.contextmanager
def other_image(branch: Any) -> Iterator[None]:
    """Feed the side branch the image states of the batch's next picture; every row has its image at the same places."""
    hook = branch[0].register_forward_pre_hook(lambda _, given: (given[0].roll(1, 0), *given[1:]))
    try:
        yield
    finally:
        hook.remove()
