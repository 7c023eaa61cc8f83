"""rnnjax: recurrent networks in JAX, and the exact answer to why their gradients vanish or explode."""

from rnnjax import activations, initializers
from rnnjax.cells import AffineCell, Cell, CellParams, GRUCell, LeakyCell, LSTMCell, StepCell, VanillaCell
from rnnjax.clipping import ClippedState, clipped, clipping_state
from rnnjax.jacobians import StructuredJacobians, autodiff_step_jacobians, step_jacobians, structured_jacobians
from rnnjax.lyapunov import LyapunovResult, kaplan_yorke_dimension, lyapunov_spectrum
from rnnjax.products import FactoredProduct, factor_product
from rnnjax.singular_values import (
    SpectralProfile,
    log_singular_values,
    log_spectral_norm,
    spectral_norm_profile,
    spectral_profile,
)
from rnnjax.unroll import Trajectory, trajectory, unroll

__version__ = "0.1.0"

__all__ = [
    "AffineCell",
    "Cell",
    "CellParams",
    "ClippedState",
    "FactoredProduct",
    "GRUCell",
    "LSTMCell",
    "LeakyCell",
    "LyapunovResult",
    "SpectralProfile",
    "StepCell",
    "StructuredJacobians",
    "Trajectory",
    "VanillaCell",
    "activations",
    "autodiff_step_jacobians",
    "clipped",
    "clipping_state",
    "factor_product",
    "initializers",
    "kaplan_yorke_dimension",
    "log_singular_values",
    "log_spectral_norm",
    "lyapunov_spectrum",
    "spectral_norm_profile",
    "spectral_profile",
    "step_jacobians",
    "structured_jacobians",
    "trajectory",
    "unroll",
]
