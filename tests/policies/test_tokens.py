"""Drawing tokens, and how likely they were, by hand."""

import math

import pytest
import torch

from vlarl_bench.errors import BenchError
from vlarl_bench.policies.tokens import choose, draw, likelihood


def test_draws_invert_the_distribution_function():
    logits = torch.tensor([0.5, 0.25, 0.25]).log()
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 0.9999999999], dtype=torch.float64)
    assert draw(logits.expand(6, 3), uniform).tolist() == [0, 0, 1, 1, 2, 2]
    impossible = torch.tensor([-torch.inf, 0, -torch.inf])
    assert draw(impossible.expand(6, 3), uniform).tolist() == [1] * 6


def test_the_likeliest_is_chosen_without_numbers_to_draw_by():
    logits = torch.tensor([[0.1, 0.3, 0.2], [2.0, 1.0, 0.0]])
    assert choose(logits, None, 5.0).tolist() == [1, 0]
    assert choose(logits, torch.tensor([0.99, 0.99]), 1e6).tolist() == [2, 2]  # so hot that all are alike


def test_likelihood_at_a_temperature_by_hand():
    logits = torch.tensor([[[0.0, 2 * math.log(3.0)]]])  # at temperature 2: 1 to 3
    logp, entropy = likelihood(logits, torch.tensor([[1]]), 2.0)
    assert logp.item() == pytest.approx(math.log(0.75))
    assert entropy.item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(BenchError, match="noise: "):
            likelihood(logits, torch.tensor([[1]]), wrong)
