"""The strategies of ``HBP``: each class lists the strings that one argument takes."""


class Curvature:
    """The matrix that the factors approximate."""

    GGN = "ggn"
    HESSIAN = "hessian"
    PCH_ABS = "pch-abs"
    PCH_CLIP = "pch-clip"


class LossHessianStrategy:
    """What is pulled back from the loss."""

    EXACT = "exact"
    SAMPLING = "sampling"
    SUM = "sum"


class BackpropStrategy:
    """How the loss Hessian is pulled back."""

    SQRT = "sqrt"
    BATCH_AVERAGE = "average"


class ExpectationApproximation:
    """Where expectations over the batch are taken in a factor."""

    BOTEV_MARTENS = "E[J^T E(H) J]"
    CHEN = "E(J^T) E(H) E(J)"
