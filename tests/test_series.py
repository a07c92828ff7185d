"""Boxes of slices back to boxes of volumes."""

import numpy as np

from mp3d.data.series import Truth, boxes_3d


def truth(*boxes: tuple[float, float, float, float], instances: list[int], labels: list[int] | None = None) -> Truth:
    return Truth(np.array(boxes, np.float32).reshape(-1, 4), labels and np.array(labels), instances=np.array(instances))


def test_slices_of_an_instance_make_its_box():
    truths = [
        Truth(),
        truth((4, 4, 8, 9), (20, 1, 21, 2), instances=[3, 1], labels=[2, 1]),
        truth((3, 5, 7, 10), (6, 6, 9, 7), instances=[3, 3], labels=[2, 2]),  # two pieces of one object
        truth(instances=[]),
    ]
    boxes, labels, instances = boxes_3d(truths)
    assert boxes.tolist() == [[20, 1, 1, 21, 2, 2], [3, 4, 1, 9, 10, 3]]
    assert (labels.tolist(), instances.tolist()) == ([1, 2], [1, 3])


def test_boxes_of_no_known_instance_are_left_out():
    boxes, labels, instances = boxes_3d([Truth(np.array([[0, 0, 1, 1]], np.float32)), Truth()])
    assert (boxes.shape, labels.shape, instances.shape) == ((0, 6), (0,), (0,))


def test_without_labels_they_are_0():
    assert boxes_3d([truth((0, 0, 2, 2), instances=[5])])[1].tolist() == [0]
