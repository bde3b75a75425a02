"""Models of `transformers` and `peft`, built from small configurations, unmodified and without downloads.

Sample ``n``'s individual gradient is what flows through row ``n`` of the model's outputs. Plain autograd computes it on
a copy that is not extended: it pulls back the loss's gradient by these outputs, with all rows but one set to zero.
"""

import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import KFAC, BatchGrad, BatchL2Grad, DiagGGNExact, DiagGGNMC, SqrtGGNMC

N, LENGTH, VOCABULARY = 3, 7, 12
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "max_position_embeddings": 16}


@dataclass
class Case:
    """A model, how it is called, and the tensors in its result that its own loss reads, the main one first."""

    model: nn.Module
    kwargs: dict[str, Any]
    labels: dict[str, Any]
    outputs: Callable[[Any], list[Tensor]] = lambda result: [result.logits]
    mixed: bool = False


def words() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sentences, one of them shorter than the others, and labels of their words."""
    ids, labels = torch.randint(3, VOCABULARY, (2, N, LENGTH))
    mask = torch.ones_like(ids)
    ids[1, -3:], mask[1, -3:], labels[1, -3:] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": mask}, {"labels": labels}


def mixtral(experts: str) -> Case:
    config = hf.MixtralConfig(num_key_value_heads=1, num_local_experts=8, **TEXT, **SMALL)
    model = hf.MixtralForCausalLM(config)
    model.set_experts_implementation(experts)
    return Case(model, *words())


def qwen2moe(experts: str) -> Case:
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_key_value_heads": 1}
    config = hf.Qwen2MoeConfig(shared_expert_intermediate_size=16, **sizes, **TEXT, **SMALL)
    model = hf.Qwen2MoeForCausalLM(config)
    model.set_experts_implementation(experts)
    return Case(model, *words())


def detr() -> Case:
    """Its own loss also reads the boxes, and the predictions of the first of two layers of the decoder."""
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = hf.DetrConfig(backbone_config=backbone, num_queries=5, auxiliary_loss=True, num_labels=4, **sizes, **heads)
    labels = [{"class_labels": torch.randint(0, 4, (n,)), "boxes": 0.2 + 0.3 * torch.rand(n, 4)} for n in (2, 1, 3)]

    def outputs(result: Any) -> list[Tensor]:
        found = [result.logits, result.pred_boxes]
        return found + [t for layer in result.auxiliary_outputs or [] for t in (layer["logits"], layer["pred_boxes"])]

    return Case(
        hf.DetrForObjectDetection(config), {"pixel_values": torch.randn(N, 3, 64, 64)}, {"labels": labels}, outputs
    )


def perceiver() -> Case:
    sizes = {"num_latents": 4, "d_latents": 16, "d_model": 16, "num_self_attends_per_block": 1}
    heads = {"num_self_attention_heads": 2, "num_cross_attention_heads": 2}
    config = hf.PerceiverConfig(num_blocks=2, **sizes, **heads, **TEXT | {"max_position_embeddings": LENGTH})
    return Case(hf.PerceiverForMaskedLM(config), *words())


def whisper() -> Case:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    lengths = {"num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 16, "vocab_size": VOCABULARY}
    special = dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"], 0)
    config = hf.WhisperConfig(**sizes, **heads, **lengths, **special)
    text, labels = words()
    kwargs = {"input_features": torch.randn(N, 4, 12), "decoder_input_ids": text["input_ids"]}
    return Case(hf.WhisperForConditionalGeneration(config), kwargs, labels)


def xlnet() -> Case:
    """Samples lie along axis 1 inside of it. Each sentence has its own order of words, and predicts four of them."""
    config = hf.XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=2, n_head=2, d_inner=32)
    text, labels = words()
    order = torch.stack([torch.randperm(LENGTH) for _ in range(N)])
    text["token_type_ids"] = torch.arange(LENGTH).expand(N, -1) // 4
    text["perm_mask"] = (order[:, :, None] <= order[:, None, :]).float()
    text["target_mapping"] = torch.eye(LENGTH)[order[:, :4]]
    return Case(hf.XLNetLMHeadModel(config), text, {"labels": labels["labels"][:, :4].contiguous()})


def deberta() -> Case:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    extras = {"position_buckets": 4, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3}
    config = hf.DebertaV2Config(**relative, **extras, **TEXT, **SMALL)
    return Case(hf.DebertaV2ForMaskedLM(config), *words())


def longformer() -> Case:
    """Global attention: two words of the first sentence, one of the second, none of the third."""
    config = hf.LongformerConfig(attention_window=[4, 4], **TEXT | {"max_position_embeddings": 32}, **SMALL)
    text, labels = words()
    text["global_attention_mask"] = torch.zeros_like(text["input_ids"])
    text["global_attention_mask"][[0, 0, 1], [0, 3, 2]] = 1
    return Case(hf.LongformerForMaskedLM(config), text, labels)


def recurrentgemma() -> Case:
    """Without its cache, which would connect the graphs of two calls."""
    sizes = {"num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 4, "num_key_value_heads": 1}
    config = hf.RecurrentGemmaConfig(vocab_size=VOCABULARY, **SMALL | sizes)
    text, labels = words()
    return Case(hf.RecurrentGemmaForCausalLM(config), text | {"use_cache": False}, labels)


def timesformer() -> Case:
    config = hf.TimesformerConfig(image_size=8, patch_size=4, num_frames=2, num_labels=5, **SMALL)
    pixels = torch.randn(N, 2, 3, 8, 8)
    return Case(hf.TimesformerForVideoClassification(config), {"pixel_values": pixels}, {"labels": torch.arange(N)})


def adapted(config: peft.PeftConfig) -> Case:
    llama = hf.LlamaConfig(num_key_value_heads=1, **TEXT, **SMALL)
    return Case(peft.get_peft_model(hf.LlamaForCausalLM(llama), config), *words())


def dora(*modules: str) -> Case:
    return adapted(peft.LoraConfig(r=2, use_dora=True, target_modules=list(modules)))


def oft() -> Case:
    return adapted(peft.OFTConfig(oft_block_size=4, target_modules=["q_proj", "down_proj"]))


def resnet() -> Case:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    pixels = torch.randn(N, 3, 16, 16)
    model = hf.ResNetForImageClassification(config)
    return Case(model, {"pixel_values": pixels}, {"labels": torch.arange(N)}, mixed=True)


MODELS: dict[str, Callable[[], Case]] = {
    "mixtral-eager": partial(mixtral, "eager"),
    "mixtral-grouped_mm": partial(mixtral, "grouped_mm"),
    "mixtral-batched_mm": partial(mixtral, "batched_mm"),
    "qwen2moe-eager": partial(qwen2moe, "eager"),
    "qwen2moe-grouped_mm": partial(qwen2moe, "grouped_mm"),
    "qwen2moe-batched_mm": partial(qwen2moe, "batched_mm"),
    "detr": detr,
    "perceiver": perceiver,
    "whisper": whisper,
    "xlnet": xlnet,
    "deberta": deberta,
    "longformer": longformer,
    "recurrentgemma": recurrentgemma,
    "timesformer": timesformer,
    "dora": partial(dora, "q_proj", "down_proj"),
    "dora-embedding": partial(dora, "embed_tokens", "q_proj"),
    "oft": oft,
    "resnet": resnet,
}
SINGLE = {"mixtral-grouped_mm", "qwen2moe-grouped_mm", "xlnet", "longformer", "recurrentgemma"}
"""These run in float32: ``grouped_mm`` has no kernel for float64, and the others always do a part in float32.

In float64 XLNet raises an error, Longformer's gradients are NaN, and RecurrentGemma's have the precision of float32.
"""
LLAMAS = {
    "mixtral-eager",
    "mixtral-batched_mm",
    "qwen2moe-eager",
    "qwen2moe-batched_mm",
    "dora",
    "dora-embedding",
    "oft",
}
"""These normalize in float32, whatever the data type: what is pulled through that is rounded to it."""

QUICK = {"mixtral-eager", "detr", "xlnet", "dora"}
each_model = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
pytestmark = pytest.mark.filterwarnings(
    # transformers warns when peft asks whether gradient checkpointing is on
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture
def case(name: str) -> Iterator[Case]:
    """The default data type is set, since some models make constants of that type in each call."""
    torch.set_default_dtype(torch.float32 if name in SINGLE else torch.float64)
    try:
        found = MODELS[name]()
        with torch.no_grad():
            for p in found.model.parameters():  # zeros, as in adapters, would make gradients of others vanish
                p.add_(0.1 * torch.randn_like(p))
        found.model.train(found.mixed)
        yield found
    finally:
        torch.set_default_dtype(torch.float32)


def losses(case: Case, model: nn.Module, lossfunc: nn.Module | None) -> tuple[Tensor, list[Tensor]]:
    """``lossfunc`` of the main output, or the model's own loss, and the outputs that it depends on."""
    if lossfunc is None:
        result = model(**case.kwargs, **case.labels)
        return result.loss, case.outputs(result)
    main = case.outputs(model(**case.kwargs))[0]
    scores = main.flatten(0, -2)
    return lossfunc(scores, torch.arange(len(scores)) % scores.shape[-1]), [main]


def truths(case: Case, lossfunc: nn.Module | None) -> dict[str, tuple[Tensor, Tensor] | None]:
    """The gradient of each parameter and the individual ones by plain autograd; ``None`` where there is no gradient."""
    model = deepcopy(case.model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss, outputs = losses(case, model, lossfunc)
    cotangents = torch.autograd.grad(loss, outputs, retain_graph=True)
    rows = []
    for n in range(N):
        of_row = [torch.zeros_like(g).index_copy(0, torch.tensor([n]), g[n, None]) for g in cotangents]
        arguments = {"retain_graph": True, "allow_unused": True}
        rows.append(torch.autograd.grad(outputs, list(parameters.values()), of_row, **arguments))
    loss.backward()
    found = {}
    for (name, p), individual in zip(parameters.items(), zip(*rows, strict=True), strict=True):
        found[name] = None if p.grad is None else (p.grad, torch.stack(individual))
    return found


def near(found: Tensor, truth: Tensor, size: Tensor, rtol: float) -> bool:
    """Each sample's entries are equal up to rounding, measured by the sample's own ``size``."""
    return found.shape == truth.shape and bool(((found - truth).flatten(1).abs().amax(1) <= rtol * size).all())


def check(case: Case, lossfunc: nn.Module | None) -> None:
    found = truths(case, lossfunc)
    rtol = 1e-9 if torch.get_default_dtype() == torch.float64 else 3e-5
    floor = 1e-4 * max(float(rows.abs().max()) for _, rows in filter(None, found.values()))
    for name, pair in found.items():
        if pair is not None:  # complete: the loss depends on nothing but these outputs
            plain, truth = pair
            assert near(truth.sum(0)[None], plain[None], truth.abs().max().clamp(min=floor), rtol), name
    for subset in (None, [2, 0]):
        model = extend(deepcopy(case.model))
        loss, _ = losses(case, model, lossfunc and extend(deepcopy(lossfunc)))
        with warnings.catch_warnings(), backpack(BatchGrad(subsampling=subset), BatchL2Grad(subsampling=subset)):
            if case.mixed:
                warnings.filterwarnings("ignore", ".*mix", UserWarning)  # says that this takes time
            loss.backward()
        for name, p in model.named_parameters():
            if found.get(name) is None:
                assert p.grad is None and not hasattr(p, "grad_batch") and not hasattr(p, "batch_l2"), name
                continue
            plain, truth = found[name]
            assert torch.equal(p.grad, plain), name
            assert hasattr(p, "grad_batch") and hasattr(p, "batch_l2"), name
            rows = truth if subset is None else truth[subset]
            size = rows.flatten(1).abs().amax(1).clamp(min=floor)
            assert near(p.grad_batch, rows, size, rtol), (name, subset)
            squares = rows.flatten(1).square().sum(1)
            assert near(p.batch_l2[:, None], squares[:, None], torch.maximum(squares, size**2), rtol), (name, subset)


@each_model
def test_individual_gradients_of_a_loss_on_top_of_the_model_are_exact(case):
    check(case, nn.CrossEntropyLoss())


@each_model
def test_individual_gradients_of_the_loss_that_the_model_computes_itself_are_exact(case):
    check(case, None)


@dataclass
class Curvature:
    """Of a parameter: the samples' diagonals of the generalized Gauss-Newton matrix ``[N, *p]``, and its block."""

    diagonals: Tensor
    block: Tensor | None


def curvatures(case: Case, with_block: set[str]) -> dict[str, Curvature | None]:
    """Of each parameter, by plain autograd: a row of the Jacobian for each score; ``None`` where there is no gradient.

    The scores of a position have the cross entropy's Hessian, ``diag(q) - q q^T`` with the probabilities ``q``.
    """
    model = deepcopy(case.model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scores = case.outputs(model(**case.kwargs))[0].flatten(0, -2)
    sums = {
        name: Curvature(
            torch.zeros(N, *p.shape, dtype=torch.float64),
            torch.zeros(p.numel(), p.numel(), dtype=torch.float64) if name in with_block else None,
        )
        for name, p in parameters.items()
    }
    unused = set(parameters)
    for position, q in enumerate(scores.detach().double().softmax(1)):
        hessian = (q.diag() - q.outer(q)) / len(scores)
        arguments = {"retain_graph": True, "allow_unused": True}
        rows = [torch.autograd.grad(score, list(parameters.values()), **arguments) for score in scores[position]]
        for (name, found), grads in zip(sums.items(), zip(*rows, strict=True), strict=True):
            if grads[0] is not None:
                unused.discard(name)
                jacobian = torch.stack(grads).flatten(1).double()
                turned = hessian @ jacobian
                diagonal = (jacobian * turned).sum(0).reshape(found.diagonals.shape[1:])
                found.diagonals[position * N // len(scores)] += diagonal
                if found.block is not None:
                    found.block += jacobian.T @ turned
    return {name: None if name in unused else found for name, found in sums.items()}


def second_order(case: Case, plain: nn.Module, extension: Any) -> nn.Module:
    """An extended copy after a backward pass; its gradients are those of a plain copy."""
    model = extend(deepcopy(case.model))
    loss, _ = losses(case, model, extend(nn.CrossEntropyLoss()))
    torch.manual_seed(0)
    with warnings.catch_warnings(), backpack(extension):
        if case.mixed:
            warnings.filterwarnings("ignore", ".*mix", UserWarning)
        loss.backward()
    for (name, p), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert hasattr(p, extension.savefield) == (other.grad is not None), name
        assert p.grad is None if other.grad is None else torch.equal(p.grad, other.grad), name
    return model


@each_model
def test_gauss_newton_matrices_are_exact(case, name):
    plain = deepcopy(case.model)
    losses(case, plain, nn.CrossEntropyLoss())[0].backward()
    run = partial(second_order, case, plain)
    factors: dict[str, list[Tensor]] = {}
    if case.mixed:
        with pytest.raises(RuntimeError, match="samples are mixed"):
            run(KFAC(fisher="exact"))
    else:
        factors = {name: p.kfac for name, p in run(KFAC(fisher="exact")).named_parameters() if p.grad is not None}
    single = {name for name, found in factors.items() if len(found) == 1 and found[0].dim() == 2}
    truth = {name: found for name, found in curvatures(case, single).items() if found is not None}
    rtol = 1e-4 if name in SINGLE else 2e-6 if name in LLAMAS else 1e-9
    floor = 1e-6 * max(float(found.diagonals.max()) for found in truth.values())

    for subset in (slice(None), [1, 0]):
        model = run(DiagGGNExact(subsampling=None if isinstance(subset, slice) else subset))
        for key, p in model.named_parameters():
            if key in truth:
                expected = truth[key].diagonals[subset].sum(0)[None]
                size = expected.amax().clamp(min=floor)
                assert near(p.diag_ggn_exact[None], expected, size, rtol), (key, subset)

    pairs = zip(run(DiagGGNMC()).named_parameters(), run(SqrtGGNMC()).parameters(), strict=True)
    for (key, p), root in pairs:
        if key in truth:
            expected = root.sqrt_ggn_mc.square().sum((0, 1))[None]
            assert near(p.diag_ggn_mc[None], expected, expected.amax().clamp(min=floor), rtol), key

    for key, found in factors.items():
        trace = torch.stack([(factor if factor.dim() == 1 else factor.diagonal()).sum() for factor in found]).prod()
        assert trace.isfinite() and trace >= 0, key
        if key in single:
            block = truth[key].block
            assert near(found[0][None], block[None], block.abs().amax().clamp(min=floor), rtol), key
