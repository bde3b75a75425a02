"""``accumulate`` and ``verify`` with ``sample_ids``: what one batch with all samples gives."""

import pytest
import torch
from torch import nn

from backpack import accumulate, backpack, extend, verify
from backpack import extensions as E

IDS = torch.tensor([1, 0, 1, -1, 3, 2, 3, 3, 4, 6, 6, -1])
PARTS = ((0, 4), (4, 8), (8, 12))
OF_BATCHES = [([1, 0, 1, -1], 2), ([1, 0, 1, 1], 2), ([0, 2, 2, -1], 3)]
"""The same, numbered in each batch anew: number 5 has no entry."""


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return extend(model), torch.randn(12, 3, dtype=torch.float64), torch.randint(3, (12,))


def extensions(rows=None):
    return [
        E.BatchGrad(rows),
        E.BatchL2Grad(rows),
        E.SumGradSquared(rows),
        E.Variance(rows),
        E.DiagGGNExact(rows),
        E.BatchDiagGGNExact(rows),
        E.BatchDiagHessian(rows),
        E.KFLR(subsampling=rows),
        E.ClippedGrad(0.02, rows),
    ]


def forward(model, batch):
    return model(batch[0]), batch[1]


def same(found, expected):
    if isinstance(expected, list):
        return all(same(a, b) for a, b in zip(found, expected, strict=True))
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-10, atol=1e-14)


def of_one_batch(model, x, y, reduction, rows):
    model.zero_grad()
    with backpack(*extensions(rows), sample_ids=IDS):
        extend(nn.CrossEntropyLoss(reduction=reduction))(model(x), y).backward()
    fields = [extension.savefield for extension in extensions()]
    return [{field: vars(p)[field] for field in (*fields,)} for p in model.parameters()]


@pytest.mark.parametrize("rows", [None, [0, -1, 3], [5, 6], [True, False, True, False, False, False, True]])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_give_what_one_batch_gives(reduction, rows):
    model, x, y = problem()
    expected = of_one_batch(model, x, y, reduction, rows)
    data = [(x[a:b], y[a:b], IDS[a:b]) for a, b in PARTS]
    lossfunc = nn.CrossEntropyLoss(reduction=reduction)
    found = accumulate(model, lossfunc, data, *extensions(rows), forward=forward, sample_ids=lambda batch: batch[2])
    assert found.samples == 7
    for p, own in zip(model.parameters(), expected, strict=True):
        assert all(same(vars(p)[field], value) for field, value in own.items())


def test_numbers_may_be_those_of_each_batch():
    model, x, y = problem()
    data = [(x[a:b], y[a:b], OF_BATCHES[k]) for k, (a, b) in enumerate(PARTS)]
    expected = of_one_batch(model, x, y, "mean", None)

    def sample_ids(batch):
        ids, count = batch[2]
        return torch.tensor(ids), count

    accumulate(model, nn.CrossEntropyLoss(), data, *extensions(), forward=forward, sample_ids=sample_ids)
    order = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    for p, own in zip(model.parameters(), expected, strict=True):
        assert same(p.grad_batch, own["grad_batch"][order]) and same(p.kflr, own["kflr"])


def test_results_of_samples_go_to_files(tmp_path):
    model, x, y = problem()
    data = [(x[a:b], y[a:b], IDS[a:b]) for a, b in PARTS]
    (expected, *_) = of_one_batch(model, x, y, "mean", [4, 0])
    found = accumulate(
        model,
        nn.CrossEntropyLoss(),
        data,
        E.BatchGrad([4, 0]),
        forward=forward,
        sample_ids=lambda batch: batch[2],
        stream=tmp_path,
    )
    assert same(found["grad_batch"]["0.weight"], expected["grad_batch"])
    assert (tmp_path / "grad_batch.0.weight.npy").exists()


def test_a_run_goes_on_where_it_was_killed(tmp_path):
    model, x, y = problem()
    data = [(x[a:b], y[a:b], IDS[a:b]) for a, b in PARTS]

    def killed(model, batch):
        if torch.equal(batch[0], data[2][0]):
            raise KeyboardInterrupt
        return forward(model, batch)

    def run(forward):
        return accumulate(
            model,
            nn.CrossEntropyLoss(reduction="sum"),
            data,
            *extensions()[:4],
            forward=forward,
            sample_ids=lambda batch: batch[2],
            checkpoint=tmp_path / "run",
            checkpoint_seconds=0,
        )

    with pytest.raises(KeyboardInterrupt):
        run(killed)
    found = run(forward)
    expected = of_one_batch(model, x, y, "sum", None)
    assert same(found["grad_batch"]["2.bias"], expected[3]["grad_batch"])
    assert same(found["variance"]["0.weight"], expected[0]["variance"])


def test_a_sample_in_several_batches_is_an_error_with_the_remedy():
    model, x, y = problem()
    data = [(x[a:b], y[a:b], torch.tensor([0, 0, 1, 1])) for a, b in PARTS]
    with pytest.raises(ValueError, match=r"Sample 0 is in several batches.*\(ids, count\)"):
        accumulate(model, nn.CrossEntropyLoss(), data, E.BatchGrad(), forward=forward, sample_ids=lambda b: b[2])


def test_roots_of_samples_of_different_sizes_do_not_join():
    model, x, y = problem()
    data = [(x[a:b], y[a:b], IDS[a:b]) for a, b in PARTS]
    with pytest.raises(ValueError, match="do not join"):
        accumulate(model, nn.CrossEntropyLoss(), data, E.SqrtGGNExact(), forward=forward, sample_ids=lambda b: b[2])


def test_wrong_numbers_are_an_error():
    model, x, y = problem()
    with pytest.raises(TypeError, match="integer tensor"):
        accumulate(model, nn.CrossEntropyLoss(), [(x, y)], E.BatchGrad(), sample_ids=lambda b: torch.rand(12))
    with pytest.raises(RuntimeError, match=r"sample_ids, of shape \[5\], does not fit"):
        accumulate(model, nn.CrossEntropyLoss(), [(x, y)], E.BatchGrad(), sample_ids=lambda b: torch.arange(5))


def test_verify_knows_the_truth_for_all_extensions():
    model, x, y = problem()
    more = [E.DiagGGNMC(2), E.KFAC(2), E.HMP(), E.GGNMP(), E.GGNGram(), E.BatchDotGrad(), E.DiagHessian(), E.EKFAC()]
    more += [E.SqrtGGNExact(), E.SqrtGGNMC(), E.BatchDiagGGNMC(), E.DiagHessianMC(), E.PCHMP()]
    found = verify(model, nn.CrossEntropyLoss(), x, y, *extensions(), *more, sample_ids=IDS)
    assert all(row.verdict == "right" for row in found.rows), found
    found = verify(model, nn.CrossEntropyLoss(), x, y, E.BatchGrad([0, 3]), E.KFLR([2, 1]), sample_ids=IDS)
    assert all(row.verdict == "right" for row in found.rows), found


def test_verify_refuses_numbers_that_do_not_fit():
    model, x, y = problem()
    with pytest.raises(ValueError, match="does not fit what the loss is called with"):
        verify(model, nn.CrossEntropyLoss(), x, y, E.BatchGrad(), sample_ids=torch.arange(5))


def test_a_selection_of_samples_without_entries_has_zeros():
    model, x, y = problem()
    data = [(x[a:b], y[a:b], IDS[a:b]) for a, b in PARTS]
    found = accumulate(
        model, nn.CrossEntropyLoss(), data, *extensions([5]), forward=forward, sample_ids=lambda batch: batch[2]
    )
    assert found.samples == 7
    for extension in extensions():
        assert found[extension.savefield].keys() == found.grad.keys()
    assert not any(rows.any() for rows in found["grad_batch"].values())


def test_factors_have_the_same_form_whatever_documents_a_batch_has():
    """Nothing arrives at the query and key of a document of one token."""

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.all = nn.Linear(4, 12, dtype=torch.float64)

        def forward(self, x, ids):
            mask = ids[:, :, None] == ids[:, None, :]
            return nn.functional.scaled_dot_product_attention(*self.all(x).chunk(3, -1), attn_mask=mask)

    torch.manual_seed(0)
    data = [
        (torch.randn(*ids.shape, 4).double(), torch.randn(*ids.shape, 4).double(), ids)
        for ids in (torch.tensor([[0, 0], [1, 2]]), torch.tensor([[0, 0], [1, 1]]))
    ]
    found = accumulate(
        extend(Attending()),
        nn.MSELoss(),
        data,
        E.KFLR(),
        forward=lambda model, batch: (model(batch[0], batch[2]), batch[1]),
        sample_ids=lambda batch: (batch[2], int(batch[2].max()) + 1),
    )
    assert [factor.shape for factor in found["kflr"]["all.weight"]] == [(12, 12), (4, 4)]
