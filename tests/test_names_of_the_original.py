"""Helpers and import paths that scripts for the original use."""

import importlib
from collections import OrderedDict

import numpy as np
import pytest
import torch
from models.problem import Problem
from torch import nn
from truths.first_order import check_first_order

from backpack import extensions
from backpack.core.derivatives.convnd import weight_jac_t_save_memory
from backpack.custom_module.branching import Parallel, SumModule
from backpack.custom_module.pad import Pad
from backpack.custom_module.permute import Permute
from backpack.custom_module.reduce_tuple import ReduceTuple
from backpack.custom_module.scale_module import ScaleModule
from backpack.custom_module.slicing import Slicing
from backpack.utils.convert_parameters import vector_to_parameter_list
from backpack.utils.subsampling import subsample

PATHS = {
    "backpack": "backpack extend disable memory_cleanup convert_module_to_backpack extensions verify summary "
    "CTX BackpropExtension",
    "backpack.context": "CTX",
    "backpack.core.derivatives.convnd": "weight_jac_t_save_memory",
    "backpack.custom_module.branching": "SumModule Parallel",
    "backpack.custom_module.graph_utils": "BackpackTracer convert_module_to_backpack",
    "backpack.custom_module.pad": "Pad",
    "backpack.custom_module.permute": "Permute",
    "backpack.custom_module.reduce_tuple": "ReduceTuple",
    "backpack.custom_module.scale_module": "ScaleModule",
    "backpack.custom_module.slicing": "Slicing",
    "backpack.extensions.backprop_extension": "BackpropExtension FAIL_ERROR FAIL_WARN FAIL_SILENT",
    "backpack.extensions.curvature": "Curvature LossHessianStrategy BackpropStrategy ExpectationApproximation",
    "backpack.extensions.curvmatprod": "HMP GGNMP PCHMP",
    "backpack.extensions.curvmatprod.ggnmp": "GGNMP",
    "backpack.extensions.curvmatprod.hmp": "HMP",
    "backpack.extensions.curvmatprod.pchmp": "PCHMP",
    "backpack.extensions.firstorder": "BatchGrad BatchL2Grad SumGradSquared Variance",
    "backpack.extensions.firstorder.base": "FirstOrderBackpropExtension FirstOrderModuleExtension",
    "backpack.extensions.firstorder.batch_grad": "BatchGrad",
    "backpack.extensions.firstorder.batch_l2_grad": "BatchL2Grad",
    "backpack.extensions.firstorder.sum_grad_squared": "SumGradSquared",
    "backpack.extensions.firstorder.variance": "Variance",
    "backpack.extensions.module_extension": "ModuleExtension",
    "backpack.extensions.secondorder": "DiagGGNExact DiagGGNMC BatchDiagGGNExact BatchDiagGGNMC SqrtGGNExact SqrtGGNMC",
    "backpack.extensions.secondorder.base": "SecondOrderBackpropExtension",
    "backpack.extensions.secondorder.diag_ggn": "DiagGGNExact DiagGGNMC BatchDiagGGNExact BatchDiagGGNMC",
    "backpack.extensions.secondorder.hbp": "HBP KFAC KFLR KFRA Curvature BackpropStrategy",
    "backpack.extensions.secondorder.diag_hessian": "DiagHessian BatchDiagHessian",
    "backpack.extensions.secondorder.hbp.hbp_options": "BackpropStrategy ExpectationApproximation LossHessianStrategy",
    "backpack.extensions.secondorder.sqrt_ggn": "SqrtGGNExact SqrtGGNMC",
    "backpack.hessianfree.ggnvp": "ggn_vector_product ggn_vector_product_from_plist",
    "backpack.hessianfree.hvp": "hessian_vector_product",
    "backpack.hessianfree.lop": "L_op transposed_jacobian_vector_product",
    "backpack.hessianfree.rop": "R_op jacobian_vector_product",
    "backpack.utils.convert_parameters": "vector_to_parameter_list",
    "backpack.utils.examples": "load_mnist_dataset get_mnist_dataloader load_one_batch_mnist autograd_diag_ggn_exact",
    "backpack.utils.kroneckers": "kfacs_to_mat two_kfacs_to_mat kfac_mat_prod apply_kfac_mat_prod inv_kfacs "
    "inv_kfac_mat_prod apply_inv_kfac_mat_prod is_matrix is_vector",
    "backpack.utils.subsampling": "subsample",
}
"""All that scripts for the original import, as far as there is such a thing here."""


@pytest.mark.parametrize("path", PATHS)
def test_import_paths_of_the_original_give_the_same_objects(path):
    module = importlib.import_module(path)
    for name in PATHS[path].split():
        assert getattr(module, name) is getattr(extensions, name, getattr(module, name))


def test_a_vector_is_cut_into_the_shapes_of_parameters():
    parameters, vector = list(nn.Linear(3, 2).parameters()), torch.arange(8.0)
    weight, bias = vector_to_parameter_list(vector, iter(parameters))
    assert torch.equal(weight, vector[:6].reshape(2, 3)) and torch.equal(bias, vector[6:])
    assert weight.data_ptr() == vector.data_ptr()
    for wrong in (torch.arange(7.0), torch.arange(9.0), torch.ones(2, 4)):
        with pytest.raises(ValueError, match="8 entries"):
            vector_to_parameter_list(wrong, parameters)
    with pytest.raises(TypeError, match="tensor"):
        vector_to_parameter_list([1.0] * 8, parameters)


def test_samples_are_taken_along_their_axis():
    tensor = torch.arange(6).reshape(2, 3)
    assert subsample(tensor) is tensor
    assert torch.equal(subsample(tensor, dim=1, subsampling=[0, -1]), tensor[:, [0, 2]])
    assert torch.equal(subsample(tensor, subsampling=np.array([False, True])), tensor[1:])
    with pytest.raises(IndexError, match="3 is out of range"):
        subsample(tensor, 1, [3])


def test_the_memory_of_convolutions_is_bounded_with_or_without_the_switch():
    with weight_jac_t_save_memory(), weight_jac_t_save_memory(save_memory=False):
        pass


def test_custom_modules_compute_what_their_names_say():
    x = torch.rand(2, 3, 4)
    assert torch.equal(SumModule()(x, x.sin(), x), x + x.sin() + x)
    assert torch.equal(Parallel(nn.Identity(), nn.ReLU())(x), x + x.relu())
    assert torch.equal(Pad([1, 0], value=2.0)(x), nn.functional.pad(x, (1, 0), value=2.0))
    assert torch.equal(Slicing((slice(None), 1))(x), x[:, 1])
    assert torch.equal(Permute(0, 2, 1)(x), x.permute(0, 2, 1))
    assert torch.equal(Permute(1, -1, init_transpose=True)(x), x.transpose(1, 2))
    assert torch.equal(ScaleModule(3.0)(x), 3 * x) and not list(ScaleModule().parameters())
    assert ReduceTuple(1)((1, 2)) == 2
    named = Parallel(OrderedDict(a=nn.Identity(), b=nn.Linear(4, 4)), merge_module=SumModule())
    assert list(named.state_dict()) == ["branch.b.weight", "branch.b.bias"]


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Permute(1, 0, 2), ValueError),
        (lambda: Permute(0, 1, init_transpose=True), ValueError),
        (lambda: Permute(-3, 1, init_transpose=True)(torch.rand(2, 3, 4)), ValueError),
        (lambda: Permute(1, init_transpose=True), ValueError),
        (lambda: ScaleModule(2), ValueError),
        (lambda: SumModule()(1, 2), TypeError),
    ],
)
def test_custom_modules_refuse_what_they_cannot_do(make, error):
    with pytest.raises(error):
        make()


def test_quantities_are_right_through_custom_modules():
    model = nn.Sequential(
        nn.LSTM(4, 3, batch_first=True),
        ReduceTuple(0),
        Parallel(nn.Sequential(nn.Linear(3, 3), ScaleModule(0.5)), nn.Sequential(nn.Linear(3, 3), nn.Tanh())),
        Permute(0, 2, 1),
        Pad((1, 0)),
        Slicing((slice(None), slice(0, 2))),
        nn.Flatten(),
        nn.Linear(12, 2),
    ).double()
    check_first_order(
        Problem(model, (torch.rand(3, 5, 4, dtype=torch.float64),)), lambda k: "reversed" if k % 2 else "all", 0.5
    )
