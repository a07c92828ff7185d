import pytest
import torch
import torch.nn.functional as F

from mp3d.models.group_transform import CentreSlice, DenseTransform, GroupTransform


def features(n=2, c=6, d=9, h=4, w=3):
    return torch.randn(n, c, d, h, w, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_window_of_nine_equals_the_authors_grouped_convolution():
    transform = GroupTransform(6, taps=9).double()
    x = features()
    expected = F.conv2d(x.reshape(2, 6 * 9, 4, 3), transform.weight, groups=6)
    torch.testing.assert_close(transform(x, [(4,), (4,)]), expected)


@pytest.mark.parametrize("taps", [1, 3, 9])
def test_it_is_a_depthwise_convolution(taps):
    """(taps, 1, 1), one group for each channel."""
    transform = GroupTransform(6, taps).double()
    x = features(d=11)
    weight = transform.weight.reshape(6, 1, taps, 1, 1)
    expected = F.conv3d(x, weight, groups=6)
    keys = range(taps // 2, 11 - taps // 2)
    torch.testing.assert_close(transform(x, [keys, keys]), expected.transpose(1, 2).flatten(0, 1))


def test_the_dense_transform_is_a_full_convolution():
    transform = DenseTransform(6, taps=5).double()
    x = features(d=9)
    expected = F.conv3d(x, transform.conv.weight)
    torch.testing.assert_close(transform(x, [range(2, 7)] * 2), expected.transpose(1, 2).flatten(0, 1))
    torch.testing.assert_close(transform(x, [(6,), (2,)]), torch.stack([expected[0, :, 4], expected[1, :, 0]]))


def test_the_centre_is_the_key_slice_as_it_is():
    x = features(d=9)
    transform = CentreSlice(taps=5)
    assert torch.equal(transform(x, [(6,), (2, 4)]), torch.stack([x[0, :, 6], x[1, :, 2], x[1, :, 4]]))
    with pytest.raises(ValueError, match="key slice 1 of clip 0 needs 2 slices on each side"):
        transform(x, [(1,), (2,)])


def test_slides_over_a_slab_like_an_explicit_loop():
    transform = GroupTransform(6, taps=5).double()
    x = features(n=3, d=11)
    keys = [(2, 8), (5,), (4, 3, 6)]
    expected = []
    for clip, clip_keys in zip(x, keys, strict=True):
        for key in clip_keys:
            taps = [transform.weight[:, t, :, :] * clip[:, key - 2 + t] for t in range(5)]
            expected.append(sum(taps))
    torch.testing.assert_close(transform(x, keys), torch.stack(expected))


@pytest.mark.parametrize("key", [1, 3, 5])
def test_one_hot_weights_pick_one_slice(key):
    transform = GroupTransform(6, taps=3).double()
    x = features(d=7)
    for tap in range(3):
        transform.weight.data.zero_()[:, tap] = 1
        picked = transform(x, [(key,), (key,)])
        assert torch.equal(picked, x[:, :, key - 1 + tap])


@pytest.mark.parametrize("depth", [5, 13])
def test_the_product_of_a_gpu_is_the_convolution_of_a_cpu(depth: int):
    torch.manual_seed(0)
    transform = GroupTransform(channels=6, taps=5)
    x = torch.randn(2, 6, depth, 4, 3).to(memory_format=torch.channels_last_3d)
    gradients = []
    for maps in (transform.slide(x), transform.slide_by_products(x)):
        assert maps.is_contiguous(memory_format=torch.channels_last)
        transform.zero_grad()
        maps.square().sum().backward()
        gradients.append(transform.weight.grad)
    torch.testing.assert_close(transform.slide_by_products(x), transform.slide(x))
    torch.testing.assert_close(*gradients)


def test_one_tap_of_one_is_the_key_slice():
    transform = GroupTransform(6, taps=1).double()
    torch.nn.init.ones_(transform.weight)
    x = features()
    assert torch.equal(transform(x, [(0,), (8,)]), torch.stack([x[0, :, 0], x[1, :, 8]]))


def test_gradient_reaches_every_slice_and_weight():
    transform = GroupTransform(6, taps=9).double()
    x = features().requires_grad_()
    transform(x, [(4,), (4,)]).square().sum().backward()
    assert bool((x.grad != 0).all())
    assert bool((transform.weight.grad != 0).all())


@pytest.mark.parametrize(("key", "clip"), [(3, 0), (5, 1), (-1, 0)])
def test_a_key_slice_too_near_the_end_is_refused(key, clip):
    keys = [(4,), (4,)]
    keys[clip] = (key,)
    message = f"key slice {key} of clip {clip} needs 4 slices on each side, and the clip has 9; use key slices 4 to 4"
    with pytest.raises(ValueError, match=message):
        GroupTransform(6, taps=9)(features().float(), keys)


def test_a_clip_shorter_than_the_taps_is_refused():
    with pytest.raises(ValueError, match="needs at least 9 slices, and the clips have 3"):
        GroupTransform(6, taps=9)(features(d=3).float(), [(1,), (1,)])


def test_even_taps_are_refused():
    with pytest.raises(ValueError, match="taps is 4; it must be odd"):
        GroupTransform(6, taps=4)


def test_starts_like_the_authors_conv2d():
    torch.manual_seed(0)
    ours = GroupTransform(64, taps=9).weight
    torch.manual_seed(0)
    theirs = torch.nn.Conv2d(64 * 9, 64, 1, groups=64, bias=False).weight
    assert torch.equal(ours, theirs)
