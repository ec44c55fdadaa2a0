"""The released layouts, in the order in which `load_checkpoint` looks for them."""

from __future__ import annotations

from repkern.models.checkpoints.acnet import ACNET
from repkern.models.checkpoints.dbb import DBB
from repkern.models.checkpoints.dyrep import DYREP
from repkern.models.checkpoints.layout import Layout
from repkern.models.checkpoints.mobileone import MOBILEONE
from repkern.models.checkpoints.orepa import OREPA
from repkern.models.checkpoints.qarepvgg import QAREPVGG
from repkern.models.checkpoints.repghost import REPGHOST
from repkern.models.checkpoints.repnas import REPNAS
from repkern.models.checkpoints.repopt import REPOPT, REPOPT_SCALES
from repkern.models.checkpoints.repvgg import REPVGG
from repkern.models.checkpoints.timm import TIMM

__all__ = ["LAYOUTS", "RELEASED", "SCALES"]

#: Layouts of networks, by name.
RELEASED: dict[str, Layout] = {
    layout.name: layout
    for layout in (REPVGG, QAREPVGG, ACNET, DBB, OREPA, DYREP, REPOPT, REPNAS, MOBILEONE, REPGHOST, TIMM)
}

#: The layout of files that hold only the scales of a hyper-search.
SCALES = REPOPT_SCALES

#: Every value of `load_checkpoint(layout=...)`.
LAYOUTS = ("auto", "repkern", *RELEASED, SCALES.name)
