"""How frames become what a policy is shown, on cases worked out by hand."""

import dataclasses

import numpy as np
import pytest

from vlarl_bench.images import as_shown
from vlarl_bench.protocol import Protocol

PROTOCOL = Protocol("p", 1, "pixels", {"s": 1}, 0, 1, (0,), (1,), cameras=("c",), image_size=4)


def test_a_frame_of_the_right_size_is_untouched():
    frame = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    np.testing.assert_array_equal(as_shown(frame, PROTOCOL), frame)


def test_mirroring_swaps_left_and_right():
    frame = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    shown = as_shown(frame, dataclasses.replace(PROTOCOL, mirrored=True))
    np.testing.assert_array_equal(shown, frame[:, ::-1])


@pytest.mark.parametrize("resize", ["bilinear", "lanczos"])
def test_a_wide_frame_keeps_its_shape_between_black_bars(resize):
    frame = np.full((6, 8, 3), 200, np.uint8)
    shown = as_shown(frame, dataclasses.replace(PROTOCOL, resize=resize))
    assert shown.shape == (4, 4, 3)
    np.testing.assert_array_equal(shown[:3], 200)  # 3 rows of picture: (4 - 3) // 2 = 0 above, 1 below
    np.testing.assert_array_equal(shown[3], 0)


def test_halving_averages():
    frame = np.zeros((8, 8, 3), np.uint8)
    frame[:, ::2] = 100
    shown = as_shown(frame, PROTOCOL)
    # An antialiased triangle of half-width 2 on columns 0, 100 alternating: 50 in the middle.
    np.testing.assert_allclose(shown[:, 1:3], 50, atol=1)
