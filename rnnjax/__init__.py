"""rnnjax: recurrent networks in JAX, and the exact answer to why their gradients vanish or explode."""

from rnnjax import activations, initializers, mean_field
from rnnjax.alignment import GradientAlignment, gradient_alignment
from rnnjax.bidirectional import batch_major, unroll_bidirectional
from rnnjax.cells import AffineCell, Cell, CellParams, GRUCell, LeakyCell, LSTMCell, SkipCell, StepCell, VanillaCell
from rnnjax.clipping import ClippedState, clipped, clipping_state
from rnnjax.composition import factor_product_over_mesh, multiply_products
from rnnjax.covariant import CovariantVectors, covariant_vectors
from rnnjax.diagnosis import Diagnosis, diagnose
from rnnjax.gradient_flow import GradientFlow, gradient_flow
from rnnjax.jacobians import autodiff_step_jacobians, step_jacobians, structured_jacobians
from rnnjax.leading import LeadingSingularValues, leading_log_singular_values
from rnnjax.lyapunov import LyapunovResult, kaplan_yorke_dimension, lyapunov_spectrum
from rnnjax.norms import spectral_norm_profile
from rnnjax.penalties import GradientFlossing, VanishingGradientPenalty
from rnnjax.products import FactoredProduct, factor_product
from rnnjax.profiles import SpectralGrid, SpectralProfile, spectral_grid, spectral_profile
from rnnjax.singular_values import SingularSpectrum, log_singular_values, log_spectral_norm, singular_spectrum
from rnnjax.structured import StructuredJacobians
from rnnjax.unroll import Trajectory, trajectory, unroll

__version__ = "0.1.0"

__all__ = [
    "AffineCell",
    "Cell",
    "CellParams",
    "ClippedState",
    "CovariantVectors",
    "Diagnosis",
    "FactoredProduct",
    "GRUCell",
    "GradientAlignment",
    "GradientFlossing",
    "GradientFlow",
    "LSTMCell",
    "LeadingSingularValues",
    "LeakyCell",
    "LyapunovResult",
    "SingularSpectrum",
    "SkipCell",
    "SpectralGrid",
    "SpectralProfile",
    "StepCell",
    "StructuredJacobians",
    "Trajectory",
    "VanillaCell",
    "VanishingGradientPenalty",
    "activations",
    "autodiff_step_jacobians",
    "batch_major",
    "clipped",
    "clipping_state",
    "covariant_vectors",
    "diagnose",
    "factor_product",
    "factor_product_over_mesh",
    "gradient_alignment",
    "gradient_flow",
    "initializers",
    "kaplan_yorke_dimension",
    "leading_log_singular_values",
    "log_singular_values",
    "log_spectral_norm",
    "lyapunov_spectrum",
    "mean_field",
    "multiply_products",
    "singular_spectrum",
    "spectral_grid",
    "spectral_norm_profile",
    "spectral_profile",
    "step_jacobians",
    "structured_jacobians",
    "trajectory",
    "unroll",
    "unroll_bidirectional",
]
