"""Where nothing is masked no attention gets a mask, and where something is, none of (B, 1, N, N) is made."""

import pytest
import torch

import fusion.heads.attention as attention
from fusion.encoders import Images, Texts, TimmImage, TransformersText
from fusion.features import Features
from fusion.heads.registry import HEADS
from fusion.model import FusionModel

ATTENDING = ["Bottleneck", "CoAttention", "CrossAttention", "GatedCrossAttention", "JointTransformer", "Perceiver"]
BERT = {
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


@pytest.fixture
def masks(monkeypatch):
    """The masks that attention in heads gets."""
    seen, usual = [], attention.scaled_dot_product_attention

    def look(*given, attn_mask=None, **options):
        seen.append(attn_mask)
        return usual(*given, attn_mask=attn_mask, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", look)
    return seen


def features(full, rows=None):
    generator = torch.Generator().manual_seed(0)
    text, image = torch.randn(4, 7, 32, generator=generator), torch.randn(4 if rows is None else 3, 9, 48, generator=generator)
    there = torch.ones(4, 7, dtype=torch.bool), torch.ones(4, 9, dtype=torch.bool)
    return {"text": Features(text, there[0], text.mean(1), full=full), "image": Features(image, there[1], image.mean(1), rows, full)}


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 1, 1, 2])], ids=["own", "shared"])
@pytest.mark.parametrize("name", ATTENDING)
def test_a_head_that_knows_all_to_be_real_masks_nothing_and_answers_the_same(masks, name, rows):
    torch.manual_seed(0)
    head = HEADS[name]({"text": 32, "image": 48}, 5, dim=64).eval()
    looked = head(features(None, rows)).output
    assert any(mask is not None for mask in masks)
    masks.clear()
    told = head(features(True, rows)).output
    assert masks == [None] * len(masks)
    assert masks
    torch.testing.assert_close(told, looked, atol=1e-5, rtol=1e-5)


@pytest.fixture
def model():
    torch.manual_seed(0)
    encoders = {"image": TimmImage("resnet10t", pretrained=False, image_size=32), "text": TransformersText(config=BERT)}
    return FusionModel.build(encoders, HEADS["CrossAttention"], 5).eval()


def inputs(full):
    ids = torch.randint(5, 50, (4, 6), generator=torch.Generator().manual_seed(0))
    there = torch.ones(4, dtype=torch.bool)
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {
        "image": Images(pixels, there, any_present=True, all_present=full),
        "text": Texts(ids, torch.ones(4, 6, dtype=torch.bool), full),
    }


def test_what_the_loader_knows_reaches_the_head(model, masks):
    looked = model(inputs(None)).output
    masks.clear()
    told = model(inputs(True)).output
    assert masks == [None] * len(masks)
    torch.testing.assert_close(told, looked, atol=1e-5, rtol=1e-5)


def test_a_modality_that_was_dropped_is_masked_all_the_same(model, masks):
    kept = {"image": torch.tensor([True, False, True, True]), "text": torch.ones(4, dtype=torch.bool)}
    told, looked = (model(inputs(full), kept).output for full in (True, None))
    assert any(mask is not None for mask in masks)
    torch.testing.assert_close(told, looked, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(told[1], model(inputs(True)).output[1])


@pytest.mark.parametrize("full", [True, None])
def test_a_text_model_gets_no_mask_or_one_of_its_keys(monkeypatch, full):
    encoder = TransformersText(config=BERT).eval()
    seen, usual = [], torch.nn.functional.scaled_dot_product_attention

    def look(*given, attn_mask=None, **options):
        seen.append(None if attn_mask is None else tuple(attn_mask.shape))
        return usual(*given, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    encoder(inputs(full)["text"])
    assert seen == [None if full else (4, 1, 1, 6)] * 2
