"""The operators, their oracles, and the only way to the native core."""

from .fit import fit_rows
from .gram import (
    gram_accumulate,
    gram_diagonal,
    gram_greedy_scores,
    gram_inverse,
    gram_n_of_m,
    gram_scores,
    gram_solve,
    gram_update,
)
from .inverse import inverse_scores, inverse_update, woodbury_update
from .living import gram_accumulate_living
from .native import copy
from .status import NumericalError, new_status, raise_for_status

__all__ = [
    "NumericalError",
    "copy",
    "fit_rows",
    "gram_accumulate",
    "gram_accumulate_living",
    "gram_diagonal",
    "gram_greedy_scores",
    "gram_inverse",
    "gram_n_of_m",
    "gram_scores",
    "gram_solve",
    "gram_update",
    "inverse_scores",
    "inverse_update",
    "new_status",
    "raise_for_status",
    "woodbury_update",
]
