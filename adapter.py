# SPDX-License-Identifier: MIT
"""The adapter F of the grounder, Appendix A. Needs torch alone; copy it.

Four gated convolution blocks in two stages, each stage after a x2 upsampling, on the patch grid of
a frozen ViT. With all gates at 0 it only upsamples: an untrained grounder is exactly MaskCLIP.

>>> Adapter(width=8)(torch.zeros(1, 8, 14, 14)).shape
torch.Size([1, 8, 56, 56])
"""

import torch
import torch.nn.functional as F
from torch import nn


class GatedBlock(nn.Module):
    """x + tanh(g) * Conv(x) on maps [B, D, H, W] of any size; g starts at 0.

    Paper silent: what stands before the convolution. The release's: LayerNorm over channels, then
    exact GELU.
    """

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        """[B, D, H, W] -> [B, D, H, W]."""
        y = self.norm(x.permute(0, 2, 3, 1))  # [B, H, W, D]: the norm is over the last axis
        y = self.conv(F.gelu(y).permute(0, 3, 1, 2))  # [B, D, H, W]
        return x + torch.tanh(self.gate) * y  # Eq. (13)


class Adapter(nn.Module):
    """[B, D, H, W] -> [B, D, 4H, 4W]: two stages of nearest x2 upsampling and two gated blocks."""

    def __init__(self, width, stages=2):
        super().__init__()
        self.stages = nn.Sequential(*(self.stage(width) for _ in range(stages)))

    @staticmethod
    def stage(width):
        """Nearest x2 upsampling, then two blocks."""
        upsample = nn.Upsample(scale_factor=2, mode="nearest")
        return nn.Sequential(upsample, GatedBlock(width), GatedBlock(width))

    def forward(self, x):
        """Any H, W and float dtype."""
        return self.stages(x)
