"""How parameters are used in a forward pass, and what can be computed of a use and a cotangent."""

from backpack.uses.base import Individual
from backpack.uses.dense import Dense
from backpack.uses.dense_use import DenseUse
from backpack.uses.derived import Derived
from backpack.uses.elementwise import ElementwiseUse, Explicit
from backpack.uses.joint import Joint, join
from backpack.uses.lookup import Lookup, LookupUse
from backpack.uses.ragged import arrive_in_groups
from backpack.uses.stacked_matrices import Parts, StackedUse
from backpack.uses.use import Cotangents, SamplewiseUse, Use

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
    "SamplewiseUse",
    "StackedUse",
    "Use",
    "arrive_in_groups",
    "join",
]
