"""What a method is to `patch`, `Handle` and checkpoints: they know methods by this protocol alone.

`core.registry` lists them: KINDS says which `Method` carries out a keyword of `patch`, METHODS which settings a keyword
takes. The settings are a frozen dataclass with `KIND`, the name of the keyword.
"""

import copy
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from llava_patch.core.undo import UndoStack
    from llava_patch.hosts.anatomy import Anatomy

Groups = list[dict[str, Any]]
"""An optimizer's groups, as torch takes them."""


class Method:
    """One method on one model. `patch` asks in the order of this class; what is not overridden asks and does nothing.

    Attributes:
        settings: the dataclass that was given to `patch`.
        anatomy: the model's parts; set before anything but `check_together` is asked.
        calls_decoder_layers: whether it needs a decoder that the identity tests ran on.
        trains_tower: whether something in the vision tower trains, so that a checkpoint must hold the tower's weights.
    """

    anatomy: "Anatomy"
    calls_decoder_layers: bool = False
    trains_tower: bool = False

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @property
    def name(self) -> str:
        """The settings class's name, for messages."""
        return type(self.settings).__name__

    # --- what it asks, before anything changes ------------------------------------------------------------------------

    def check_together(self, others: Mapping[str, Any]) -> None:
        """Refuse settings of other kinds that contradict these; the SettingError names both, and what to do."""

    def refused_when_partitioned(self) -> str | None:
        """The setting that cannot be had with weights that DeepSpeed ZeRO-3 has partitioned, for a message."""
        return None

    def check_model(self, loading: bool) -> None:
        """Refuse a model that it cannot be put on (SettingError).

        `loading`: the model is being built from a patched checkpoint and its weights follow.
        """

    def takes_samples(self) -> bool:
        """Whether its settings are to be measured on `patch(samples=...)`."""
        return False

    def measure(self, samples: Any) -> None:
        """Measure what the settings leave open, and put it into them."""

    def agrees(self, asked: Any) -> bool:
        """Whether settings that are asked for go with these, which the model carries already."""
        return bool(asked == self.settings)

    def check_added(self, there: Mapping[str, "Method"]) -> None:
        """Refuse, by a SettingError, to join methods that the model carries already, by kind."""

    # --- what it changes ----------------------------------------------------------------------------------------------

    def resolve(self) -> None:
        """Resolve the settings against the model, changing nothing; SettingError or HostError: it cannot take them."""

    def decoder_layers(self) -> tuple[int, ...]:
        """Decoder layers whose input it adds to."""
        return ()

    def attach(self, undo: "UndoStack", *, zero_start: bool, loading: bool) -> None:
        """Change the model, noting in `undo` how every change is taken back.

        `zero_start`: new weights leave the output as it is; else they are initialised as new ones.
        """

    def changed(self, settings: Any, undo: "UndoStack") -> "Method":
        """The same method with other settings that `agrees` lets pass."""
        twin = copy.copy(self)
        twin.settings = settings
        return twin

    # --- what trains --------------------------------------------------------------------------------------------------

    def parameters(self) -> "list[nn.Parameter]":
        """What it adds to the model; a checkpoint that says it has the method must hold these."""
        return []

    def freeze(self) -> None:
        """Set requires_grad as the settings say; SettingError where they cannot be honoured."""

    def arrange_groups(self, groups: Groups, base_lr: float, early: "Collection[nn.Parameter]") -> Groups:
        """Split the groups of a torch optimizer as the settings ask; `base_lr` holds where they name none.

        `early` learns before the rest where the settings ask for a warm-up.
        """
        return groups

    def remarks(self, trainable: set[str], others: Mapping[str, Any]) -> Iterable[str]:
        """Ends of the line of `Handle.report`."""
        return ()

    # --- what a checkpoint keeps beside settings and weights ----------------------------------------------------------

    def fit_files(self, folder: Path) -> None:
        """Make the host's files in a saved checkpoint fit the model."""
