"""Whether a series has the same findings by window, slab and stream.

    python benchmarks/series_findings.py SHARDS RUN [RUN ...] [--split test] [--max-series 20]

For each run (a checkpoint does too) every series of the split is read in the three modes. Two findings agree if they
lie on the same slice, overlap by IoU >= 0.9 and differ in score by less than 0.01; the table has the share of all
findings with a score of at least 0.05 that have a partner in the other mode, which may lie just below 0.05. What the
differences cost in sensitivity says ``jobs/evaluate.py --streamed``.
"""

import argparse
from itertools import combinations

import numpy as np
import torch

from mp3d.checkpoint import open_checkpoint
from mp3d.data.series import Volume
from mp3d.data.shard import SeriesEntry, ShardSet, decode_image, open_shards
from mp3d.metrics.boxes import box_iou
from mp3d.predict import Finding, Predictor, SeriesMode

LEAST_SCORE = 0.05
LEAST_IOU = 0.9
SCORE_DIFFERENCE = 0.01
MODES: tuple[SeriesMode, ...] = ("window", "slab", "stream")


def volume_of(shards: ShardSet, entry: SeriesEntry) -> Volume:
    """The stored series; only its spacing matters here, not where it lies."""
    if entry.spacing_mm is None:
        raise SystemExit(f"{shards.folder} holds pictures; give shards of CT series")
    z, y, x = entry.spacing_mm
    return Volume(np.stack([decode_image(row) for row in shards.iter_rows(entry)]), np.diag([x, y, z, 1.0]))


def count_agreeing(ours: list[Finding], theirs: list[Finding]) -> tuple[int, int]:
    """How many findings of both, from the least score on, have a partner, and how many there are. Each is the partner
    of one; a partner may lie just below the least score.
    """
    left, agreeing = list(theirs), 0
    for finding in ours:
        near = [
            other
            for other in left
            if other.slice_index == finding.slice_index
            and abs(other.score - finding.score) < SCORE_DIFFERENCE
            and max(finding.score, other.score) >= LEAST_SCORE
        ]
        if not near:
            continue
        overlaps = box_iou(np.array([finding.box_px]), np.array([other.box_px for other in near]))
        if overlaps.max() >= LEAST_IOU:
            partner = near[int(overlaps.argmax())]
            left.remove(partner)
            agreeing += (finding.score >= LEAST_SCORE) + (partner.score >= LEAST_SCORE)
    return agreeing, sum(each.score >= LEAST_SCORE for each in [*ours, *theirs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--split", default="test")
    parser.add_argument("--max-series", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shards = open_shards(args.shards)
    entries = shards.split(args.split)[: args.max_series]
    print(f"{len(entries)} series of split {args.split!r}, {sum(entry.num_rows for entry in entries)} slices\n")
    print("| run | trained on | modes | findings | agree |")
    print("| --- | --- | --- | --- | --- |")
    for run in args.runs:
        checkpoint = open_checkpoint(run)
        modes = MODES[:2] if checkpoint.config.model.norm == "gn3d" else MODES
        found: dict[SeriesMode, list[list[Finding]]] = {mode: [] for mode in modes}
        for mode in modes:
            predictor = Predictor.open(checkpoint, mode=mode)
            for entry in entries:
                found[mode].append(predictor.find_lesions(volume_of(shards, entry), LEAST_SCORE - SCORE_DIFFERENCE))
        for one, other in combinations(modes, 2):
            pairs = list(zip(found[one], found[other], strict=True))
            agreeing, count = np.sum([count_agreeing(ours, theirs) for ours, theirs in pairs], axis=0)
            share = f"{agreeing / count:.3f}" if count else "none found"
            trained = "windows" if checkpoint.config.clip.num_key_slices == 1 else "slabs"
            print(f"| {checkpoint.config.name} | {trained} | {one}, {other} | {count} | {share} |", flush=True)


if __name__ == "__main__":
    main()
