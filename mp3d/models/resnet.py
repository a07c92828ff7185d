"""The frame of every 3D backbone: a stem and four stages of residual blocks, run folded (:mod:`mp3d.models.folded`)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mp3d.config import StrideConfig
from mp3d.errors import ConfigError
from mp3d.models.folded import (
    AlongZ,
    ConvNorm,
    Norm,
    NormKind,
    WholeClips,
    ZPadding,
    fold,
    max_pool,
    max_pool_plane,
    unfold,
)

STAGE_WIDTHS = (64, 128, 256, 512)
"""Middle channels of the four stages at width 1."""


PUBLISHED_STRIDES = StrideConfig()
"""Those of pre-training and detection: z kept, 4 to 32 in the plane."""


class Stem(nn.Module):
    """Convolutions with ReLU, the first perhaps strided, then the max pool if there is one."""

    def __init__(self, layers: Sequence[ConvNorm], strides: StrideConfig = PUBLISHED_STRIDES) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.pool = strides.pool
        self.pool_z_stride = 2 if strides.isotropic else 1

    def forward(self, x: Float[Tensor, "nd c h w"], z: AlongZ) -> Float[Tensor, "_ o h4 w4"]:
        return self.pooled(self.convolved(x, z), z)

    def convolved(self, x: Float[Tensor, "nd c h w"], z: AlongZ) -> Float[Tensor, "_ o h2 w2"]:
        """What the pool reads."""
        for layer in self.layers:
            x = F.relu(layer(x, z), inplace=True)
        return x

    def pooled(self, x: Float[Tensor, "nd o h2 w2"], z: AlongZ) -> Float[Tensor, "_ o h4 w4"]:
        if self.pool == "none":
            return x
        return max_pool_plane(x) if self.pool == "1x3x3" else max_pool(x, z, self.pool_z_stride)


class FoldedResNet(nn.Module):
    """A 3D residual network.

    Args:
        stem: from one channel to the first stage's input.
        stages: the blocks of stage 1 to 4; a block is called as ``block(x, z)`` on a folded tensor.
        out_channels: channels of the four outputs.
        strides: of the whole network.
    """

    def __init__(
        self,
        stem: Stem,
        stages: Sequence[Sequence[nn.Module]],
        out_channels: Sequence[int],
        strides: StrideConfig = PUBLISHED_STRIDES,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stage1, self.stage2, self.stage3, self.stage4 = (nn.ModuleList(blocks) for blocks in stages)
        self.out_channels = list(out_channels)
        self.strides = strides.of_outputs
        """In the plane, of the four outputs."""
        self.keeps_z = not strides.isotropic
        """Every slice has its own features, to the end."""
        self.z_padding: ZPadding = "zeros"
        """Beyond the ends of a clip, or of a stream."""
        self.num_frozen_parts = 0

    @property
    def stages(self) -> tuple[nn.ModuleList, ...]:
        return self.stage1, self.stage2, self.stage3, self.stage4

    def freeze(self, stages: int) -> None:
        """Holds the first parts fixed for good, batch statistics included; they keep nothing for a backward pass.

        Args:
            stages: the authors' counting: -1 none, 0 the stem, k also stages 1..k.
        """
        self.num_frozen_parts = stages + 1
        for part in (self.stem, *self.stages)[: self.num_frozen_parts]:
            part.requires_grad_(False)
            part.eval()

    def train(self, mode: bool = True) -> "FoldedResNet":
        super().train(mode)
        for part in (self.stem, *self.stages)[: self.num_frozen_parts]:
            part.eval()
        return self

    def forward(self, x: Float[Tensor, "n 1 d h w"]) -> list[Float[Tensor, "n _ _ _ _"]]:
        """The outputs of stage 1 to 4."""
        z = WholeClips(len(x), self.z_padding)
        return [unfold(features, z.depth(features)) for features in self.run(fold(x), z)]

    def with_stem(self, x: Float[Tensor, "n 1 d h w"]) -> list[Float[Tensor, "n _ _ _ _"]]:
        """The outputs of the stem, before its pool, and of stage 1 to 4: what a decoder reads."""
        z = WholeClips(len(x), self.z_padding)
        with self._grad_unless_frozen(0):
            stem = self.stem.convolved(fold(x), z)
            x = self.stem.pooled(stem, z)
        return [unfold(features, z.depth(features)) for features in (stem, *self._run_stages(x, z))]

    def run(self, x: Float[Tensor, "nd 1 h w"], z: AlongZ) -> list[Float[Tensor, "_ _ _ _"]]:
        """The outputs of stage 1 to 4 on folded tensors, whose slices hang together as ``z`` says."""
        with self._grad_unless_frozen(0):
            x = self.stem(x, z)
        return self._run_stages(x, z)

    def _grad_unless_frozen(self, part: int) -> torch.set_grad_enabled:
        """Part 0 is the stem, part k stage k."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and self.num_frozen_parts <= part)

    def _run_stages(self, x: Float[Tensor, "nd c h w"], z: AlongZ) -> list[Float[Tensor, "_ _ _ _"]]:
        outputs = []
        for number, blocks in enumerate(self.stages, start=1):
            with self._grad_unless_frozen(number):
                for block in blocks:
                    x = block(x, z)
                x = self.after_stage(number, x, z)
            outputs.append(x)
        return outputs

    def after_stage(self, number: int, x: Float[Tensor, "nd c h w"], z: AlongZ) -> Float[Tensor, "_ c h w"]:
        """What the next stage reads and this one puts out; ``number`` is 1 to 4."""
        return x


def base_channels(width: float) -> int:
    """Channels of the stem's output, 64 at width 1; even.

    Raises:
        ConfigError: a width that leaves no channel.
    """
    channels = 2 * round(STAGE_WIDTHS[0] / 2 * width)
    if channels == 0:
        raise ConfigError(f"model.width is {width}: the stem would have no channel; use at least 0.02")
    return channels


def scaled_norm(kind: NormKind, width: float) -> Norm:
    """Fewer groups in a narrow network, so that a group has as many channels as at width 1."""
    return Norm(kind, num_groups=base_channels(width) // 2)


def build_resnet(
    stem: Stem,
    num_blocks: Sequence[int],
    base: int,
    expansion: int,
    block: Callable[[int, int, int, int], nn.Module],
    strides: StrideConfig = PUBLISHED_STRIDES,
    kind: type[FoldedResNet] = FoldedResNet,
) -> FoldedResNet:
    """Four stages behind a stem; the first block of a stage carries its stride.

    Args:
        num_blocks: of the four stages.
        base: the stem's output channels.
        expansion: output channels of a block over its middle channels.
        block: makes a block from its index in the whole network, its input channels, middle channels and stride.
    """
    stages, out_channels = [], []
    in_channels, index = base, 0
    for stage, blocks_of_stage in enumerate(num_blocks):
        channels = base * STAGE_WIDTHS[stage] // STAGE_WIDTHS[0]
        blocks = []
        for position in range(blocks_of_stage):
            blocks.append(block(index, in_channels, channels, strides.stages[stage] if position == 0 else 1))
            in_channels = channels * expansion
            index += 1
        stages.append(blocks)
        out_channels.append(in_channels)
    return kind(stem, stages, out_channels, strides)
