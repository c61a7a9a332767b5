"""Resized crops and changed colours, against arithmetic on whole numbers and torchvision's functions."""

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from pipeline.images.views import apply_views, draw_views
from tests.support.helpers import view_parameters
from tests.support.resizing import resized_by_whole_numbers, weights_of

CPU = torch.device("cpu")


def photographs(count, channels, height, width, seed=0):
    """Smooth images with some noise, so that resizing has both to keep."""
    generator = np.random.default_rng(seed)
    coarse = torch.from_numpy(generator.uniform(0, 255, (count, channels, 5, 6)))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (smooth + torch.from_numpy(generator.normal(0, 8, smooth.shape))).clamp(0, 255).byte()


def drawn(rows, image, size, view=0, start=0, **rule):
    return draw_views(3, view, start, rows, view_parameters(padding=0, **rule), image, size)


@pytest.mark.parametrize(("image", "size"), [((40, 33), (24, 24)), ((20, 20), (32, 28)), ((9, 50), (16, 8))])
@pytest.mark.parametrize("channels", [1, 3])
def test_resized_crops_are_sums_of_whole_numbers(image, size, channels):
    images = photographs(20, channels, *image)
    parameters = drawn(20, image, size, flip=True, scale=(0.05, 1.0))
    views = apply_views(images, *parameters.on(CPU), 0, size)
    assert views.dtype == torch.uint8
    assert views.shape == (20, channels, *size)
    for row in range(20):
        by_hand = resized_by_whole_numbers(images[row].numpy(), parameters.crop[row], parameters.flip[row], size)
        np.testing.assert_array_equal(views[row].numpy(), by_hand)


@pytest.mark.parametrize(("image", "size"), [((72, 64), (48, 48)), ((32, 32), (40, 56))])
def test_resized_crops_are_those_of_torchvision_within_rounding(image, size):
    images = photographs(30, 3, *image)
    parameters = drawn(30, image, size, flip=True, scale=(0.08, 1.0))
    views = apply_views(images, *parameters.on(CPU), 0, size)
    for row in range(30):
        box = [int(side) for side in parameters.crop[row]]
        theirs = transforms.resized_crop(images[row].float(), *box, size, InterpolationMode.BILINEAR, antialias=True)
        theirs = theirs.flip(-1) if parameters.flip[row] else theirs
        assert (views[row].float() - theirs).abs().max() <= 1.1  # half a level for each of two roundings


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_are_those_of_torchvision_within_rounding(channels):
    images = photographs(30, channels, 16, 16)
    parameters = drawn(30, (16, 16), (16, 16), flip=False, jitter=(0.4, 0.5, 0.6))
    views = apply_views(images, *parameters.on(CPU), 0, (16, 16))
    changed = 0
    for row in range(30):
        brightness, contrast, saturation = (float(factor) / 128 for factor in parameters.colour[row])
        theirs = transforms.adjust_brightness(images[row].double() / 255, brightness)
        theirs = transforms.adjust_contrast(theirs, contrast)
        theirs = transforms.adjust_saturation(theirs, saturation) * 255
        assert (views[row] - theirs).abs().max() <= 3  # three roundings, each perhaps enlarged by the next factor
        assert (views[row] - theirs).abs().mean() <= 0.6
        changed += bool((views[row] != images[row]).any())
    assert changed == 30


def test_colours_of_a_pixel_by_hand():
    image = torch.tensor([[[[200, 100]], [[100, 100]], [[0, 100]]]], dtype=torch.uint8)
    whole, same = torch.tensor([[0, 0, 1, 2]]), torch.tensor([[128, 128, 128]])
    no_flip = torch.zeros(1)
    assert torch.equal(apply_views(image, whole, no_flip, same, 0, (1, 2)), image)
    halved = apply_views(image, whole, no_flip, torch.tensor([[64, 128, 128]]), 0, (1, 2))
    assert halved[0, :, 0].flatten().tolist() == [100, 50, 50, 50, 0, 50]
    twice = apply_views(image, whole, no_flip, torch.tensor([[256, 128, 128]]), 0, (1, 2))
    assert twice[0, :, 0].flatten().tolist() == [255, 200, 200, 200, 0, 200]
    # Gray of the pixels is 118.4998 and 100 (0.299, 0.587, 0.114, in 16,384ths): 118 and 100, their mean 109.
    flat = apply_views(image, whole, no_flip, torch.tensor([[128, 0, 128]]), 0, (1, 2))
    assert set(flat.flatten().tolist()) == {109}
    gray = apply_views(image, whole, no_flip, torch.tensor([[128, 128, 0]]), 0, (1, 2))
    assert gray[0, :, 0].tolist() == [[118, 100]] * 3


def test_crops_have_the_area_and_shape_that_were_asked_for():
    crop, flip, colour = drawn(4000, (60, 80), (24, 24), flip=True, scale=(0.1, 0.6), ratio=(0.5, 2.0))
    top, left, height, width = crop.astype(np.float64).T
    assert crop.shape == (4000, 4)
    assert crop.dtype == np.int16
    assert colour.shape == (4000, 0)
    assert abs(flip.mean() - 0.5) < 5 * 0.5 / np.sqrt(4000)
    assert (np.minimum(top, left) >= 0).all()
    assert (top + height <= 60).all()
    assert (left + width <= 80).all()
    share, shape = height * width / 4800, width / height
    assert share.min() > 0.09
    assert share.max() < 0.62
    assert (shape > 0.48).all()
    assert (shape < 2.1).all()
    # Small crops always fit, so their area is uniform: of those below 0.3, half are below 0.2.
    below = (share < 0.2).sum() / (share < 0.3).sum()
    assert abs(below - 0.5) < 5 * 0.5 / np.sqrt((share < 0.3).sum())
    assert abs(np.log(shape[share < 0.3]).mean()) < 5 * np.log(2) / np.sqrt(3 * (share < 0.3).sum())
    # Each place in the image is as likely: the middle of the rooms left and above is half of them.
    assert abs((top / np.maximum(1, 60 - height))[height < 50].mean() - 0.5) < 0.03


@pytest.mark.parametrize(("image", "box"), [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10))])
def test_where_no_crop_fits_the_middle_is_taken(image, box):
    crop = drawn(50, image, (8, 8), flip=False, scale=(0.9, 1.0), ratio=(0.75, 1.3333)).crop
    assert (crop == box).all()


def test_crops_of_one_size_from_larger_images_are_cut_and_not_resized():
    images = photographs(40, 3, 20, 30)
    parameters = draw_views(1, 0, 0, 40, view_parameters(padding=2, flip=True), (20, 30), (16, 24))
    views = apply_views(images, *parameters.on(CPU), 2, (16, 24))
    assert (parameters.crop[:, 2:] == (16, 24)).all()
    assert parameters.crop[:, 0].max() == 8
    assert parameters.crop[:, 1].max() == 10
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    for row, (top, left, height, width) in enumerate(parameters.crop):
        cut = padded[row, :, top : top + height, left : left + width]
        cut = cut[:, :, ::-1] if parameters.flip[row] else cut
        np.testing.assert_array_equal(views[row].numpy(), cut)


def test_rows_have_their_own_numbers_whatever_is_drawn_beside_them():
    rule = {"flip": True, "scale": (0.2, 1.0), "jitter": (0.4, 0.4, 0.4)}
    whole = drawn(50, (32, 32), (24, 24), view=3, **rule)
    part = drawn(16, (32, 32), (24, 24), view=3, start=16, **rule)
    for all_rows, some in zip(whole, part, strict=True):
        np.testing.assert_array_equal(some, all_rows[16:32])
    images = photographs(50, 3, 32, 32)
    together = apply_views(images, *whole.on(CPU), 0, (24, 24))
    alone = torch.cat(
        [
            apply_views(images[row : row + 1], *(each[row : row + 1] for each in whole.on(CPU)), 0, (24, 24))
            for row in range(50)
        ]
    )
    assert torch.equal(together, alone)


def test_bits_do_not_depend_on_the_precision_of_products():
    """TF32 has 11 significant bits, as weights have at most; here rounded by hand."""
    images = photographs(8, 3, 64, 64)
    parameters = drawn(8, (64, 64), (48, 48), flip=True, scale=(0.1, 1.0))
    single = apply_views(images, *parameters.on(CPU), 0, (48, 48))
    double = apply_views(images.double(), *parameters.on(CPU), 0, (48, 48))
    assert torch.equal(single, double.byte())
    for length in range(1, 65):
        weights = weights_of(length, 48)
        mantissa, _ = np.frexp(weights.astype(np.float64))
        assert (mantissa * 2**11 == np.rint(mantissa * 2**11)).all()
        assert (weights >= 0).all()
        assert (weights.sum(1) == 2048).all()
