"""The probe's training loop: AdamW, warm-up, cosine fall, clipped gradients; divided over processes, resumable.

Every rank has the whole decoder and takes its share of each batch. The loss is the mean over the target tokens of the
whole batch, whose number every rank knows, so the gradients of the shares need only be added up.
`DistributedDataParallel` would average over ranks, whatever their number of tokens, and wait for a backward pass on
every rank, which a rank without a sample of the batch cannot give.
"""

import itertools
import math
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from llava_patch.core import parallel
from llava_patch.core.errors import HostError, LlavaPatchError, SettingError
from llava_patch.core.terminal import progress_bar
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.measurements.rprobe.resume import Progress, TrainingFolder
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store.freeze import FrozenData
from llava_patch.probe.decoder import ProbeDecoder, quarter, trained_parameters

FLOAT = 4  # bytes of a float32
STATE = 3  # tensors beside each trained weight: its gradient and the two averages of Adam
LORA_SCALE = 2  # lora_alpha / r; LLaVA's own LoRA recipe has r 128, alpha 256


def choose_trained(decoder: ProbeDecoder, settings: RProbe) -> None:
    """Make a decoder train what `RProbe.trained` says, and nothing else.

    "all": every weight. "head": the MLP from hidden size to pixels. "lora": that MLP and low-rank updates of every
    Linear of the decoder layers, put in by peft; they start at zero, so that the decoder first answers as without them.
    """
    decoder.requires_grad_(settings.trained == "all")
    if settings.trained == "lora":
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise SettingError('RProbe.trained = "lora" needs peft: pip install peft') from error
        names = [f"layers.{name}" for name, part in decoder.layers.named_modules() if isinstance(part, nn.Linear)]
        rank = settings.lora_rank
        config = LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, lora_dropout=0.0, target_modules=names)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(settings.seed)
            inject_adapter_in_model(config, decoder)
        decoder.eval()
    decoder.head.requires_grad_(True)


def check_memory(anatomy: Anatomy, settings: RProbe) -> None:
    """Refuse a decoder that does not fit beside the model, before any image is encoded; says how much it needs."""
    device = next(anatomy.layers[0].parameters()).device
    free, needed = free_memory(device), needed_memory(anatomy, settings)
    if free is None or needed <= free:
        return
    advice = "use a device with more free memory"
    if settings.trained == "all":
        low = needed_memory(anatomy, RProbe(trained="lora", lora_rank=settings.lora_rank)) / 1e9
        advice = (
            f'set RProbe.trained = "lora" (about {low:.1f} GB; its figures compare with each other only), or {advice}'
        )
    raise SettingError(
        f"R-Probe trains a float32 copy of {quarter(len(anatomy.layers))} decoder layers, which needs about "
        f'{needed / 1e9:.1f} GB with RProbe.trained = "{settings.trained}" (activations come on top), and {device} has '
        f"{free / 1e9:.1f} GB free: {advice}"
    )


def needed_memory(anatomy: Anatomy, settings: RProbe) -> int:
    """Bytes of the decoder's weights, gradients and optimizer state."""
    layers = anatomy.layers[: quarter(len(anatomy.layers))]
    copied = sum(p.numel() for p in itertools.chain(layers.parameters(), anatomy.norm.parameters()))
    hidden = int(anatomy.text_config.hidden_size)
    trained = 2 * hidden * (hidden + 3 * anatomy.patch_size**2)
    if settings.trained == "all":
        return FLOAT * (copied + trained) * (1 + STATE)
    if settings.trained == "lora":
        linears = [part for part in layers.modules() if isinstance(part, nn.Linear)]
        trained += sum(settings.lora_rank * (part.in_features + part.out_features) for part in linears)
    return FLOAT * (copied + trained * (1 + STATE))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device; None where that is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "meta":
        raise HostError("the decoder's layers are not in memory (offloaded): load the model without that")
    facts = Path("/proc/meminfo")
    if device.type != "cpu" or not facts.is_file():
        return None
    found = re.search(r"^MemAvailable:\s*(\d+)", facts.read_text(encoding="ascii"), re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


LOOK_SECONDS = 1.0  # about how often losses are fetched from the device
LOOK_STEPS = 20  # and after how many steps at the latest


def train_probe(
    decoder: ProbeDecoder,
    data: FrozenData,
    settings: RProbe,
    lr: float,
    progress: bool = False,
    work: TrainingFolder | None = None,
) -> list[float]:
    """Fit a decoder, or go on with one whose training was interrupted; the training MSE of each step.

    A state that `work` holds is taken up, and the numbers at the end are bit for bit those of a training that was not
    interrupted. There are fewer than `settings.steps` when `settings.minutes` were over. A CheckpointError where the
    state belongs to another run, a LlavaPatchError where the loss is not finite.
    """
    with parallel.guard():
        run = _Training(decoder, data, settings, lr, work if parallel.rank() == 0 else None)
        done, steps = run.start(), settings.steps
        order = batches(len(data), settings.batch_size, settings.seed)
        for _ in done.losses:
            next(order)
        bar = progress_bar(steps, "R-Probe: train", progress and parallel.rank() == 0)
        bar.update(len(done.losses))
        looked, look_every, minutes = time.monotonic(), 1, settings.minutes
        with bar, torch.enable_grad(), torch.autocast(run.device.type, enabled=False):
            for step in range(len(done.losses), steps):
                over = minutes is not None and bool(done.losses) and done.seconds >= 60 * minutes
                if over and not run.waiting:
                    break
                run.step(next(order), rate(step, steps, settings.warmup))
                saving = work is not None and (step + 1) % settings.save_every == 0
                if len(run.waiting) < look_every and step + 1 < steps and not saving:
                    continue
                fresh = run.look(done)
                spent = time.monotonic() - looked
                looked += spent
                # Rank 0's clock counts for all: they look, and end, at the same step.
                look_every = max(1, min(LOOK_STEPS, int(LOOK_SECONDS * fresh / max(spent, 1e-6))))
                done.seconds, look_every = parallel.exchange((done.seconds + spent, look_every))[0]
                bar.set_postfix(mse=f"{done.losses[-1]:.4f}", refresh=False)
                bar.update(fresh)
                if saving and step + 1 < steps:
                    run.save(done)
                    looked = time.monotonic()
        if work is not None:
            run.save(done)  # unfinished: a larger RProbe.minutes goes on from here
        return done.losses


class _Training:
    """A decoder in training; `work` is rank 0's folder, None elsewhere and where there is none."""

    def __init__(
        self, decoder: ProbeDecoder, data: FrozenData, settings: RProbe, lr: float, work: TrainingFolder | None
    ) -> None:
        self.decoder, self.data, self.settings, self.lr, self.work = decoder, data, settings, lr, work
        self.device = next(decoder.parameters()).device
        self.weights = list(trained_parameters(decoder).values())
        self.optimizer = torch.optim.AdamW(self.weights, lr=lr, weight_decay=settings.weight_decay)
        self.failure: Exception | None = None
        self.waiting: list[Tensor] = []  # losses that are still on the device

    def start(self) -> Progress:
        """Progress so far: none, or what is in the folder; the same weights on every rank."""
        found = None if self.work is None else self.work.load_state(self.decoder, self.optimizer)
        found = parallel.exchange(found)[0]
        with torch.no_grad():
            parallel.from_rank_0(self.weights)
            for weight in self.weights if found is not None else ():
                state = self.optimizer.state[weight]
                if not state:
                    averages = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
                    state.update(step=torch.tensor(0.0), **averages)
                parallel.from_rank_0(state.values())
        if found is None:
            return Progress([], processes=parallel.world())
        processes, found.processes = found.processes, parallel.world()
        note = f"R-Probe: goes on after step {len(found.losses)} of {self.settings.steps}"
        if processes != found.processes:
            note += f" (with {found.processes} processes after {processes}: the numbers agree with an "
            note += "uninterrupted run's within rounding, not to the bit)"
        if parallel.rank() == 0:
            print(note, file=sys.stderr)
        return found

    def step(self, index: Tensor, share_of_lr: float) -> None:
        """One step on a batch; its loss waits on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * share_of_lr
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        own = parallel.share(len(index))
        try:
            if len(own) and self.failure is None:
                batch = self.data.batch(index[own.start : own.stop], self.device)
                rebuilt = self.decoder(batch.image_tokens, batch.text_tokens, batch.sequence, batch.injections)
                total = token_errors(rebuilt, batch.pixels).sum() / int(self.data.counts[index].sum())
                total.backward()
                loss = total.detach()
        except Exception as error:
            if parallel.world() == 1:
                raise
            # The others wait for gradients until the next look, where they are told.
            self.failure = error
        if parallel.world() > 1:
            for weight in self.weights:
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
            parallel.add_up([loss, *(weight.grad for weight in self.weights if weight.grad is not None)])
        torch.nn.utils.clip_grad_norm_(self.weights, self.settings.clip)
        self.optimizer.step()
        self.waiting.append(loss)

    def look(self, done: Progress) -> int:
        """Fetch the losses that wait on the device; how many they were."""
        if self.failure is not None:
            raise self.failure
        parallel.exchange(None)  # a rank that failed says so here, before its losses are believed
        values = torch.stack(self.waiting).tolist()
        first = len(done.losses) + 1
        for step, value in enumerate(values, first):
            if not math.isfinite(value):
                raise LlavaPatchError(
                    f"R-Probe's loss is {value} at step {step}: lower RProbe.lr (now {self.lr:g}); steps {first} to "
                    f"{first + len(values) - 1} were looked at together"
                )
        done.losses += values
        self.waiting.clear()
        return len(values)

    def save(self, done: Progress) -> None:
        """Write the state, or the decoder when all steps are done; the others wait for it."""
        if self.work is not None and len(done.losses) < self.settings.steps:
            self.work.save_state(self.decoder, self.optimizer, done)
        elif self.work is not None:
            self.work.finish(self.decoder, done)
        parallel.exchange(None)


def token_errors(rebuilt: Tensor, pixels: Tensor) -> Tensor:
    """Mean squared error inside each token, [targets]; both arguments are [targets, pixels]."""
    return (rebuilt - pixels).square().mean(-1)


def rate(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine to zero."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of sample numbers, int64 [size]: every sample once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(count, generator=generator).tolist() for _ in itertools.repeat(None))
    numbers = itertools.chain.from_iterable(orders)
    while True:
        yield torch.tensor(list(itertools.islice(numbers, size)))
