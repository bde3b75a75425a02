"""How each kind of node uses the parameters that its edges lead to; one file for each family of kinds."""

from backpack.nodes import convolution as convolution  # they register their kinds
from backpack.nodes import elementwise as elementwise
from backpack.nodes import linear_cross_entropy as linear_cross_entropy
from backpack.nodes import lookup as lookup
from backpack.nodes import normalization as normalization
from backpack.nodes import products as products
from backpack.nodes import recurrent as recurrent
from backpack.nodes.general import GeneralUse as GeneralUse
from backpack.nodes.general import PlacedUse as PlacedUse
from backpack.nodes.registry import FORMS as FORMS
from backpack.nodes.registry import Place as Place
from backpack.nodes.registry import form as form
from backpack.nodes.registry import use_of as use_of
