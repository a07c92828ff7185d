"""What a model costs, before a run: parameters, floating-point operations, memory of a training step. Nothing is
computed and no weight allocated: the very model goes through its layers with shapes only.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mp3d.config import ClipConfig, ModelConfig
from mp3d.models import ClipClassifier, ClipSegmenter, LesionDetector, build_model
from mp3d.models.backbone import KeySliceFPN, WindowFPN
from mp3d.models.faster_rcnn import ROI_SIZE
from mp3d.models.resnet import FoldedResNet
from mp3d.models.transform import PAD_MULTIPLE, ClipBatch


@dataclass(frozen=True)
class Cost:
    """Of one clip.

    Attributes:
        parameters: of the model; ``trained`` those that are not frozen.
        backbone_flops: two for each multiplication with its addition, of the convolutions of the backbone and of what
            makes its features 2D, as the literature counts them.
        flops: of the whole network in inference, all key slices together; layers without matrices count nothing.
        training_bytes: kept by a forward pass for the backward pass. Workspaces of the kernels come on top.
        shared_bytes: kept once for all clips of a step: weights in half precision, batch statistics.
    """

    parameters: int
    trained: int
    backbone_flops: int
    flops: int
    training_bytes: int
    shared_bytes: int

    def of_step(self, clips: int, adam: bool) -> int:
        """Bytes of a training step: activations, float32 weights, their gradients and the optimiser's state."""
        slots = 2 if adam else 1
        return clips * self.training_bytes + self.shared_bytes + 4 * (self.parameters + (1 + slots) * self.trained)


def estimate(model: ModelConfig, clip: ClipConfig, image_size: int, autocast: torch.dtype | None = None) -> Cost:
    """The cost of clips of squares of ``image_size`` pixels; a clip of a slab has all its key slices.

    Args:
        autocast: what a training step computes in; None is float32.

    Raises:
        ConfigError: a model that cannot read clips of this depth.
    """
    depth, radius = (clip.depth, clip.num_slices // 2) if clip.block is None else (clip.num_slices, 0)
    keys = tuple(range(radius, depth - radius)) if clip.num_key_slices > 1 else (depth // 2,)
    if clip.block is not None:
        keys = tuple(range(depth))
    side = image_size if clip.block is not None else -(-image_size // PAD_MULTIPLE) * PAD_MULTIPLE
    with FakeTensorMode():
        network = build_model(model, clip).eval()
        one, two = (
            ClipBatch(
                torch.empty(clips, 1, depth, side, side), [keys] * clips, [(side, side)] * clips, [(side, side)] * clips
            )
            for clips in (1, 2)
        )
        with torch.no_grad(), FlopCounterMode(display=False) as of_backbone:
            _backbone(network, one)
        with torch.no_grad(), FlopCounterMode(display=False) as of_all:
            _forward(network, one)
        kept_of_one, kept_of_two = (_kept_bytes(network.train(), batch, autocast) for batch in (one, two))
    parameters = list(network.parameters())
    return Cost(
        parameters=sum(each.numel() for each in parameters),
        trained=sum(each.numel() for each in parameters if each.requires_grad),
        backbone_flops=of_backbone.get_total_flops(),
        flops=of_all.get_total_flops(),
        training_bytes=kept_of_two - kept_of_one,
        shared_bytes=2 * kept_of_one - kept_of_two,
    )


def _backbone(network: nn.Module, batch: ClipBatch) -> None:
    """The 3D backbone, and what makes its features 2D."""
    x, keys = batch.tensors, batch.key_slices
    match network:
        case LesionDetector(backbone=WindowFPN() as neck):
            neck.middle_slices(x, keys)
        case LesionDetector(backbone=KeySliceFPN() as neck):
            for transform, features in zip(neck.group_transforms, neck.backbone(x), strict=True):
                transform(features, keys)
        case _:
            assert isinstance(network.backbone, FoldedResNet)
            network.backbone(x)


def _forward(network: nn.Module, batch: ClipBatch) -> None:
    """All layers with weights; of a detector, the box head on as many proposals as it may get."""
    match network:
        case LesionDetector():
            features = network.backbone(batch.tensors, batch.key_slices)
            network.rpn.head(list(features.values()))
            proposals = network.rpn.post_nms_top_n()
            if network.training:
                proposals = network.roi_heads.fg_bg_sampler.batch_size_per_image
            channels = features["0"].shape[1]
            rois = features["0"].new_empty(len(features["0"]) * proposals, channels, ROI_SIZE, ROI_SIZE)
            rois.requires_grad_(network.training)
            network.roi_heads.box_predictor(network.roi_heads.box_head(rois))
        case ClipClassifier():
            network.fc(_pooled(network.backbone(batch.tensors)[-1]))
        case ClipSegmenter():
            logits = network.key_slice_logits(batch)
            torch.log_softmax(logits, 1)


def _pooled(features: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n c"]:
    return features.mean(dim=(2, 3, 4))


def _kept_bytes(network: nn.Module, batch: ClipBatch, autocast: torch.dtype | None) -> int:
    """Memory that autograd keeps, each piece once, the weights aside."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", autocast, enabled=autocast is not None):
        _forward(network, batch)
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
