"""save_pretrained, from_pretrained and push_to_hub, through huggingface_hub's mixin."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn

from repkern.models import saving
from repkern.models.files import replaced

__all__ = ["HubMixin"]

WEIGHTS = "model.safetensors"
_CONFIG = "config.json"
_Own = TypeVar("_Own", bound="HubMixin")


class HubMixin:
    """For networks: folders and repositories of the Hugging Face Hub that hold `model.safetensors` and `config.json`.

    The weights file is that of `repkern.models.save`, so `repkern.models.load` reads it too; config.json repeats its
    metadata for people and programs. All methods need the package huggingface_hub and raise ImportError without it.
    """

    def save_pretrained(
        self, folder: str | Path, *, repo_id: str | None = None, push_to_hub: bool = False, **push: Any
    ) -> str | None:
        """Write weights, configuration and a model card into `folder`; a card that is there stays.

        push_to_hub: upload afterwards to `repo_id` (default: the folder's name), with the arguments of `push_to_hub`.
        Returns the address of the commit when something was uploaded. ValueError as `repkern.models.save`.
        """
        if push and not push_to_hub:
            raise TypeError(f"{', '.join(sorted(push))}: only with push_to_hub=True")
        adapter = _adapter()(self)
        card = {} if repo_id is None else {"repo_id": repo_id}
        return adapter.save_pretrained(folder, repo_id=repo_id, push_to_hub=push_to_hub, model_card_kwargs=card, **push)

    @classmethod
    def from_pretrained(
        cls: type[_Own],
        folder_or_repo_id: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> _Own:
        """The network in a local folder or a repository of the Hub, made again from its metadata; in eval mode.

        The arguments are huggingface_hub's. TypeError when it is not one of this class; ValueError and
        FileNotFoundError as `repkern.models.load`, the latter also for a Path, "/..." or "./..." where no folder is.
        """
        named = str(folder_or_repo_id)
        is_path = isinstance(folder_or_repo_id, Path) or named.startswith((".", "~")) or Path(named).is_absolute()
        if is_path and not Path(named).is_dir():
            raise FileNotFoundError(f"no folder at {named}")
        adapter = _adapter()
        try:
            model = adapter.from_pretrained(
                folder_or_repo_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            ).network
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, TypeError, AttributeError) as problem:
            # huggingface_hub reads config.json first, and takes it for the JSON object that it should be.
            raise ValueError(f"{_CONFIG} of {folder_or_repo_id} is damaged: {problem}") from problem
        if not isinstance(model, cls):
            raise TypeError(f"{folder_or_repo_id} holds a {type(model).__name__}, not a {cls.__name__}")
        return model

    def push_to_hub(self, repo_id: str, **push: Any) -> str:
        """Upload weights, configuration and model card in one commit; returns its address.

        push: commit_message, private, token, branch, create_pr, allow_patterns, ignore_patterns, delete_patterns, as
        in huggingface_hub's ModelHubMixin.push_to_hub.
        """
        return _adapter()(self).push_to_hub(repo_id, model_card_kwargs={"repo_id": repo_id}, **push)

    def model_card(self, repo_id: str = "<this repository>") -> str:
        """The text of the model card: what the file holds and how to use it, no claim about accuracy."""
        return _card_text(saving.describe(cast(nn.Module, self)), repo_id)


def _adapter() -> Any:
    """A subclass of huggingface_hub's mixin around one network.

    Networks do not derive from the mixin itself: the package is optional, and the mixin would record the arguments of
    every constructor a second time.
    """
    try:
        from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
    except ImportError as problem:
        raise ImportError(
            "save_pretrained, from_pretrained and push_to_hub need huggingface_hub: pip install 'repkern[hub]'. "
            "repkern.models.save and repkern.models.load write and read single files without it."
        ) from problem

    class Adapter(ModelHubMixin, library_name="repkern"):
        def __init__(self, network: Any) -> None:
            self.network = network

        def _save_pretrained(self, save_directory: Path) -> None:
            saving.save(self.network, save_directory / WEIGHTS)
            described = saving.describe(self.network)
            text = json.dumps(described, indent=2, sort_keys=True) + "\n"
            with replaced(save_directory / _CONFIG) as temporary:
                temporary.write_text(text, encoding="utf-8")

        @classmethod
        def _from_pretrained(cls, *, model_id: str, **download: Any) -> Adapter:
            if Path(model_id).is_dir():
                return cls(saving.load(Path(model_id) / WEIGHTS))
            known = ("revision", "cache_dir", "force_download", "token", "local_files_only")
            path = hf_hub_download(model_id, WEIGHTS, **{name: download[name] for name in known})
            return cls(saving.load(path))

        def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
            return ModelCard(self.network.model_card(**kwargs))

    return Adapter


_CARD = """---
library_name: repkern
tags:
- image-classification
- structural-re-parameterization
---

# {name}

{form}

```python
from repkern.models import Network

model = Network.from_pretrained("{repo_id}")  # in eval mode
```

Made by `repkern.create_model({arguments})`, written by repkern {repkern} with torch {torch}.
{num_parameters:,} parameters. Training data and accuracy: to be added by whoever trained it.
"""
_TRAINING = (
    "In training form: blocks of the kind `{block}`, which `repkern.reparameterize(model, verify=images)` turns into "
    "plain convolutions that compute the same in eval mode."
)
_DEPLOYED = "In deployed form: plain convolutions with bias, made by `repkern.reparameterize` from blocks `{block}`."


def _card_text(described: dict[str, Any], repo_id: str) -> str:
    template = _TRAINING if described["form"] == "training" else _DEPLOYED
    if described["block"] == "plain":
        template = "In deployed form: plain convolutions with bias."
    return _CARD.format(
        name=described["model_name"],
        form=template.format(block=described["block"]),
        repo_id=repo_id,
        arguments=_call(described),
        **{key: described[key] for key in ("repkern", "torch", "num_parameters")},
    )


def _call(described: dict[str, Any]) -> str:
    """The arguments of create_model that are not the defaults, as one writes them."""
    from repkern.models.registry import create_model

    parameters = inspect.signature(create_model).parameters
    empty: tuple[Any, ...] = ({}, [], None)
    chosen = {
        key: value
        for key, value in described["config"].items()
        if value not in empty and not (key in parameters and parameters[key].default == value)
    }
    return ", ".join([repr(described["model_name"]), *(f"{key}={value!r}" for key, value in chosen.items())])
