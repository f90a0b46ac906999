"""Numbers in short."""

from vlarl_bench.report.spans import spans


def test_spans():
    assert spans([2, 0, 1, 8, 5, 7]) == "0-2, 5, 7-8"
    assert spans([3]) == "3"
    assert spans([]) == ""
