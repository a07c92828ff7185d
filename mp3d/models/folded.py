"""Convolution, normalisation and pooling of a 3D network that runs folded into 2D.

A **folded** tensor has shape ``(n*d, c, h, w)`` in channels-last memory: the slices of all clips, one after the other.
Next to it travels ``z`` (:class:`AlongZ`), which knows how they hang together. Three facts make it work without copies:

- a 1 x k x k convolution is a 2D convolution of every slice;
- the same memory read as ``(n, c, d, h*w)``, the *columns* of a clip, turns a 3 x 1 x 1 convolution into a 3 x 1 one
  (a GPU stays in three dimensions, where gradients are some tenth faster);
- read as ``(n, c, d, h, w)`` it is a channels-last 3D tensor, for the 3 x 3 x 3 convolutions of the plain 3D networks.

2D channels-last kernels are good everywhere, where 3D ones for pooling and normalisation are not. Weights keep the
shape of ``nn.Conv3d``, ``(out, in, kd, kh, kw)``, so that the authors' checkpoints load without reshaping.
"""

from dataclasses import dataclass
from math import gcd
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

NormKind = Literal["slice_gn", "gn3d", "bn", "frozen_bn"]
ZPadding = Literal["zeros", "replicate"]
"""What lies beyond the ends of a clip along z: zeros (published), or its first and last slice once more."""


@dataclass(frozen=True)
class Norm:
    """Which normalisation follows a convolution.

    Attributes:
        kind: ``slice_gn`` is group norm with the statistics of one slice, ``gn3d`` with those of the clip, as
            published; ``bn`` and ``frozen_bn`` are batch norm over all slices of the batch.
        num_groups: of a group norm; 32 in the authors' configs.
    """

    kind: NormKind
    num_groups: int = 32


class AlongZ(Protocol):
    """How the slices of a folded tensor hang together.

    The same network runs over whole clips (:class:`WholeClips`) and over a series that comes in chunks
    (:class:`mp3d.models.stream.SeriesStream`): whatever mixes slices, or joins branches that do, asks here.
    """

    def depth(self, x: Float[Tensor, "nd c h w"]) -> int:
        """Slices of a clip in ``x``."""
        ...

    def with_neighbours(
        self, x: Float[Tensor, "nd c h w"], reach: int, always_zeros: bool = False
    ) -> tuple[Float[Tensor, "_ c h w"], int, int]:
        """What an operation over ``2 * reach + 1`` slices reads: the folded tensor, its slices per clip, and how many
        slices of zeros are still to be added on each side.

        Args:
            always_zeros: whatever the padding of the network; a maximum of what a ReLU left is the same with either.
        """
        ...

    def add(self, ahead: Float[Tensor, "_ c h w"], behind: Float[Tensor, "_ c h w"]) -> Float[Tensor, "_ c h w"]:
        """The sum of two branches, of which ``behind`` went through more operations along z and is used up."""
        ...


@dataclass(frozen=True)
class WholeClips:
    """``num_clips`` clips of equal depth that are there from the first slice to the last."""

    num_clips: int
    padding: ZPadding = "zeros"

    def depth(self, x: Float[Tensor, "nd c h w"]) -> int:
        return len(x) // self.num_clips

    def with_neighbours(
        self, x: Float[Tensor, "nd c h w"], reach: int, always_zeros: bool = False
    ) -> tuple[Float[Tensor, "_ c h w"], int, int]:
        depth = self.depth(x)
        if self.padding == "zeros" or always_zeros:
            return x, depth, reach
        slices = x.permute(0, 2, 3, 1).unflatten(0, (self.num_clips, depth))
        slices = torch.cat([slices[:, :1]] * reach + [slices] + [slices[:, -1:]] * reach, dim=1)
        return slices.flatten(0, 1).permute(0, 3, 1, 2), depth + 2 * reach, 0

    def add(self, ahead: Float[Tensor, "nd c h w"], behind: Float[Tensor, "nd c h w"]) -> Float[Tensor, "nd c h w"]:
        return ahead + behind


def fold(x: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n*d c h w"]:
    """Clips to slices; free if ``x`` is channels-last."""
    if x.shape[1] == 1:
        # One channel is channels-last whatever its stride, but torch only takes it for that if the stride is 1.
        return x.flatten(0, 2).unsqueeze(3).permute(0, 3, 1, 2)
    return x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)


def unfold(x: Float[Tensor, "nd c h w"], depth: int) -> Float[Tensor, "n c d h w"]:
    """Slices back to clips, channels-last; always a view."""
    return x.unflatten(0, (-1, depth)).transpose(1, 2)


def to_columns(x: Float[Tensor, "nd c h w"], depth: int) -> Float[Tensor, "n c d h*w"]:
    """The folded tensor with z as the rows of a 2D picture; free if ``x`` is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(0, (-1, depth)).permute(0, 3, 1, 2)


def from_columns(x: Float[Tensor, "n c d hw"], height: int, width: int) -> Float[Tensor, "n*d c h w"]:
    """Undoes :func:`to_columns`."""
    return x.permute(0, 2, 3, 1).flatten(0, 1).unflatten(1, (height, width)).permute(0, 3, 1, 2)


def max_pool(x: Float[Tensor, "nd c h w"], z: AlongZ, z_stride: int = 1) -> Float[Tensor, "_ c h2 w2"]:
    """3 x 3 x 3 max pooling with stride (z_stride, 2, 2) and padding 1, of what a ReLU left.

    The maximum is separable: first in the plane, then over z. Where nothing is negative, padding with zeros is right.
    """
    return max_pool_z(max_pool_plane(x), z, z_stride)


def max_pool_plane(x: Float[Tensor, "nd c h w"]) -> Float[Tensor, "nd c h2 w2"]:
    """1 x 3 x 3 max pooling with stride (1, 2, 2) and padding 1."""
    return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


def max_pool_z(
    x: Float[Tensor, "nd c h w"], z: AlongZ, stride: int = 1, padded: bool = True
) -> Float[Tensor, "_ c h w"]:
    """3 x 1 x 1 max pooling of what a ReLU left, with padding 1 or none.

    Where no gradient is wanted, the maximum of neighbours, twice: a half to a third of the time.
    """
    x, depth, padding = z.with_neighbours(x, reach=1, always_zeros=True)
    padding = padding if padded else 0
    if stride == 1 and depth > 2 and not torch.is_grad_enabled():
        return _maximum_of_three(x.unflatten(0, (len(x) // depth, depth)), padding).flatten(0, 1)
    columns = F.max_pool2d(to_columns(x, depth), kernel_size=(3, 1), stride=(stride, 1), padding=(padding, 0))
    return from_columns(columns, *x.shape[2:])


def _maximum_of_three(x: Float[Tensor, "n d c h w"], padding: int) -> Float[Tensor, "n _ c h w"]:
    """Of every slice and its neighbours; without padding those at the ends have no answer."""
    pairs = torch.maximum(x[:, :-1], x[:, 1:])
    if padding == 0:
        return torch.maximum(pairs[:, :-1], pairs[:, 1:])
    result = torch.empty_like(x)
    result[:, 0], result[:, -1] = pairs[:, 0], pairs[:, -1]
    torch.maximum(pairs[:, :-1], pairs[:, 1:], out=result[:, 1:-1])
    return result


PIXEL_BATCH = 16
"""The least batch with which PyTorch gives 1 x 1 convolutions of float32 to oneDNN on one thread."""


def conv_pixels(
    x: Float[Tensor, "n c h w"], weight: Float[Tensor, "o c 1 1"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "n o h w"]:
    """A 1 x 1 convolution, which asks nothing of where pixels lie: on a CPU each row is taken for a picture, a view of
    channels-last memory. With fewer than 16 in a batch PyTorch takes a path up to one and a half times slower.
    """
    height = x.shape[2]
    if x.device.type != "cpu" or len(x) >= PIXEL_BATCH or not x.is_contiguous(memory_format=torch.channels_last):
        return F.conv2d(x, weight, bias)
    rows = x.permute(0, 2, 3, 1).flatten(0, 1).unsqueeze(1).permute(0, 3, 1, 2)
    rows = F.conv2d(rows, weight, bias)
    return rows.permute(0, 2, 3, 1).squeeze(1).unflatten(0, (-1, height)).permute(0, 3, 1, 2)


class Conv(nn.Module):
    """Bias-free convolution of a folded tensor, padded by half its kernel: in the plane with zeros, along z as the
    clips say.

    Args:
        stride: in the plane; ``z_stride``: along z.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], stride: int = 1, z_stride: int = 1
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.stride, self.z_stride = stride, z_stride
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *kernel))
        self.bias: Tensor | None = None
        """Of a batch norm that was fused into it."""
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Float[Tensor, "nd c h w"], z: AlongZ) -> Float[Tensor, "_ o h2 w2"]:
        kd, kh, kw = self.kernel
        stride = self.stride
        on_cpu = x.device.type == "cpu"
        if kh == kw == 1 and stride > 1 and on_cpu:
            # taking every other pixel first is the same, and oneDNN's strided 1 x 1 kernels write past their weight
            # gradients at 8 input channels (PyTorch 2.15, AVX-512)
            x, stride = x[:, :, ::stride, ::stride].contiguous(memory_format=torch.channels_last), 1
        if kd == 1 and self.z_stride > 1:
            x = fold(unfold(x, z.depth(x))[:, :, :: self.z_stride])
        if kd == kh == kw == stride == 1:
            return conv_pixels(x, self.weight.squeeze(2), self.bias)
        if kd == 1:
            return F.conv2d(x, self.weight.squeeze(2), self.bias, stride=stride, padding=(kh // 2, kw // 2))
        x, depth, padding = z.with_neighbours(x, reach=kd // 2)
        if kh == kw == stride == 1 and on_cpu:
            columns = F.conv2d(
                to_columns(x, depth), self.weight.squeeze(4), self.bias, (self.z_stride, 1), padding=(padding, 0)
            )
            return from_columns(columns, *x.shape[2:])
        paddings = (padding, kh // 2, kw // 2)
        strides = (self.z_stride, stride, stride)
        return fold(F.conv3d(unfold(x, depth), self.weight, self.bias, strides, paddings))

    def extra_repr(self) -> str:
        out_channels, in_channels = self.weight.shape[:2]
        stride = (self.z_stride, self.stride, self.stride)
        return f"{in_channels}, {out_channels}, kernel={self.kernel}, stride={stride}"


class GroupNorm(nn.GroupNorm):
    """Group norm that hands on the precision it was given; under autocast, a GPU's would hand on float32.

    A GPU's kernels would also bring the tensor out of channels-last memory and leave that to the next convolution to
    mend. Where nothing is trained, sums of the channels, a multiplication and an addition do without.
    """

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        if input.is_cuda and not torch.is_grad_enabled():
            with torch.autocast("cuda", enabled=False):
                return self.by_channels(input)
        return super().forward(input).to(input.dtype)

    def by_channels(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """In float32 at least, whatever the precision of ``x``, until the result is rounded to it."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
        count = pixels.shape[1] * pixels.shape[2] // self.num_groups
        sums = pixels.sum(1, dtype=dtype)
        powers = torch.linalg.vector_norm(pixels, dim=1, dtype=dtype).square()
        means, squares = (each.unflatten(1, (self.num_groups, -1)).sum(2, True) / count for each in (sums, powers))
        rates = ((squares - means.square()).clamp(min=0) + self.eps).rsqrt()
        scale = self.weight.unflatten(0, (self.num_groups, -1)) * rates
        shift = self.bias.unflatten(0, (self.num_groups, -1)) - means * scale
        scale, shift = (each.flatten(1)[:, :, None, None] for each in (scale, shift))
        return torch.addcmul(shift, x, scale).to(x.dtype)


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch norm that always uses its stored statistics and is never trained."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        return super().train(False)


class ConvNorm(nn.Module):
    """Convolution, then normalisation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int],
        stride: int = 1,
        z_stride: int = 1,
        *,
        norm: Norm,
    ) -> None:
        super().__init__()
        self.conv = Conv(in_channels, out_channels, kernel, stride, z_stride)
        self.over_clip = norm.kind == "gn3d"
        match norm.kind:
            case "slice_gn" | "gn3d":
                # Never a group of one channel: normalising would erase that channel's mean.
                self.norm = GroupNorm(gcd(norm.num_groups, out_channels // 2), out_channels)
            case "bn":
                self.norm = nn.BatchNorm2d(out_channels)
            case "frozen_bn":
                self.norm = FrozenBatchNorm(out_channels)

    def forward(self, x: Float[Tensor, "nd c h w"], z: AlongZ) -> Float[Tensor, "_ o h2 w2"]:
        x = self.conv(x, z)
        if self.over_clip:
            return from_columns(self.norm(to_columns(x, z.depth(x))), *x.shape[2:])
        return self.norm(x)

    @torch.no_grad()
    def fuse(self) -> None:
        """Takes the stored statistics of a batch norm into the convolution, for inference and for good."""
        if not isinstance(self.norm, nn.BatchNorm2d):
            return
        norm, weight = self.norm, self.conv.weight
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        weight.copy_(weight.double() * scale.view(-1, 1, 1, 1, 1))
        self.conv.bias = (norm.bias.double() - norm.running_mean.double() * scale).to(weight)
        self.norm = nn.Identity()


def fuse_batch_norms(model: nn.Module) -> None:
    """Every batch norm behind a convolution of a model, in place; see :meth:`ConvNorm.fuse`."""
    for module in model.modules():
        if isinstance(module, ConvNorm):
            module.fuse()
