"""RepNAS's candidate blocks (paper 2109.03508) as released: the supernet's and, with fewer of them, the subnet's."""

from __future__ import annotations

from repkern.models.checkpoints.layout import Block, BlockRule, Layout, inside, prefixed

__all__ = ["REPNAS"]

# By the kernel's size; the subnet numbers only the branches it keeps, so that a number says nothing.
_PLAIN = {(False, False): "pointwise", (False, True): "horizontal", (True, False): "vertical", (True, True): "dense"}


def _normed(block: Block, name: str | None = None) -> Block:
    kernel = block["conv.weight"]
    if name is None:
        name = _PLAIN[kernel.shape[2] > 1, kernel.shape[3] > 1]
    return {f"{name}.weight": kernel} | prefixed(f"{name}_bn.", inside("bn.", block))


def _average(block: Block) -> Block:
    ours = {"avg.weight": block["conv1.conv.weight"]}
    return ours | prefixed("avg_inner_bn.", inside("conv1.bn.bn.", block)) | prefixed("avg_bn.", inside("bn2.", block))


def _sequence(block: Block) -> Block:
    """1x1, stored as its deviation from the identity as ours, and KxK; with stride 2 there is no 1x1."""
    ours = _normed(inside("conv2.", block), "expand")
    if "conv1.weight" in block:
        ours["reduce.weight"] = block["conv1.weight"]
        ours |= prefixed("reduce_bn.", inside("bn1.bn.", block))
    return ours


def _mixed(block: Block) -> Block:
    ours = prefixed("identity_bn.", inside("skip_connect.bn.", block))
    for number in dict.fromkeys(name.split(".")[1] for name in block if name.startswith("_ops.")):
        branch = inside(f"_ops.{number}.", block)
        if "conv.weight" in branch:
            ours |= _normed(branch)
        else:
            ours |= _average(branch) if "conv1.conv.weight" in branch else _sequence(branch)
    return ours


REPNAS = Layout(
    "repnas",
    "bestfleer/RepNAS",
    (
        BlockRule(
            r"_ops\.\d+\.(?:conv|conv1\.conv|conv2\.conv)\.weight",
            r"_ops\.\d+\..+|skip_connect\.bn\..+|conv\.(?:conv|bn)\..+",
            _mixed,
            # The convolution that branches would share; it is in every file and never computed with.
            dropped=r"conv\..+",
        ),
    ),
)
