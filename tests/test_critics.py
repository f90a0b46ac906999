import copy

import pytest
import torch

from vlarl_bench.critics import QEnsemble, ValueCritic


def critic(steps=300, window=4, seed=0):
    return ValueCritic(2, 32, 1e-2, steps, 64, window, torch.Generator().manual_seed(seed))


def states(n=256, seed=0):
    """Features, and returns that they tell exactly."""
    features = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    return features, 0.5 + 0.3 * features[:, 0]


def test_it_learns_what_features_tell_and_says_how_well_it_foresaw():
    value = critic()
    assert "explained_variance" not in value.fit(*states())  # nothing could be foreseen yet
    features, returns = states(seed=1)
    assert value.fit(features, returns)["explained_variance"] > 0.95
    assert torch.allclose(value(features), returns, atol=0.1)
    surprise = -(returns - returns.mean()) + returns.mean()
    error = surprise - value(features)
    expected = 1 - float(error.var() / surprise.var())
    assert value.fit(features, surprise)["explained_variance"] == pytest.approx(expected)


def test_returns_that_do_not_vary_leave_nothing_to_explain():
    value = critic(steps=1)
    features, returns = states()
    value.fit(features, returns)
    assert list(value.fit(features, torch.zeros(256))) == ["critic_loss"]


def test_it_forgets_rounds_beyond_its_window():
    value = critic(steps=1, window=2)
    for seed in range(3):
        value.fit(*states(8, seed))
    assert [features.tolist() for features, _ in value.replay] == [states(8, s)[0].tolist() for s in (1, 2)]


def test_it_resumes_bitwise():
    straight = critic(steps=20)
    straight.fit(*states(seed=0))
    resumed = critic(steps=20, seed=9)
    resumed.fit(*states(seed=5))
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    resumed.generator.set_state(straight.generator.get_state())  # the algorithm's, which stores it
    assert straight.fit(*states(seed=1)) == resumed.fit(*states(seed=1))
    assert torch.equal(straight(states()[0]), resumed(states()[0]))


def test_a_normalised_critic_stays_bounded_where_it_has_no_data():
    """Far from all data the other one grows with the distance."""
    far = [10.0**k * torch.ones(1, 4) for k in (1, 3)]
    for norm, grows in ((False, True), (True, False)):
        ensemble = QEnsemble(2, 3, 4, 8, torch.Generator().manual_seed(0), norm)
        ensemble.standardise(torch.randn(9, 3, generator=torch.Generator().manual_seed(1)))
        for member in ensemble.members:
            torch.nn.init.ones_(member[1].weight)
        near, away = (ensemble(torch.zeros(1, 3), chunk).abs().max().item() for chunk in far)
        assert (away > 10 * near) == grows


def test_members_of_an_ensemble_are_not_copies_of_one():
    """All say 0 at first, so that only what they learn could tell; here each head adds up what its layers say."""
    ensemble = QEnsemble(3, 2, 4, 8, torch.Generator().manual_seed(0))
    features, chunks = states(5)[0], torch.ones(5, 4)
    ensemble.standardise(features)
    assert not ensemble(features, chunks).any()
    for member in ensemble.members:
        torch.nn.init.ones_(member[1].weight)
    assert len(ensemble(features, chunks)[:, 0].unique()) == 3
