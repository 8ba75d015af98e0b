"""Encoders and a head, joined: which parts are built, what comes out, and what leaves as an exported program."""

from functools import partial
from typing import Any

import pytest
import torch
from slow_cases import slow_except

from fusion.encoders import Columns, Encoder, Images, TableColumns, Texts, TimmImage, TransformersText
from fusion.errors import UserError
from fusion.heads import Concat, FusionHead, Gated, InteractionExperts, LevelWeighted, Unimodal, attention_maps
from fusion.heads.registry import HEADS as EVERY_HEAD
from fusion.model import FusionModel, factory_parts, head_class, head_spec

BERT = {
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
}
HEADS = {name: partial(head, dim=8) for name, head in EVERY_HEAD.items()}
IMAGES = ["test_resnet", "test_vit"]


def encoders(image: str = "test_resnet") -> dict[str, Encoder]:
    torch.manual_seed(0)
    return {"text": TransformersText(config=BERT), "image": TimmImage(image, pretrained=False, image_size=64)}


def inputs(size: int = 3, length: int = 6, *, seed: int = 1) -> dict[str, Any]:
    """Sample 0 lacks its text, sample 1 its image."""
    torch.manual_seed(seed)
    mask = torch.arange(length)[None] < torch.randint(1, length + 1, (size, 1))
    mask[0] = False
    present = torch.ones(size, dtype=torch.bool)
    present[1] = False
    return {
        "text": Texts(torch.randint(4, 50, (size, length)).where(mask, 0), mask),
        "image": Images(torch.rand(size, 3, 64, 64), present),
    }


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("name", HEADS)
def test_a_model_of_every_stage_trains_every_parameter_on_a_mixed_batch(name: str, image: str) -> None:
    model = FusionModel.build(encoders(image), HEADS[name], 3).train()
    output = model(inputs(4)).output
    assert output.shape == (4, 3)
    assert output.isfinite().all()
    output.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("image", IMAGES)
def test_early_fusion_carries_no_body_of_an_encoder(image: str) -> None:
    early = FusionModel.build(encoders(image), HEADS["JointTransformer"], 3)
    names = [key for key, _ in early.encoders.named_parameters()]
    assert names
    assert not [key for key in names if "encoder.layer" in key or "blocks." in key or "layer1" in key]
    assert early.head.dims == {name: encoder.embed_dim for name, encoder in early.encoders.items()}

    later = FusionModel.build(encoders(image), HEADS["Concat"], 3)
    assert later.head.dims == {name: encoder.dim for name, encoder in later.encoders.items()}
    assert sum(p.numel() for p in early.encoders.parameters()) < sum(p.numel() for p in later.encoders.parameters()) / 4


@pytest.mark.parametrize("image", IMAGES)
def test_a_head_of_levels_gets_the_last_depths_of_each_encoder_with_their_widths(image: str) -> None:
    made = encoders(image)
    depths = {name: range(-min(3, encoder.depth), 0) for name, encoder in made.items()}
    widths = {name: encoder.level_dims(depths[name]) for name, encoder in made.items()}
    model = FusionModel.build(made, partial(LevelWeighted, dim=8, depths=3), 3).eval()
    assert model.head.level_dims == widths
    assert len(widths["text"]) == 2  # all it has
    given = {name: encoder.levels(inputs()[name], list(depths[name])) for name, encoder in made.items()}
    assert torch.equal(model(inputs()).output, model.head(given).output)


def test_attention_maps_of_a_whole_model_are_named_by_where_they_are() -> None:
    model = FusionModel.build(encoders(), HEADS["CrossAttention"], 3).eval()
    output, maps = attention_maps(model, inputs())
    assert torch.equal(output.output, model(inputs()).output)
    text_reads_image = maps["head.layers.0.text.cross_attention"]
    assert text_reads_image.shape[:3] == (3, 4, 6)
    torch.testing.assert_close(text_reads_image[2].sum(dim=-1), torch.ones(4, 6))
    assert (text_reads_image[1] == 0).all()  # sample 1 has no image


@pytest.mark.parametrize("name", HEADS)
def test_what_an_absent_modality_holds_changes_no_prediction(name: str) -> None:
    model = FusionModel.build(encoders(), HEADS[name], 3).eval()
    batch = inputs()
    pixels, ids = batch["image"].pixels.clone(), batch["text"].ids.clone()
    pixels[1], ids[0] = float("nan"), 17
    other = {"text": batch["text"]._replace(ids=ids), "image": batch["image"]._replace(pixels=pixels)}
    torch.testing.assert_close(model(other).output, model(batch).output)


@pytest.mark.parametrize("name", ["Gated", "CrossAttention", "LevelWeighted", "JointTransformer"])  # a head of each stage
def test_beside_frozen_encoders_the_head_alone_learns(name: str) -> None:
    free = FusionModel.build(encoders(), HEADS[name], 3)
    frozen = {
        "text": TransformersText(config=BERT, frozen=True),
        "image": TimmImage("test_resnet", pretrained=False, image_size=64, frozen=True),
    }
    model = FusionModel.build(frozen, HEADS[name], 3).train()
    assert model.state_dict().keys() == free.state_dict().keys()
    model(inputs(4)).output.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == key.startswith("head."), key
    assert all(encoder.frozen and not encoder.training for encoder in model.encoders.values())


def test_one_modality_makes_a_model_without_fusion() -> None:
    model = FusionModel.build({"text": encoders()["text"]}, partial(Unimodal, dim=8), 3)
    output, by_modality, *_ = model({"text": inputs()["text"]})
    assert output.shape == (3, 3)
    assert torch.equal(by_modality["text"], output)


def test_a_head_for_other_modalities_is_refused_naming_both() -> None:
    with pytest.raises(ValueError, match="built for text, picture; the encoders are text, image"):
        FusionModel(encoders(), Concat({"text": 16, "picture": 96}, 3))


def test_the_parts_of_a_factory_are_its_class_and_what_it_binds() -> None:
    assert factory_parts(Gated, FusionHead) == (Gated, {})
    assert factory_parts(partial(Gated, dim=64), FusionHead) == (Gated, {"dim": 64})
    assert head_class(partial(Gated, dim=64)) is Gated

    def instantiate(cls: type, *args: Any, **settings: Any) -> Any:  # as jsonargparse does
        return cls(*args, **settings)

    assert factory_parts(partial(instantiate, Concat, dim=8), FusionHead) == (Concat, {"dim": 8})


@pytest.mark.parametrize("name", EVERY_HEAD)  # of every stage: pooled, tokens, levels, embeddings
def test_a_function_that_makes_a_head_builds_the_same_model_as_the_class(name: str) -> None:
    torch.manual_seed(0)
    expected = FusionModel.build(encoders(), HEADS[name], 3).eval()
    torch.manual_seed(0)
    model = FusionModel.build(encoders(), lambda dims, out: EVERY_HEAD[name](dims, out, dim=8), 3).eval()
    assert torch.equal(model(inputs()).output, expected(inputs()).output)
    assert head_class(lambda dims, out: EVERY_HEAD[name](dims, out, dim=8)) is None


def test_what_the_constructor_of_a_head_rejects_is_a_user_error_and_what_else_goes_wrong_is_not() -> None:
    with pytest.raises(UserError, match="Gated: dim is 0; expected at least 1"):
        FusionModel.build(encoders(), partial(Gated, dim=0), 3)
    with pytest.raises(TypeError, match="returned a int"):
        FusionModel.build(encoders(), lambda dims, out: 3, 3)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match="rank") as raised:
        FusionModel.build(encoders(), partial(Gated, rank=2), 3)
    assert not isinstance(raised.value, UserError)


def test_the_spec_of_a_head_builds_it_again_whatever_made_it() -> None:
    for factory in (partial(LevelWeighted, depths=2, dim=8), lambda dims, out: LevelWeighted(dims, out, depths=2, dim=8)):
        model = FusionModel.build(encoders(), factory, 3)
        random_state = torch.get_rng_state()
        spec = head_spec(model)
        assert spec == {"class": "fusion.heads.level_weighted.LevelWeighted", "init": {"depths": 2, "dim": 8}}
        assert torch.equal(torch.get_rng_state(), random_state)


class Scaled(Gated):
    """A head of a user, with an argument that is not plain data."""

    def __init__(self, dims: Any, out_dim: int, dim: int = 8, activation: Any = None) -> None:
        super().__init__(dims, out_dim, dim=dim)


def widened(dims: Any, out_dim: int) -> FusionHead:
    head = Scaled(dims, out_dim)
    head.classifier = torch.nn.Linear(8, out_dim, bias=False)
    return head


class Elsewhere:
    class Nested(Gated):
        pass


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda dims, out: Scaled(dims, out, activation=torch.relu), "argument activation of Scaled is a builtin_function_or_method"),
        (lambda dims, out: Elsewhere.Nested(dims, out), "its class Elsewhere.Nested can't be imported"),
        (widened, r"has classifier.bias of shape \(3,\), this head None; it must not be changed after construction"),
    ],
)
def test_a_head_that_a_checkpoint_could_not_bring_back_is_rejected_with_the_reason(factory: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"the head can't be saved: .*{message}"):
        head_spec(FusionModel.build(encoders(), factory, 3))


def test_a_positional_argument_of_a_head_is_recorded_by_its_name() -> None:
    assert head_spec(FusionModel.build(encoders(), lambda dims, out: Scaled(dims, out, 4), 3))["init"] == {"dim": 4}


@pytest.mark.parametrize("wrong", [None, "Gated", dict, lambda dims, out_dim: None, partial(dict)])
def test_what_is_no_factory_is_refused_naming_the_class_that_was_expected(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a FusionHead class or a functools\.partial of one"):
        factory_parts(wrong, FusionHead)


@pytest.mark.parametrize("name", slow_except(["Concat", "CrossAttention", "JointTransformer"], "CrossAttention"))
def test_an_exported_model_answers_as_the_eager_one_for_other_batches_and_lengths(name: str) -> None:
    model = FusionModel.build(encoders("test_vit"), HEADS[name], 3).eval()
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=24)
    shapes: Any = {"text": Texts({0: batch, 1: length}, {0: batch, 1: length}), "image": Images({0: batch}, {0: batch}, None)}  # type: ignore[arg-type]
    program = torch.export.export(model, (inputs(),), dynamic_shapes=(shapes,)).module()
    for size, words in ((2, 3), (5, 11)):
        other = inputs(size, words, seed=size)
        torch.testing.assert_close(program(other).output, model(other).output, atol=1e-5, rtol=1e-5)


def test_a_graph_of_pooled_nodes_asks_the_encoders_for_no_tokens() -> None:
    model = FusionModel.build(encoders(), partial(EVERY_HEAD["AdaptiveGraph"], dim=8, nodes="pooled"), 3)
    assert model.head.stage == "pooled"
    assert EVERY_HEAD["AdaptiveGraph"].stage == "tokens"
    assert model(inputs()).output.isfinite().all()


@pytest.mark.parametrize("head", ["Gated", "CrossAttention", "LevelWeighted", "JointTransformer"])
def test_forward_is_encode_and_fuse(head):
    torch.manual_seed(0)
    encoders = {name: TableColumns(dim=8, heads=2, depth=2, numbers=3) for name in ("one", "other", "third")}
    model = FusionModel.build(encoders, HEADS[head], 4).eval()
    mask = torch.tensor([[True] * 3, [False] * 3])
    inputs = {name: Columns(torch.randn(2, 3), torch.zeros(2, 0, dtype=torch.int64), mask) for name in encoders}
    features = model.encode(inputs)
    assert list(features) == ["one", "other", "third"]
    assert torch.equal(model.fuse(features).output, model(inputs).output)
    kept = {name: torch.tensor([name != "one", True]) for name in encoders}
    assert not torch.equal(model.fuse(model.encode(inputs, kept)).output[0], model(inputs).output[0])


@pytest.mark.parametrize("expert", ["JointTransformer", "LevelWeighted", "CrossAttention", "ProductOfExperts"])
def test_experts_of_every_stage_get_the_widths_that_they_read_and_are_saved_as_plain_data(expert: str) -> None:
    model = FusionModel.build(encoders("test_vit"), partial(InteractionExperts, dim=8, expert=expert), 3).train()
    assert model.head.stage == EVERY_HEAD[expert].stage
    assert [*model.head.level_dims] == (["text", "image"] if expert == "LevelWeighted" else [])
    output, _, losses, *_ = model(inputs(4))
    (output.square().sum() + losses.sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    spec = head_spec(model)
    assert spec == {"class": "fusion.heads.interaction_experts.InteractionExperts", "init": {"dim": 8, "expert": expert}}
