"""Individual gradients and what is made of them, against a loop over samples."""

import pytest
from models.layers import CASES, build
from truths.first_order import check_first_order, subsets


@pytest.mark.parametrize("name", CASES)
def test_quantities_of_all_samples_follow_from_individual_gradients(name):
    check_first_order(build(name), lambda k: "all", scale=1.0)


@pytest.mark.parametrize("name", CASES)
def test_each_extension_selects_its_own_samples(name):
    keys = list(subsets(3))[1:]
    check_first_order(build(name), lambda k: keys[(k + sum(map(ord, name))) % len(keys)], scale=0.25)


@pytest.mark.parametrize("name", CASES)
def test_the_same_without_the_gradient(name):
    keys = list(subsets(3))
    check_first_order(build(name), lambda k: keys[(k + len(name)) % len(keys)], scale=0.5, alone=True)
