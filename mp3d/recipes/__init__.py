"""Named, complete configurations. A recipe is a function; a variant is a recipe with fields changed on the command
line; ``NAME_smoke`` is the recipe NAME at smoke size.

Recipes named ``..._paper`` keep the published choices: windows of nine slices, 3D group norm, zeros beyond the ends of
a clip, the authors' anchors and schedule. The other detectors train on slabs with group norm per slice and replicated
ends, so that a series can be inferred at once.

A docstring has the command and the data that it needs; the cost, which is that of all layers with weights, forward and
backward, worked out from their shapes with one key slice a clip, with the hours of an H200 that reaches 40 % of the 790
TFLOP/s taken as its peak in bf16 (an assumption, not a measurement), or, of a small recipe, its time; the score to
expect, *published* by the authors (paper, abstract, name of a released checkpoint), from the *authors' log*, or
*unverified*, as remembered from tables that were not at hand; and the score that was measured with this code.
"""

from collections.abc import Callable

from mp3d.config import TrainConfig
from mp3d.recipes.lesions import (
    deeplesion_acs18,
    deeplesion_i3d18,
    deeplesion_mp3d18ba,
    deeplesion_mp3d63,
    deeplesion_mp3d63_paper,
    deeplesion_p3d18ba_paper,
    deeplesion_p3d63_paper,
    deeplesion_r3d18,
    deeplesion_r3d50,
    deeplesion_resnet2d50,
)
from mp3d.recipes.pictures import (
    vdt_coco_masks_r3d18,
    vdt_coco_mp3d18ba,
    vdt_coco_mp3d63,
    vdt_coco_r3d18,
    vdt_coco_r3d50,
    vdt_imagenet_mp3d63,
    vdt_imagenet_r3d18,
    vdt_imagenet_r3d18_paper,
    vdt_imagenet_r3d50_paper,
    vdt_imagenet_v1c_paper,
)
from mp3d.recipes.small import (
    SYNTHETIC_WORLD,
    small_classification,
    small_finetune,
    small_pretrain,
    small_pretrain_boxes,
    small_pretrain_masks,
    small_segmentation,
    synthetic_finetune,
    synthetic_pretrain,
    synthetic_segmentation,
)
from mp3d.recipes.volumes import (
    lidc_classification,
    lidc_classification_paper,
    lidc_segmentation,
    lidc_segmentation_paper,
    lits_liver,
    lits_liver_paper,
)

__all__ = ["FINETUNE", "PRETRAIN", "SYNTHETIC_WORLD", "Recipe"]

Recipe = Callable[[], TrainConfig]
PRETRAIN: tuple[Recipe, ...] = (
    synthetic_pretrain,
    small_pretrain,
    small_pretrain_boxes,
    small_pretrain_masks,
    vdt_imagenet_r3d18_paper,
    vdt_imagenet_r3d50_paper,
    vdt_imagenet_v1c_paper,
    vdt_imagenet_r3d18,
    vdt_imagenet_mp3d63,
    vdt_coco_r3d18,
    vdt_coco_r3d50,
    vdt_coco_mp3d18ba,
    vdt_coco_mp3d63,
    vdt_coco_masks_r3d18,
)
FINETUNE: tuple[Recipe, ...] = (
    synthetic_finetune,
    synthetic_segmentation,
    small_finetune,
    small_classification,
    small_segmentation,
    deeplesion_mp3d63_paper,
    deeplesion_mp3d63,
    deeplesion_mp3d18ba,
    deeplesion_p3d63_paper,
    deeplesion_p3d18ba_paper,
    deeplesion_r3d18,
    deeplesion_r3d50,
    deeplesion_i3d18,
    deeplesion_acs18,
    deeplesion_resnet2d50,
    lidc_classification_paper,
    lidc_classification,
    lidc_segmentation_paper,
    lidc_segmentation,
    lits_liver_paper,
    lits_liver,
)
