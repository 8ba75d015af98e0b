"""Text encoders made of transformers models of each kind: what they give, what padding leaves alone, and what they refuse."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_hub import go_offline, into_cache
from transformers import BertConfig, BertForMaskedLM, BertModel, CLIPConfig, CLIPModel, GPT2Config, GPT2Model, T5Config, T5EncoderModel

from fusion.encoders import TableColumns, Texts, TransformersText
from fusion.encoders.transformers_text import never_empty
from fusion.errors import UserError
from fusion.features import Features
from fusion.heads import Concat, JointTransformer
from fusion.inputs import Mixture
from fusion.model import FusionModel

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
COMMON = {"vocab_size": 50, "max_position_embeddings": 24}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": COMMON | SHAPE,
    "roberta": COMMON | SHAPE,
    "distilbert": COMMON | {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "deberta-v2": COMMON | SHAPE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    "clip_text_model": COMMON | SHAPE,
    "modernbert": COMMON | SHAPE,
    "xlm-roberta": COMMON | SHAPE,
    "mpnet": COMMON | SHAPE,
}
HEADS_OF_KEYS = {"num_key_value_heads": 2, "head_dim": 8}
# Without a module of words with their positions, which early fusion would read.
NO_EMBEDDINGS: dict[str, dict[str, Any]] = {
    "eurobert": COMMON | SHAPE | {"num_key_value_heads": 2, "mask_token_id": 4},
    "t5": {"vocab_size": 50, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 32, "d_kv": 8},
    "gpt2": {"vocab_size": 50, "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "umt5": {"vocab_size": 50, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 32, "d_kv": 8},
    "llama": COMMON | SHAPE | HEADS_OF_KEYS,
    "qwen3": COMMON | SHAPE | HEADS_OF_KEYS,
    "gemma3_text": COMMON | SHAPE | HEADS_OF_KEYS,
}
DECODERS = ("gpt2", "llama", "qwen3", "gemma3_text")
EVERY = CONFIGS | NO_EMBEDDINGS
every = pytest.mark.parametrize("kind", EVERY)
every_with_embeddings = pytest.mark.parametrize("kind", CONFIGS)


def make(kind: str = "bert", seed: int = 0, **options: Any) -> TransformersText:
    torch.manual_seed(seed)
    return TransformersText(config={"model_type": kind} | EVERY[kind], **options)


def texts(lengths: list[int], width: int = 7) -> Texts:
    """Words of 4 and above; padding is 0."""
    ids = torch.randint(4, 50, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    return Texts(ids.where(mask, 0), mask)


def real(features: Features) -> tuple[torch.Tensor, torch.Tensor]:
    """What may be read: the real tokens, and the pooled vectors of the texts that are there."""
    return features.tokens[features.mask], features.pooled[features.present]


@every
def test_features_of_every_reading_have_the_widths_that_the_encoder_announces(kind: str) -> None:
    encoder = make(kind).eval()
    batch = texts([7, 3, 0])
    readings, widths = [encoder(batch), *encoder.levels(batch, [-1, 0])], [encoder.dim, *encoder.level_dims([-1, 0])]
    if kind in CONFIGS:
        readings, widths = [*readings, encoder.embed(batch)], [*widths, encoder.embed_dim]
    for features, width in zip(readings, widths, strict=True):
        assert features.tokens.shape == (3, 7, width)
        assert features.pooled.shape == (3, width)
        assert torch.equal(features.mask, batch.mask)


@every
def test_levels_are_those_after_each_layer(kind: str) -> None:
    encoder = make(kind).eval()
    batch = texts([7, 3])
    last, first = encoder.levels(batch, [-1, 0])
    torch.testing.assert_close(encoder.levels(batch, [1])[0].tokens, last.tokens)
    assert not torch.allclose(first.tokens, last.tokens)
    assert kind not in CONFIGS or not torch.allclose(first.tokens, encoder.embed(batch).tokens)
    for depth in (2, -3):
        with pytest.raises(UserError, match=f"has 2 levels; there is no depth {depth}"):
            encoder.levels(batch, [depth])


@every
def test_every_parameter_gets_a_finite_gradient_though_a_sample_has_no_text(kind: str) -> None:
    encoder = make(kind).train()
    features = encoder(texts([7, 3, 0]))
    assert features.tokens.isfinite().all()
    assert features.pooled.isfinite().all()
    (features.tokens.sin().sum() + features.pooled.sin().sum()).backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@every
def test_a_batch_without_any_text_is_finite(kind: str) -> None:
    encoder = make(kind).train()
    features = encoder(texts([0, 0]))
    assert not features.present.any()
    (features.tokens.sin().sum() + features.pooled.sin().sum()).backward()
    assert features.tokens.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


def test_a_sample_without_a_text_lets_the_model_read_its_first_token_since_softmax_over_nothing_may_be_nan() -> None:
    assert never_empty(texts([2, 0], 3).mask).tolist() == [[True, True, False], [True, False, False]]


@every
def test_padding_neither_its_length_nor_its_words_changes_what_is_read(kind: str) -> None:
    encoder = make(kind).eval()
    short, longer = texts([7, 3, 5]), texts([7, 3, 5])
    longer = Texts(*(torch.cat([x, torch.zeros(3, 4, dtype=x.dtype)], dim=1) for x in longer[:2]))
    noisy = Texts(torch.where(short.mask, short.ids, 9), short.mask)
    for read in (encoder.forward, *([encoder.embed] if kind in CONFIGS else []), lambda x: encoder.levels(x, [0])[0]):
        expected = real(read(short))
        for other in (longer, noisy):
            torch.testing.assert_close(real(read(other)), expected, atol=1e-5, rtol=1e-5)


@every
def test_a_text_is_encoded_the_same_alone_and_beside_others(kind: str) -> None:
    encoder = make(kind).eval()
    batch = texts([7, 0, 4])
    together = encoder(batch)
    alone = encoder(Texts(batch.ids[2:], batch.mask[2:]))
    torch.testing.assert_close(real(alone), real(Features(*(x[2:] for x in together[:3]))), atol=1e-5, rtol=1e-5)


@every
def test_the_order_of_the_words_matters(kind: str) -> None:
    encoder = make(kind).eval()
    with torch.no_grad():  # DeBERTa's relative positions start too faint to be seen
        for parameter in encoder.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    batch = texts([7])
    assert not torch.allclose(encoder(batch).pooled, encoder(Texts(batch.ids.flip(1), batch.mask)).pooled, atol=1e-4)


def test_pooling_is_the_mean_the_first_or_the_last_of_the_real_tokens() -> None:
    batch = texts([7, 3])
    pooled = {}
    for pooling in ("mean", "first", "last"):
        features = make(pooling=pooling).eval()(batch)
        pooled[pooling] = features.pooled
    tokens = features.tokens
    torch.testing.assert_close(pooled["mean"], torch.stack([tokens[0].mean(dim=0), tokens[1, :3].mean(dim=0)]))
    torch.testing.assert_close(pooled["first"], tokens[:, 0])
    torch.testing.assert_close(pooled["last"], torch.stack([tokens[0, 6], tokens[1, 2]]))


def test_pooling_is_by_default_the_last_token_for_a_causal_tower_and_the_mean_elsewhere() -> None:
    last = dict.fromkeys(("clip_text_model", *DECODERS), "last")
    assert {kind: make(kind).pooling for kind in EVERY} == dict.fromkeys(EVERY, "mean") | last


@every
def test_its_spec_is_plain_data_that_builds_the_same_module(kind: str) -> None:
    encoder = make(kind, pooling="first").eval()
    encoder.fit_vocabulary(40)
    rebuilt = TransformersText(**json.loads(json.dumps(encoder.spec()))).eval()
    rebuilt.load_state_dict(encoder.state_dict())
    batch = Texts(texts([7, 3]).ids.clamp(max=39), texts([7, 3]).mask)
    torch.testing.assert_close(rebuilt(batch).pooled, encoder(batch).pooled)
    assert rebuilt.spec() == encoder.spec()


@every
def test_a_vocabulary_is_fitted_by_keeping_the_first_words(kind: str) -> None:
    encoder = make(kind).eval()
    batch = texts([7, 3])
    batch = Texts(batch.ids.clamp(max=29), batch.mask)
    before = encoder(batch).tokens
    encoder.fit_vocabulary(30)
    assert encoder.vocab_size == encoder.body.config.vocab_size == 30
    assert encoder.embedding.weight.shape == (30, 16)
    assert encoder.embedding.weight.requires_grad
    torch.testing.assert_close(encoder(batch).tokens, before)
    with pytest.raises(IndexError):
        encoder(Texts(torch.full((1, 2), 30), torch.ones(1, 2, dtype=torch.bool)))


def test_a_vocabulary_larger_than_the_embeddings_is_refused_naming_both() -> None:
    with pytest.raises(UserError, match="51 tokens don't fit the 50 embeddings"):
        make().fit_vocabulary(51)


@every
def test_the_longest_text_fits_and_one_more_token_does_not(kind: str) -> None:
    encoder = make(kind).eval()
    with_table = {"bert": 24, "roberta": 23, "xlm-roberta": 23, "mpnet": 22, "distilbert": 24, "clip_text_model": 24, "gpt2": 24}
    expected = with_table.get(kind)  # the others' positions are relative
    assert encoder.longest == expected
    if encoder.longest is None:
        assert encoder(texts([60], 60)).tokens.shape[1] == 60
        return
    assert encoder(texts([expected], expected)).tokens.shape[1] == expected
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        encoder(texts([expected + 1], expected + 1))


@every_with_embeddings
def test_trimmed_to_embeddings_it_loses_its_body_and_embeds_as_before(kind: str) -> None:
    encoder = make(kind).eval()
    batch = texts([7, 3])
    before = encoder.embed(batch)
    encoder.trim("embeddings")
    torch.testing.assert_close(encoder.embed(batch), before)
    names = [key for key, _ in encoder.named_parameters()]
    assert names
    assert all(key.startswith("body.embeddings.") for key in names)
    encoder.embed(batch).tokens.sin().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@every
def test_a_frozen_encoder_gets_no_gradient_and_keeps_its_mode(kind: str) -> None:
    encoder = make(kind, frozen=True).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    batch = texts([7, 3])
    for features in (encoder(batch), *([encoder.embed(batch)] if kind in CONFIGS else []), *encoder.levels(batch, [0])):
        assert not features.tokens.requires_grad
    torch.testing.assert_close(encoder(batch).tokens, encoder(batch).tokens, atol=0, rtol=0)  # no dropout
    assert TransformersText(**encoder.spec()).frozen


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    BertModel(BertConfig(**CONFIGS["bert"])).save_pretrained(tmp_path)
    return tmp_path


def assert_is_bert_of_the_folder(encoder: TransformersText) -> None:
    torch.manual_seed(7)
    expected = BertModel(BertConfig(**CONFIGS["bert"])).state_dict()
    found = encoder.body.state_dict()
    assert {key for key in expected if "pooler" not in key} - found.keys() <= {"embeddings.position_ids", "embeddings.token_type_ids"}
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_a_local_folder_gives_its_weights(folder: Path) -> None:
    assert_is_bert_of_the_folder(TransformersText(str(folder)))


def test_a_folder_of_a_masked_language_model_gives_its_encoder(tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = BertForMaskedLM(BertConfig(**CONFIGS["bert"]))
    model.save_pretrained(tmp_path)
    encoder = TransformersText(str(tmp_path))
    expected = model.bert.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in encoder.body.state_dict().items())


def test_a_folder_of_a_model_with_two_towers_gives_its_text_tower(tmp_path: Path) -> None:
    torch.manual_seed(7)
    vision = SHAPE | {"image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=CONFIGS["clip_text_model"], vision_config=vision, projection_dim=8))
    model.save_pretrained(tmp_path)
    encoder = TransformersText(str(tmp_path)).eval()
    assert encoder.pooling == "last"
    batch = texts([7, 7])
    with torch.no_grad():
        expected = model.eval().text_model(input_ids=batch.ids).last_hidden_state
        torch.testing.assert_close(encoder(batch).tokens, expected)


def test_an_encoder_from_a_folder_is_built_again_without_the_folder(folder: Path) -> None:
    encoder = TransformersText(str(folder)).eval()
    spec = encoder.spec()
    for path in folder.iterdir():
        path.unlink()
    rebuilt = TransformersText(**json.loads(json.dumps(spec))).eval()
    rebuilt.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(rebuilt(texts([7, 3])).tokens, encoder(texts([7, 3])).tokens)


def test_without_pretrained_a_folder_gives_its_shape_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    encoder = TransformersText(str(folder), pretrained=False)
    assert (encoder.dim, encoder.vocab_size) == (16, 50)
    with pytest.raises(ValueError, match="only a text encoder made from a config"):
        encoder.fit_vocabulary(40)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_weights_stored_in_half_precision_are_float32_unless_asked_otherwise(folder: Path, stored: torch.dtype) -> None:
    BertModel.from_pretrained(folder, dtype=stored).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(stored).removeprefix("torch.")
    kept = load_file(folder / "model.safetensors")
    for encoder in (TransformersText(str(folder)), TransformersText(config=json.loads((folder / "config.json").read_text()))):
        assert {p.dtype for p in encoder.parameters()} == {torch.float32}
        assert {p.dtype for p in TransformersText(**encoder.spec()).parameters()} == {torch.float32}
    encoder = TransformersText(str(folder))
    for name, p in encoder.body.named_parameters():
        assert torch.equal(p, kept[name].float()), name
    encoder(texts([7, 3])).pooled.square().sum().backward()
    torch.optim.SGD(encoder.parameters(), lr=0.1).step()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_that_is_asked_for_gives_features_that_a_float32_head_can_use(dtype: str) -> None:
    encoder = make(dtype=dtype).eval()
    assert {p.dtype for p in encoder.parameters()} == {getattr(torch, dtype)}
    batch = texts([7, 3])
    exact = make().eval()
    for features, expected in zip(
        [encoder(batch), encoder.embed(batch), *encoder.levels(batch, [0])],
        [exact(batch), exact.embed(batch), *exact.levels(batch, [0])],
        strict=True,
    ):
        assert features.tokens.dtype == features.pooled.dtype == torch.float32
        torch.testing.assert_close(features.pooled, expected.pooled, atol=0.05, rtol=0.05)
    torch.nn.Linear(16, 2)(encoder(batch).pooled).sum().backward()
    rebuilt = TransformersText(**json.loads(json.dumps(encoder.spec()))).eval()
    rebuilt.load_state_dict(encoder.state_dict())
    assert torch.equal(rebuilt(batch).pooled, encoder(batch).pooled)
    assert {p.dtype for p in rebuilt.parameters()} == {getattr(torch, dtype)}


def test_a_dtype_that_is_none_of_those_is_refused_naming_them() -> None:
    with pytest.raises(UserError, match="dtype is 'int8'; expected one of float32, bfloat16, float16"):
        make(dtype="int8")


def test_ids_beyond_the_embeddings_are_refused_naming_both_sizes_or_get_embeddings_of_their_own() -> None:
    make().cover_vocabulary(50)
    with pytest.raises(UserError, match=r"has ids up to 52, the model 50 embeddings; .*--model\.text\.resize_embeddings=true"):
        make().cover_vocabulary(53)
    encoder, before = make(resize_embeddings=True), make().embedding.weight
    encoder.cover_vocabulary(53)
    assert torch.equal(encoder.embedding.weight[:50], before)
    added = encoder.embedding.weight[50:]
    torch.testing.assert_close(added, before.mean(dim=0).expand(3, -1), atol=1e-3, rtol=0)
    batch = Texts(torch.full((1, 2), 52), torch.ones(1, 2, dtype=torch.bool))
    encoder(batch).pooled.sin().sum().backward()  # (a plain sum after a layer norm has no gradient but rounding)
    assert encoder.embedding.weight.grad[52].abs().sum() > 0
    rebuilt = TransformersText(**json.loads(json.dumps(encoder.spec())))
    rebuilt.load_state_dict(encoder.state_dict())
    assert torch.equal(rebuilt.eval()(batch).pooled, encoder.eval()(batch).pooled)


def test_enlarged_embeddings_of_a_frozen_encoder_stay_frozen() -> None:
    encoder = make(frozen=True, resize_embeddings=True)
    encoder.cover_vocabulary(53)
    assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"hidden_size": 15}, "not a multiple of the number of attention heads"),
        ({"hidden_size": "wide"}, "expected int, got str"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "no_such"}, "no_such"),
        ({"vocab_size": 0}, "IndexError"),
    ],
)
def test_a_config_that_can_not_be_built_is_refused_with_the_reason(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"no bert can be built with this config .*{reason}"):
        TransformersText(config={"model_type": "bert"} | CONFIGS["bert"] | settings)


def change_weights(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def assert_names_ways_out(error: UserError, *tried: str) -> None:
    for part in (*tried, "--model.text.name_or_path=FOLDER", "model.safetensors", "--model.text.config="):
        assert part in str(error)


def test_a_folder_whose_weights_lack_a_layer_is_refused_naming_the_missing_ones(folder: Path) -> None:
    def lose_a_layer(weights: dict[str, torch.Tensor]) -> None:
        for key in [key for key in weights if "encoder.layer.1." in key]:
            del weights[key]

    change_weights(folder, lose_a_layer)
    with pytest.raises(UserError, match="is missing 16 of the model's weights") as refused:
        TransformersText(str(folder))
    assert_names_ways_out(refused.value, str(folder), "encoder.layer.1.attention")


def test_a_folder_whose_weights_have_another_shape_is_refused_naming_them(folder: Path) -> None:
    def widen(weights: dict[str, torch.Tensor]) -> None:
        weights["embeddings.word_embeddings.weight"] = torch.zeros(60, 16)

    change_weights(folder, widen)
    with pytest.raises(UserError) as refused:
        TransformersText(str(folder))
    assert_names_ways_out(refused.value, str(folder), "embeddings.word_embeddings.weight: (60, 16) where (50, 16) is expected")


def test_a_folder_whose_weights_are_cut_off_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError) as refused:
        TransformersText(str(folder))
    assert_names_ways_out(refused.value, str(folder))


def test_a_folder_without_weights_is_refused_naming_it_and_the_two_ways_out(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError) as refused:
        TransformersText(str(folder))
    assert_names_ways_out(refused.value, str(folder))


def test_a_hub_name_that_cannot_be_had_is_refused_naming_it_and_the_two_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(tmp_path, monkeypatch)
    with pytest.raises(UserError) as refused:
        TransformersText("nobody/no-such-text-encoder")
    assert_names_ways_out(refused.value, "nobody/no-such-text-encoder")


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (GPT2Model, GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, use_cache=False)),
        (T5EncoderModel, T5Config(d_model=16, num_layers=2, num_heads=2, d_ff=32, d_kv=8, vocab_size=50, use_cache=False)),
    ],
    ids=["gpt2", "t5"],
)
def test_decoders_and_encoders_of_encoder_decoders_answer_as_transformers_own(model: Any, config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = model(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = TransformersText(str(tmp_path)).eval()
    batch = texts([7, 3])
    features = ours(batch)
    for i, length in enumerate((7, 3)):
        alone = theirs(input_ids=batch.ids[i : i + 1, :length]).last_hidden_state[0]
        torch.testing.assert_close(features.tokens[i, :length], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features.pooled[i], alone[-1] if model is GPT2Model else alone.mean(dim=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_reads_no_word_after_a_token(kind: str) -> None:
    encoder = make(kind).eval()
    batch = texts([7])
    changed = Texts(torch.cat([batch.ids[:, :4], (batch.ids[:, 4:] + 1).clamp(max=49)], dim=1), batch.mask)
    before, after = encoder(batch).tokens, encoder(changed).tokens
    torch.testing.assert_close(after[:, :4], before[:, :4], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(after[:, 4:], before[:, 4:])


@pytest.mark.parametrize("kind", NO_EMBEDDINGS)
def test_a_model_without_embeddings_with_positions_is_rejected_by_early_heads_alone(kind: str) -> None:
    image = TableColumns(dim=16, heads=2)
    image.fit_columns(2, [])
    encoders = {"facts": image, "text": make(kind)}
    assert isinstance(FusionModel.build(encoders, partial(Concat, dim=8), 3), FusionModel)
    with pytest.raises(UserError, match=f"'{kind}' has no module of embeddings with positions, which early fusion reads"):
        FusionModel.build(encoders, partial(JointTransformer, dim=16), 3)


@pytest.mark.parametrize("kind", ["bart", "marian"])
def test_an_encoder_decoder_without_an_encoder_of_its_own_is_rejected(kind: str) -> None:
    with pytest.raises(UserError, match=f"'{kind}' is an encoder-decoder, of which transformers has no encoder alone; use an encoder such"):
        TransformersText(config={"model_type": kind})


def test_a_tower_of_a_pair_that_transformers_does_not_make_alone_is_rejected_in_a_line() -> None:
    with pytest.raises(UserError, match=r"'siglip_text_model' is not a model that AutoModel makes; its encoder is --model\.text=PairText"):
        TransformersText(config={"model_type": "siglip_text_model"})


def test_a_misspelt_model_type_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown model_type 'robertta'\. Did you mean .*roberta"):
        TransformersText(config={"model_type": "robertta"})


def test_a_misspelt_setting_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"bert has no setting 'hiden_size'\. Did you mean .*hidden_size"):
        TransformersText(config={"model_type": "bert", "hiden_size": 16})


def test_a_setting_that_only_the_code_of_the_model_names_is_taken() -> None:
    encoder = TransformersText(config={"model_type": "deberta-v2"} | CONFIGS["deberta-v2"] | {"position_buckets": 4, "share_att_key": True})
    assert encoder.body.encoder.position_buckets == 4
    assert TransformersText(**encoder.spec()).body.encoder.position_buckets == 4


def test_a_config_without_model_type_is_refused_naming_some() -> None:
    with pytest.raises(UserError, match="needs a model_type, such as bert"):
        TransformersText(config={"hidden_size": 16})


@pytest.mark.parametrize("options", [{}, {"name_or_path": "bert-base-uncased", "config": {"model_type": "bert"}}])
def test_neither_or_both_of_name_and_config_are_refused_naming_both(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"exactly one of name_or_path .* and config"):
        TransformersText(**options)


@pytest.mark.parametrize("kind", ["vit", "ibert", "luke", "layoutlm"])
def test_a_model_that_reads_no_plain_texts_is_refused_in_one_line(kind: str) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(UserError, match=f"'{kind}' can't be run on token ids and a mask alone") as caught:
        TransformersText(config={"model_type": kind, **small})
    assert "\n" not in str(caught.value)


# Sentence-transformers, and weights in shards.

FLAGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def make_sentence_model(folder: Path, pooling: dict[str, Any], normalize: bool = True, more: tuple[str, ...] = (), path: str = "") -> str:
    """Adds to a transformers folder what sentence-transformers writes beside it."""
    kinds = ["Transformer", "Pooling", *more, *(["Normalize"] if normalize else [])]
    paths = [path, *(f"{i}_{kind}" for i, kind in enumerate(kinds[1:], start=1))]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **pooling}))
    return str(folder)


def sentence_formula(flag: str, tokens: np.ndarray) -> np.ndarray:
    """The documented formulas of sentence-transformers' Pooling, for the tokens (n, D) of one text, in float64."""
    weights = np.arange(1, len(tokens) + 1)[:, None]
    return {
        "cls_token": tokens[0],
        "mean_tokens": tokens.sum(axis=0) / len(tokens),
        "max_tokens": tokens.max(axis=0),
        "mean_sqrt_len_tokens": tokens.sum(axis=0) / np.sqrt(len(tokens)),
        "weightedmean_tokens": (weights * tokens).sum(axis=0) / weights.sum(),
        "lasttoken": tokens[-1],
    }[flag]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("flag", FLAGS)
@torch.no_grad()
def test_a_sentence_transformers_folder_pools_and_normalises_by_its_own_formulas(flag: str, normalize: bool, folder: Path) -> None:
    torch.manual_seed(7)
    model, lengths = BertModel(BertConfig(**CONFIGS["bert"])).eval(), (7, 3, 1, 0)
    name = make_sentence_model(folder, {f"pooling_mode_{other}": other == flag for other in FLAGS}, normalize)
    encoder = TransformersText(name).eval()
    batch = texts(list(lengths))
    features = encoder(batch)
    for i, length in enumerate(lengths[:3]):
        tokens = model(input_ids=batch.ids[i : i + 1, :length]).last_hidden_state[0].double().numpy()
        expected = sentence_formula(flag, tokens)
        expected = expected / np.linalg.norm(expected) if normalize else expected
        assert np.allclose(features.pooled[i].numpy(), expected, atol=1e-5), (flag, length)
    assert features.pooled.isfinite().all()
    rebuilt = TransformersText(**json.loads(json.dumps(encoder.spec()))).eval()
    rebuilt.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(rebuilt(batch).pooled, features.pooled)


@torch.no_grad()
def test_a_sentence_transformers_hub_name_is_loaded_from_the_cache_offline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path.with_name(f"{tmp_path.name}-hub")
    name = make_sentence_model(folder, {"pooling_mode_max_tokens": True})
    into_cache(folder, hub, "nobody/tiny")
    go_offline(hub, monkeypatch)
    encoder, local = TransformersText("nobody/tiny").eval(), TransformersText(name).eval()
    assert (encoder.pooling, encoder.normalize) == ("max", True)
    assert torch.equal(encoder(texts([7, 3])).pooled, local(texts([7, 3])).pooled)


def test_an_explicit_pooling_overrides_that_of_a_sentence_transformers_folder(folder: Path) -> None:
    name = make_sentence_model(folder, {"pooling_mode": "cls"})
    made = [TransformersText(name, **options) for options in ({}, {"pooling": "mean"}, {"normalize": False}, {"normalize": True})]
    assert [(one.pooling, one.normalize) for one in made] == [("first", True), ("mean", False), ("first", False), ("first", True)]
    with pytest.raises(UserError, match="pooling is 'median'; expected one of mean, first, last, max"):
        TransformersText(name, pooling="median")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"more": ("Dense",)}, r"consists of Transformer, Pooling, Dense, Normalize; .*--model\.text\.pooling=mean"),
        (
            {"pooling": {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}},
            "pools by cls_token and max_tokens",
        ),
        ({"pooling": {}}, "pools by nothing"),
        ({"pooling": {"pooling_mode": "attention"}}, "pools by attention; expected one of mean_tokens"),
        ({"path": "0_Transformer"}, "has its transformer in '0_Transformer', expected in the folder itself"),
    ],
)
def test_what_a_sentence_transformers_folder_has_beyond_that_is_rejected_unless_a_pooling_is_chosen(
    options: dict[str, Any], reason: str, folder: Path
) -> None:
    name = make_sentence_model(folder, **{"pooling": {"pooling_mode_mean_tokens": True}} | options)
    with pytest.raises(UserError, match=reason):
        TransformersText(name)
    assert not TransformersText(name, pooling="mean").normalize


@torch.no_grad()
def test_weights_in_shards_are_those_in_one_file(folder: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    BertModel.from_pretrained(folder).save_pretrained(sharded, max_shard_size="5KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    one, other = (TransformersText(str(path)).eval() for path in (folder, sharded))
    assert torch.equal(one(texts([7, 3])).pooled, other(texts([7, 3])).pooled)
    next(iter(sorted(sharded.glob("model-*.safetensors")))).unlink()
    with pytest.raises(UserError) as refused:
        TransformersText(str(sharded))
    assert_names_ways_out(refused.value, str(sharded))


# Attention without padding.


@pytest.mark.slow
def test_attention_over_blocks_gives_what_padded_attention_gives():
    config = {"model_type": "bert", "attention_probs_dropout_prob": 0.0} | CONFIGS["bert"] | {"hidden_size": 32}
    padded, blocks = (make_as(config, attention) for attention in ("sdpa", "flex_attention"))
    assert blocks.body.config._attn_implementation == "flex_attention"
    x = texts([7, 3, 0])
    with torch.no_grad():
        assert torch.allclose(padded(x).tokens[x.mask], blocks(x).tokens[x.mask], atol=1e-5)
    again = TransformersText(**blocks.spec())  # a checkpoint is used on any machine
    assert again.body.config._attn_implementation == "sdpa"


def make_as(config: dict[str, Any], attention: Any) -> TransformersText:
    torch.manual_seed(0)
    return TransformersText(config=config, attention=attention).eval()


@pytest.mark.parametrize(
    ("kind", "attention", "message"),
    [
        ("bert", "flex_attention", "has no dropout of attention weights, but this bert has 0.1"),
        ("deberta-v2", "flash_attention_2", "deberta-v2 can't use flash_attention_2; use"),
        ("bert", "flash_attention_2", "bert can't use flash_attention_2 here"),
    ],
)
def test_attention_that_the_model_lacks_is_refused(kind, attention, message):
    with pytest.raises(UserError, match=message):
        make(kind, attention=attention)


# Mixed texts


@every
def test_words_are_mixed_by_every_model_that_takes_embeddings(kind: str) -> None:
    """A weight of 0 gives the partner's text, and what is padded in both has no influence."""
    encoder, stages = make(kind).eval(), ["tokens", "levels", *(["embeddings"] if kind in CONFIGS else [])]
    takes_none = kind == "clip_text_model"
    batch = texts([5, 3, 5, 0])
    for stage in stages:
        depths = [0, -1] if stage == "levels" else []
        if takes_none and stage != "embeddings":
            with pytest.raises(UserError, match="a clip_text_model can't encode mixed word embeddings instead of ids"):
                encoder.check_mixing(stage, depths)  # type: ignore[arg-type]
            continue
        encoder.check_mixing(stage, depths)  # type: ignore[arg-type]

        def read(weight: float, x: Texts, stage: Any = stage, depths: list[int] = depths) -> Features:
            mixture = Mixture(torch.tensor([2, 1, 0, 3]), torch.tensor(weight))
            found = encoder.read(x._replace(mixture=mixture), stage, depths)
            return found[0] if isinstance(found, list) else found

        plain, swapped = encoder.read(batch, stage, depths), read(0.0, batch)  # type: ignore[arg-type]
        plain = plain[0] if isinstance(plain, list) else plain
        torch.testing.assert_close(swapped.pooled[:3], plain.pooled[[2, 1, 0]], atol=1e-5, rtol=1e-5)
        noisy = Texts(torch.where(batch.mask, batch.ids, 9), batch.mask)
        short = Texts(batch.ids[:, :5], batch.mask[:, :5])
        for other in (noisy, short):
            torch.testing.assert_close(real(read(0.3, other)), real(read(0.3, batch)), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(read(0.3, batch).pooled[0], plain.pooled[0], atol=1e-6)
        assert not read(0.3, batch).present[3]


def test_a_model_that_encodes_embeddings_differently_from_ids_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make()
    usual = encoder.body.forward

    def forward(input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, **more: Any) -> Any:
        doubled = None if inputs_embeds is None else 2 * inputs_embeds
        return usual(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=doubled, **more)

    monkeypatch.setattr(encoder.body, "forward", forward)
    with pytest.raises(UserError, match="a bert encodes word embeddings differently from their ids, so that texts can't be mixed"):
        encoder.check_mixing("tokens")
