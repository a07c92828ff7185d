"""Top-k accuracy of a classifier."""

import numpy as np
from jaxtyping import Float, Int

from mp3d.errors import DataError


def top_k_accuracy(logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"], k: int = 1) -> float:
    """Share of samples whose true class is among the ``k`` highest logits.

    Ties count against the model, and so does NaN: a constant or diverged output scores 0, not the share of class 0.

    Raises:
        DataError: no sample, or a label outside ``0..classes-1``.
    """
    num_samples, num_classes = logits.shape
    if num_samples == 0:
        raise DataError("accuracy is undefined: there is no sample; the split is empty")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(
            f"labels {labels.min()}..{labels.max()} do not fit {num_classes} classes, which count from 0; "
            "is num_classes of the head right?"
        )
    own = logits[np.arange(num_samples), labels]
    rank = np.sum(~(logits < own[:, None]), axis=1)  # itself and every class that is not lower
    return float(np.mean(rank <= k))
