"""Giving a clean model the blocks that a DyRep checkpoint has: its convolutions become blocks, or get a bias."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from repkern.nn._surgery import move_hooks
from repkern.nn.block import RepBlock
from repkern.nn.conv_norm_act import ConvNormAct
from repkern.nn.dyrep import DyRepBlock

__all__ = ["Growth", "compare_graph"]

_logger = logging.getLogger("repkern")

# Released name of a branch's last norm -> the branch, in the order in which DyRep's graph lists them.
_LAST_NORMS = {
    "dbb_1x1.bn": "1x1",
    "dbb_1x1_kxk.bn2": "1x1_kxk",
    "dbb_1x1_avg.avgbn": "1x1_avg",
    "dbb_kxk.bn": "kxk",
    "dbb_1xk.bn": "1xk",
    "dbb_kx1.bn": "kx1",
    "dbb_id": "id",
}
_PARTS = ("running_mean", "weight")
_MARK = "dbb_kxk.bn.running_mean"
_DEPLOYED = "conv_deployed"
_NESTED = {"dbb_kxk.conv": "dense", "dbb_1x1_kxk.conv2": "expand"}


def _blocks(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Prefix of each block ("" or "layer.") -> its branches, parents first."""
    prefixes = [name.removesuffix(_MARK) for name in tensors if re.fullmatch(rf"(|.*\.){re.escape(_MARK)}", name)]
    return {
        prefix: tuple(
            branch
            for norm, branch in _LAST_NORMS.items()
            if any(f"{prefix}{norm}.{part}" in tensors for part in _PARTS)
        )
        for prefix in sorted(prefixes, key=lambda prefix: prefix.count("."))
    }


def compare_graph(tensors: Mapping[str, Tensor], graph: Any) -> None:
    """Log where the graph that DyRep writes beside the tensors says something else; the tensors are what is loaded."""
    found = {prefix.rstrip("."): branches for prefix, branches in _blocks(tensors).items()}
    try:
        stated = {str(path): [bool(flag) for flag in flags] for path, flags in graph["dbb_graph"]}
    except (KeyError, TypeError, ValueError):
        _logger.warning("load_checkpoint: the entry 'dyrep' holds no graph of blocks; the tensors tell the branches")
        return
    for path in sorted(set(stated) | set(found)):
        names = [name for name, flag in zip(_LAST_NORMS.values(), stated.get(path, []), strict=False) if flag]
        # "id" is listed for every block that asked for it, whether or not its geometry allows one.
        differ = set(names) ^ set(found.get(path, ()))
        if differ - {"id"} or (path in found) != (path in stated):
            _logger.warning(
                "load_checkpoint: DyRep's graph gives %s the branches %s, its tensors %s",
                path or "(root)",
                ", ".join(names) or "none",
                ", ".join(found.get(path, ())) or "none",
            )


class Growth:
    """The changes that make a model's layers those of a checkpoint; `undo` takes them back.

    tensors: the checkpoint's, its layers by the model's names and its blocks by DyRep's. A convolution (inside a
    ConvNormAct too, which then becomes a sequence of the same names) becomes a DyRepBlock of the branches the tensors
    have, blocks inside blocks included; one that was cut to a convolution with bias, or deployed, gets a bias. Blocks
    that are as they should be stay. The new values are for the caller to load.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self.model = self._given = model
        self._changes: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        self._blocks = _blocks(tensors)
        try:
            for prefix, branches in self._blocks.items():
                internal = tensors.get(f"{prefix}dbb_1x1_kxk.conv1.weight")
                self._grow(prefix, branches, None if internal is None else internal.shape[0])
            self._add_biases(tensors)
        except BaseException:
            self.undo()
            raise

    @property
    def changed(self) -> bool:
        """Whether the model has other layers now."""
        return bool(self._changes) or self.model is not self._given

    def undo(self) -> None:
        """Make the model what it was."""
        for parent, name, old, _ in reversed(self._changes):
            parent._modules[name] = old
        self._changes.clear()

    def finish(self) -> None:
        """Give the hooks of replaced modules to the new ones."""
        for old, new in {id(old): (old, new) for _, _, old, new in self._changes}.values():
            move_hooks(old, new)

    def _grow(self, prefix: str, branches: Sequence[str], internal: int | None) -> None:
        path = _our_path(prefix)
        old = _module_at(self.model, path)
        if isinstance(old, DyRepBlock) and self._is_as_stored(old, prefix, branches, internal):
            return
        if not isinstance(old, DyRepBlock) and (isinstance(old, RepBlock) or not isinstance(old, nn.Conv2d)):
            kind = "nothing" if old is None else type(old).__name__
            raise ValueError(
                f"the checkpoint has a DyRep block at {path or '(root)'}, where the model has {kind} and no nn.Conv2d"
            )
        kept: dict[str, Any] = {}
        if isinstance(old, DyRepBlock):
            kept = {name: getattr(old, name) for name in ("activation", "border", "recompute")}
        block = DyRepBlock(
            **_geometry(old), padding_mode=old.padding_mode, branches=branches, internal_channels=internal, **kept
        )
        trained = any(parameter.requires_grad for parameter in old.parameters())
        self._put(path, old, block.train(old.training).requires_grad_(trained))

    def _is_as_stored(self, block: DyRepBlock, prefix: str, branches: Sequence[str], internal: int | None) -> bool:
        nested = all(
            isinstance(getattr(block, ours), DyRepBlock) == (f"{prefix}{released}." in self._blocks)
            for released, ours in _NESTED.items()
        )
        return nested and set(block.branches) == set(branches) and internal in (None, block.internal_channels)

    def _add_biases(self, tensors: Mapping[str, Tensor]) -> None:
        for name in tensors:
            path, _, last = name.rpartition(".")
            path = path.removesuffix(_DEPLOYED).rstrip(".")
            conv = _module_at(self.model, path) if last == "bias" else None
            if not isinstance(conv, nn.Conv2d) or isinstance(conv, RepBlock) or conv.bias is not None:
                continue
            new = nn.utils.skip_init(nn.Conv2d, **_geometry(conv), bias=True, padding_mode=conv.padding_mode)
            self._put(path, conv, new.train(conv.training).requires_grad_(conv.weight.requires_grad))

    def _put(self, path: str, old: nn.Module, new: nn.Module) -> None:
        if not path:
            self.model = new
            return
        parent_path, _, _ = path.rpartition(".")
        parent = self.model.get_submodule(parent_path)
        if isinstance(parent, ConvNormAct):
            self._replace(parent, _opened(parent))
        self._replace(old, new)

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        """Everywhere the model has it."""
        if old is self.model:
            self.model = new
            return
        places = [
            (parent, name) for parent in self.model.modules() for name, child in parent._modules.items() if child is old
        ]
        for parent, name in places:
            parent._modules[name] = new
            self._changes.append((parent, name, old, new))


def _our_path(prefix: str) -> str:
    path = prefix.removesuffix(".")
    for released, ours in _NESTED.items():
        path = re.sub(rf"(^|\.){re.escape(released)}(?=\.|$)", rf"\1{ours}", path)
    return path


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _geometry(layer: nn.Conv2d | DyRepBlock) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    parameter = next(layer.parameters())
    return {name: getattr(layer, name) for name in names} | {"device": parameter.device, "dtype": parameter.dtype}


def _opened(block: ConvNormAct) -> nn.Sequential:
    """The same layers by the same names, any of which may then be replaced."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=block.conv, bn=block.bn)
    if block.activation is not None:
        layers["activation"] = block.activation
    opened = nn.Sequential(layers)
    opened.training = block.training
    return opened
