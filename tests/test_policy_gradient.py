import numpy as np
import pytest
import torch

from vlarl_bench.policy_gradient import clipped_surrogate, gae


def brute_force(rewards, values, next_values, terminated, ended, gamma, lam):
    """The definition: a sum of discounted temporal differences up to the end of the episode."""
    n = len(rewards)
    out = np.zeros(n)
    for i in range(n):
        for j in range(i, n):
            bootstrap = 0.0 if terminated[j] else next_values[j]
            out[i] += (gamma * lam) ** (j - i) * (rewards[j] + gamma * bootstrap - values[j])
            if ended[j]:
                break
    return out


@pytest.mark.parametrize("seed", range(20))
def test_gae_equals_the_sum_that_defines_it(seed):
    rng = np.random.default_rng(seed)
    n = 30
    ended = rng.random(n) < 0.2
    terminated = ended & (rng.random(n) < 0.5)  # the other ends are cut off by a time limit
    ended[-1] = True
    args = (rng.normal(size=n), rng.normal(size=n), rng.normal(size=n), terminated, ended, 0.97, 0.9)
    np.testing.assert_allclose(gae(*args), brute_force(*args), atol=1e-12)


def test_gae_by_hand():
    """Two episodes: one succeeds at its second decision, one is cut off and bootstraps from what it saw last."""
    got = gae(
        rewards=np.array([0.0, 1.0, 0.0]),
        values=np.array([0.5, 0.6, 0.2]),
        next_values=np.array([0.6, 9.0, 0.4]),
        terminated=np.array([False, True, False]),
        ended=np.array([False, True, True]),
        gamma=0.5,
        lam=0.5,
    )
    second = 1 - 0.6
    assert got.tolist() == pytest.approx([0.5 * 0.6 - 0.5 + 0.25 * second, second, 0.5 * 0.4 - 0.2])


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective"),
    [(1.0, 2.0, 2.0), (1.5, 2.0, 2.4), (0.5, 2.0, 1.0), (1.5, -2.0, -3.0), (0.5, -2.0, -1.6)],
)
def test_clipped_surrogate_by_hand(ratio, advantage, objective):
    got = clipped_surrogate(torch.tensor(ratio), torch.tensor(advantage), 0.2)
    assert float(got) == pytest.approx(objective, rel=1e-6)
