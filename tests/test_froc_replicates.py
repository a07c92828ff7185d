"""Intervals by patient against a plain loop, the paired test between two models, strata."""

import numpy as np
import pytest

from mp3d.errors import DataError
from mp3d.metrics.average_precision import average_precision, average_precision_replicates
from mp3d.metrics.bootstrap import interval, patient_weights, weighted_mean
from mp3d.metrics.froc import froc, match
from mp3d.metrics.froc_replicates import (
    events_of,
    froc_intervals,
    mean_over,
    paired_test,
    sensitivities,
    stratum_sensitivities,
)
from mp3d.metrics.protocols import MP3D_PORT, PROTOCOLS


def made_model(quality: float, num_images: int = 60, seed: int = 1):
    """Images of 20 patients with one or two lesions each; a lesion is found with the chance ``quality``."""
    rng, noise = np.random.default_rng(seed), np.random.default_rng([seed, int(1000 * quality)])
    detections, truths, patients = [], [], []
    for index in range(num_images):
        corners = rng.uniform(0, 400, (1 + index % 2, 2))
        true = np.c_[corners, corners + 30]
        found = true[noise.random(len(true)) < quality] + noise.uniform(-2, 2)
        false = noise.uniform(0, 400, (4, 2))
        boxes = np.r_[found, np.c_[false, false + 20]]
        detections.append((boxes, np.r_[noise.uniform(0.3, 1, len(found)), noise.uniform(0, 0.7, 4)]))
        truths.append(true)
        patients.append(f"patient {index // 3}")
    return detections, truths, patients


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.name)
def test_a_replicate_is_the_froc_of_the_images_drawn(protocol):
    detections, truths, patients = made_model(0.7)
    weights = patient_weights(patients, 20, seed=3)
    sampled = sensitivities(events_of(match(detections, truths, protocol)), weights, protocol)
    for row, of_image in zip(sampled, weights, strict=True):
        drawn = np.repeat(np.arange(len(truths)), of_image)
        result = froc([detections[i] for i in drawn], [truths[i] for i in drawn], protocol)
        assert row == pytest.approx(list(result.sensitivity_at.values()), abs=1e-12)


def test_average_precision_of_a_replicate_is_that_of_the_images_drawn():
    detections, truths, patients = made_model(0.7)
    weights = patient_weights(patients, 10, seed=4)
    for value, of_image in zip(average_precision_replicates(detections, truths, weights), weights, strict=True):
        drawn = np.repeat(np.arange(len(truths)), of_image)
        expected = average_precision([detections[i] for i in drawn], [truths[i] for i in drawn])
        assert value == pytest.approx(expected, abs=1e-9)


def test_patients_are_drawn_whole_and_the_seed_decides():
    weights = patient_weights(["b", "a", "b", "c"], 500, seed=5)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    assert ((weights[:, 0] + weights[:, 1] + weights[:, 3]) == 3).all()
    np.testing.assert_array_equal(weights, patient_weights(["b", "a", "b", "c"], 500, seed=5))
    np.testing.assert_array_equal(weights[:, [1, 0]], patient_weights(["a", "b", "c"], 500, seed=5)[:, :2])
    assert (weights != patient_weights(["b", "a", "b", "c"], 500, seed=6)).any()
    assert weights[:, 1].mean() == pytest.approx(1, abs=0.15)


def test_intervals_hold_the_value_and_narrow_with_more_patients():
    few, many = (made_model(0.7, number) for number in (60, 600))
    widths = []
    for detections, truths, patients in (few, many):
        matching = match(detections, truths, MP3D_PORT)
        low, high = froc_intervals(matching, patients, MP3D_PORT, num_replicates=300).mean_sensitivity
        assert low < froc(detections, truths).mean_sensitivity < high
        widths.append(high - low)
    assert widths[1] < 0.6 * widths[0]


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(10, 2, 400)
    weights = patient_weights([str(i) for i in range(400)], 2000, seed=1)
    low, high = interval(weighted_mean(values, weights))
    half = 1.96 * values.std() / 20
    assert (low, high) == (pytest.approx(values.mean() - half, abs=0.02), pytest.approx(values.mean() + half, abs=0.02))


def test_what_few_replicates_define_has_no_interval():
    assert np.isnan(interval(np.array([1.0, np.nan, np.nan, np.nan]))).all()
    assert weighted_mean(np.array([np.nan, 2.0]), np.array([[1, 0], [0, 3]]))[1] == 2


def test_the_paired_test_tells_two_models_apart_and_two_equal_ones_not():
    worse, truths, patients = made_model(0.45)
    better, _, _ = made_model(0.9)
    first, second = (match(detections, truths, MP3D_PORT) for detections in (worse, better))
    apart = paired_test(first, second, patients, MP3D_PORT, 400)
    assert apart.difference > 0.2
    assert apart.interval.low > 0
    assert apart.p_value < 0.01
    equal = paired_test(first, first, patients, MP3D_PORT, 400)
    assert (equal.difference, equal.p_value) == (0, 1)
    assert tuple(equal.interval) == (0, 0)


def test_the_paired_test_does_not_mind_how_scores_are_scaled():
    detections, truths, patients = made_model(0.6)
    scaled = [(boxes, scores**3 / 10) for boxes, scores in detections]
    same = paired_test(*(match(each, truths, MP3D_PORT) for each in (detections, scaled)), patients, MP3D_PORT, 200)
    assert same.difference == pytest.approx(0)
    assert same.p_value == 1


def test_two_models_of_one_quality_are_rarely_told_apart():
    """Of two models that differ by chance only, the test says p < 0.05 in about one of twenty cases."""
    small = 0
    for seed in range(40):
        detections, truths, patients = made_model(0.7, 30, seed)
        rng = np.random.default_rng([seed, 9])
        swapped = [(boxes, rng.permutation(scores)) for boxes, scores in detections]
        again = [(boxes, rng.permutation(scores)) for boxes, scores in detections]
        test = paired_test(*(match(each, truths, MP3D_PORT) for each in (swapped, again)), patients, MP3D_PORT, 100)
        small += test.p_value < 0.05
    assert small <= 6


def test_models_of_other_images_are_not_compared():
    detections, truths, patients = made_model(0.6)
    other = match(detections[:-1], truths[:-1], MP3D_PORT)
    with pytest.raises(DataError, match="the same images"):
        paired_test(match(detections, truths, MP3D_PORT), other, patients, MP3D_PORT, 100)


def test_strata_share_the_false_positives_of_all_images():
    detections, truths, _ = made_model(0.7)
    matching = match(detections, truths, MP3D_PORT)
    first = np.arange(matching.num_lesions) < 20
    parts = [stratum_sensitivities(matching, lesions, MP3D_PORT) for lesions in (first, ~first)]
    whole = froc(detections, truths).sensitivity_at
    for fps, value in whole.items():
        mixed = (first.sum() * parts[0][fps] + (~first).sum() * parts[1][fps]) / len(first)
        assert mixed == pytest.approx(value)
    everything = sensitivities(events_of(matching), np.ones((1, 60), np.int32), MP3D_PORT)
    assert mean_over(everything, MP3D_PORT)[0] == pytest.approx(froc(detections, truths).mean_sensitivity)
