"""P3D backbones as the authors released them: MP3D's blocks, but z is pooled away behind the stages (``p3d.py``).

Nine slices become 5, 3 and 1, so a network answers for the middle slice of a window only: there is no group transform,
the middle of what is left is taken. The weights have the names and shapes of MP3D's. It is not the P3D of Qiu et al.,
whose last stage is 2D. The VDT paper's published DeepLesion recipe is this network with depth 18ba.
"""

from jaxtyping import Float
from torch import Tensor

from mp3d.config import StrideConfig
from mp3d.models.folded import AlongZ, NormKind, max_pool_z
from mp3d.models.mp3d import Depth, build_mp3d
from mp3d.models.resnet import FoldedResNet

MIN_DEPTH = 9
"""Fewer slices leave nothing for the last pool."""
PLANE_POOL = StrideConfig(pool="1x3x3")


class P3D(FoldedResNet):
    """MP3D's stages, each followed by a max pool over z; it is the pooled features that are put out."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.keeps_z = False

    def after_stage(self, number: int, x: Float[Tensor, "nd c h w"], z: AlongZ) -> Float[Tensor, "_ c h w"]:
        match number:
            case 1 | 2:
                return max_pool_z(x, z, stride=2)
            case 3:
                return max_pool_z(x, z, padded=False)
            case _:
                return x


def build_p3d(depth: Depth, width: float = 1.0, norm: NormKind = "slice_gn") -> FoldedResNet:
    """A P3D backbone for one input channel and clips of at least ``MIN_DEPTH`` slices.

    Args:
        width: factor on every channel count.

    Raises:
        ConfigError: a width that leaves no channel.
    """
    return build_mp3d(depth, width, norm, PLANE_POOL, P3D)
