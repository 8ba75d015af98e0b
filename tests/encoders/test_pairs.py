"""CLIP and SigLIP as pairs of encoders: their own similarities, pixels and padding, and all that other encoders do."""

import copy
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_hub import go_offline, into_cache
from tiny_pairs import KINDS, save_pair
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer, BertConfig, CLIPTextModel, Siglip2Config
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from fusion.data.kinds.text import batch_texts
from fusion.data.pretrained_tokenizer import pretrained_tokenizer
from fusion.encoders import Images, PairImage, PairText, Texts, TransformersText
from fusion.errors import UserError
from fusion.features import Features
from fusion.heads import Concat, CrossAttention, JointTransformer, LevelWeighted, LogitMean
from fusion.model import FusionModel
from fusion.processing.images import ImageSpec, load_image

PROCESSORS = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}
SENTENCES = ["is there a red circle?", "a blue square", "what colour"]
every = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {kind: str(save_pair(kind, tmp_path_factory.mktemp(kind))) for kind in KINDS}


@pytest.fixture
def folder(kind: str, folders: dict[str, str]) -> str:
    return folders[kind]


def encoders(folder: str, **options: Any) -> tuple[PairImage, PairText]:
    return PairImage(folder, **options).eval(), PairText(folder, **options).eval()


def pixels(count: int = 3, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def images(present: list[bool]) -> Images:
    return Images(pixels(len(present)), torch.tensor(present))


def texts(folder: str, sentences: list[str | None] = [*SENTENCES, None]) -> Texts:  # noqa: B006
    return batch_texts(pretrained_tokenizer(folder, max_length=12), sentences)


def normalised(encoder: PairImage, raw: Tensor) -> Tensor:
    return (raw - encoder.mean) / encoder.std


def theirs(folder: str) -> Any:
    return AutoModel.from_pretrained(folder).eval()


def assert_same(one: Features, other: Features, samples: Any = slice(None)) -> None:
    torch.testing.assert_close(one.unshared().tokens[samples], other.unshared().tokens[samples], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.unshared().pooled[samples], other.unshared().pooled[samples], atol=1e-5, rtol=1e-5)


def rebuilt(encoder: Any) -> Any:
    again = type(encoder)(**json.loads(json.dumps(encoder.spec()))).eval()
    again.load_state_dict(encoder.state_dict())
    return again


# The pair's own similarities.


@every
@torch.no_grad()
def test_cosines_are_those_of_transformers(folder: str, kind: str) -> None:
    image, text = encoders(folder)
    padding = {"padding": "max_length", "max_length": 12} if kind == "siglip" else {"padding": True}
    batch = AutoTokenizer.from_pretrained(folder)(SENTENCES, **padding, return_tensors="pt")
    if kind == "siglip":  # as its documentation has it: the tokenizer of the published models returns no mask
        del batch["attention_mask"]
    batch.pop("token_type_ids", None)
    output = theirs(folder)(pixel_values=normalised(image, pixels()), **batch)
    expected = output.image_embeds @ output.text_embeds.T
    found = cosine_similarity(image(pixels()).pooled[:, None], text(texts(folder)).pooled[None, :3], dim=-1)
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    logits = found / image.temperature + image.logit_bias
    torch.testing.assert_close(logits, output.logits_per_image, atol=1e-4, rtol=1e-4)
    assert (image.temperature, image.logit_bias) == (text.temperature, text.logit_bias)


@every
def test_cosines_stay_those_of_transformers_when_a_batch_is_longer_and_a_sample_has_no_text(folder: str, kind: str) -> None:
    _, text = encoders(folder)
    alone, beside = text(texts(folder, ["a blue square"])), text(texts(folder, ["a blue square", " ".join(["red"] * 8), None]))
    torch.testing.assert_close(alone.pooled[0], beside.pooled[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone.tokens[0], beside.tokens[0, : alone.tokens.shape[1]], atol=1e-5, rtol=1e-5)
    assert beside.present.tolist() == [True, True, False]
    assert beside.pooled.isfinite().all()


@every
def test_what_stands_in_the_padding_changes_nothing(folder: str, kind: str) -> None:
    _, text = encoders(folder)
    batch = texts(folder)
    noisy = batch._replace(ids=torch.where(batch.mask, batch.ids, 5))
    for read in (text.forward, text.embed, lambda x: text.levels(x, [0])[0]):
        one, other = read(batch), read(noisy)
        torch.testing.assert_close(one.tokens[batch.mask], other.tokens[batch.mask])
        torch.testing.assert_close(one.pooled[:3], other.pooled[:3])


def test_texts_longer_than_the_positions_are_rejected(folders: dict[str, str]) -> None:
    with pytest.raises(UserError, match="texts of 13 tokens, but the model has 12 positions"):
        PairText(folders["siglip"])(Texts(torch.ones(1, 13, dtype=torch.int64), torch.ones(1, 13, dtype=torch.bool)))


def test_padding_is_that_of_the_tokenizer_and_not_of_the_config(folders: dict[str, str], tmp_path: Path) -> None:
    _, text = encoders(folders["siglip"])
    assert (text.pad_id, text.body.config.pad_token_id) == (0, 1)
    without = save_pair("siglip", tmp_path, tokenizer=False)
    assert PairText(str(without)).pad_id == 1
    assert PairText(str(without), pad_id=2).pad_id == 2
    assert rebuilt(text).pad_id == 0


@pytest.mark.parametrize("padding", [1, 14, 15], ids=["low", "the end of the text", "the largest id"])
@torch.no_grad()
def test_clip_pools_the_end_of_the_text_whatever_pads_it(padding: int, tmp_path: Path) -> None:
    folder = str(save_pair("clip", tmp_path, text={"vocab_size": 16}))
    batch = texts(folder, SENTENCES)
    batch = batch._replace(ids=torch.where(batch.mask, batch.ids, padding))
    output = theirs(folder).get_text_features(input_ids=batch.ids, attention_mask=batch.mask.long())
    torch.testing.assert_close(PairText(folder).eval()(batch).pooled, output.pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", [1, 14, 15], ids=["low", "the end of the text", "the largest id"])
@torch.no_grad()
def test_by_the_legacy_rule_the_end_of_the_text_is_its_largest_id(padding: int, tmp_path: Path) -> None:
    """transformers takes the largest id of the padded row; with padding above all, that is right only where there is none."""
    folder = str(save_pair("clip", tmp_path, text={"vocab_size": 16, "eos_token_id": 2}))
    batch = texts(folder, SENTENCES)
    batch = batch._replace(ids=torch.where(batch.mask, batch.ids, padding))
    alone = [theirs(folder).get_text_features(input_ids=ids[mask][None]).pooler_output[0] for ids, mask in zip(*batch[:2], strict=True)]
    torch.testing.assert_close(PairText(folder).eval()(batch).pooled, torch.stack(alone), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_siglip_of_another_text_width_projects_its_tokens_like_its_pooled_features(tmp_path: Path) -> None:
    folder = str(save_pair("siglip", tmp_path, text={"hidden_size": 16, "projection_size": 24}))
    image, text = encoders(folder)
    features = text(texts(folder))
    assert (image.dim, text.dim, features.tokens.shape[-1], features.pooled.shape[-1]) == (24, 24, 24, 24)
    batch = text.padded(texts(folder))
    torch.testing.assert_close(features.pooled, theirs(folder).get_text_features(input_ids=batch.ids).pooler_output, atol=1e-5, rtol=1e-5)


@every
@torch.no_grad()
def test_tokens_are_the_last_hidden_states_in_the_space_of_the_pooled(folder: str, kind: str) -> None:
    image, text = encoders(folder)
    model, batch = theirs(folder), texts(folder, SENTENCES)
    patches = model.vision_model(pixel_values=normalised(image, pixels())).last_hidden_state
    if kind == "clip":
        patches = model.visual_projection(model.vision_model.post_layernorm(patches))
        words = model.text_projection(model.text_model(input_ids=batch.ids).last_hidden_state)
    else:
        words = model.text_model(input_ids=text.padded(batch).ids).last_hidden_state[:, : batch.ids.shape[1]]
    torch.testing.assert_close(image(pixels()).tokens, patches, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text(batch).tokens[batch.mask], words[batch.mask], atol=1e-5, rtol=1e-5)
    if kind == "clip":
        assert torch.equal(image(pixels()).pooled, image(pixels()).tokens[:, 0])


# Images.


@pytest.mark.parametrize("shape", [(60, 41), (33, 100), (32, 32), (20, 25)])
@every
def test_pixels_are_those_of_the_pairs_own_processor(folder: str, kind: str, shape: tuple[int, int], tmp_path: Path) -> None:
    """To two of 255 levels: Pillow rounds between its two passes, whose order depends on the part that is resized; it also clips there,
    which differs by more, but not for this noise."""
    noise = np.random.default_rng(0).integers(100, 150, (*shape, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    encoder = PairImage(folder).eval()
    spec = ImageSpec(encoder.image_size, encoder.data_config["resize"], encoder.data_config["interpolation"])
    found = normalised(encoder, torch.from_numpy(load_image(tmp_path / "a.png", spec)) / 255)
    expected = PROCESSORS[kind].from_pretrained(folder)(Image.open(tmp_path / "a.png"), return_tensors="pt").pixel_values[0]
    assert ((found - expected).abs() * encoder.std * 255).max() <= 2
    assert encoder.data_config["resize"] == {"clip": "crop", "siglip": "squash"}[kind]


def write_processing(folder: str, to: Path, **changed: Any) -> str:
    shutil.copytree(folder, to)
    path = to / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return str(to)


def test_processing_is_read_as_older_and_newer_files_have_it(folders: dict[str, str], tmp_path: Path) -> None:
    constants = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    older = write_processing(folders["clip"], tmp_path / "older", size=32, crop_size=32, resample=2, **constants)
    config = PairImage(older).data_config
    assert config == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize": "crop"}
    newer = tmp_path / "newer"
    shutil.copytree(older, newer)
    nested = json.loads((newer / "preprocessor_config.json").read_text())
    (newer / "preprocessor_config.json").unlink()
    (newer / "processor_config.json").write_text(json.dumps({"image_processor": nested, "processor_class": "CLIPProcessor"}))
    assert PairImage(str(newer)).data_config == config
    plain = write_processing(folders["siglip"], tmp_path / "plain", do_normalize=False)
    assert (PairImage(plain).data_config["mean"], PairImage(plain).data_config["std"]) == ([0.0] * 3, [1.0] * 3)


@pytest.mark.parametrize(
    ("changed", "reason", "override"),
    [
        (
            {"size": {"shortest_edge": 40}},
            r"resizes by size \{'shortest_edge': 40\} and crop_size .*data_config=\{resize: crop\}",
            "resize",
        ),
        ({"do_resize": False}, "expected to squash or crop to the size", "resize"),
        ({"resample": 1}, r"has resample 1; expected one of nearest \(0\), bilinear \(2\), bicubic \(3\)", "interpolation"),
        ({"do_rescale": False}, "scales pixels by 1, expected 1/255", None),
    ],
)
def test_processing_that_can_not_be_expressed_is_rejected_naming_the_override(
    changed: dict[str, Any], reason: str, override: str | None, folders: dict[str, str], tmp_path: Path
) -> None:
    folder = write_processing(folders["clip"], tmp_path / "pair", **changed)
    with pytest.raises(UserError, match=reason):
        PairImage(folder)
    chosen = {"resize": {"resize": "pad"}, "interpolation": {"interpolation": "nearest"}, None: {"mean": 0.5, "std": 0.5}}[override]
    config = PairImage(folder, data_config=chosen).data_config
    assert all(config[key] in (value, [value] * 3) for key, value in chosen.items())


def test_a_folder_without_processing_is_rejected_unless_all_of_it_is_given(folders: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(folders["clip"], tmp_path / "pair")
    (tmp_path / "pair" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"image encoder: could not load .*preprocessor_config\.json"):
        PairImage(str(tmp_path / "pair"))
    chosen = {"mean": 0.5, "std": 0.25, "interpolation": "bilinear", "resize": "pad"}
    assert PairImage(str(tmp_path / "pair"), data_config=chosen).data_config == chosen | {"mean": [0.5] * 3, "std": [0.25] * 3}
    with pytest.raises(UserError, match="data_config has no 'means'"):
        PairImage(folders["clip"], data_config={"means": 0.5})


@every
@torch.no_grad()
def test_images_of_another_size_get_interpolated_positions(folder: str, kind: str) -> None:
    encoder = PairImage(folder, image_size=[32, 48]).eval()
    wide = torch.rand(2, 3, 32, 48)
    output = theirs(folder).get_image_features(pixel_values=normalised(encoder, wide), interpolate_pos_encoding=True)
    torch.testing.assert_close(encoder(wide).pooled, output.pooler_output, atol=1e-5, rtol=1e-5)
    assert_same(rebuilt(encoder)(wide), encoder(wide))
    assert encoder.embed(wide).tokens.shape[1] == encoder(wide).tokens.shape[1] == 4 * 6 + (kind == "clip")


@every
def test_absent_images_change_nothing_and_shared_ones_are_encoded_once(folder: str, kind: str) -> None:
    encoder = PairImage(folder).eval()
    batch = images([True, False, True])
    smudged = batch._replace(pixels=torch.where(batch.present[:, None, None, None], batch.pixels, float("nan")))
    assert_same(encoder(batch), encoder(smudged), [0, 2])
    assert encoder(smudged).tokens.isfinite().all()
    assert encoder(batch).present.tolist() == [True, False, True]

    counts: list[int] = []
    encoder.body.register_forward_pre_hook(lambda m, args, given: counts.append(len(given["pixel_values"])), with_kwargs=True)
    shared = encoder(Images(pixels(2), torch.ones(4, dtype=torch.bool), torch.tensor([0, 1, 1, 0])))
    assert counts == [2]
    assert_same(shared, encoder(pixels(2)[torch.tensor([0, 1, 1, 0])]))


@every
def test_several_images_of_a_sample_add_tokens_and_average_their_embeddings(folder: str, kind: str) -> None:
    encoder = PairImage(folder).eval()
    shown = torch.tensor([[True, True], [True, False]])
    several = encoder(Images(pixels(3), shown.any(dim=1), torch.tensor([[0, 1], [2, 0]]), image_mask=shown))
    single = encoder(pixels(3))
    torch.testing.assert_close(several.pooled, torch.stack([single.pooled[:2].mean(dim=0), single.pooled[2]]))
    assert several.tokens.shape[1] == 2 * single.tokens.shape[1]
    assert several.mask.sum(dim=1).tolist() == [2 * single.tokens.shape[1], single.tokens.shape[1]]


# What every encoder does.


@every
def test_features_of_every_reading_have_the_widths_that_the_encoders_announce(folder: str, kind: str) -> None:
    for encoder, batch in zip(encoders(folder), (images([True, False, True]), texts(folder)), strict=True):
        widths = [encoder.dim, encoder.embed_dim, *encoder.level_dims([-1, 0])]
        for features, width in zip([encoder(batch), encoder.embed(batch), *encoder.levels(batch, [-1, 0])], widths, strict=True):
            count = len(batch.present)
            assert features.tokens.shape == (count, features.mask.shape[1], width)
            assert features.pooled.shape == (count, width)
            assert torch.equal(features.present, batch.present)
        for depth in (2, -3):
            with pytest.raises(UserError, match=f"2 levels; there is no depth {depth}"):
                encoder.levels(batch, [depth])


@every
@torch.no_grad()
def test_levels_are_the_hidden_states_of_transformers(folder: str, kind: str) -> None:
    image, text = encoders(folder)
    model, batch = theirs(folder), texts(folder, SENTENCES)
    patches = model.vision_model(pixel_values=normalised(image, pixels()), output_hidden_states=True).hidden_states
    ids = text.padded(batch).ids if kind == "siglip" else batch.ids
    words = model.text_model(input_ids=ids, output_hidden_states=True).hidden_states
    for depth in (0, 1):
        torch.testing.assert_close(image.levels(pixels(), [depth])[0].tokens, patches[depth + 1], atol=1e-5, rtol=1e-5)
        found = text.levels(batch, [depth])[0].tokens
        torch.testing.assert_close(found[batch.mask], words[depth + 1][:, : found.shape[1]][batch.mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(image.embed(pixels()).tokens, patches[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text.embed(batch).tokens, words[0][:, : batch.ids.shape[1]], atol=1e-5, rtol=1e-5)


@every
def test_a_spec_rebuilds_both_without_the_folder(kind: str, tmp_path: Path) -> None:
    folder = str(save_pair(kind, tmp_path / "pair"))
    image, text = encoders(folder)
    batch = texts(folder)
    shutil.rmtree(folder)
    for encoder, x in ((image, pixels()), (text, batch)):
        again = rebuilt(encoder)
        assert_same(again(x), encoder(x))
        assert rebuilt(again).spec() == again.spec()
        assert (again.temperature, again.logit_bias) == (encoder.temperature, encoder.logit_bias) != (1.0, 0.0)
    assert rebuilt(image).data_config == image.data_config


@pytest.mark.parametrize("what", ["embeddings", "levels", "tokens", "pooled"])
@every
def test_trimmed_to_what_is_read_every_parameter_left_gets_a_gradient(folder: str, kind: str, what: Any) -> None:
    depths = [-1] if what == "levels" else []
    for encoder, batch in zip(encoders(folder), (images([True, False, True]), texts(folder)), strict=True):
        before, count = encoder.read(batch, what, depths), sum(1 for _ in encoder.parameters())
        encoder.trim(what, depths)
        after = encoder.read(batch, what, depths)
        one, other = (f if isinstance(f, Features) else f[0] for f in (before, after))
        torch.testing.assert_close(one.pooled, other.pooled)
        assert what == "pooled" or torch.equal(one.tokens, other.tokens)
        assert (sum(1 for _ in encoder.parameters()) < count) == (what in ("embeddings", "levels"))
        (other.pooled.sin().sum() + (0 if what == "pooled" else other.tokens.sin().sum())).backward()
        for name, p in encoder.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
        if what == "embeddings":
            assert all(name.startswith(("body.embeddings.", "body.pre_layrnorm.")) for name, _ in encoder.named_parameters())


@every
def test_a_frozen_pair_gets_no_gradient_and_keeps_its_mode(folder: str, kind: str) -> None:
    for encoder, batch in zip(encoders(folder, frozen=True), (images([True]), texts(folder)), strict=True):
        encoder.train()
        assert not any(module.training for module in encoder.modules())
        assert not any(p.requires_grad for p in encoder.parameters())
        for features in (encoder(batch), encoder.embed(batch), *encoder.levels(batch, [0])):
            assert not features.pooled.requires_grad
        assert rebuilt(encoder).frozen


@every
def test_recomputed_activations_give_the_same_gradients(folder: str, kind: str) -> None:
    for encoder, batch in zip(encoders(folder), (images([True, True]), texts(folder)), strict=True):
        twin = copy.deepcopy(encoder).train()
        twin.checkpoint_activations()
        for one in (encoder.train(), twin):
            one(batch).pooled.sin().sum().backward()
        assert all(torch.allclose(p.grad, q.grad, atol=1e-6) for p, q in zip(encoder.parameters(), twin.parameters(), strict=True))


@every
def test_parameters_belong_to_the_embeddings_a_block_or_what_follows(folder: str, kind: str) -> None:
    for encoder in encoders(folder):
        layers = encoder.layers_of_parameters()
        assert layers.keys() == {name for name, _ in encoder.named_parameters()}
        assert set(layers.values()) == {0, 1, 2}
        for name, layer in layers.items():
            before, block = "embeddings" in name or "pre_layrnorm" in name, ".layers." in name
            assert layer == (0 if before else int(name.split(".layers.")[1][0]) + 1 if block else 2), name


@pytest.mark.parametrize(
    "head",
    [partial(Concat, dim=8), partial(CrossAttention, dim=16), partial(JointTransformer, dim=16), LevelWeighted, LogitMean],
)
@every
def test_heads_of_every_stage_read_a_pair(folder: str, kind: str, head: Any) -> None:
    image, text = encoders(folder)
    model = FusionModel.build({"image": image, "text": text}, head, 3)
    batch = {"image": images([True, False, True, True]), "text": texts(folder)}
    output = model(batch).output
    assert output.shape == (4, 3)
    output.sin().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class WithPooled(CrossAttention):
    """A head of tokens that also reads pooled features, which nothing says but its code."""

    def fuse(self, features: dict[str, Features]) -> Tensor:
        return super().fuse(features) + features["image"].pooled[:, :1]


@every
def test_a_head_of_tokens_that_reads_pooled_features_in_its_own_way_gets_the_pairs(folder: str, kind: str) -> None:
    image, text = encoders(folder)
    before = image(pixels()).pooled
    FusionModel.build({"image": image, "text": text}, partial(WithPooled, dim=16), 3)
    assert torch.equal(image(pixels()).pooled, before)


@every
def test_tokens_read_alone_need_no_pooling_head_but_unimodal_predictions_do(folder: str, kind: str) -> None:
    for unimodal in (False, True):
        image, text = encoders(folder)
        before = image(pixels()), text(texts(folder, SENTENCES))
        model = FusionModel.build({"image": image, "text": text}, partial(CrossAttention, dim=16, unimodal=unimodal), 3)
        names = {name for name, _ in model.named_parameters()}
        assert any("body.head." in name for name in names) == (unimodal and kind == "siglip")
        assert torch.equal(image(pixels()).tokens, before[0].tokens)
        assert torch.equal(image(pixels()).pooled, before[0].pooled) == (unimodal or kind == "clip")
        assert text(texts(folder, SENTENCES)).pooled.shape == before[1].pooled.shape


@every
@torch.no_grad()
def test_a_text_tower_in_half_precision_gives_features_that_a_float32_head_can_use(folder: str, kind: str) -> None:
    exact, half = PairText(folder).eval(), PairText(folder, dtype="bfloat16").eval()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    features = half(texts(folder))
    assert features.tokens.dtype == features.pooled.dtype == torch.float32
    assert cosine_similarity(features.pooled[:3], exact(texts(folder)).pooled[:3]).min() > 0.99
    assert torch.equal(rebuilt(half)(texts(folder)).pooled, features.pooled)


# From scratch, and what is rejected.


@every
def test_towers_from_scratch_are_made_by_their_configs(kind: str) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    projection = {"projection_dim": 8} if kind == "clip" else {}
    image = PairImage(config={"model_type": f"{kind}_vision_model", "image_size": 32, "patch_size": 16} | shape | projection)
    text = PairText(config={"model_type": f"{kind}_text_model", "vocab_size": 40, "max_position_embeddings": 8} | shape)
    assert image.image_size == (32, 32)
    assert (text.from_scratch, text.longest, text.pad_id) == (True, 8, 0)
    text.fit_vocabulary(30)
    ids = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
    assert text(Texts(ids, ids > 0)).pooled.isfinite().all()
    assert text.end_of_text(Texts(ids, ids > 0)).tolist() == [3, 2]


def test_a_misspelt_config_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"image encoder: config has model_type 'clip_text_model', which is no image tower"):
        PairImage(config={"model_type": "clip_text_model"})
    with pytest.raises(UserError, match=r"image encoder: clip_vision_model has no setting 'patch_sise'\. Did you mean patch_size"):
        PairImage(config={"model_type": "clip_vision_model", "patch_sise": 8})
    with pytest.raises(UserError, match=r"text encoder: siglip_text_model has no setting 'hiden_size'\. Did you mean hidden_size"):
        PairText(config={"model_type": "siglip_text_model", "hiden_size": 8})
    for made in (PairImage, PairText):
        with pytest.raises(UserError, match="exactly one of name_or_path"):
            made()


def test_other_models_are_rejected_with_what_to_use_instead(tmp_path: Path) -> None:
    Siglip2Config().save_pretrained(tmp_path / "naflex")
    BertConfig().save_pretrained(tmp_path / "bert")
    (tmp_path / "open_clip").mkdir()
    (tmp_path / "open_clip" / "open_clip_config.json").write_text("{}")
    save_pair("clip", tmp_path / "clip")
    CLIPTextModel.from_pretrained(tmp_path / "clip").save_pretrained(tmp_path / "tower")
    for made, side in ((PairImage, "image"), (PairText, "text")):
        for name, reason in (
            ("naflex", "SigLIP 2 with NaFlex.*google/siglip2-base-patch16-224"),
            ("bert", "is a 'bert', not a pair; expected model_type clip or siglip"),
            ("tower", "is a 'clip_text_model', not a pair"),
            ("open_clip", "is a model of open_clip.*convert_clip_original_pytorch_to_hf.py"),
            ("nothing", f"could not load.*--model.{side}.name_or_path=FOLDER"),
        ):
            with pytest.raises(UserError, match=f"{side} encoder: .*{reason}"):
                made(str(tmp_path / name))


def test_a_pair_whose_weights_lack_a_tower_is_rejected(folders: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(folders["clip"], tmp_path / "pair")
    CLIPTextModel.from_pretrained(folders["clip"]).save_pretrained(tmp_path / "tower")
    shutil.copy(tmp_path / "tower" / "model.safetensors", tmp_path / "pair" / "model.safetensors")
    with pytest.raises(UserError, match=r"is missing \d+ of the model's weights"):
        PairImage(str(tmp_path / "pair"))


def test_siglip_for_texts_alone_is_pointed_to_its_encoder(folders: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"makes; its encoder is --model\.text=PairText"):
        TransformersText(folders["siglip"])


def test_a_fast_tokenizer_is_read_where_the_models_own_class_is_a_slow_one(folders: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(folders["siglip"], tmp_path / "pair")
    path = tmp_path / "pair" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "SiglipTokenizer"}))
    assert texts(str(tmp_path / "pair")).ids.tolist() == texts(folders["siglip"]).ids.tolist()
    assert PairText(str(tmp_path / "pair")).pad_id == 0


@every
@torch.no_grad()
def test_weights_in_shards_are_those_in_one_file(folder: str, kind: str, tmp_path: Path) -> None:
    sharded = str(save_pair(kind, tmp_path, max_shard_size="20KB"))
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    for one, other, batch in zip(encoders(folder), encoders(sharded), (pixels(), texts(folder)), strict=True):
        assert torch.equal(one(batch).pooled, other(batch).pooled)


@every
@torch.no_grad()
def test_a_hub_name_is_loaded_from_the_cache_offline(folder: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    into_cache(Path(folder), tmp_path, "nobody/tiny")
    go_offline(tmp_path, monkeypatch)
    for one, other, batch in zip(encoders("nobody/tiny"), encoders(folder), (pixels(), texts("nobody/tiny")), strict=True):
        assert torch.equal(one(batch).pooled, other(batch).pooled)
    with pytest.raises(UserError, match=r"image encoder: could not load .*nobody/none"):
        PairImage("nobody/none")
