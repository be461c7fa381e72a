"""The benchmarks' shapes against the libraries whose models they are."""

import pytest
import torch

from benchmarks import shapes


def shapes_of(model):
    return [tuple(param.shape) for param in model.parameters()]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (shapes.resnet18(), "resnet18"),
        (shapes.resnet50(), "resnet50"),
        (shapes.vit(), "vit_base_patch16_224"),
        (shapes.vit(384), "vit_small_patch16_224"),
        (shapes.convnext_tiny(), "convnext_tiny"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_benchmarked_shapes_are_those_of_timms_model(ours, theirs):
    timm = pytest.importorskip("timm", exc_type=ImportError)
    with torch.device("meta"):
        assert shapes_of(timm.create_model(theirs)) == ours


def test_benchmarked_shapes_are_those_of_hugging_faces_gpt2():
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    assert shapes_of(model) == shapes.gpt2()
