"""What the bases and their arms say about DPVR."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llava_patch.core.plotting import IMAGE, OTHER, SPLIT, TEXT, panels
from llava_patch.tools.evidence import statistics
from llava_patch.tools.evidence.findings import Finding, Found, Missing
from llava_patch.tools.evidence.statistics import gains, share, unpack_bits

TITLE = "DPVR where the image is read early, and where it is read late"
ABOUT = (
    "A LLaVA of 8 decoder layers (width 64, 16 image tokens) follows pairs of letters that its picture shows: two "
    "steps need two looks at the image, one after the other. In the early base the second look is in layer 2; in the "
    "late ones in the last layer, or in the last but one (`sixth`); a ladder has three. `turned` is the late base "
    "trained on with a loss that keeps the last layer from reading image states that skip the middle: it is planted "
    "that way, so that a side branch has something to learn. A routed arm counts only beside three companions: "
    "untrained, begun at random, and fed another picture. If depth did not need the image, VTW would lose nothing."
)
GATE = 0.9
LITTLE = 0.03
MUCH = 0.3
FEW_OTHER = "another picture, batch 128 0.0005"
READS = {"early": 2, "late": 7, "sixth": 6, "turned": 7, "ladder": 7}
"""Layer of the last look, as each base begins."""
SPLIT_AT = {"early": 2, "late": 4, "sixth": 4, "turned": 4, "ladder": 4}
DPVR = "Late-Layer Fusion is Enough (DPVR)"
Seeds = Sequence[Mapping[str, Any]]


def findings(found: Found) -> list[Finding]:
    """Where each base reads, what each arm keeps, and what its companions say."""
    every: list[Finding] = []
    for part in (_sweeps, _late, _turned, _early, _fusions, _beside, _rates, _recipes, _ladder):
        try:
            every += part(found)
        except Missing:  # some of its runs are not part of the tier
            continue
    return every


def gate(found: Found, base: str) -> str:
    """Why nothing can be said with a base; empty where its stock model answers."""
    worst = min(share(one["stock"]) for one in found[base])
    return "" if worst >= GATE else f"the stock model answers {worst:.2f} of the hardest questions, under {GATE}"


def _arms(found: Found, run: str, arm: str) -> Seeds:
    return [one["arms"][arm] for one in found[run]]


def _shares(seeds: Seeds, key: str) -> list[float]:
    return [share(one[key]) for one in seeds]


def _falls(arm: Seeds) -> bool:
    """Whether the arm loses by another picture, in every seed."""
    return all(gap.low > MUCH for gap in gains(arm, "rows", arm, "other"))


_NEEDS_IMAGE = f"the same arm fed another picture's states must lose at least {MUCH}"
_QUESTIONS = "share of {n} held-out questions of {steps} steps, {what}, paired"


def _measured(seeds: Seeds, what: str, steps: str = "two", key: str = "stock") -> str:
    return _QUESTIONS.format(n=seeds[0][key].partition(":")[0], steps=steps, what=what)


def _companions(arm: Seeds, base: Seeds) -> dict[str, list[float]]:
    return {
        "stock": _shares(base, "stock"), "trained": _shares(arm, "rows"), "untrained": _shares(arm, "untrained"),
        "begun at random": _shares(arm, "random"), "another picture": _shares(arm, "other"),
        "trainable share": [one["trainable"] for one in arm],
    }  # fmt: skip


def _cost(base: Seeds, name: str) -> dict[str, list[float]]:
    """FLOPs over the stock model's: of the decoder in the prefill, and of one further token."""
    kinds = {"prefill of the decoder": "decoder", "a decoded token": "token"}
    return {f"{kind}, {name}": [one["cost"][name][key] for one in base] for kind, key in kinds.items()}


# --- where a base reads ----------------------------------------------------------------------------------------------


def _sweeps(found: Found) -> Iterator[Finding]:
    for base in ("early", "late"):
        if base not in found:
            continue
        seeds, reads = found[base], READS[base]
        after = [{"vtw": one["vtw"][str(reads + 1)], "stock": one["stock"]} for one in seeds]
        before = [{"vtw": one["vtw"][str(reads)]} for one in seeds]
        lost, easy = gains(after, "stock", after, "vtw"), gains(seeds, "one", seeds, "one_vtw")
        yield Finding(
            f"Image tokens that leave before layer {reads} are missed in the {base} base, and behind it they are not",
            f"VTW; {DPVR}, section 2",
            _measured(seeds, f"VTW at split {reads + 1} - VTW at split {reads}"),
            gains(after, "vtw", before, "vtw"),
            f"one look answers one step: at split {SPLIT_AT[base]} such questions must lose less than {LITTLE}, and at "
            f"split {reads + 1} no more than that may be lost of the others",
            all(gap.high < LITTLE for gap in (*easy, *lost)),
            gate=gate(found, base), least=MUCH,
            values={f"VTW {split}": [share(one["vtw"][split]) for one in seeds] for split in seeds[0]["vtw"]}
            | {"stock": _shares(seeds, "stock"), "one step": _shares(seeds, "one")}
            | {f"one step, VTW {SPLIT_AT[base]}": _shares(seeds, "one_vtw")},
            note="the layer is where the base was made to begin reading; training could have moved it. Behind the last "
            "layer nothing is routed, so there VTW is the stock model by definition",
            short=f"the VTW sweep finds the layer that reads the image ({base} base)",
        )  # fmt: skip
    seeds = found["late"]
    same = [unpack_bits(one["ideal"]) == unpack_bits(one["vtw"][str(SPLIT_AT["late"])]) for one in seeds]
    yield Finding(
        "Without fusion layers a side branch changes no answer: ideal is VTW at text positions",
        f"{DPVR}, section 3.2 (DPVR-LF-ideal)",
        "share of questions that ideal and VTW at the same split answer both right or both wrong",
        tuple(statistics.mean(one.float().numpy()) for one in same),
        "the stock model must differ from VTW there",
        all(gap.low > MUCH for gap in gains(seeds, "stock", [{"vtw": one["vtw"]["4"]} for one in seeds], "vtw")),
        gate=gate(found, "late"), least=0.99,
    )  # fmt: skip


# --- late reading -----------------------------------------------------------------------------------------------------


def _late(found: Found) -> Iterator[Finding]:
    yield _keeps(
        found,
        "late",
        "lf",
        "LF keeps the accuracy of a base that reads late",
        "LF keeps the accuracy of a base that reads late (within 0.03)",
    )
    base, arm = found["late"], _arms(found, "late/arms", "lf")
    yield Finding(
        "On a late base that was trained on answers alone, LF's side branch has something to learn",
        "theory: late fusion reads whatever image states still are in the fusion layer's coordinates",
        _measured(base, "LF trained - LF untrained, split 4, K = 1"),
        gains(arm, "rows", arm, "untrained"), _NEEDS_IMAGE, _falls(arm), gate=gate(found, "late"), least=0.02,
        values=_companions(arm, base),
        note="the residual stream carries the image past the middle layers, so an untrained branch does as well",
    )  # fmt: skip


def _keeps(found: Found, base: str, name: str, claim: str, short: str, run: str = "", steps: str = "two") -> Finding:
    seeds, arm = found[base], _arms(found, run or f"{base}/arms", name)
    return Finding(
        f"{claim}, within {LITTLE} of the stock model's",
        f"{DPVR}, Table 2",
        _measured(seeds, f"{name} - stock, split {SPLIT_AT[base]}", steps),
        gains(arm, "rows", seeds, "stock"), _NEEDS_IMAGE, _falls(arm), gate=gate(found, base), least=-LITTLE,
        values=_companions(arm, seeds) | (_cost(seeds, name) if name in seeds[0]["cost"] else {}), short=short,
    )  # fmt: skip


def _turned(found: Found) -> Iterator[Finding]:
    seeds, arm = found["turned"], _arms(found, "turned/arms", "lf")
    shut, beside = gate(found, "turned"), _companions(arm, seeds)
    planted = "the base is planted: a loss made its last layer depend on the middle's work on image states"
    yield _keeps(
        found,
        "turned",
        "lf",
        "LF keeps the accuracy where the middle works on the image",
        "LF keeps it where the middle layers work on the image (within 0.03)",
    )
    for variant in ("pc", "kv"):
        yield _keeps(found, "turned", variant, f"{variant.upper()} keeps the accuracy there as well", "")
    yield Finding(
        "Where the middle layers work on image states, LF must be trained", f"{DPVR}, section 3.2",
        _measured(seeds, "LF trained - LF untrained, split 4, K = 1"), gains(arm, "rows", arm, "untrained"),
        "an untrained branch must still be better than one fed another picture",
        all(gap.low > 0 for gap in gains(arm, "untrained", arm, "other")), gate=shut, least=0.05, values=beside,
        note=planted, short="there LF's side branch must be trained: trained against untrained",
    )  # fmt: skip
    yield Finding(
        "LF stays below the stock model even when trained", "theory: one layer stands for four",
        _measured(seeds, "stock - LF trained, split 4"), gains(seeds, "stock", arm, "rows"),
        _NEEDS_IMAGE, _falls(arm), gate=shut, least=0.0, values=beside, note=planted,
    )  # fmt: skip
    yield Finding(
        "A side branch that begins as a copy learns more than one begun at random",
        "theory: a copy begins near what the layers did",
        _measured(seeds, "copy - random, both trained alike"), gains(arm, "rows", arm, "random"),
        _NEEDS_IMAGE, _falls(arm), gate=shut, values=beside,
        short="a copied side branch learns more than a random one",
    )  # fmt: skip


# --- where theory says that LF fails ---------------------------------------------------------------------------------


def _early(found: Found) -> Iterator[Finding]:
    seeds, lf, pc = found["early"], _arms(found, "early/arms", "lf"), _arms(found, "early/arms", "pc")
    shut = gate(found, "early")
    yield Finding(
        "LF does not bring back what a base reads early, at a split before that layer",
        "theory: a late fusion layer that cannot read is not taught to by its side branch",
        _measured(seeds, "stock - LF trained, split 2"), gains(seeds, "stock", lf, "rows"),
        f"PC at the same split, which shows the image to every layer, must gain at least {MUCH} over LF",
        all(gap.low > MUCH for gap in gains(pc, "rows", lf, "rows")), gate=shut, least=MUCH,
        values=_companions(lf, seeds), short="LF fails where no fusion layer reads, as theory says: stock against LF",
    )  # fmt: skip
    yield Finding(
        "PC brings it back", "theory: the layer that reads gets image states again",
        _measured(seeds, "PC trained - LF trained, split 2"), gains(pc, "rows", lf, "rows"), _NEEDS_IMAGE, _falls(pc),
        gate=shut, least=MUCH, values=_companions(pc, seeds) | _cost(seeds, "pc"),
    )  # fmt: skip


def _fusions(found: Found) -> Iterator[Finding]:
    seeds, shut = found["sixth"], gate(found, "sixth")
    one, two, sparse = (_arms(found, "sixth/arms", name) for name in ("K=1", "K=2", "layer 6"))
    values = {f"{k}, K = {n}": v for n, arm in ((1, one), (2, two)) for k, v in _companions(arm, seeds).items()}
    values |= {f"{k}, layer 6 alone": v for k, v in _companions(sparse, seeds).items()}
    yield Finding(
        "Where the last but one layer reads, K = 2 is needed: the last layer alone cannot fuse", f"{DPVR}, Table 5",
        _measured(seeds, "LF with K = 2 - LF with K = 1, both trained"), gains(two, "rows", one, "rows"),
        _NEEDS_IMAGE, _falls(two), gate=shut, least=MUCH, values=values,
        short="late fusion must reach the layer that reads: K = 2 against 1",
    )  # fmt: skip
    yield Finding(
        f"One fusion layer is enough if it is the one that reads (sparse fusion), within {LITTLE} of K = 2",
        f"{DPVR}, future work", _measured(seeds, "fusion at layer 6 alone - K = 2"),
        gains(sparse, "rows", two, "rows"), _NEEDS_IMAGE, _falls(sparse), gate=shut, least=-LITTLE, values=values,
        short="one fusion layer is enough if it is the one that reads (sparse)",
    )  # fmt: skip


# --- beside others ----------------------------------------------------------------------------------------------------


def _beside(found: Found) -> Iterator[Finding]:
    seeds, shut, lf = found["turned"], gate(found, "turned"), _arms(found, "turned/arms", "lf")
    both, lora, full = (_arms(found, "turned/beside", name) for name in ("lf_fastv", "lora", "full"))
    yield Finding(
        f"LF costs FastV no more than {LITTLE}", f"{DPVR}, section 2: left to future work",
        _measured(seeds, "LF + FastV(2, ½) - FastV"),
        gains(both, "rows", seeds, "fastv"), "FastV itself must cost something, or nothing was pruned",
        all(gap.low > 0 for gap in gains(seeds, "stock", seeds, "fastv")), gate=shut, least=-LITTLE,
        values={"FastV": _shares(seeds, "fastv")} | _companions(both, seeds) | _cost(seeds, "fastv")
        | _cost(seeds, "lf_fastv"), short="LF costs FastV nothing (within 0.03)",
    )  # fmt: skip
    tuned = {"LoRA, r = 16": lora, "full": full}
    yield Finding(
        f"LF is within {LITTLE} of LoRA (r = 16), which saves nothing", f"{DPVR}, Table 2",
        _measured(seeds, "LF trained - LoRA trained alike"), gains(lf, "rows", lora, "rows"), _NEEDS_IMAGE, _falls(lf),
        gate=shut, least=-LITTLE, values={name: _shares(arm, "rows") for name, arm in tuned.items()}
        | {f"trainable share, {name}": [one["trainable"] for one in arm] for name, arm in tuned.items()}
        | {"LF": _shares(lf, "rows"), "trainable share, LF": [one["trainable"] for one in lf]},
    )  # fmt: skip


def _rates(found: Found) -> Iterator[Finding]:
    seeds, runs = found["turned"], found["turned/rates"]
    lf, pc = ([_best(one["arms"], variant) for one in runs] for variant in ("lf", "pc"))
    arm = _arms(found, "turned/arms", "lf")
    yield Finding(
        f"At the better of three learning rates each, LF is within {LITTLE} of PC", f"{DPVR}, Table 2",
        _measured(seeds, "LF - PC, split 4"), gains(lf, "rows", pc, "rows"), _NEEDS_IMAGE, _falls(arm),
        gate=gate(found, "turned"), least=-LITTLE, values=_every(runs),
        note="rates are chosen on the questions that are reported",
    )  # fmt: skip


def _recipes(found: Found) -> Iterator[Finding]:
    seeds, runs = found["turned"], found["turned/recipes"]
    small, large = ([_best(one["arms"], name) for one in runs] for name in ("batch 4 ", "batch 128"))
    yield Finding(
        "At equal samples, the paper's batch of 4 trains LF better than LLaVA's 128",
        f"{DPVR}, appendix B", _measured(seeds, "batch 4 - batch 128, each at the best of its rates"),
        gains(small, "rows", large, "rows"), "both arms must begin at the same untrained model",
        all(a["untrained"] == b["untrained"] for a, b in zip(small, large, strict=True)),
        gate=gate(found, "turned"), values=_every(runs),
        note="each at the best of its own rates; the larger batch is tried at larger ones",
        short="LF trains better in batches of 4 than of 128, at equal samples",
    )  # fmt: skip
    few, other = ([one["arms"][name] for one in runs] for name in ("batch 128 0.0005", FEW_OTHER))
    steps = "trained - untrained, and untrained - fed another picture, must both be above 0"
    yield Finding(
        "After few small steps (batch 128, 5e-4, equal samples) LF is below the stock model and above an untrained one",
        "theory: one layer learns to stand for four",
        _measured(seeds, "stock - LF trained so, split 4"), gains(seeds, "stock", few, "rows"), steps,
        all(gap.low > 0 for gap in (*gains(few, "rows", few, "untrained"), *gains(few, "untrained", other, "rows"))),
        gate=gate(found, "turned"), least=LITTLE, values=_every(runs) | {"stock": _shares(seeds, "stock")},
        short="stock > trained LF > untrained > another picture, after few small steps",
    )  # fmt: skip


def _best(arms: Mapping[str, Any], begins: str) -> Mapping[str, Any]:
    return max((arm for name, arm in arms.items() if name.startswith(begins)), key=lambda arm: share(arm["rows"]))


def _every(runs: Seeds) -> dict[str, list[float]]:
    return {name: [share(one["arms"][name]["rows"]) for one in runs] for name in runs[0]["arms"]}


def _ladder(found: Found) -> Iterator[Finding]:
    yield _keeps(
        found,
        "ladder",
        "lf",
        "LF keeps the third of three steps",
        "LF keeps the third of three steps (within 0.03)",
        steps="three",
    )


# --- figure -----------------------------------------------------------------------------------------------------------


def figures(found: Found) -> dict[str, Any]:
    """The VTW and the untrained LF sweep of each base, and LF's companions at its split."""
    bases = [base for base in READS if base in found]
    if not bases:
        raise Missing("late")
    figure, axes = panels(1, len(bases))
    for axis, base in zip([axes] if len(bases) == 1 else axes, bases, strict=True):
        _draw(axis, found, base)
    return {"routing": figure}


def _draw(axis: Any, found: Found, base: str) -> None:
    seeds = found[base]
    for name, key, colour in (("VTW", "vtw", TEXT), ("LF untrained, K = 1", "lf", IMAGE)):
        splits = sorted(map(int, seeds[0][key]))
        levels = [sum(share(one[key][str(split)]) for one in seeds) / len(seeds) for split in splits]
        axis.plot(splits, levels, marker="o", ms=3, color=colour, label=name)
    axis.axhline(sum(_shares(seeds, "stock")) / len(seeds), color="black", lw=0.8, ls="--", label="stock")
    if f"{base}/arms" in found:
        first = next(iter(found[f"{base}/arms"][0]["arms"]))
        arm = _arms(found, f"{base}/arms", first)
        for name, key, marker, colour in (
            ("LF trained", "rows", "*", SPLIT), ("begun at random", "random", "s", OTHER),
            ("another picture", "other", "x", OTHER),
        ):  # fmt: skip
            axis.plot([SPLIT_AT[base]] * len(arm), _shares(arm, key), marker, color=colour, ls="", ms=5, label=name)
    axis.set(title=base, xlabel="split", ylabel="right, most steps", ylim=(0, 1.05))
    axis.legend(fontsize=6)
