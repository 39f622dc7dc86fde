"""Which weights of the probe's decoder train, and whether the device has the memory for it."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor, nn

from llava_patch.core.errors import HostError, SettingError
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.probe.decoder import ProbeDecoder, quarter

FLOAT = 4  # bytes of a float32
STATE = 3  # tensors beside each trained weight: its gradient and the two averages of Adam
LORA_SCALE = 2  # lora_alpha / r; LLaVA's own LoRA recipe has r 128, alpha 256


def choose(decoder: ProbeDecoder, settings: RProbe) -> None:
    """Make a decoder train what `RProbe.trained` says, and nothing else.

    "all": every weight. "head": the MLP from hidden size to pixels. "lora": that MLP and low-rank updates of every
    Linear of the decoder layers, put in by peft; they start at zero, so that the decoder first answers as without them.

    Args:
        decoder: changed in place.
        settings: `trained`, `lora_rank` and `seed` are read.

    Raises:
        SettingError: "lora" without peft.
    """
    decoder.requires_grad_(settings.trained == "all")
    if settings.trained == "lora":
        _add_lora(decoder, settings)
    decoder.head.requires_grad_(True)


def _add_lora(decoder: ProbeDecoder, settings: RProbe) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise SettingError('RProbe.trained = "lora" needs peft: pip install peft') from error
    names = [f"layers.{name}" for name, part in decoder.layers.named_modules() if isinstance(part, nn.Linear)]
    config = LoraConfig(
        r=settings.lora_rank, lora_alpha=LORA_SCALE * settings.lora_rank, lora_dropout=0.0, target_modules=names
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        inject_adapter_in_model(config, decoder)
    decoder.eval()


def trained_parameters(decoder: ProbeDecoder) -> dict[str, Tensor]:
    """The weights that train, by name, in a fixed order."""
    return {name: parameter for name, parameter in decoder.named_parameters() if parameter.requires_grad}


def check_memory(anatomy: Anatomy, settings: RProbe) -> None:
    """Refuse a decoder that does not fit, before any image is encoded.

    Args:
        anatomy: the model under test; its first decoder layer says which device the probe is on.
        settings: `trained` and `lora_rank` are read.

    Raises:
        SettingError: more memory is needed than is free; says how much, and what to set.
    """
    device = next(anatomy.layers[0].parameters()).device
    free = free_memory(device)
    needed = needed_memory(anatomy, settings)
    if free is None or needed <= free:
        return
    advice = "use a device with more free memory"
    if settings.trained == "all":
        low = RProbe(trained="lora", lora_rank=settings.lora_rank)
        advice = (
            f'set RProbe.trained = "lora" (about {needed_memory(anatomy, low) / 1e9:.1f} GB; its figures compare with '
            f"each other only), or {advice}"
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
    if device.type == "cpu" and facts.is_file():
        lines = dict(line.split(":", 1) for line in facts.read_text(encoding="ascii").splitlines() if ":" in line)
        if "MemAvailable" in lines:
            return int(lines["MemAvailable"].split()[0]) * 1024
    return None
