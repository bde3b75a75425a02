"""How a forward pass uses parameters, and what can be computed from a use and a cotangent."""

from backpack.uses.base import Individual as Individual
from backpack.uses.dense_gradients import Dense as Dense
from backpack.uses.dense_use import DenseUse as DenseUse
from backpack.uses.derived import Derived as Derived
from backpack.uses.elementwise import ElementwiseUse as ElementwiseUse
from backpack.uses.elementwise import Explicit as Explicit
from backpack.uses.elementwise import GroupNormScaleUse as GroupNormScaleUse
from backpack.uses.in_chunks import InChunks as InChunks
from backpack.uses.in_chunks import RowsUse as RowsUse
from backpack.uses.joint import Joint as Joint
from backpack.uses.joint import join as join
from backpack.uses.lookup import Lookup as Lookup
from backpack.uses.lookup import LookupUse as LookupUse
from backpack.uses.ragged import arrive_in_groups as arrive_in_groups
from backpack.uses.stacked_matrices import Parts as Parts
from backpack.uses.stacked_matrices import StackedUse as StackedUse
from backpack.uses.use import Cotangents as Cotangents
from backpack.uses.use import SamplewiseUse as SamplewiseUse
from backpack.uses.use import Use as Use
