"""Recurrent cells: affine ones, of which everything is known, and any step function."""

from rnnjax.cells.base import AffineCell, Cell, CellParams
from rnnjax.cells.gru import GRUCell
from rnnjax.cells.leaky import LeakyCell
from rnnjax.cells.lstm import LSTMCell
from rnnjax.cells.skip import SkipCell
from rnnjax.cells.step import StepCell
from rnnjax.cells.vanilla import VanillaCell

__all__ = [
    "AffineCell",
    "Cell",
    "CellParams",
    "GRUCell",
    "LSTMCell",
    "LeakyCell",
    "SkipCell",
    "StepCell",
    "VanillaCell",
]
