"""save_pretrained, from_pretrained and push_to_hub, through huggingface_hub's mixin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn

from repkern.models import saving

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
        return adapter.save_pretrained(folder, repo_id=repo_id, push_to_hub=push_to_hub, **push)

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
        FileNotFoundError as `repkern.models.load`.
        """
        model = (
            _adapter()
            .from_pretrained(
                folder_or_repo_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
            .network
        )
        if not isinstance(model, cls):
            raise TypeError(f"{folder_or_repo_id} holds a {type(model).__name__}, not a {cls.__name__}")
        return model

    def push_to_hub(self, repo_id: str, **push: Any) -> str:
        """Upload weights, configuration and model card in one commit; returns its address.

        push: commit_message, private, token, branch, create_pr, allow_patterns, ignore_patterns, delete_patterns, as
        in huggingface_hub's ModelHubMixin.push_to_hub.
        """
        return _adapter()(self).push_to_hub(repo_id, **push)

    def model_card(self) -> str:
        """The text of the model card: what the file holds and how to use it, no claim about accuracy."""
        return _card_text(saving.describe(cast(nn.Module, self)))


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
            (save_directory / _CONFIG).write_text(text, encoding="utf-8")

        @classmethod
        def _from_pretrained(cls, *, model_id: str, **download: Any) -> Adapter:
            if Path(model_id).is_dir():
                return cls(saving.load(Path(model_id) / WEIGHTS))
            known = ("revision", "cache_dir", "force_download", "token", "local_files_only")
            path = hf_hub_download(model_id, WEIGHTS, **{name: download[name] for name in known})
            return cls(saving.load(path))

        def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
            return ModelCard(self.network.model_card())

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
from repkern.models.network import Network

model = Network.from_pretrained("<this repository>")  # eval mode
```

{next_step}

Built with `repkern.create_model({arguments})`, written by repkern {repkern} with torch {torch}.
Nothing is said here about training data or accuracy: whoever trained the model should add both.
"""


def _card_text(described: dict[str, Any]) -> str:
    name, block = described["model_name"], described["block"]
    if described["form"] == "training":
        form = f"`{name}` in training form (block `{block}`): every convolution is a sum of branches."
        next_step = "`repkern.reparameterize(model, verify=images)` gives the plain network that computes the same."
    else:
        form = f"`{name}` in deployed form: plain convolutions only."
        next_step = "Training goes on from the training form, which this file does not hold."
    arguments = ", ".join(f"{key}={value!r}" for key, value in described["config"].items() if value is not None)
    return _CARD.format(form=form, next_step=next_step, arguments=arguments, **_versions(described), name=name)


def _versions(described: dict[str, Any]) -> dict[str, str]:
    return {"repkern": described["repkern"], "torch": described["torch"]}
