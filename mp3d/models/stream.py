"""A whole series through a network, chunk by chunk, each slice once; the same numbers as in one pass over the stack.

It is the very network, with its weights; only the answers to what it asks about z (:class:`mp3d.models.folded.AlongZ`)
are others. A convolution over three slices finds the last two of the chunk before, and answers one slice late; where
branches meet, the one that went ahead waits; the group transforms slide. Padding is added at the ends of the series
only. Memory is that of a chunk, however long the series.

Group norm over the clip (``gn3d``) mixes all slices and cannot be streamed.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import TypeVar, cast

import torch
from jaxtyping import Float, Int16
from torch import Tensor

from mp3d.config import ModelConfig
from mp3d.errors import ConfigError
from mp3d.models.backbone import KeySliceFPN
from mp3d.models.detector import LesionDetector
from mp3d.models.folded import ZPadding, fold, unfold
from mp3d.models.resnet import FoldedResNet
from mp3d.sample import Clip, Prediction

Item = TypeVar("Item")

ONE_SLICE_OF_A_WINDOW = (
    "a backbone that does not keep z (a P3D, a 2D one, isotropic strides) answers for the middle slice of a window, so "
    "that a series cannot be streamed: infer in mode window, or train a backbone that keeps z"
)
MIXES_SLICES = (
    "model.norm is gn3d, which takes its statistics over all slices of a clip, so that a series cannot be streamed: "
    "infer in mode window or slab, or train with slice_gn"
)


def check_streamable(model: ModelConfig) -> None:
    """Raises: ConfigError where a network cannot be streamed, for its norm or its backbone."""
    if not model.keeps_z:
        raise ConfigError(ONE_SLICE_OF_A_WINDOW)
    if model.norm == "gn3d":
        raise ConfigError(MIXES_SLICES)


class SeriesStream:
    """What a network keeps of a series between two chunks; for inference only.

    A network asks in the same order in every pass, so a place in it is known by its number.
    """

    def __init__(self, padding: ZPadding = "zeros") -> None:
        self.padding = padding
        self._held: list[Tensor] = []
        self._place = 0
        self._is_first, self._is_last = True, False

    def next_pass(self, is_first: bool, is_last: bool) -> None:
        """Call before each chunk goes through the network."""
        self._place, self._is_first, self._is_last = 0, is_first, is_last

    def depth(self, x: Float[Tensor, "d c h w"]) -> int:
        """Raises: ConfigError, as only ``gn3d`` asks."""
        raise ConfigError(MIXES_SLICES)

    def with_neighbours(
        self, x: Float[Tensor, "d c h w"], reach: int, always_zeros: bool = False
    ) -> tuple[Float[Tensor, "_ c h w"], int, int]:
        """The chunk behind what the last one left; as no clip at all while that is too little for one output."""
        before = x[:0] if self._is_first else self._held[self._place]
        if len(before) == 0 and len(x) > 0:  # the series begins: deep in a network that may not be in the first chunk
            before = self._beyond(x[:1], reach, always_zeros)
        x = _joined([before, x])
        if self._is_last:
            x = _joined([x, self._beyond(x[-1:], reach, always_zeros)])
        self._keep(x[-2 * reach :].clone())
        if len(x) <= 2 * reach:
            return x[:0], 2 * reach + 1, 0
        return x, len(x), 0

    def add(self, ahead: Float[Tensor, "a c h w"], behind: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Slice to slice; what has no partner yet waits. Works in ``behind``."""
        held = ahead[:0] if self._is_first else self._held[self._place]
        old = min(len(held), len(behind))
        new = len(behind) - old
        behind[:old] += held[:old]
        behind[old:] += ahead[:new]
        self._keep(_joined([held[old:], ahead[new:]]).clone())
        return behind

    def _beyond(self, end: Float[Tensor, "1 c h w"], reach: int, always_zeros: bool) -> Float[Tensor, "r c h w"]:
        """``reach`` slices of padding behind an end of the series."""
        padding = torch.cat([end] * reach)
        return padding if self.padding == "replicate" and not always_zeros else torch.zeros_like(padding)

    def _keep(self, x: Tensor) -> None:
        """For the next pass at this place."""
        self._held[self._place : self._place + 1] = [x]
        self._place += 1


def _joined(parts: list[Float[Tensor, "_ c h w"]]) -> Float[Tensor, "_ c h w"]:
    """One after the other. The empty ones are left out: beside them PyTorch gives up channels-last memory, and every
    kernel behind it is slower.
    """
    filled = [part for part in parts if len(part)] or parts[:1]
    return torch.cat(filled) if len(filled) > 1 else filled[0]


def stream_backbone(
    backbone: FoldedResNet, chunks: Iterable[Float[Tensor, "1 1 d h w"]]
) -> Iterator[list[Float[Tensor, "_ _ _ _"]]]:
    """For each chunk of a series, in order, the slices that are now complete at the end of stages 1 to 4, folded.

    Together they equal ``backbone(the whole series)``.

    Raises:
        ConfigError: the norm is ``gn3d``, or the backbone does not keep z.
    """
    if not backbone.keeps_z:
        raise ConfigError(ONE_SLICE_OF_A_WINDOW)
    z = SeriesStream(backbone.z_padding)
    for x, is_first, is_last in _with_ends(chunks):
        z.next_pass(is_first, is_last)
        yield backbone.run(fold(x), z)


def stream_pyramids(
    neck: KeySliceFPN, chunks: Iterable[Float[Tensor, "1 1 d h w"]], at_once: int
) -> Iterator[OrderedDict[str, Float[Tensor, "k c _ _"]]]:
    """Maps of the next key slices, at most ``at_once`` of them, as soon as they can be made.

    The key slices are all but the first and last ``taps // 2``. A stage is the later the deeper it lies, so the slices
    of the earlier ones wait.
    """
    radius = neck.taps // 2
    waiting: list[deque[Tensor]] = [deque() for _ in neck.group_transforms]
    for stages in stream_backbone(neck.backbone, chunks):
        for slices, features in zip(waiting, stages, strict=True):
            slices.extend(features[index : index + 1] for index in range(len(features)))
        while (ready := min(at_once, min(map(len, waiting)) - 2 * radius)) > 0:
            maps = OrderedDict()
            for level, (transform, slices) in enumerate(zip(neck.group_transforms, waiting, strict=True)):
                stack = torch.cat([slices[index] for index in range(ready + 2 * radius)])
                maps[str(level)] = transform(unfold(stack, len(stack)), [range(radius, radius + ready)])
                for _ in range(ready):
                    slices.popleft()
            yield neck.fpn(maps)


def stream_predictions(
    detector: LesionDetector, chunks: Iterable[Int16[Tensor, "d h w"]], at_once: int
) -> Iterator[list[Prediction]]:
    """Predictions for the next key slices, at most ``at_once`` of them, as soon as they can be made.

    Together they equal ``detector([Clip(the whole series, all its slices but the first and last taps // 2)])``.

    Args:
        chunks: of one series, in order, in Hounsfield units; at least one.

    Raises:
        ConfigError: the network cannot be streamed.
    """
    if not isinstance(detector.backbone, KeySliceFPN):
        raise ConfigError(ONE_SLICE_OF_A_WINDOW)
    batches = (detector.transform([Clip(slices, ())])[0] for slices in chunks)
    first = next(batches)
    tensors = (batch.tensors for batch in chain([first], batches))
    for maps in stream_pyramids(detector.backbone, tensors, at_once):
        batch = replace(first, key_slices=[tuple(range(len(maps["0"])))])
        yield cast(list[Prediction], detector.detect(maps, batch))


def _with_ends(items: Iterable[Item]) -> Iterator[tuple[Item, bool, bool]]:
    """Each with whether it is the first and whether it is the last."""
    items = iter(items)
    coming = next(items, None)
    is_first = True
    while coming is not None:
        item, coming = coming, next(items, None)
        yield item, is_first, coming is None
        is_first = False
