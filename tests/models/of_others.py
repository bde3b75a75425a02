"""Unmodified models that others wrote, small and without downloads."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers as hf
from mlp_mixer_pytorch import MLPMixer
from pytorchcv.models.resnet_cifar import resnet20_cifar10

from .problem import Problem

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONVNETS = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4}
MODELS = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(vocab_size=50, max_position_embeddings=16, **SMALL)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=50, num_key_value_heads=1, **SMALL)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=50, **T5)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(image_size=16, patch_size=8, num_labels=5, **SMALL)),
    "swin": lambda: hf.SwinForImageClassification(hf.SwinConfig(num_labels=5, **SWIN)),
    "resnet": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=8, layer_type="basic", **CONVNETS)
    ),
    "convnext": lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(num_stages=2, **CONVNETS)),
    "mobilenet": lambda: hf.MobileNetV2ForImageClassification(
        hf.MobileNetV2Config(image_size=16, depth_multiplier=0.25, num_labels=5)
    ),
    "resnet_inplace": resnet20_cifar10,
    "mixer": lambda: MLPMixer(image_size=16, channels=3, patch_size=4, dim=16, depth=2, num_classes=5),
}


LANGUAGE = ("gpt2", "bert", "llama", "t5")
SINGLE = ("llama", "t5")
"""Normalize, and take softmax, in float32 whatever the model's data type: two ways to a number differ by its rounding.

In second derivatives, which are differences of larger numbers, by up to a thousand times as much. ``widened`` shows
that it is this alone.
"""


@contextmanager
def widened() -> Iterator[None]:
    """What is computed in float32 inside of a model is computed in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def problem(name: str, n: int = 3, length: int = 7) -> Problem:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    if name in LANGUAGE:
        ids = torch.randint(0, 50, (n, length))
        kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return Problem(model, (), kwargs | ({"decoder_input_ids": ids} if name == "t5" else {}))
    size = 32 if name.startswith("resnet") else 16
    return Problem(model, (torch.randn(n, 3, size, size, dtype=torch.float64),))
