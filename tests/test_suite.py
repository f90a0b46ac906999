import numpy as np

from vlarl_bench.suite import windows


def test_windows_hold_the_last_action_and_end_with_the_episode():
    chunks, mask = windows(np.arange(6.0).reshape(3, 2), 2)
    assert chunks.tolist() == [[[0, 1], [2, 3]], [[2, 3], [4, 5]], [[4, 5], [4, 5]]]
    assert mask.tolist() == [[1, 1], [1, 1], [1, 0]]
