"""Write docs/recipes.md from the recipes and their schema. --check: exit code 1 when it is stale."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from repkern.train.recipe_list import RecipeLine, SchemaLine, recipe_lines, schema_lines

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
NOTICE = "<!-- Written by benchmarks/make_recipe_docs.py from repkern/recipes and the schema. Do not edit. -->\n"

HEAD = """# Recipes

A recipe is a YAML file that says everything about a training: network, data, optimizer, schedule, loss, checkpoints.
What the engine makes of it is in [training.md](training.md), several processes in [distributed.md](distributed.md).

```bash
repkern recipes                       # the recipes that come with repkern
repkern train digits_orepa            # one of them, here: OREPA on scanned digits, a minute on two cores
repkern train digits_orepa --set optimizer.lr=0.05 --set train.epochs=40
repkern train my.yaml --dry-run       # the whole recipe, the network's layers, the memory it will take
repkern train orepa_table4_resnet18_orepa --data /data/imagenet
torchrun --nproc-per-node 8 -m repkern train orepa_table4_resnet18_orepa --data /data/imagenet

repkern eval runs/digits_orepa        # the test images again, or others: --data, --set data.image_size=320
repkern predict cat.jpg --checkpoint runs/pets
```

The same command continues a run that was interrupted, at the very step.

## Writing one

```yaml
base: digits_orepa          # a name of `repkern recipes`, or a path relative to this file
about: OREPA without a warm-up
schedule: {warmup_epochs: 0}
optimizer:
  lr: 0.05
model:
  options: {block_options: {scaling: scalar}}
```

* `base`: the recipe that this one is laid over. Mappings are merged field by field; lists, numbers and texts are
  replaced. `null` takes a section away (`ema: null`), `{}` empties a mapping (`options: {}`). `name`, `about` and
  `paper` are not inherited: another recipe has another result.
* `--set 'model.freeze=["stem.*"]'` lays one value, written as in YAML, over the file. All that cannot be is named at
  once, with file, line and field: `my.yaml:4: optimizer.learning_rate: there is no such field; did you mean
  optimizer.lr?`
* Numbers are numbers (`1e-3`, not `"1e-3"`), `true` and `false` are the truth values, and a key may be there once.
* Paths of data, checkpoints and scales are relative to where the command runs. `--data DIR` is `--set data.root=DIR`.
* `version` is that of the format. A file of a newer one is refused, not guessed at.
* From Python: `repkern.train.recipe_files.load_recipe("my.yaml", ["optimizer.lr=0.05"])`.

## Fine-tuning

`model.checkpoint` is any file that [`load_checkpoint`](checkpoints.md) reads, or a run folder; a last layer for other
classes is left out and starts anew. `model.freeze` names parameters that stay, `train.frozen_norms` keeps the
statistics of norms, `optimizer.layer_lr` has factors on the learning rate, and `model.replace` with `preserve: true`
puts blocks into the network that start as exactly what was there. `finetune_folder` has all of these but frozen norms.

Weights of a plain network also load into the same network of blocks (`block: orepa`): each block starts as its
convolution.

## RepOptimizers

`repopt_*`, `digits_repopt` and `fashion_repopt` need the scales of a search for the same network: `optimizer.scales`.
The released ones are `RepOpt-VGG-{B1,B2,L1,L2}-scales.pth` and `RepOptGhostNet_0_5x_scales.pth`; others come from
a search on a small data set ([repoptimizers.md](repoptimizers.md)), which takes a recipe too:

```bash
repkern search hyper --recipe digits_repopt
repkern train digits_repopt --set optimizer.scales=runs/search/scales.safetensors
```

## Memory

`--dry-run` runs one training step on torch's meta device, where tensors have shapes and no values, and follows every
tensor's life. The estimate is within 10 % of what torch's allocator counts in a real step (tested with ResNet-18,
RepVGG-A0, DBB, ACB and OREPA networks, where it was at most 4.4 % off); what oneDNN or cuDNN take as scratch is not in
it, and autocast needs less.
"""
TABLE_HEAD = """## All recipes

"Paper" is the top-1 accuracy that the source printed, in percent. `digits_*` and `fashion_*` are short; the others are
the papers' settings, checked to build, and have not been trained here.

Rows that are not here: networks that repkern does not have (EfficientNet, RegNet, VGG-16 on ImageNet, VGGNet-16,
ResNet-152, ResNeXt-101); blocks that cannot be folded or are not described (RepVGG table 7: identity without norm, ReLU
in branches, residual reorganization; OREPA table 2: ResNet-50's stem by itself; OREPA table 3: no norm, which does not
converge; supplement 3: offline); optimizers that repkern does not have (RepOptimizers table 4: Adam, Adafactor);
detection and segmentation.
"""
SCHEMA_HEAD = """## All fields

Defaults stand behind every field; one without must be given where its section is. The steps of `data.augment`:
[augmentation.md](augmentation.md).
"""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), ["---"] * len(list(head)), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def recipes_table(lines: Iterable[RecipeLine]) -> str:
    head = ["recipe", "network", "block", "data", "epochs", "optimizer", "paper", "source"]
    return table(head, (_cells(line) for line in lines))


def _cells(line: RecipeLine) -> list[str]:
    top1 = "" if line.top1 is None else f"{line.top1:.2f}"
    about = "; ".join(part for part in (line.source or line.about, line.note) if part)
    return [f"`{line.name}`", line.network, line.block, line.data, str(line.epochs), line.optimizer, top1, about]


def schema_tables() -> str:
    parts = []
    for name, description, fields in schema_lines():
        title = f"### `{name}`\n\n{description}\n\n" if name else f"{description}\n\n"
        rows = [_field(field, name) for field in fields]
        parts.append(title + (table(["field", "value", "default", ""], rows) if rows else ""))
    return "\n".join(parts)


def _field(field: SchemaLine, section: str) -> list[str]:
    short = field.name.removeprefix(f"{section}.")
    return [f"`{short}`", field.kind, f"`{field.default}`" if field.default else "", field.description]


def page() -> str:
    """The whole of docs/recipes.md."""
    return "\n".join([NOTICE + HEAD, TABLE_HEAD, recipes_table(recipe_lines()), SCHEMA_HEAD, schema_tables()])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when the page is stale")
    if parser.parse_args().check:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
