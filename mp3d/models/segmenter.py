"""Segmentation of clips by a 3D encoder and decoder (VDT paper: LiTS liver, LIDC nodules; authors' ``medseg``).

The network answers for every slice that it reads; of a block of a volume all are key slices, of a colour picture the
middle one stands for the three planes.

Differs from the authors' code: features are brought to the size of the skip connection, not doubled, so that any size
will do.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mp3d.config import UNKNOWN, ClipConfig, ModelConfig, SegmentationHead
from mp3d.models.backbone import build_backbone
from mp3d.models.folded import ConvNorm, Norm, WholeClips, fold, unfold
from mp3d.models.resnet import base_channels, scaled_norm
from mp3d.models.segmentation_losses import mask_losses
from mp3d.models.transform import ClipBatch, ClipTransform
from mp3d.sample import Clip, Prediction, Target


class ConvStack(nn.Module):
    """Convolutions with normalisation and ReLU, on clips."""

    def __init__(self, *layers: ConvNorm) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n o d h w"]:
        z = WholeClips(len(x))
        folded = fold(x)
        for layer in self.layers:
            folded = F.relu(layer(folded, z), inplace=True)
        return unfold(folded, x.shape[2])


class UpBlock(nn.Module):
    """Trilinear to the size of the skip connection, 1 x 1 x 1, concatenation, two 3 x 3 x 3."""

    def __init__(self, in_channels: int, skip_channels: int, norm: Norm) -> None:
        super().__init__()
        self.reduce = ConvStack(ConvNorm(in_channels, skip_channels, (1, 1, 1), norm=norm))
        self.mix = ConvStack(
            ConvNorm(2 * skip_channels, skip_channels, (3, 3, 3), norm=norm),
            ConvNorm(skip_channels, skip_channels, (3, 3, 3), norm=norm),
        )

    def forward(self, x: Float[Tensor, "n c _ _ _"], skip: Float[Tensor, "n s d h w"]) -> Float[Tensor, "n s d h w"]:
        x = self.reduce(resized(x, skip.shape[2:], "trilinear"))
        return self.mix(torch.cat([skip, x], dim=1))


class UNetDecoder(nn.Module):
    """From the stem and all stages to as many channels as the head asks for, at the stem's size."""

    def __init__(self, channels: Sequence[int], head: SegmentationHead, norm: Norm) -> None:
        super().__init__()
        pairs = zip(channels[1:], channels[:-1], strict=True)
        self.ups = nn.ModuleList(UpBlock(deep, skip, norm) for deep, skip in pairs)
        self.convs = ConvStack(
            ConvNorm(channels[0], head.channels, (3, 3, 3), norm=norm),
            ConvNorm(head.channels, head.channels, (3, 3, 3), norm=norm),
        )

    def forward(self, features: Sequence[Float[Tensor, "n _ _ _ _"]]) -> Float[Tensor, "n c d h w"]:
        x = features[-1]
        for up, skip in zip(reversed(self.ups), reversed(features[:-1]), strict=True):
            x = up(x, skip)
        return self.convs(x)


class FCNDecoder(nn.Module):
    """Stage 4 beside stage 2, both beside the stem: nearest neighbour, 1 x 1 x 1; then one 3 x 3 x 3."""

    def __init__(self, channels: Sequence[int], head: SegmentationHead, norm: Norm) -> None:
        super().__init__()
        stem, _, stage2, _, stage4 = channels
        self.mix2 = ConvStack(ConvNorm(stage2 + stage4, stage4, (1, 1, 1), norm=norm))
        self.mix_stem = ConvStack(ConvNorm(stem + stage4, stage4, (1, 1, 1), norm=norm))
        self.convs = ConvStack(ConvNorm(stage4, head.channels, (3, 3, 3), norm=norm))

    def forward(self, features: Sequence[Float[Tensor, "n _ _ _ _"]]) -> Float[Tensor, "n c d h w"]:
        stem, _, stage2, _, x = features
        x = self.mix2(torch.cat([stage2, resized(x, stage2.shape[2:], "nearest")], dim=1))
        x = self.mix_stem(torch.cat([stem, resized(x, stem.shape[2:], "nearest")], dim=1))
        return self.convs(x)


def synchronise_dice(model: nn.Module) -> None:
    """Have a Dice over the batch taken over the batches of all workers."""
    if isinstance(model, ClipSegmenter):
        model.over_workers = True


class ClipSegmenter(nn.Module):
    """Says for every pixel of the key slices of clips which class it is of.

    Args:
        model: its head is a :class:`SegmentationHead`.
    """

    over_workers = False
    """See :func:`synchronise_dice`."""

    def __init__(self, model: ModelConfig, clip: ClipConfig) -> None:
        super().__init__()
        head = model.head
        if not isinstance(head, SegmentationHead):
            raise TypeError(f"model.head is a {type(head).__name__}; a segmenter needs a SegmentationHead")
        self.head = head
        self.transform = ClipTransform(clip)
        self.backbone = build_backbone(model)
        channels = [base_channels(model.width), *self.backbone.out_channels]
        decoder = UNetDecoder if head.decoder == "unet" else FCNDecoder
        self.decoder = decoder(channels, head, scaled_norm(model.norm, model.width))
        self.dropout = nn.Dropout3d(head.dropout)
        self.classify = nn.Conv3d(head.channels, head.num_classes + 1, 1)

    def forward(
        self, clips: Sequence[Clip], targets: Sequence[Target] | None = None, image_size: int | None = None
    ) -> dict[str, Tensor] | list[Prediction]:
        """Losses in training mode; in evaluation mode one map of logits per key slice, in pixels of the given clips.

        Args:
            targets: one per key slice, in clip order; needed in training. One without a mask is wholly unknown.
            image_size: pixels of the longer side; None takes the config's.

        Raises:
            ValueError: no target in training, another number of targets than key slices, a mask that cannot be.
        """
        batch, _ = self.transform(clips, targets, image_size)
        logits = self.key_slice_logits(batch)
        if not self.training:
            sizes, given_sizes = batch.per_key_slice(batch.image_sizes), batch.per_key_slice(batch.given_sizes)
            per_key_slice = zip(logits, sizes, given_sizes, strict=True)
            return [Prediction(mask_logits=_as_given(row, size, given)) for row, size, given in per_key_slice]
        if targets is None:
            raise ValueError("targets is None; training needs one target per key slice")
        masks = self._masks(targets, batch)
        keys_per_clip = [len(keys) for keys in batch.key_slices]
        return mask_losses(logits, masks, self.head, keys_per_clip, over_workers=self.over_workers)

    def key_slice_logits(self, batch: ClipBatch) -> Float[Tensor, "k c h w"]:
        """Float32, of the key slices in clip order."""
        features = self.backbone.with_stem(batch.tensors)
        logits = self.classify(self.dropout(self.decoder(features)))
        logits = resized(logits, batch.tensors.shape[2:], "trilinear")
        clips = [clip for clip, keys in enumerate(batch.key_slices) for _ in keys]
        return logits[clips, :, [key for keys in batch.key_slices for key in keys]].float()

    def _masks(self, targets: Sequence[Target], batch: ClipBatch) -> Int64[Tensor, "k h w"]:
        """Of the padded batch; the padding is unknown."""
        height, width = batch.tensors.shape[3:]
        masks = batch.tensors.new_full((len(targets), height, width), UNKNOWN, dtype=torch.int64)
        sizes = zip(batch.per_key_slice(batch.given_sizes), batch.per_key_slice(batch.image_sizes), strict=True)
        for index, (target, (given, size)) in enumerate(zip(targets, sizes, strict=True)):
            if "mask" not in target:
                continue
            mask = target["mask"]
            if mask.shape != given:
                raise ValueError(f"target {index} has a mask of {tuple(mask.shape)}, its slice is {given}")
            if bool(((mask > self.head.num_classes) & (mask != UNKNOWN)).any()):
                classes = mask.unique().tolist()
                raise ValueError(
                    f"target {index} has a mask of the classes {classes}; they are 0..{self.head.num_classes}, "
                    f"and {UNKNOWN} where nothing is known"
                )
            scaled = mask[None, None]
            if size != given:
                scaled = F.interpolate(scaled, size=size, mode="nearest-exact")
            masks[index, : size[0], : size[1]] = scaled[0, 0]
        return masks


def resized(x: Float[Tensor, "n c _ _ _"], size: Sequence[int], mode: str) -> Float[Tensor, "n c d h w"]:
    """To ``d, h, w``; as it is where that is its size."""
    if x.shape[2:] == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode=mode, align_corners=False if mode == "trilinear" else None)


def _as_given(
    logits: Float[Tensor, "c _ _"], image_size: tuple[int, int], given: tuple[int, int]
) -> Float[Tensor, "c h w"]:
    """Without padding, at the size of the clip before it was resized."""
    logits = logits[:, : image_size[0], : image_size[1]]
    if image_size == given:
        return logits
    return F.interpolate(logits[None], size=given, mode="bilinear", align_corners=False)[0]
