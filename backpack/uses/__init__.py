"""How parameters are used in a forward pass, and what can be computed of a use and a cotangent."""

from backpack.uses.base import Cotangents, Individual, Use
from backpack.uses.dense import Dense, DenseUse
from backpack.uses.derived import Derived
from backpack.uses.elementwise import ElementwiseUse, Explicit
from backpack.uses.joint import Joint, join
from backpack.uses.lookup import Lookup, LookupUse
from backpack.uses.ragged import arrive_in_groups
from backpack.uses.stacked_matrices import Parts, StackedUse

__all__ = [
    "Cotangents",
    "Dense",
    "DenseUse",
    "Derived",
    "ElementwiseUse",
    "Explicit",
    "Individual",
    "Joint",
    "Lookup",
    "LookupUse",
    "Parts",
    "StackedUse",
    "Use",
    "arrive_in_groups",
    "join",
]
