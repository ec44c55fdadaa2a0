"""ODBBlock: the seven branches of RepNAS, each with a gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from repkern.nn.branch_sum import branch_norm_sum
from repkern.nn.geometry import Pair, check_geometry
from repkern.nn.seven_branches import SevenBranchBlock

__all__ = ["ODBBlock"]


class ODBBlock(SevenBranchBlock):
    """activation(sum of gate * branch), each branch with norms: the searchable block of RepNAS (paper, Sec. 3.2).

    branches: any of ("1x1", "1x1_kxk", "1x1_avg", "kxk", "1xk", "kx1", "id"); None: all that are possible ("id" where
    Ci = Co, stride 1 and the size is kept; for K = 1 only "1x1_kxk", "kxk" and "id"). All but "id", which always runs,
    have a gate. Any odd K, stride, padding (None keeps the size at stride 1), dilation, groups, padding_mode.
    internal_channels: Cm of the 1x1-KxK branch; default Ci. border, recompute: as in DiverseBranchBlock.
    strided_reduce: False leaves the 1x1 of the 1x1-KxK branch out where the stride is not 1, as the released code.
    Submodules: those of DyRepBlock, but `dense` has no bias, and `reduce` is the deviation from an identity.
    Input [N, Ci, H, W]; ValueError for another, and for arguments that cannot be a block.
    """

    _identity_reduce = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        padding: str | Pair | None = None,
        dilation: Pair = 1,
        groups: int = 1,
        *,
        activation: nn.Module | None = None,
        padding_mode: str = "zeros",
        recompute: str = "none",
        branches: Sequence[str] | None = None,
        internal_channels: int | None = None,
        border: str = "exact",
        strided_reduce: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = check_geometry(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        if branches is not None and len(branches) == 0:
            raise ValueError("branches must name at least one branch, got none")
        bare = not strided_reduce and geometry.stride != (1, 1)
        if bare and internal_channels not in (None, in_channels):
            raise ValueError(f"without a 1x1 in front, internal_channels is in_channels, got {internal_channels}")
        super().__init__(geometry, activation, recompute, branches, internal_channels, border, device, dtype)
        if bare:
            self.reduce = self.reduce_bn = None

    @property
    def gated_branches(self) -> tuple[str, ...]:
        """The branches that a gate belongs to, in the order of the gates."""
        return tuple(name for name in self.branches if name != "id")

    def forward(self, x: Tensor, gates: Tensor | None = None, mask: Sequence[bool] | None = None) -> Tensor:
        """x [N, Ci, H, W], gates [B] -> [N, Co, H', W']; B as `gated_branches`.

        gates: what each branch is multiplied with, with a gradient; None for ones. mask: which branches run at all;
        None for all. It is given apart from the gates, on the host, so that nobody waits for the device: branches it
        leaves out cost nothing, their gates have a zero gradient, and their norms see no data.
        ValueError when a length is not B, or when nothing would run; TypeError for a mask that is a tensor.
        """
        self._check_input(x)
        names = self.gated_branches
        if gates is not None and gates.shape != (len(names),):
            raise ValueError(f"gates must be [{len(names)}] for {', '.join(names)}, got {tuple(gates.shape)}")
        if isinstance(mask, Tensor):
            raise TypeError("mask must be bools on the host, got a tensor: use tolist(), once for all blocks")
        if mask is not None and len(mask) != len(names):
            raise ValueError(f"mask must have {len(names)} entries for {', '.join(names)}, got {len(mask)}")
        running = []
        for at, name in enumerate(names):
            if mask is None or mask[at]:
                running.append(self._branch(name)._replace(gain=None if gates is None else gates[at]))
        if "id" in self.branches:
            running.append(self._branch("id"))
        if not running:
            raise ValueError("mask leaves no branch to run")
        return branch_norm_sum(x, running, self.activation, recompute=self.recompute, owner=self)

    def keep_branches(self, names: Sequence[str]) -> None:
        """Remove all other branches, what they compute included. ValueError for one that is not there."""
        missing = [name for name in names if name not in self.branches]
        if missing or not names:
            raise ValueError(f"names must be some of {', '.join(self.branches)}, got {tuple(names)}")
        self._remove([name for name in self.branches if name not in names])
