"""What tests of figures share: the lines that were drawn, and whether everything is visible and apart."""

import itertools


def curves(axes):
    """Lines with a style, in the order of the runs: without horizontal and vertical lines, and without markers."""
    return [line for line in axes.get_lines() if line.get_linestyle() != "None" and len(line.get_xdata()) != 2]


def markers(axes):
    return [line for line in axes.get_lines() if line.get_linestyle() == "None"]


def overlaps(figure):
    """Pairs of axes, legends and note that overlap, and of tick labels of the same axes."""
    pairs = _overlaps(_boxes(figure))
    for axes in figure.axes:
        ticks = [*axes.xaxis._update_ticks(), *axes.yaxis._update_ticks()]
        texts = [text for tick in ticks for text in (tick.label1, tick.label2)]
        shown = [text for text in texts if text.get_visible() and text.get_text()]
        pairs += _overlaps({text: text.get_window_extent() for text in shown})
    return pairs


def outside(figure):
    """Names of axes, legends and note that are not wholly inside the figure."""
    paper = figure.bbox.padded(1)
    corners = {name: ((box.x0, box.y0), (box.x1, box.y1)) for name, box in _boxes(figure).items()}
    return [name for name, pair in corners.items() if not all(paper.contains(*corner) for corner in pair)]


def _boxes(figure):
    boxes = {f"axes {i}": axes.get_tightbbox() for i, axes in enumerate(figure.axes)}
    boxes |= {f"legend {i}": legend.get_window_extent() for i, legend in enumerate(figure.legends)}
    if figure.get_supxlabel():
        boxes["note"] = figure._supxlabel.get_window_extent()
    return boxes


def _overlaps(boxes):
    pairs = itertools.combinations(boxes.items(), 2)
    return [(name, other) for (name, a), (other, b) in pairs if a.padded(-1).overlaps(b.padded(-1))]
