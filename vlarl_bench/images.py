"""From a rendered frame to the image that a policy is shown, as the protocol says."""

import numpy as np

from .protocol import Protocol


def as_shown(frame: np.ndarray, protocol: Protocol) -> np.ndarray:
    """[image_size, image_size, 3] uint8 from an upright frame [height, width, 3] uint8.

    Mirrored where the protocol says so; scaled by one factor and padded with black to a square, as openpi's
    `resize_with_pad` does.
    """
    if protocol.mirrored:
        frame = frame[:, ::-1]
    size = protocol.image_size
    if frame.shape[:2] == (size, size):
        return np.ascontiguousarray(frame)
    from PIL import Image

    height, width = frame.shape[:2]
    scale = max(height, width) / size
    shape = int(width / scale), int(height / scale)
    methods = {"bilinear": Image.Resampling.BILINEAR, "lanczos": Image.Resampling.LANCZOS}
    small = np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize(shape, methods[protocol.resize]))
    image = np.zeros((size, size, 3), np.uint8)
    top, left = (size - small.shape[0]) // 2, (size - small.shape[1]) // 2
    image[top : top + small.shape[0], left : left + small.shape[1]] = small
    return image
