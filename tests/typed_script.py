"""A user's script: type checkers know what each extension stores. Checked by ``test_types.py``, and run."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from backpack import RunningMean, accumulate, backpack, extend, results
from backpack.extensions import EKFAC, GGNMP, KFAC, BatchGrad, ClippedGrad, DiagGGNMC
from backpack.utils.kroneckers import Eigen

model = extend(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
lossfunc = extend(nn.CrossEntropyLoss())
assert_type(model, nn.Sequential)
X, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])

individual, factors, eigen = BatchGrad(subsampling=[0, 1]), KFAC(mc_samples=2), EKFAC(fisher="exact")
product, clipped = GGNMP(), ClippedGrad(max_norm=1.0)
with backpack(individual, factors, eigen, product, clipped, DiagGGNMC()):
    lossfunc(model(X), y).backward()

assert_type(results(model, individual), dict[str, Tensor])
assert_type(results(model, factors), dict[str, list[Tensor]])
assert_type(results(model, eigen), dict[str, Eigen])
assert_type(results(model, product), dict[str, Callable[[Tensor], Tensor]])
for parameter in model.parameters():
    assert_type(individual.result(parameter), Tensor)
    assert individual.result(parameter).shape == (2, *parameter.shape)
    assert product.result(parameter)(parameter).shape == parameter.shape
    assert clipped.result(parameter).shape == parameter.shape
    assert_type(eigen.result(parameter).sample(damping=1.0), Tensor)

mean = RunningMean(factors, decay=None)
mean.update(model)
assert_type(mean["0.weight"], list[Tensor])

found = accumulate(model, lossfunc, [(X, y)], DiagGGNMC(), factors)
assert_type(found.loss, Tensor)
assert_type(found.samples, int)
assert_type(found.grad, dict[str, Tensor])
print(len(found["kfac"]["0.weight"]))
