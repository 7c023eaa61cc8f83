"""The figure of times shows the ratios that the times have."""

import numpy as np
import pytest

from rnnjax.cost_plots import times_beside
from tests.figure_checks import outside, overlaps

TIMES = {
    ("gru", "9, 1, 4, 2"): {"ours": 2.0, "a": 3.0, "b": 1.0},
    ("gru", "5, 1, 4, 2"): {"ours": 4.0, "a": 4.0, "b": 40.0},
}
TIMES |= {("lstm", size): {"ours": 1.0, "a": 2.5} for size in ("9, 1, 4, 2", "5, 1, 4, 2")}


def rows():
    return [
        {"cell": cell, "size": size, "what": name, "median_ms": value}
        for (cell, size), own in TIMES.items()
        for name, value in own.items()
    ]


def test_points_are_ratios():
    figure = times_beside(rows(), "ours")
    figure.draw_without_rendering()
    gru, lstm = figure.axes
    points = {c.get_label(): np.ma.filled(c.get_offsets()[:, 0], np.nan) for c in gru.collections}
    np.testing.assert_allclose(points["a"], [1.5, 1.0])
    np.testing.assert_allclose(points["b"], [0.5, 10.0])
    by_name = {c.get_label(): np.ma.filled(c.get_offsets()[:, 0], np.nan) for c in lstm.collections}
    np.testing.assert_allclose(by_name["a"], 2.5)
    assert np.isnan(by_name["b"]).all()
    assert [text.get_text() for text in gru.get_yticklabels()] == ["9, 1, 4, 2", "5, 1, 4, 2"]
    assert not overlaps(figure) and not outside(figure)


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ([], "at least one time"),
        ([{"cell": "gru"}], "missing: size, what, median_ms"),
        ([{"cell": "gru", "size": "1", "what": "ours", "median_ms": 0.0}], "must be positive"),
        ([{"cell": "gru", "size": "1", "what": "a", "median_ms": 1.0}], "unit must be among"),
    ],
)
def test_what_cannot_be_drawn_is_refused(measured, message):
    with pytest.raises(ValueError, match=message):
        times_beside(measured, "ours")
