"""Experiments: one absl script a question. Run them from the checkout, ``python -m experiments.NAME``."""

import os

# Before anything loads LAPACK: a second thread gains nothing on matrices of a few hundred rows, and where other
# programs keep the cores busy the threads wait for each other, a hundred times longer than the work takes.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
