"""Activations computed twice, and compiled models: the same training, for less memory or time."""

import pytest
import torch
from tiny_world import BERT

from fusion.encoders import Texts, TransformersText
from fusion.errors import UserError
from fusion.predictor import Predictor

PARTS = ["image", "text", "head"]


def one_update(parts, *options):
    model, data, trainer = parts("--trainer.max_steps=1", *options, dropout=0.4)
    trainer.fit(model, datamodule=data)
    return model.model.state_dict()


@pytest.mark.parametrize("checkpointed", [[part] for part in PARTS] + [PARTS], ids="+".join)
def test_activations_computed_twice_give_the_same_update(parts, checkpointed):
    plain = one_update(parts)
    twice = one_update(parts, f"--model.checkpoint_activations={checkpointed}")
    for name, value in plain.items():
        assert torch.allclose(value, twice[name], atol=1e-7), name


@pytest.mark.parametrize("part", PARTS)
def test_activations_computed_twice_are_not_kept(parts, part):
    def kept_bytes(*options):
        model, data, _ = parts("--model.head=CrossAttention", *options)
        model.build(data).train()
        held = 0

        def pack(tensor):
            nonlocal held
            held += tensor.nbytes
            return tensor

        batch = next(iter(data.train_dataloader()))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.model(batch.inputs)
        return held

    assert kept_bytes(f"--model.checkpoint_activations=[{part}]") < 0.95 * kept_bytes()


def test_a_part_that_does_not_exist_is_refused(parts):
    with pytest.raises(UserError, match="unknown part 'txt'"):
        parts("--model.checkpoint_activations=[txt]")


@pytest.mark.slow
def test_a_compiled_model_trains_what_an_eager_one_trains_and_its_checkpoint_loads_anywhere(tiny, write_manifest, fit_here, fit_command):
    # Compiling takes minutes: a block of the image encoder will do, and as the second batch differs from the first in pictures and in
    # words, it is once that both are found to vary.
    manifest = write_manifest(lambda i, row: row | {"text": row["text"] + " please" * (i % 19)})
    options = ["--recipe", tiny(manifest=manifest), "--trainer.max_epochs=1", '--model.image.init_args.options={"depth": 1}']
    eager = fit_here(*options, runs="eager")
    compiled, _ = fit_command(*options, "--model.compile=true", runs="compiled", timeout_s=500)
    a, b = eager.checkpoint()["state_dict"], compiled.checkpoint()["state_dict"]
    assert list(a) == list(b)
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-4
    Predictor.load(compiled.folder)


def test_a_text_model_whose_activations_are_computed_again_is_compiled_as_one_graph():
    encoder = TransformersText(config=BERT).train()
    encoder.checkpoint_activations()
    ids, mask = torch.ones(4, 6, dtype=torch.long), torch.arange(6)[None] < torch.tensor([6, 4, 3, 6])[:, None]
    found = torch._dynamo.explain(lambda texts: encoder(texts).pooled)(Texts(ids, mask))
    assert found.graph_break_count == 0, [str(one.reason) for one in found.break_reasons]
