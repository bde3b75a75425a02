"""What ``accumulate`` returns, understands and warns of: samplers, modes of the model, losses that models compute."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from truths import close

from backpack import accumulate, results
from backpack.extensions import KFAC, BatchGrad, BatchL2Grad, ClippedGrad, DiagGGNMC, SumGradSquared, Variance

F64 = torch.float64
X, Y = torch.randn(20, 3, dtype=F64), torch.randint(2, (20,))
DATA = TensorDataset(X, Y)


def classifier(*between):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), *between, nn.Linear(4, 2)).double()


def test_results_are_a_mapping_by_savefield_and_by_extension():
    model, variance = classifier(), Variance()
    found = accumulate(model, nn.CrossEntropyLoss(), DataLoader(DATA, batch_size=6), KFAC(), variance, BatchGrad())
    assert list(found) == ["kfac", "variance", "grad_batch"] and len(found) == 3
    assert "kfac" in found and "kflr" not in found
    assert found.kfac is found["kfac"] and found[variance] is found.variance
    assert found.variance.keys() == results(model, variance).keys()
    assert repr(found) == f"Accumulated(20 samples, loss {found.loss:.4g}, results: kfac, variance, grad_batch)"
    assert copy.deepcopy(found).samples == 20
    with pytest.raises(KeyError, match="kflr: there are results of kfac, variance, grad_batch only"):
        found["kflr"]
    with pytest.raises(AttributeError, match="no attribute 'kflr', but results of kfac, variance, grad_batch"):
        _ = found.kflr


class Poisson(Sampler):
    """Batches in which each sample is with some probability; one may be empty."""

    def __init__(self, n, rate, steps):
        self.n, self.rate, self.steps = n, rate, steps

    def __iter__(self):
        for _ in range(self.steps):
            yield (torch.rand(self.n) < self.rate).nonzero().flatten().tolist()

    def __len__(self):
        return self.steps


def collated(rows):
    return (torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])) if rows else (X[:0], Y[:0])


LOADERS = {
    "shuffled": lambda: DataLoader(DATA, batch_size=6, shuffle=True),
    "weighted": lambda: DataLoader(DATA, batch_size=5, sampler=WeightedRandomSampler(torch.rand(20), 17)),
    "subset": lambda: DataLoader(DATA, batch_size=4, sampler=[3, 3, 1, 19, 7]),
    "shuffled batches": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 3, True)),
    "Poisson": lambda: DataLoader(DATA, batch_sampler=Poisson(20, 0.1, 12), collate_fn=collated),
    "workers": lambda: DataLoader(DATA, batch_size=6, shuffle=True, num_workers=1),
}


@pytest.mark.parametrize("selected", [None, [3, 0]])
@pytest.mark.parametrize("name", LOADERS)
def test_rows_of_a_loader_with_an_order_of_its_own_have_their_numbers(name, selected):
    model, loss = classifier(), nn.CrossEntropyLoss(reduction="sum")
    alone = accumulate(model, loss, [(X, Y)], BatchGrad()).grad_batch
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="draws its samples in an order of its own.*shuffle=False"):
        found = accumulate(model, loss, LOADERS[name](), BatchGrad(selected), BatchL2Grad(), SumGradSquared())
    numbers = found.places["batch_l2"]
    assert len(numbers) == found.samples
    assert torch.equal(found.places["grad_batch"], numbers if selected is None else numbers[selected])
    for path, g in alone.items():
        assert close(found.grad_batch[path], g[found.places["grad_batch"]])
        assert close(found.batch_l2[path], g[numbers].square().flatten(1).sum(1))
        assert close(found.sum_grad_squared[path], g[numbers].square().sum(0))


def test_a_loader_in_the_order_of_the_data_is_not_warned_of():
    for loader in (DataLoader(DATA, batch_size=6), DataLoader(DATA, sampler=SequentialSampler(DATA), batch_size=20)):
        assert accumulate(classifier(), nn.CrossEntropyLoss(), loader, BatchGrad([1])).places == {}
    accumulate(classifier(), nn.CrossEntropyLoss(), DataLoader(DATA, batch_size=6, shuffle=True), Variance())


def test_samples_that_a_loader_leaves_out_are_warned_of():
    with pytest.warns(UserWarning, match="leaves out 2 of 20 samples.*drop_last=False"):
        found = accumulate(classifier(), nn.CrossEntropyLoss(), DataLoader(DATA, batch_size=6, drop_last=True))
    assert found.samples == 18
    accumulate(classifier(), nn.CrossEntropyLoss(), DataLoader(DATA, batch_size=5, drop_last=True))


@pytest.mark.parametrize("layer", [nn.Dropout(0.3), nn.BatchNorm1d(4)], ids=lambda layer: type(layer).__name__)
def test_layers_that_depend_on_the_training_mode_are_warned_of(layer):
    model = classifier(layer)
    with pytest.warns(UserWarning, match=f"training mode and has {type(layer).__name__}.*model.eval()"):
        accumulate(model, nn.CrossEntropyLoss(), DataLoader(DATA, batch_size=10))
    accumulate(model.eval(), nn.CrossEntropyLoss(), DataLoader(DATA, batch_size=10))  # the remedy


ARGUMENTS = {
    "swapped": lambda model, loss: (loss, model, [(X, Y)]),
    "function": lambda model, loss: (model, F.cross_entropy, DATA),
    "class": lambda model, loss: (model, nn.CrossEntropyLoss, DATA),
    "no data": lambda model, loss: (model, loss, Variance()),
    "no model": lambda model, loss: (X, loss, DATA),
}
WORDS = {
    "swapped": "takes the model first, and then the loss; got CrossEntropyLoss and Sequential",
    "function": "in place of F.cross_entropy",
    "class": "takes a module as the loss",
    "no data": "takes an iterable of batches behind the loss, got Variance",
    "no model": "as the model, got Tensor",
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_arguments_are_named(name):
    with pytest.raises(TypeError, match=WORDS[name]):
        accumulate(*ARGUMENTS[name](classifier(), nn.CrossEntropyLoss()), Variance())


class Weighted(nn.Module):
    """A loss with a parameter of its own."""

    reduction = "sum"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2, dtype=F64))

    def forward(self, out, y):
        return ((out - nn.functional.one_hot(y, 2)) ** 2 * self.weight).sum()


def test_a_loss_may_have_parameters_of_its_own():
    model, loss = classifier(), Weighted()
    found = accumulate(model, loss, DataLoader(DATA, batch_size=6), BatchGrad())
    loss(model(X), Y).backward()
    for path, p in model.named_parameters():
        assert close(found.grad[path], p.grad) and close(found.grad_batch[path].sum(0), p.grad)
    with pytest.raises(TypeError, match="as the model, got int"):
        accumulate(3, loss, [(X, Y)])
    with pytest.raises(TypeError, match="takes the model first, and then the loss; got Tanh and Weighted"):
        accumulate(nn.Tanh(), loss, [(X, Y)])


def gpt2():
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=17, n_positions=10, bos_token_id=0, eos_token_id=0)
    config.loss_type = "ForCausalLM"
    return GPT2LMHeadModel(config)


def bert(cls, **options):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return cls(BertConfig(vocab_size=17, max_position_embeddings=10, **sizes, **options))


def ignoring(ids):
    labels = ids.clone()
    labels[0, 4:] = -100
    labels[3] = -100
    return labels


OWN = {
    "causal": (gpt2, ignoring),
    "masked": (lambda: bert(BertForMaskedLM), ignoring),
    "classes": (lambda: bert(BertForSequenceClassification, num_labels=3), lambda ids: ids[:, 0] % 3),
    "regression": (lambda: bert(BertForSequenceClassification, num_labels=1), lambda ids: ids[:, 0] / 17),
    "several": (
        lambda: bert(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification"),
        lambda ids: (ids[:, :3] % 2).float(),
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_a_models_own_loss_is_weighed_by_the_targets_that_count(name):
    torch.manual_seed(0)
    make, labels_of = OWN[name]
    model, ids = make().eval(), torch.randint(17, (5, 7))
    labels = labels_of(ids)
    batches = [{"input_ids": ids[a:b], "labels": labels[a:b]} for a, b in ((0, 3), (3, 4), (4, 5))]
    found = accumulate(model, None, batches, BatchGrad(), SumGradSquared())
    clipped = accumulate(model, None, batches, ClippedGrad(1e6))
    whole = model(input_ids=ids, labels=labels).loss
    whole.backward()
    tolerance = 1e-5  # in float32
    assert close(found.loss.float(), whole, rtol=tolerance)
    reached = [path for path, p in model.named_parameters() if p.grad is not None]
    assert list(found.grad) == list(found.grad_batch) == reached  # in their order
    size = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    for path, p in model.named_parameters():
        if p.grad is not None:
            assert close(found.grad[path], p.grad, size, rtol=tolerance)
            assert close(found.grad_batch[path].sum(0), p.grad, size, rtol=tolerance)
            assert close(clipped.grad_clipped[path], p.grad, size, rtol=tolerance)
            assert close(found.sum_grad_squared[path], found.grad_batch[path].square().sum(0), rtol=tolerance)


def test_second_order_needs_a_loss_and_a_models_loss_a_mapping():
    batch = {"input_ids": torch.randint(17, (2, 5)), "labels": torch.randint(17, (2, 5))}
    with pytest.raises(ValueError, match="DiagGGNMC starts from an extended loss.*pass lossfunc, and forward="):
        accumulate(gpt2(), None, [batch], DiagGGNMC())
    with pytest.raises(TypeError, match="a batch is a mapping"):
        accumulate(gpt2().eval(), None, [(X, Y)])
    with pytest.raises(TypeError, match="returns no loss for a batch with input_ids"):
        accumulate(gpt2().eval(), None, [{"input_ids": batch["input_ids"]}])

    def forward(model, batch):  # the remedy
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        return logits.flatten(0, 1), batch["labels"][:, 1:].flatten()

    assert accumulate(gpt2().eval(), nn.CrossEntropyLoss(), [batch], DiagGGNMC(), forward=forward).diag_ggn_mc


def test_data_in_other_forms_are_told_what_to_write():
    model, loss = classifier(), nn.CrossEntropyLoss()
    with pytest.raises(TypeError, match=r"got TensorDataset. Write DataLoader\(dataset, batch_size=...\)"):
        accumulate(model, loss, DATA, Variance())
    with pytest.raises(TypeError, match=r"got Tensor. Write \[\(inputs, targets\)\] for a single batch"):
        accumulate(model, loss, X, Y, Variance())
    with pytest.raises(TypeError, match=r"For a single batch, pass \[\(inputs, targets\)\]"):
        accumulate(model, loss, (X, Y), Variance())
    assert accumulate(model, loss, [(X, Y)], Variance()).samples == 20
    assert accumulate(model, loss, DataLoader(DATA, batch_size=7), Variance()).samples == 20
