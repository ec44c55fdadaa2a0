"""From a checkpoint file to a network in eval mode, whoever wrote the file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from repkern.models import Network, create_model, default_block, load
from repkern.models.checkpoints import LoadReport, load_checkpoint
from repkern.models.checkpoints.reading import read_checkpoint
from repkern.models.saving import read_description
from repkern.nn.kinds import KINDS
from repkern.nn.reparameterize import is_block

__all__ = ["Opened", "open_model", "usual_image_size"]

_SHOWN = 12  # lines of what does not match; a file of another network differs in every tensor


class Opened(NamedTuple):
    """A network from a file. layouts: of the file; "repkern" for ours. form: "training" or "deployed"."""

    model: Network
    layouts: list[str]

    @property
    def form(self) -> str:
        """Whether there are blocks to convert."""
        return "training" if any(is_block(module) for module in self.model.modules()) else "deployed"


def open_model(
    path: str | Path, *, model: str | None = None, block: str | None = None, num_classes: int | None = None
) -> Opened:
    """The network in a checkpoint file, in eval mode on the CPU, in the form the file has.

    A file of `repkern.models.save` says itself what it holds. Others are released checkpoints (all layouts of
    `repkern.load_checkpoint`, training or deployed form) and need model, the name of the network.
    block: the kind of its blocks; None: the one whose names and shapes fit, the network's published kind first.
    num_classes: None: as many as the last layer in the file has.

    FileNotFoundError; ValueError for a file that is no checkpoint, without a name where one is needed, for arguments
    that contradict the file, and where no kind of block fits: then with what does not match of the closest.
    """
    described = read_description(path)
    if described is not None:
        asked = {"model": model, "block": block, "num_classes": num_classes}
        config = described["config"]
        has = {
            "model": described["model_name"],
            "block": config.get("block"),
            "num_classes": config.get("num_classes"),
        }
        wrong = [
            f"{name}={value!r}, but it holds {has[name]!r}"
            for name, value in asked.items()
            if value not in (None, has[name])
        ]
        if wrong:
            raise ValueError(f"{path} was asked for with {'; '.join(wrong)}")
        return Opened(load(path), ["repkern"])
    if model is None:
        raise ValueError(f"{path} does not say which network it holds: its name is needed (repkern.list_models())")
    tensors = read_checkpoint(path).tensors
    classes = _classes(tensors) if num_classes is None else num_classes
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    kind = _fitting_kind(path, tensors, model, _candidates(model, block), options)
    network, report = create_model(model, block=kind, **options), LoadReport()
    load_checkpoint(tensors, network, report=report)
    return Opened(network.eval(), report.layouts)


def usual_image_size(model: Network) -> int:
    """The side of the images the network was published with."""
    return 32 if model.model_name.endswith("_cifar") else 224


def _candidates(model: str, block: str | None) -> list[str]:
    """The kinds of blocks that may be in the file, the likeliest first. Any kind may have been deployed before."""
    if block is not None:
        return list(dict.fromkeys([block, "plain"]))
    return list(dict.fromkeys([default_block(model), "plain", *KINDS]))


def _fitting_kind(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    model: str,
    kinds: Sequence[str],
    options: Mapping[str, Any],
) -> str:
    """The first kind whose network has the checkpoint's names and shapes; networks are made without memory."""
    closest: tuple[int, str, str] | None = None
    for kind in kinds:
        with torch.device("meta"):
            network = create_model(model, block=kind, **options)
        report = LoadReport()
        try:
            with warnings.catch_warnings():  # that loading into a network without memory does nothing: it only compares
                warnings.filterwarnings("ignore", ".*copying from a non-meta parameter", UserWarning)
                load_checkpoint(tensors, network, report=report)
        except ValueError as problem:
            count = (
                sum(not line.startswith("shape of ") for line in report.problems) if report.problems else len(tensors)
            )
            if closest is None or count < closest[0]:
                closest = (count, kind, str(problem))
        else:
            if not report.started:  # else it is the plain network, in blocks that start as its convolutions
                return kind
    if closest is None:
        raise ValueError(f"{path} holds the plain network, which is none of the blocks {', '.join(kinds)}")
    why = f"{path} fits {model} with none of the blocks {', '.join(kinds)}"
    if 2 * closest[0] > len(tensors):  # a list of what does not match would hide that it is another network
        first = ", ".join(list(tensors)[:3])
        raise ValueError(f"{why}: most names of its {len(tensors)} tensors ({first}, ...) are those of another network")
    lines = closest[2].splitlines()
    shown = [*lines[:_SHOWN], f"  ... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN + 1 else lines
    raise ValueError(f"{why}. Closest is {closest[1]}: " + "\n".join(shown))


def _classes(tensors: Mapping[str, Tensor]) -> int | None:
    """Outputs of the last layer, where the checkpoint has one of a name we know."""
    ours = cast("dict[str, Tensor]", load_checkpoint(tensors))
    head = ours.get("head.weight")
    return None if head is None or head.dim() != 2 else head.shape[0]
