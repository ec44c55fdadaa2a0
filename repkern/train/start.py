"""Fine-tuning: a network that starts from the weights of a file or of an earlier run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from repkern.models.checkpoints import load_checkpoint
from repkern.models.structure import apply_changes
from repkern.train.run_checkpoints import read_run

__all__ = ["start_from"]


def start_from(model: nn.Module, source: str | Path) -> list[str]:
    """Load `source` into `model`: a file that `repkern.load_checkpoint` reads, a run folder (its best step), or one of
    the checkpoints in it.

    A last layer of another number of classes is left as it is; returns the names of its tensors. Everything else must
    fit: ValueError lists what does not. FileNotFoundError, CheckpointError for a folder without a whole checkpoint.
    """
    path = Path(source)
    tensors: Mapping[str, Tensor] | None = None
    if path.is_dir():
        found = read_run(path)
        apply_changes(model, found.checkpoint.structure.get("changes", {}))
        tensors = found.weights
    try:
        load_checkpoint(path if tensors is None else tensors, model)
        return []
    except ValueError:
        ours = tensors if tensors is not None else load_checkpoint(path)
        assert isinstance(ours, Mapping)
        other = _other_classes(model, ours)
        if not other:
            raise
        load_checkpoint({**ours, **other}, model)
        return sorted(other)


def _other_classes(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's own last layer, where it differs in nothing but the number of its outputs."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        return {}
    own = {f"{layers[-1]}.{name}": tensor for name, tensor in model.get_submodule(layers[-1]).state_dict().items()}
    alike = own.keys() <= tensors.keys() and all(own[name].shape[1:] == tensors[name].shape[1:] for name in own)
    return own if alike and any(own[name].shape != tensors[name].shape for name in own) else {}
