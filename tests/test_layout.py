"""The shape of the library: imports go only up the list, files stay short, nothing prints, everything is explained."""

import ast
import inspect
from pathlib import Path

import pytest

import rnnjax

PACKAGE = Path(rnnjax.__file__).parent

# Data flows down this list. A module may import only modules above it.
LAYOUT = [
    "rnnjax.typing",
    "rnnjax.validation",
    "rnnjax.settings",
    "rnnjax.meshes",
    "rnnjax.activations",
    "rnnjax.initializers",
    "rnnjax.cells.base",
    "rnnjax.cells.vanilla",
    "rnnjax.cells.leaky",
    "rnnjax.cells.gru",
    "rnnjax.cells.lstm",
    "rnnjax.cells.skip",
    "rnnjax.cells.step",
    "rnnjax.cells",
    "rnnjax.cotangents",
    "rnnjax.chunks",
    "rnnjax.independent_loops",
    "rnnjax.in_place",
    "rnnjax.side_by_side",
    "rnnjax.controls",
    "rnnjax.local_derivatives",
    "rnnjax.pointwise",
    "rnnjax.deferred",
    "rnnjax.linear_maps",
    "rnnjax.weight_gradients",
    "rnnjax.linearisation",
    "rnnjax.affine_scan",
    "rnnjax.unroll",
    "rnnjax.bidirectional",
    "rnnjax.lapack",
    "rnnjax.structured",
    "rnnjax.operators",
    "rnnjax.sheared",
    "rnnjax.jacobians",
    "rnnjax.graded",
    "rnnjax.determinants",
    "rnnjax.products",
    "rnnjax.composition",
    "rnnjax.jacobi",
    "rnnjax.singular_values",
    "rnnjax.norms",
    "rnnjax.profiles",
    "rnnjax.frames",
    "rnnjax.leading",
    "rnnjax.lyapunov",
    "rnnjax.covariant",
    "rnnjax.alignment",
    "rnnjax.gradient_flow",
    "rnnjax.quadrature",
    "rnnjax.mean_field",
    "rnnjax.diagnosis",
    "rnnjax.clipping",
    "rnnjax.penalties",
    "rnnjax.tasks.base",
    "rnnjax.tasks.adding",
    "rnnjax.tasks.copy_memory",
    "rnnjax.tasks.temporal_order",
    "rnnjax.tasks.sentences",
    "rnnjax.tasks.language_recall",
    "rnnjax.tasks.digits",
    "rnnjax.tasks",
    "rnnjax.serialization",
    "rnnjax.workdir",
    "rnnjax.metrics",
    "rnnjax.timing",
    "rnnjax.monitor",
    "rnnjax.progress",
    "rnnjax.models",
    "rnnjax.backpropagation",
    "rnnjax.train",
    "rnnjax.configuration",
    "rnnjax.drawing",
    "rnnjax.plots",
    "rnnjax.spectral_plots",
    "rnnjax.remedy_plots",
    "rnnjax.diagnosis_plots",
    "rnnjax.cost_plots",
    "rnnjax.comparison_plots",
    "rnnjax.dependency_plots",
    "rnnjax",
    "rnnjax.testing",
]


def module_files(package=PACKAGE):
    """Every module of the package by its dotted name."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported_modules(source, module, is_package, modules):
    """Names of the modules among ``modules`` that ``source`` imports, at any depth of nesting, with their lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                origin = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{origin}.{alias.name}"
                found.append((submodule if submodule in modules else origin, node.lineno))
    return [(name, line) for name, line in found if name in modules]


def downward_imports(source, module, is_package, layout=LAYOUT):
    """Imports of ``source`` that go down the layout, as lines to read."""
    return [
        f"line {line}: {module} imports {name}"
        for name, line in imported_modules(source, module, is_package, set(layout))
        if layout.index(name) >= layout.index(module)
    ]


def test_parser_finds_every_kind_of_downward_import():
    source = """
import json, rnnjax.plots
import rnnjax.typing as t
from rnnjax import validation, monitor
from rnnjax import LSTMCell
from rnnjax.cells import VanillaCell, base
from . import step
from .lstm import LSTMCell
from .. import unroll
from ..typing import Array
class A:
    def f(self):
        if True:
            from rnnjax.train import fit
"""
    assert downward_imports(source, "rnnjax.cells.gru", is_package=False) == [
        "line 2: rnnjax.cells.gru imports rnnjax.plots",
        "line 4: rnnjax.cells.gru imports rnnjax.monitor",
        "line 5: rnnjax.cells.gru imports rnnjax",
        "line 6: rnnjax.cells.gru imports rnnjax.cells",
        "line 7: rnnjax.cells.gru imports rnnjax.cells.step",
        "line 8: rnnjax.cells.gru imports rnnjax.cells.lstm",
        "line 9: rnnjax.cells.gru imports rnnjax.unroll",
        "line 14: rnnjax.cells.gru imports rnnjax.train",
    ]
    assert downward_imports("from .base import Cell", "rnnjax.cells", is_package=True) == []
    assert downward_imports("from .. import unroll", "rnnjax.cells", is_package=True) == [
        "line 1: rnnjax.cells imports rnnjax.unroll"
    ]
    assert downward_imports("from . import testing", "rnnjax", is_package=True) == [
        "line 1: rnnjax imports rnnjax.testing"
    ]


def test_every_module_has_its_place_in_the_layout():
    assert len(set(LAYOUT)) == len(LAYOUT)
    assert set(module_files()) - set(LAYOUT) == set()


@pytest.mark.parametrize("module", sorted(module_files()))
def test_imports_go_only_up_the_layout(module):
    path = module_files()[module]
    assert downward_imports(path.read_text("utf-8"), module, path.name == "__init__.py") == []


def printed_lines(source):
    """Lines of ``source`` that call ``print``."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


@pytest.mark.parametrize("module", sorted(module_files()))
def test_library_never_prints_and_keeps_its_files_short(module):
    source = module_files()[module].read_text("utf-8")
    assert printed_lines(source) == []
    assert len(source.splitlines()) <= 350


def test_print_is_found_in_code_but_not_in_docstrings():
    assert printed_lines('"""\n>>> print(1)\n"""\ndef f():\n    if 1:\n        print(2)\n') == [6]


def has_own_docstring(value):
    """Whether somebody wrote a docstring: not one that a dataclass made of its fields, nor one of a base class."""
    text = value.__doc__ or ""
    written = not inspect.isclass(value) or not text.startswith(f"{value.__name__}(")
    return bool(text.strip()) and written


@pytest.mark.parametrize("name", rnnjax.__all__)
def test_public_name_has_a_docstring(name):
    value = getattr(rnnjax, name)
    assert not (callable(value) or inspect.ismodule(value)) or has_own_docstring(value)


def test_public_names_are_those_of_the_contract():
    contract = """
        LSTMCell VanillaCell GRUCell LeakyCell StepCell unroll trajectory step_jacobians factor_product
        log_singular_values log_spectral_norm spectral_profile lyapunov_spectrum leading_log_singular_values
        multiply_products clipped gradient_flow
    """
    assert set(contract.split()) <= set(rnnjax.__all__)
    assert len(set(rnnjax.__all__)) == len(rnnjax.__all__)
