"""Mixup and CutMix: images, texts, tables and targets of a sample are mixed together."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_world import BERT
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from fusion.data.samples import Batch
from fusion.encoders import Columns, Images, TableColumns, Texts, TransformersText
from fusion.encoders.base import mixed_tokens
from fusion.inputs import Mixture
from fusion.tasks import Classification, MultiLabel, Ordinal, Regression
from fusion.training import Engine, Mixing
from fusion.training.mixing import Box, Mixer, mix_images, mix_inputs, partners

WEIGHT = 0.3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count, shared=False, absent=(), size=(6, 8)):
    """uint8 images, one for each sample, or with image_index two for all."""
    pixels = torch.randint(0, 256, (2 if shared else count, 3, *size), dtype=torch.uint8, generator=generator())
    present = torch.tensor([i not in absent for i in range(count)])
    return Images(pixels, present, torch.arange(count) % 2 if shared else None)


def texts(lengths, width=6, seed=0):
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, 40, mask.shape, generator=generator(seed))
    return Texts(ids.where(mask, 0), mask)


# Partners


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=12), st.integers(0, 1000))
def test_partners_are_a_permutation_of_samples_that_have_the_same_inputs_and_as_many_images(pattern, seed):
    torch.manual_seed(seed)
    shown = torch.arange(3) < torch.tensor([count for _, count in pattern])[:, None]
    several = Images(torch.zeros(1, 3, 2, 2), shown.any(dim=1), torch.zeros(shown.shape, dtype=torch.long), image_mask=shown)
    written = texts([2 * there for there, _ in pattern])
    partner = partners({"photos": several, "text": written}).tolist()
    assert sorted(partner) == list(range(len(pattern)))
    for i, other in enumerate(partner):
        assert pattern[i] == pattern[other]
        assert (other == i) == (pattern.count(pattern[i]) == 1)  # alone, or with another one


def test_every_other_sample_is_a_partner_equally_often():
    torch.manual_seed(0)
    counts = np.zeros((4, 4))
    for _ in range(3000):
        counts[np.arange(4), partners({"text": texts([1, 2, 3, 4])}).numpy()] += 1
    assert np.diag(counts).sum() == 0
    assert counts[~np.eye(4, dtype=bool)] / 3000 == pytest.approx([1 / 3] * 12, abs=0.03)


# What is mixed


def test_a_batch_is_mixed_as_the_formula_says():
    """A linear model of pixels, word embeddings and columns, and the cross entropy of its logits, in float64 by hand."""
    rng, count = np.random.default_rng(0), 5
    batch = {
        "image": images(count),
        "text": texts([6, 3, 1, 4, 2]),
        "table": Columns(torch.randn(count, 2, generator=generator()), torch.tensor([[1], [0], [2], [1], [1]]), torch.ones(count, 3) > 0),
    }
    mixture = Mixture(torch.tensor([3, 0, 1, 4, 2]), torch.tensor(WEIGHT))
    mixed = mix_inputs(batch, mixture, None)
    torch.manual_seed(0)
    words, table = torch.nn.Embedding(40, 4).double(), TableColumns(dim=4, heads=2, depth=0, numbers=2, cardinalities=[3]).double()
    of_pixels, of_words, of_table = (rng.normal(size=shape) for shape in ((3 * 6 * 8, 3), (6 * 4, 3), (3 * 4, 3)))
    target = np.array([0, 2, 1, 1, 0])

    # By hand: each sample's own inputs, mixed with its partner's.
    e = words.weight.detach().numpy()[batch["text"].ids] * batch["text"].mask.numpy()[..., None]
    tokens = table.tokens
    w, b, c = (x.detach().numpy() for x in (tokens.weight, tokens.bias, tokens.categories.weight))
    columns = np.concatenate([batch["table"].numbers.double().numpy()[..., None] * w, c[batch["table"].categories]], axis=1) + b
    flat = [x.reshape(count, -1) for x in (batch["image"].pixels.double().numpy() / 255, e, columns)]
    p = mixture.partner.numpy()
    sample = [WEIGHT * x + (1 - WEIGHT) * x[p] for x in flat]
    logits = sum(x @ weights for x, weights in zip(sample, (of_pixels, of_words, of_table), strict=True))
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows = np.arange(count)
    expected = -WEIGHT * log_p[rows, target] - (1 - WEIGHT) * log_p[rows, target[p]]

    embedded = mixed_tokens(words(batch["text"].ids), mixed["text"])[0]
    found = [mixed["image"].pixels.double(), embedded, table.embed(mixed["table"]._replace(numbers=batch["table"].numbers.double())).tokens]
    weights = [torch.from_numpy(x) for x in (of_pixels, of_words, of_table)]
    output = sum(x.flatten(1) @ weight for x, weight in zip(found, weights, strict=True))
    task = Classification()
    task.learn({"train": ["a", "b", "c"]}, column="label", on_unseen="error")
    loss = task.of_mixture(task.loss, output, torch.from_numpy(target), mixture)
    assert loss.detach().numpy() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("head", ["Concat", "JointTransformer", "LevelWeighted"])
def test_the_text_takes_part_at_every_stage_that_a_head_reads(parts, head):
    """Of samples with the same image, where only texts and labels differ."""
    model, data, _ = parts(f"--model.head={head}")
    built = model.build(data).eval()
    batch = next(iter(data.train_dataloader()))
    same = images(len(batch.target), size=(32, 32))
    same = same._replace(pixels=same.pixels[:1].expand(len(batch.target), -1, -1, -1))
    plain = {"image": same, "text": batch.inputs["text"]}
    partner = partners(plain)
    mixed = mix_inputs(plain, Mixture(partner, torch.tensor(WEIGHT)), None)
    output = built(mixed).output
    different = (plain["text"].ids != plain["text"].ids[partner]).any(dim=1)
    assert different.sum() > len(different) / 2
    assert torch.equal((output - built(plain).output).abs().amax(dim=1) > 1e-5, different)
    assert not torch.allclose(output, WEIGHT * built(plain).output + (1 - WEIGHT) * built(plain).output[partner], atol=1e-6)

    # By hand: transformers' own model, given embeddings.
    text, body = plain["text"], built.encoders["text"].body
    e = body.embeddings.word_embeddings(text.ids) * text.mask[..., None]
    e = WEIGHT * e + (1 - WEIGHT) * e[partner]
    mask = text.mask | text.mask[partner]
    if head == "JointTransformer":
        tokens = [body.embeddings(inputs_embeds=e)]
    else:
        tokens = list(body(inputs_embeds=e, attention_mask=mask, output_hidden_states=True).hidden_states[1:])
    features = [built.encoders["text"].features(one, Texts(text.ids, mask)) for one in tokens]
    by_hand = built.encode({"image": mixed["image"], "text": plain["text"]}) | {
        "text": features if head == "LevelWeighted" else features[-1]
    }
    assert torch.allclose(output, built.fuse(by_hand).output, atol=1e-5)


def test_the_word_embeddings_are_trained_through_both_texts_of_a_pair():
    torch.manual_seed(0)
    encoder = TransformersText(config=BERT)
    batch = Texts(torch.tensor([[10, 11], [12, 13]]), torch.ones(2, 2, dtype=torch.bool))
    encoder(batch._replace(mixture=Mixture(torch.tensor([1, 0]), torch.tensor(WEIGHT)))).pooled[0].square().sum().backward()
    gradient = encoder.embedding.weight.grad.norm(dim=1)
    assert (gradient[10:14] > 0).all()
    assert torch.allclose(gradient[10:12] / gradient[12:14], torch.tensor(WEIGHT / (1 - WEIGHT)), rtol=1e-4)


def test_what_is_padded_in_both_texts_and_cells_missing_in_both_rows_have_no_influence():
    torch.manual_seed(0)
    mixture = Mixture(torch.tensor([1, 2, 0]), torch.tensor(WEIGHT))
    text, encoder = texts([4, 2, 3]), TransformersText(config=BERT).eval()
    noisy = text._replace(ids=torch.where(text.mask, text.ids, 30))
    short = Texts(text.ids[:, :4], text.mask[:, :4])
    expected = encoder(text._replace(mixture=mixture))
    assert expected.mask.sum(dim=1).tolist() == [4, 3, 4]
    for other in (noisy, short):
        found = encoder(other._replace(mixture=mixture))
        assert torch.allclose(found.tokens[found.mask], expected.tokens[expected.mask], atol=1e-5)
        assert torch.allclose(found.pooled, expected.pooled, atol=1e-5)
    mask = torch.tensor([[True, False, True], [False, False, True], [True, True, True]])
    table, numbers = TableColumns(dim=8, heads=2, numbers=3), torch.randn(3, 3)
    first, second = (
        table(Columns(x, torch.zeros(3, 0, dtype=torch.long), mask, mixture=mixture)) for x in (numbers, numbers.where(mask, torch.nan))
    )
    assert first.mask.tolist() == [[True, False, True], [True, True, True], [True, True, True]]
    assert torch.equal(first.pooled, second.pooled)


@pytest.mark.parametrize("box", [None, Box(1, 4, 2, 7)], ids=["mixup", "CutMix"])
def test_images_that_samples_share_are_mixed_for_each_sample(box):
    shared, mixture = images(4, shared=True, absent=(2, 3)), Mixture(torch.tensor([1, 0, 3, 2]), torch.tensor(0.5))
    own = shared._replace(pixels=shared.pixels[shared.image_index], image_index=None)
    before = shared.pixels.clone()
    found = mix_images(shared, mixture, box)
    assert found.image_index is None
    assert torch.equal(found.pixels, mix_images(own, mixture, box).pixels)
    assert torch.equal(found.present, shared.present)
    assert torch.equal(shared.pixels, before)
    inside = torch.zeros(6, 8, dtype=torch.bool)
    inside[1:4, 2:7] = True
    a, b = shared.pixels / 255
    expected = (a + b) / 2 if box is None else torch.where(inside, b, a)
    assert torch.allclose(found.pixels[0].float() / (1 if box is None else 255), expected)


def test_several_images_of_a_sample_are_mixed_position_by_position():
    shown = torch.tensor([[True, True], [True, False], [True, True], [True, False]])
    pixels = torch.rand(4, 3, 2, 2, generator=generator())
    several = Images(pixels, shown.any(dim=1), torch.tensor([[0, 1], [2, 0], [3, 2], [1, 0]]), True, False, shown)
    found = mix_images(several, Mixture(torch.tensor([2, 3, 0, 1]), torch.tensor(WEIGHT)), None)
    of_sample = found.pixels[found.image_index]
    for i, k, one, other in ((0, 0, 0, 3), (0, 1, 1, 2), (1, 0, 2, 1), (2, 1, 2, 1), (3, 0, 1, 2)):
        assert torch.allclose(of_sample[i, k], WEIGHT * pixels[one] + (1 - WEIGHT) * pixels[other])


@given(st.integers(0, 10_000), st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_the_weight_of_cutmix_is_exactly_the_share_of_pixels_that_are_a_samples_own(seed, size):
    mixer = Mixer(Mixing(cutmix=1.0), Classification())
    torch.manual_seed(seed)
    black, white = torch.zeros(1, 3, *size), torch.ones(1, 3, *size)
    batch = {"image": Images(torch.cat([black, white]), torch.ones(2, dtype=torch.bool))}
    _, weight, boxes = mixer.draw(batch)
    found = mix_images(batch["image"], Mixture(torch.tensor([1, 0]), torch.tensor(weight)), boxes["image"]).pixels
    assert float((found[0] == 0).double().mean()) == pytest.approx(weight, abs=1e-12)
    assert float((found[1] == 1).double().mean()) == pytest.approx(weight, abs=1e-12)


def test_the_weights_of_mixup_have_the_beta_distribution_and_batches_are_mixed_as_often_as_asked():
    mixer = Mixer(Mixing(mixup=0.4, cutmix=1.0, probability=0.6, cutmix_share=0.25), Classification())
    torch.manual_seed(0)
    drawn = [mixer.draw({"image": images(1, size=(64, 64))}) for _ in range(6000)]
    mixup = np.array([weight for cut, weight, _ in drawn if not cut and weight < 1])
    cutmix = [boxes for _, _, boxes in drawn if boxes is not None]
    assert len(mixup) / 6000 == pytest.approx(0.6 * 0.75, abs=0.02)
    assert len(cutmix) / 6000 == pytest.approx(0.6 * 0.25, abs=0.02)
    assert mixup.mean() == pytest.approx(0.5, abs=0.02)
    assert mixup.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.01)  # of Beta(a, a)


# Targets

OUTPUT = torch.randn(4, 3, generator=generator(3))
PAIRS = Mixture(torch.tensor([1, 2, 3, 0]), torch.tensor(WEIGHT))


def learnt(task, *cells):
    task.learn({"train": list(cells)}, column="label", on_unseen="error")
    return task, torch.from_numpy(task.encode(list(cells)))


def mixed_by_hand(target):
    return WEIGHT * target + (1 - WEIGHT) * target[PAIRS.partner]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_mixed_classes(smoothing):
    task, target = learnt(Classification(label_smoothing=smoothing), "a", "b", "c", "a")
    probabilities = mixed_by_hand(torch.nn.functional.one_hot(target, 3).float())
    expected = cross_entropy(OUTPUT, probabilities, label_smoothing=smoothing, reduction="none")
    assert torch.allclose(task.of_mixture(task.loss, OUTPUT, target, PAIRS), expected, atol=1e-6)


def test_labels_are_mixed():
    task, target = learnt(MultiLabel(), "a;b", "c", "", "b")
    expected = binary_cross_entropy_with_logits(OUTPUT, mixed_by_hand(target.float()), reduction="none").mean(dim=1)
    assert torch.allclose(task.of_mixture(task.loss, OUTPUT, target, PAIRS), expected, atol=1e-6)


@pytest.mark.parametrize("loss", ["mse", "huber", "mae"])
def test_numbers_are_mixed_before_the_loss(loss):
    task, target = learnt(Regression(loss=loss), "1", "5", "2", "11")
    error = OUTPUT[:, 0] - mixed_by_hand(target)[:, 0]
    near = error.square() / 2
    expected = {"mse": near, "mae": error.abs(), "huber": near.where(error.abs() < 1, error.abs() - 0.5)}[loss]
    assert torch.allclose(task.of_mixture(task.loss, OUTPUT[:, :1], target, PAIRS), expected, atol=1e-6)


def test_the_likelihoods_of_both_ordered_classes_count():
    task, target = learnt(Ordinal(), "1", "2", "3", "1")
    log_p = task.values(OUTPUT[:, :2]).log()
    rows = torch.arange(4)
    expected = -WEIGHT * log_p[rows, target] - (1 - WEIGHT) * log_p[rows, target[PAIRS.partner]]
    assert torch.allclose(task.of_mixture(task.loss, OUTPUT[:, :2], target, PAIRS), expected, atol=1e-5)


def test_class_weights_still_divide_by_the_mean_weight_of_the_update():
    weights = {"a": 3.0, "b": 0.5, "c": 1.0}
    task, target = learnt(Classification(class_weights=weights), "a", "b", "c", "a")
    engine = Engine(image=lambda: None, text=lambda: None, task=task)
    w, log_p, rows, p = np.array(list(weights.values())), OUTPUT.double().log_softmax(1).numpy(), np.arange(4), PAIRS.partner.numpy()
    of_both = [(share, target.numpy()[order]) for share, order in ((WEIGHT, rows), (1 - WEIGHT, p))]
    losses = sum(-share * w[y] * log_p[rows, y] for share, y in of_both)
    sample_weights = sum(share * w[y] for share, y in of_both)
    assert float(engine.loss(OUTPUT, target, target, PAIRS)) == pytest.approx(losses.sum() / sample_weights.sum(), rel=1e-6)


def test_accuracy_in_training_counts_both_classes_by_their_weights():
    task, target = learnt(Classification(), "a", "b", "c", "a")
    batch = Batch({}, target, torch.arange(4), mixture=PAIRS)
    output = torch.eye(3)[target]
    figures = Mixer(Mixing(mixup=1.0), task).figures(lambda y: task.batch_figures(output, y), batch)
    right_of_partner = (target == target[PAIRS.partner]).float().mean()
    assert float(figures["accuracy"]) == pytest.approx(WEIGHT + (1 - WEIGHT) * float(right_of_partner))
    assert float(figures["mixed_share"]) == 1
    assert float(figures["mixed_weight"]) == pytest.approx(WEIGHT)
