import torch
from torch import nn

from vlarl_bench.policies.patches import embed_patches


def test_it_is_the_convolution_and_so_are_its_gradients():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, (2, 4), stride=(2, 4), dtype=torch.float64)
    images = torch.rand(2, 3, 9, 14, dtype=torch.float64, requires_grad=True)  # one row and two columns are left over
    theirs = conv(images).flatten(2).transpose(1, 2)
    ours = embed_patches(conv, images)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weights, learnt = torch.rand_like(ours), (images, *conv.parameters())
    for mine, its in zip(*(torch.autograd.grad((out * weights).sum(), learnt) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)
