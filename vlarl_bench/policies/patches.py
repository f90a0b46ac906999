"""The first layer of a vision transformer."""

import torch.nn.functional as F
from torch import Tensor, nn


def embed_patches(conv: nn.Conv2d, images: Tensor) -> Tensor:
    """[B, P, D]: what a convolution whose stride is its kernel makes of [B, C, H, W], row by row of patches.

    Patches that do not overlap are one matrix product, which on a CPU takes less time than a convolution's own kernel.
    What is left over at the lower and right edges of an image is not seen, as by the convolution.
    """
    height, width = conv.kernel_size
    b, channels, *size = images.shape
    rows, columns = size[0] // height, size[1] // width
    images = images[..., : rows * height, : columns * width].to(conv.weight.dtype)
    apart = images.reshape(b, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
    return F.linear(apart.reshape(b, rows * columns, -1), conv.weight.flatten(1), conv.bias)
