"""Image encoders made of timm models of each family: what they give, what they leave alone, and what they refuse."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from tiny_hub import go_offline, into_cache
from torch import Tensor

from fusion.encoders import Images, TimmImage
from fusion.encoders.timm_image import at_most
from fusion.errors import UserError
from fusion.features import Features

SWIN: dict[str, Any] = {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
OPTIONS: dict[str, dict[str, Any]] = {"swin_tiny_patch4_window7_224": SWIN}
# timm's own small twins of ResNet, ConvNeXt, ViT and EfficientNet; a real MobileNetV3; a Swin (channels last) cut down.
SMALL = ["test_resnet", "test_convnext", "test_vit", "test_efficientnet", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224"]
BATCH_NORM = ["test_resnet", "test_efficientnet", "mobilenetv3_small_050"]
LARGER = ["resnet10t", "convnext_atto", "vit_tiny_patch16_224", "efficientnet_b0"]
MODELS = SMALL + [pytest.param(name, marks=pytest.mark.slow) for name in LARGER]

every = pytest.mark.parametrize("name", MODELS)


def make(name: str, **options: Any) -> TimmImage:
    torch.manual_seed(0)
    settings = {"pretrained": False, "image_size": 64, "options": OPTIONS.get(name)} | options
    return TimmImage(name, **settings)


def pixels(count: int = 3, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def images(present: list[bool], seed: int = 1) -> Images:
    return Images(pixels(len(present), seed), torch.tensor(present))


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same(one: Features, other: Features) -> None:
    torch.testing.assert_close(one.tokens, other.tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.pooled, other.pooled, atol=1e-5, rtol=1e-5)


@every
def test_features_of_every_reading_have_the_widths_that_the_encoder_announces(name: str) -> None:
    encoder = make(name).eval()
    batch = images([True, False, True])
    depths = [-1, 0, -2, 0]
    widths = [encoder.dim, encoder.embed_dim, *encoder.level_dims(depths)]
    for features, width in zip([encoder(batch), encoder.embed(batch), *encoder.levels(batch, depths)], widths, strict=True):
        count = features.tokens.shape[1]
        assert features.tokens.shape == (3, count, width)
        assert features.mask.shape == (3, count)
        assert features.mask.dtype == torch.bool
        assert features.pooled.shape == (3, width)
        assert features.present.tolist() == [True, False, True]
        assert features.tokens.isfinite().all()


@every
def test_levels_are_given_in_the_order_asked_for(name: str) -> None:
    encoder = make(name).eval()
    batch = images([True, True])
    count = len(encoder.level_channels())
    first, last = encoder.levels(batch, [0])[0], encoder.levels(batch, [count - 1])[0]
    swapped = encoder.levels(batch, [-1, 0])
    assert_same(swapped[0], last)
    assert_same(swapped[1], first)


def test_a_depth_that_is_not_there_is_refused_naming_how_many_there_are() -> None:
    encoder = make("test_resnet")
    count = len(encoder.level_channels())
    for depth in (count, -count - 1):
        with pytest.raises(UserError, match=f"'test_resnet' has {count} levels; there is no depth {depth}"):
            encoder.levels(images([True]), [depth])


@every
def test_every_parameter_gets_a_gradient_from_tokens_and_pooled(name: str) -> None:
    encoder = make(name)
    features = encoder(images([True, True, False]))
    (features.tokens.sin().sum() + features.pooled.sin().sum()).backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@every
def test_its_spec_is_plain_data_that_builds_the_same_module_without_weights(name: str) -> None:
    encoder = make(name).eval()
    spec = json.loads(json.dumps(encoder.spec()))
    assert spec["pretrained"] is False
    rebuilt = TimmImage(**spec).eval()
    rebuilt.load_state_dict(encoder.state_dict())
    assert_same(rebuilt(images([True, True])), encoder(images([True, True])))


@every
def test_bytes_and_fractions_of_the_same_picture_agree(name: str) -> None:
    encoder = make(name).eval()
    as_bytes = (pixels(2) * 255).to(torch.uint8)
    present = torch.ones(2, dtype=torch.bool)
    assert_same(encoder(Images(as_bytes, present)), encoder(Images(as_bytes.float() / 255, present)))
    assert_same(encoder(Images(as_bytes, present)), encoder(as_bytes))


def of(features: Features, samples: Tensor | slice) -> Features:
    """The features of some samples."""
    return Features(features.tokens[samples], features.mask[samples], features.pooled[samples])


@every
def test_pixels_are_normalised_by_the_constants_of_the_model(name: str) -> None:
    encoder = make(name).eval()
    config = resolve_model_data_config(timm.create_model(name))
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    seen: list[Tensor] = []
    encoder.body.forward_features = lambda x, run=encoder.body.forward_features: seen.append(x) or run(x)
    encoder(pixels(2))
    torch.testing.assert_close(seen[0], (pixels(2) - mean) / std)
    assert encoder.data_config == {"mean": list(config["mean"]), "std": list(config["std"]), "interpolation": config["interpolation"]}


def test_the_constants_of_the_model_can_be_overridden_and_travel_in_the_spec() -> None:
    encoder = make("test_resnet", data_config={"mean": [0.1, 0.2, 0.3], "interpolation": "bicubic"})
    torch.testing.assert_close(encoder.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    again = TimmImage(**encoder.spec())
    assert again.data_config == encoder.data_config
    assert again.data_config["interpolation"] == "bicubic"
    assert torch.equal(again.mean, encoder.mean)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("junk", [1.0, float("nan")])
@every
def test_pixels_of_an_absent_image_change_neither_other_samples_nor_statistics_nor_gradients(
    name: str, junk: float, training: bool
) -> None:
    encoder = make(name).train(training)
    twin = copy.deepcopy(encoder)
    batch = images([True, False, True, False])
    smudged = batch.pixels.clone()
    smudged[~batch.present] = junk
    for module, given in ((encoder, batch), (twin, batch._replace(pixels=smudged))):
        torch.manual_seed(0)  # for stochastic depth
        features = module(given)
        assert features.tokens.isfinite().all()
        (features.tokens[given.present].sin().sum() + features.pooled[given.present].sin().sum()).backward()
    torch.manual_seed(0)
    assert_same(*(of(module(batch), batch.present) for module in (encoder.eval(), twin.eval())))
    for (key, one), other in zip(encoder.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    for (key, p), q in zip(encoder.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), key


@pytest.mark.parametrize("name", BATCH_NORM)
@pytest.mark.parametrize("picture", [None, torch.zeros(3, dtype=torch.long)], ids=["plain", "picture"])
def test_a_training_batch_without_any_image_leaves_the_running_statistics_alone(name: str, picture: Tensor | None) -> None:
    encoder = make(name).train()
    before = state(encoder)
    features = encoder(images([False] * 3)._replace(image_index=picture))
    assert features.tokens.isfinite().all()
    assert not features.mask.any()
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert encoder.training
    assert all(module.training for module in encoder.modules())

    encoder(images([True, False, True]))
    assert any(not torch.equal(value, before[key]) for key, value in encoder.state_dict().items()), "statistics follow real images"


@every
def test_a_sample_is_encoded_the_same_alone_and_beside_others(name: str) -> None:
    encoder = make(name).eval()
    batch = images([True, False, True])
    together = encoder(batch)
    alone = encoder(Images(batch.pixels[2:], batch.present[2:]))
    assert_same(of(together, slice(2, None)), alone)


@every
def test_picture_indices_give_what_repeated_pixels_give(name: str) -> None:
    encoder = make(name).eval()
    picture = torch.tensor([1, 0, 1, 1])
    distinct = pixels(2)
    present = torch.tensor([True, True, False, True])
    shared, repeated = Images(distinct, present, picture), Images(distinct[picture], torch.ones(4, dtype=torch.bool))
    for read in (encoder.forward, encoder.embed, lambda x: encoder.levels(x, [-1])[0]):
        one, other = read(shared), read(repeated)
        assert_same(*(of(f.unshared(), present) for f in (one, other)))
        assert one.present.tolist() == present.tolist()


@every
def test_each_distinct_picture_is_encoded_once(name: str) -> None:
    encoder = make(name).eval()
    counts: list[int] = []
    encoder.body.forward_features = lambda x, run=encoder.body.forward_features: counts.append(len(x)) or run(x)
    features = encoder(Images(pixels(2), torch.ones(5, dtype=torch.bool), torch.tensor([0, 1, 1, 0, 1])))
    assert counts == [2]
    assert len(features.tokens) == 2
    assert len(features.unshared().tokens) == len(features.mask) == 5


@every
def test_a_frozen_encoder_gets_no_gradient_and_keeps_its_mode_and_its_buffers(name: str) -> None:
    encoder = make(name, frozen=True)
    before = state(encoder)
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    for features in (encoder(pixels()), encoder.embed(pixels()), encoder.levels(pixels(), [-1])[0]):
        assert not features.tokens.requires_grad
        assert not features.pooled.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert TimmImage(**encoder.spec()).frozen


@every
def test_trimmed_to_embeddings_it_loses_its_body_and_embeds_as_before(name: str) -> None:
    encoder = make(name).eval()
    batch = images([True, False])
    before, count = encoder.embed(batch), sum(p.numel() for p in encoder.parameters())
    encoder.trim("embeddings")
    assert_same(encoder.embed(batch), before)

    names = [key for key, _ in encoder.named_parameters()]
    assert names
    assert not [key for key in names if any(part in key for part in ("blocks", "layer1", "layers.", "stages"))]
    assert sum(p.numel() for p in encoder.parameters()) < count / 4
    features = encoder.embed(batch)
    (features.tokens.sin().sum() + features.pooled.sin().sum()).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert all(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_trimmed_to_what_is_read_forward_answers_as_before(name: str) -> None:
    for what in ("tokens", "pooled"):
        encoder = make(name).eval()
        before = encoder(pixels(2))
        encoder.trim(what)
        torch.testing.assert_close(encoder(pixels(2)).pooled, before.pooled)
        if what == "tokens":
            assert_same(encoder(pixels(2)), before)


def test_a_convolutional_map_is_read_row_by_row_and_its_cells_know_their_place() -> None:
    encoder = make("test_resnet").eval()
    grid = encoder.body.forward_features((pixels(1) - encoder.mean) / encoder.std)
    features = encoder(pixels(1))
    torch.testing.assert_close(features.pooled, grid.mean(dim=(2, 3)), atol=1e-5, rtol=1e-5)
    assert features.tokens.shape[1] == grid.shape[2] * grid.shape[3]
    place = features.tokens - torch.nn.functional.layer_norm(grid.flatten(2).transpose(1, 2), (encoder.dim,))
    by_row, by_column = place[0, :, 0].view(2, 2), place[0, :, encoder.dim // 2].view(2, 2)
    expected = torch.tensor([math.cos(math.pi / 4), math.cos(3 * math.pi / 4)])  # the first cosine wave at the two cells' middles
    torch.testing.assert_close(by_row, expected[:, None].expand(2, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(by_column, expected[None].expand(2, 2), atol=1e-5, rtol=0)


def test_a_vision_transformer_pools_by_its_class_token() -> None:
    features = make("test_vit").eval()(pixels(2))
    assert features.tokens.shape[1] == 1 + 4 * 4
    assert torch.equal(features.pooled, features.tokens[:, 0])


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_options_reach_the_timm_model(name: str) -> None:
    assert make(name, image_size=None).image_size == (160, 160)
    encoder = make(name, options={"in_chans": 3, "drop_path_rate": 0.3})
    assert any(getattr(module, "drop_prob", 0) > 0 for module in encoder.modules())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "fastvit_t8", "mobileone_s1"])
def test_a_model_of_one_channel_reads_the_luma_of_the_picture(name: str) -> None:
    encoder = make(name, options={"in_chans": 1}).eval()
    seen: list[Tensor] = []
    encoder.body.forward_features = lambda x, run=encoder.body.forward_features: seen.append(x) or run(x)
    encoder(pixels(2))
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R BT.601, as PIL's mode L
    config = resolve_model_data_config(timm.create_model(name))
    expected = ((pixels(2) * weights).sum(dim=1, keepdim=True) - sum(config["mean"]) / 3) / (sum(config["std"]) / 3)
    torch.testing.assert_close(seen[0], expected)
    rebuilt = TimmImage(**json.loads(json.dumps(encoder.spec()))).eval()
    rebuilt.load_state_dict(encoder.state_dict())
    assert_same(rebuilt(pixels(2)), encoder(pixels(2)))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_model_of_more_channels_reads_as_many(name: str) -> None:
    encoder = make(name, options={"in_chans": 5}).eval()
    raw = torch.rand(2, 5, 64, 64, generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []
    run = encoder.body.forward_features
    encoder.body.forward_features = lambda x: seen.append(x) or run(x)
    features = encoder(raw)
    torch.testing.assert_close(seen[0], (raw - 0.5) / 0.5)
    changed = torch.cat([raw[:, :4], 1 - raw[:, 4:]], dim=1)
    assert not torch.allclose(encoder(changed).pooled, features.pooled)
    own = {"mean": [0.1, 0.2, 0.3, 0.4, 0.5], "std": [0.5, 0.4, 0.3, 0.2, 0.1]}
    again = make(name, options={"in_chans": 5}, data_config=own)
    assert again.data_config | own == again.data_config
    for one in (encoder, again.eval()):
        rebuilt = TimmImage(**json.loads(json.dumps(one.spec()))).eval()
        rebuilt.load_state_dict(one.state_dict())
        assert_same(rebuilt(raw), one(raw))
    with pytest.raises(UserError, match="reads images of 5 channels, got 3"):
        encoder(pixels(2))


def test_pretrained_weights_are_adapted_to_more_channels(folder: Path) -> None:
    three, six = (TimmImage(str(folder), image_size=64, options={"in_chans": n}).eval() for n in (3, 6))
    first, second = (next(iter(one.body.parameters())) for one in (three, six))
    torch.testing.assert_close(second, torch.cat([first, first], dim=1) / 2)  # timm's rule: repeated, and scaled to the same sum


def test_constants_of_another_number_of_channels_are_rejected() -> None:
    with pytest.raises(UserError, match=r"data_config\.mean has 2 values; expected one for each of 3 channels"):
        make("test_vit", data_config={"mean": [0.1, 0.2]})
    with pytest.raises(UserError, match=r"data_config\.std has 3 values; expected one for each of 4 channels"):
        make("test_vit", data_config={"std": [0.1, 0.2, 0.3]}, options={"in_chans": 4})
    with pytest.raises(UserError, match=r"data_config has no 'means'\. Did you mean mean"):
        make("test_vit", data_config={"means": [0.1, 0.2, 0.3]})


@every
def test_pictures_that_are_not_square_keep_their_height_and_width(name: str) -> None:
    encoder = make(name, image_size=[64, 128]).eval()
    assert encoder.image_size == (64, 128)
    wide = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(1))
    square = make(name).eval()
    prefix = getattr(encoder.body, "num_prefix_tokens", 0) or 0
    for read in ("forward", "embed"):
        found, expected = getattr(encoder, read)(wide), getattr(square, read)(pixels(2))
        assert found.tokens.isfinite().all()
        assert found.tokens.shape[1] - prefix == 2 * (expected.tokens.shape[1] - prefix) or found.tokens.shape[1] == 14 * 14
    assert [f.dim for f in encoder.levels(wide, [0, -1])] == encoder.level_dims([0, -1])
    rebuilt = TimmImage(**json.loads(json.dumps(encoder.spec()))).eval()
    assert rebuilt.image_size == (64, 128)
    rebuilt.load_state_dict(encoder.state_dict())
    assert_same(rebuilt(wide), encoder(wide))


@pytest.mark.parametrize("size", [[64], [64, 64, 3], [64, 0], -8, "64"])
def test_a_size_that_is_none_is_refused_saying_what_was_expected(size: Any) -> None:
    with pytest.raises(UserError, match=r"image_size is .*; expected a side in pixels, or \[height, width\]"):
        make("test_resnet", image_size=size)


def test_a_size_at_which_the_model_does_not_run_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match=r"timm's 'convit_tiny' does not run on images of 64 x 96 pixels \(RuntimeError: .+\)"):
        make("convit_tiny", image_size=[64, 96])
    with pytest.raises(UserError, match=r"'nest_tiny' rejected its options {} and size 64 x 96: Model only handles square inputs"):
        make("nest_tiny", image_size=[64, 96], options={})


def test_a_model_is_built_though_it_can_not_be_read_before_its_first_block() -> None:
    encoder = make("densenet121").eval()
    assert encoder(pixels(1)).dim == encoder.dim == 1024
    for use in (lambda: encoder.embed_dim, lambda: encoder.embed(pixels(1))):
        with pytest.raises(UserError, match="early fusion can't find the stem of 'densenet121'"):
            use()


@pytest.mark.parametrize(
    ("name", "dim", "rows", "columns", "options"),
    [
        ("xcit_nano_12_p8_224", 128, 8, 14, {}),  # patches with the size of their grid; pooled from 16 columns
        ("pvt_v2_b0", 32, 14, 14, {}),  # a map with the channels last, in a model that gives them first
        ("beit_base_patch16_224", 768, 4, 8, {"depth": 1}),  # patches alone, without the class token
    ],
)
def test_what_a_stem_gives_without_positions_is_placed_on_its_grid(
    name: str, dim: int, rows: int, columns: int, options: dict[str, Any]
) -> None:
    encoder = make(name, image_size=[64, 128], options=options).eval()
    features = encoder.embed(torch.full((1, 3, 64, 128), 0.5))
    assert features.tokens.shape == (1, rows * columns, dim)
    middle = features.tokens[0].unflatten(0, (rows, columns))[1:-1, 1:-1].flatten(0, 1)  # where no border is in the patch
    assert len(middle.unique(dim=0)) == len(middle), "the same patch at another place is another token"


def test_weights_stored_in_half_precision_are_read_as_float32(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=5).half()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    encoder = TimmImage(str(tmp_path), image_size=64)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert (
        torch.equal(encoder.body.conv1[0].weight, model.conv1[0].weight.float()) if isinstance(model.conv1, torch.nn.Sequential) else True
    )
    encoder(pixels(2)).pooled.square().sum().backward()


def test_an_option_that_the_model_does_not_take_is_refused_naming_it() -> None:
    with pytest.raises(UserError, match=r"'test_vit' rejected its options.*no_such_option"):
        make("test_vit", options={"no_such_option": 1})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as timm saves one: config.json and model.safetensors, with constants of its own."""
    torch.manual_seed(7)
    model = timm.create_model("test_resnet", num_classes=5)
    save_for_hf(model, str(tmp_path), safe_serialization=True, data_config={"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]})
    return tmp_path


def test_a_local_folder_gives_its_weights_and_its_constants(folder: Path) -> None:
    torch.manual_seed(7)
    model = timm.create_model("test_resnet", num_classes=5)
    encoder = TimmImage(str(folder), image_size=64)
    expected = model.state_dict()
    found = encoder.body.state_dict()
    assert expected.keys() - found.keys() == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    torch.testing.assert_close(encoder.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(encoder.std.flatten(), torch.tensor([0.4, 0.5, 0.6]))


def test_an_encoder_from_a_folder_is_built_again_without_the_folder(folder: Path) -> None:
    encoder = TimmImage(str(folder), image_size=64).eval()
    spec = encoder.spec()
    for path in folder.iterdir():
        path.unlink()
    rebuilt = TimmImage(**spec).eval()
    rebuilt.load_state_dict(encoder.state_dict())
    assert_same(rebuilt(pixels(2)), encoder(pixels(2)))


def test_a_folder_without_weights_is_refused_naming_it_and_the_two_ways_out(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError) as refused:
        TimmImage(str(folder), image_size=64)
    assert_names_ways_out(refused.value, str(folder))
    assert TimmImage(str(folder), pretrained=False, image_size=64).dim == 96, "its shape alone needs no weights"


def test_a_folder_whose_weights_are_cut_off_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError) as refused:
        TimmImage(str(folder), image_size=64)
    assert_names_ways_out(refused.value, str(folder))


def test_a_folder_whose_weights_lack_a_layer_is_refused_naming_it(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if not key.startswith("layer4")}, path)
    with pytest.raises(UserError, match=r"layer4") as refused:
        TimmImage(str(folder), image_size=64)
    assert_names_ways_out(refused.value, str(folder))


@pytest.mark.parametrize("missing", ["folder", "config.json"])
def test_a_folder_that_is_not_one_of_timm_is_refused_naming_what_it_lacks(tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "nothing" if missing == "folder" else tmp_path
    with pytest.raises(UserError, match=r"no config\.json in folder .*expected a timm model folder"):
        TimmImage(str(folder))


def test_an_unknown_name_is_refused_naming_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown image encoder 'resnet18x'\. Did you mean .*resnet18"):
        TimmImage("resnet18x")


def test_weights_that_cannot_be_had_are_refused_naming_them_and_the_two_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(tmp_path, monkeypatch)
    with pytest.raises(UserError) as refused:
        TimmImage("test_resnet.r160_in1k")
    assert_names_ways_out(refused.value, "test_resnet.r160_in1k")


@pytest.mark.parametrize("name", ["hf-hub:nobody/tiny", "hf_hub:nobody/tiny"])
def test_a_hub_name_is_loaded_from_the_cache_offline(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    hub = tmp_path.with_name(f"{tmp_path.name}-hub")
    into_cache(folder, hub, "nobody/tiny")
    go_offline(hub, monkeypatch)
    encoder, local = TimmImage(name, image_size=64).eval(), TimmImage(str(folder), image_size=64).eval()
    assert_same(encoder(pixels(2)), local(pixels(2)))
    assert encoder.data_config["mean"] == [0.1, 0.2, 0.3]
    rebuilt = TimmImage(**json.loads(json.dumps(encoder.spec()))).eval()
    rebuilt.load_state_dict(encoder.state_dict())
    assert encoder.spec()["name"] == "test_resnet"
    assert_same(rebuilt(pixels(2)), encoder(pixels(2)))


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_hub_name_that_is_not_in_the_cache_is_rejected_naming_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrained: bool
) -> None:
    go_offline(tmp_path, monkeypatch)
    with pytest.raises(UserError, match="hf-hub:nobody/tiny") as rejected:
        TimmImage("hf-hub:nobody/tiny", pretrained=pretrained)
    assert_names_ways_out(rejected.value, "hf-hub:nobody/tiny")


def assert_names_ways_out(error: UserError, tried: str) -> None:
    for part in (tried, "--model.image.name=FOLDER", "model.safetensors", "--model.image.pretrained=false"):
        assert part in str(error)


@pytest.mark.parametrize("shape", [(14, 14), (15, 28), (31, 14), (20, 9), (56, 56)])
def test_a_large_grid_is_pooled_as_torch_pools_it(shape: tuple[int, int]) -> None:
    y = torch.randn(2, 5, *shape, dtype=torch.float64)
    sides = [min(side, 14) for side in shape]
    torch.testing.assert_close(at_most(y, 14), torch.nn.functional.adaptive_avg_pool2d(y, sides))


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("vit_small_patch14_reg4_dinov2", [56, 112], {"depth": 2}),  # registers
        ("vit_small_patch16_dinov3", [64, 128], {"depth": 2}),
        ("eva02_tiny_patch14_224", [56, 112], {"depth": 2}),
        ("naflexvit_base_patch16_gap", [64, 128], {"depth": 2}),
        ("swinv2_tiny_window8_256", [64, 128], {"depths": (1, 1, 1, 1)}),
        ("vit_base_patch16_siglip_224", [64, 128], {"depth": 2}),
    ],
)
def test_families_that_people_start_from_give_timms_own_features(name: str, size: list[int], options: dict[str, Any]) -> None:
    encoder = make(name, image_size=size, options=options).eval()
    raw = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    features = encoder(raw)
    theirs = encoder.body.forward_features((raw - encoder.mean) / encoder.std)
    if theirs.dim() == 4:  # a map, of which tokens are normalised and get positions
        torch.testing.assert_close(features.pooled, theirs.mean(dim=(1, 2)), atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(features.tokens, theirs, atol=1e-5, rtol=1e-5)
    assert features.mask.all()
    rebuilt = TimmImage(**json.loads(json.dumps(encoder.spec()))).eval()
    rebuilt.load_state_dict(encoder.state_dict())
    assert_same(rebuilt(raw), features)
