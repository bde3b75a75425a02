"""An import path of the original."""

from backpack.extensions.batch_diag_ggn import BatchDiagGGNExact as BatchDiagGGNExact
from backpack.extensions.batch_diag_ggn import BatchDiagGGNMC as BatchDiagGGNMC
from backpack.extensions.diag_ggn import DiagGGNExact as DiagGGNExact
from backpack.extensions.diag_ggn import DiagGGNMC as DiagGGNMC
