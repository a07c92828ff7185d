"""3 x 3 convolutions with a quarter of the multiplications, for inference in float32 on a CPU.

Winograd's minimal filtering F(4 x 4, 3 x 3): Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR
2016, section 4. A picture is cut into tiles of 6 x 6 pixels that overlap by two. Transformed, a tile of ``d`` and a
kernel ``g`` need only be multiplied place by place, 36 products of matrices over the channels, for 4 x 4 outputs:

    output = A' ((G g G') * (B' d B)) A

The feature pyramid and the region proposals spend most of their time in such convolutions, of 256 channels: with AVX2
this takes half of it. Rounding is some parts in a million of the largest output, where the plain sum has one. PyTorch's
own kernels for AVX-512 and for bfloat16 have more to gain from their instructions.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

FEWEST_CHANNELS = 128
"""Of input and output; below, the transforms cost what the products save."""
AT_ONCE = 256
"""Tiles that are multiplied together: their 36 products with 256 channels take 9 MB."""

OF_TILE = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
"""B' of the paper."""
OF_KERNEL = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
"""G."""
OF_OUTPUT = [
    [1, 1, 1, 1, 1, 0],
    [0, 1, -1, 2, -2, 0],
    [0, 1, 1, 4, 4, 0],
    [0, 1, -1, 8, -8, 1],
]
"""A'."""


class WinogradConv2d(nn.Module):
    """What a 3 x 3 convolution with stride 1 and padding 1 computes, in channels-last memory and without gradients."""

    kernels: Tensor
    of_tile: Tensor
    of_output: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        weight = conv.weight.detach()
        kernels = _both_axes(_matrix(OF_KERNEL, weight.double()), weight.double().permute(2, 3, 1, 0))
        self.register_buffer("kernels", kernels.flatten(0, 1).to(weight).contiguous())
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach())
        self.register_buffer("of_tile", _matrix(OF_TILE, weight))
        self.register_buffer("of_output", _matrix(OF_OUTPUT, weight))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o h w"]:
        n, channels, height, width = x.shape
        rows, columns = -(-height // 4), -(-width // 4)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 4 * columns - width + 1, 1, 4 * rows - height + 1))
        tiles = padded.unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 0, 1, 2, 3)
        output = x.new_empty(n, rows, 4, columns, 4, self.kernels.shape[2])
        pictures, lines = max(1, AT_ONCE // (rows * columns)), max(1, AT_ONCE // columns)
        for first in range(0, n, pictures):
            for top in range(0, rows, lines):
                part = tiles[:, :, first : first + pictures, top : top + lines]
                transformed = _both_axes(self.of_tile, part).view(36, -1, channels)
                products = torch.bmm(transformed, self.kernels).view(6, 6, *part.shape[2:5], -1)
                pixels = _both_axes(self.of_output, products)
                output[first : first + pictures, top : top + lines] = pixels.permute(2, 3, 0, 4, 1, 5)
        output = output.view(n, 4 * rows, 4 * columns, -1)[:, :height, :width].contiguous()
        if self.bias is not None:
            output += self.bias
        return output.permute(0, 3, 1, 2)


def use_winograd(model: nn.Module) -> None:
    """Every plain 3 x 3 convolution of many channels in a model, in place and for good: for inference only."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and _is_plain(child) and min(child.weight.shape[:2]) >= FEWEST_CHANNELS:
                setattr(parent, name, WinogradConv2d(child))


def _is_plain(conv: nn.Conv2d) -> bool:
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def _both_axes(matrix: Float[Tensor, "o i"], x: Float[Tensor, "i i *rest"]) -> Float[Tensor, "o o *rest"]:
    """``matrix @ x @ matrix.T`` for all of the rest."""
    half = (matrix @ x.reshape(len(x), -1)).view(len(matrix), len(x), -1)
    return (matrix @ half).view(len(matrix), len(matrix), *x.shape[2:])


def _matrix(rows: Sequence[Sequence[float]], like: Tensor) -> Float[Tensor, "o i"]:
    return torch.tensor(rows, dtype=like.dtype, device=like.device)
