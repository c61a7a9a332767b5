"""Resized crops by arithmetic on whole numbers, as docs/FORMAT.md has them."""

import numpy as np


def weights_of(length, size):
    """By what each pixel of a row is multiplied, in 2048ths: (size, length) int64."""
    table = np.zeros((size, length), np.int64)
    step = length / size
    reach = max(step, 1.0)
    for place in range(size):
        centre = (place + 0.5) * step
        row = np.array([max(0.0, 1 - abs(pixel + 0.5 - centre) / reach) for pixel in range(length)])
        whole = np.rint(2048 * row / row.sum()).astype(np.int64)
        whole[whole.argmax()] += 2048 - whole.sum()
        table[place] = whole
    return table


def resized_by_whole_numbers(image, box, flip, size):
    top, left, height, width = box
    crop = image[:, top : top + height, left : left + width].astype(np.int64)
    narrow = (np.einsum("ih,chw->ciw", weights_of(height, size[0]), crop) + 1024) // 2048
    view = (np.einsum("jw,ciw->cij", weights_of(width, size[1]), narrow) + 1024) // 2048
    return view[:, :, ::-1] if flip else view
