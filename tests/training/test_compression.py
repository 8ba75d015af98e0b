"""Compressed gradients: what the bits say, what they leave for later, and what two ranks learn by them."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from tiny_world import ROUNDING, TWO, assert_same_end, furthest, furthest_weights

from fusion.errors import UserError
from fusion.training.distributed import residuals
from fusion.training.distributed.sign_compression import SignCompression, decode, encode, pack_bits, unpack_bits
from fusion.training.optim.muon import orthogonal


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_bits_survive_being_packed_into_an_eighth_of_the_bytes(values):
    bits = torch.tensor(values)
    assert unpack_bits(pack_bits(bits), len(bits)).tolist() == values
    assert pack_bits(bits).nbytes == -(-len(values) // 8)


# One rank alone, so that what it hears is what it says.


@pytest.fixture
def alone():
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield SimpleNamespace(world_size=1, sent=0)
    dist.destroy_process_group()


class Bucket:
    """A bucket of DDP: gradients are views of one buffer."""

    def __init__(self, parameters, values):
        self.own, self.memory = parameters, torch.cat([v.flatten() for v in values])
        self.views = [part.view_as(p) for p, part in zip(parameters, self.memory.split([p.numel() for p in parameters]), strict=True)]

    def buffer(self):
        return self.memory

    def parameters(self):
        return self.own

    def gradients(self):
        return self.views


SHAPES = [(3, 4), (5,), (1,), (), (2, 3, 2, 2), (3, 4)]


def said(compression, strategy, parameters, values, *, skipped=False):
    bucket = Bucket(parameters, values)
    compression.exchange(strategy, bucket).wait()
    compression.end_update(skipped=skipped)
    return [view.clone() for view in bucket.gradients()]


def test_what_is_said_and_what_is_left_add_up_to_the_gradients(alone):
    """Summed over the updates: the errors of all but the last are fed back."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    compression = SignCompression()
    true, heard = [torch.zeros(s) for s in SHAPES], [torch.zeros(s) for s in SHAPES]
    for _ in range(20):
        gradients = [torch.randn(shape) for shape in SHAPES]
        out = said(compression, alone, parameters, gradients)
        assert all(len(o.abs().unique()) <= 8 for o in out[1:4])  # sizes of a vector
        true = [t + g for t, g in zip(true, gradients, strict=True)]
        heard = [h + o for h, o in zip(heard, out, strict=True)]
    for t, h, p in zip(true, heard, parameters, strict=True):
        assert torch.allclose(h + compression.residual[p], t, atol=1e-5)


def test_a_vector_is_said_by_powers_of_two_below_its_largest_value(alone):
    p = torch.nn.Parameter(torch.zeros(8))
    (out,) = said(SignCompression(), alone, [p], [torch.tensor([4.0, -2.0, 3.0, -1.3, 0.01, 0.0, -0.06, 0.25])])
    assert out.tolist() == [4, -2, 4, -1, 0, 0, -0.0625, 0.25]
    assert alone.sent == 8 * 4 / 8 + 4


def test_a_matrix_is_said_by_sizes_of_its_rows_and_columns(alone):
    """Nearer to it than one size could be; exactly where its sizes are such products. Summed in float64."""
    rng = np.random.default_rng(0)
    spread = rng.lognormal(size=(20, 1)) * rng.lognormal(size=(1, 30)) * rng.standard_normal((20, 30))
    p = torch.nn.Parameter(torch.zeros(20, 30))
    (out,) = said(SignCompression(), alone, [p], [torch.from_numpy(spread).float()])
    assert alone.sent == 75 + 20 + 30 + 4
    sizes = np.abs(spread)
    products = np.outer(sizes.mean(axis=1), sizes.mean(axis=0))
    expected = np.sign(spread) * products * (sizes * products).sum() / (products**2).sum()
    assert np.abs(out.numpy() - expected).max() < 0.13 * np.abs(expected).max()  # two float8 of 3 bits each
    assert np.square(spread - out.numpy()).sum() < 0.7 * np.square(spread - np.sign(spread) * sizes.mean()).sum()


@given(st.lists(st.integers(1, 6), min_size=1, max_size=2), st.integers(0, 10**6))
def test_what_is_left_is_never_more_than_what_was_to_be_said(shape, seed):
    p = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) ** 5
    assert (p - decode(*encode(p), shape)).square().sum() <= p.square().sum() * (1 + 1e-5)


def uneven(updates, shape, seed=0):
    """Gradients whose directions are of very different sizes, as those of layers are."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for n in shape)
    small = min(shape)
    for _ in range(updates):
        noise = torch.randn(shape, generator=generator)
        noise[:small] *= torch.logspace(0, -4, small)[:, None]
        noise[:, :small] *= torch.logspace(0, -4, small)
        yield left @ noise @ right


def test_in_the_axes_of_what_was_heard_small_directions_are_not_drowned(alone, monkeypatch):
    """What Muon makes of momentum that was said, beside the momentum as it was: far nearer than in the matrix's own axes."""
    off = {}
    for longest in (0, 64):
        monkeypatch.setattr("fusion.training.distributed.sign_compression.LONGEST", longest)
        p, compression = torch.nn.Parameter(torch.zeros(24, 32)), SignCompression()
        true, heard = torch.zeros(24, 32), torch.zeros(24, 32)
        for gradient in uneven(80, (24, 32)):
            (out,) = said(compression, alone, [p], [gradient])
            true, heard = true.lerp(gradient, 0.05), heard.lerp(out, 0.05)
        straight, turned = orthogonal(torch.stack([true, heard]))
        off[longest] = float((straight - turned).square().sum() / straight.square().sum())
    print(off)
    assert off[64] < 0.3 * off[0]


@pytest.mark.parametrize("shape", [(6, 6), (3, 8), (8, 1)])
def test_the_axes_stay_at_right_angles(alone, shape):
    p, compression = torch.nn.Parameter(torch.zeros(shape)), SignCompression()
    for gradient in uneven(30, shape):
        said(compression, alone, [p], [1e-12 * gradient])
    for axes in compression.axes[p]:
        assert torch.allclose(axes.basis.T @ axes.basis, torch.eye(len(axes.basis)), atol=1e-5)
        assert len(axes.basis) == 1 or not torch.equal(axes.basis.abs(), torch.eye(len(axes.basis)))
    matrices = torch.randn(1, *shape)
    assert torch.allclose(compression.rotate_back([p], compression.rotate([p], matrices)), matrices, atol=1e-5)


def test_sides_too_long_and_filters_and_vectors_and_embeddings_keep_their_axes(alone, monkeypatch):
    monkeypatch.setattr("fusion.training.distributed.sign_compression.LONGEST", 8)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((8, 9), (8, 9), (9, 9), (8, 3, 3, 3), (8,))]
    compression = SignCompression()
    compression.embeddings = {parameters[1]}
    said(compression, alone, parameters, [torch.ones_like(p) for p in parameters])
    assert [[side is not None for side in compression.axes[p]] for p in parameters] == [[True, False], *[[False, False]] * 4]


def test_compression_goes_on_from_its_state_to_the_bit(alone, tmp_path):
    named = {f"p{i}": torch.nn.Parameter(torch.zeros(shape)) for i, shape in enumerate(SHAPES)}
    parameters, whole = list(named.values()), SignCompression()
    gradients = [[torch.randn(s, generator=torch.Generator().manual_seed(i)) for s in SHAPES] for i in range(20)]
    for values in gradients[:13]:
        said(whole, alone, parameters, values)
    torch.save(whole.state(named), tmp_path / "state.pt")
    residuals.write(residuals.path_of(tmp_path, 13, 0, 1), whole.residual_state(named))
    resumed = SignCompression()
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True), residuals.read(tmp_path, 13, 1, 0, 1), named)
    for values in gradients[13:]:
        for one, other in zip(said(whole, alone, parameters, values), said(resumed, alone, parameters, values), strict=True):
            assert torch.equal(one, other)


def test_the_gradient_scalers_scale_changes_nothing_but_the_scale(alone):
    outs = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(1)
        p, compression, seen = torch.nn.Parameter(torch.zeros(6)), SignCompression(), []
        for step in range(5):
            compression.scale = scale * 2**step if scale > 1 else 1.0  # it may grow between updates
            (out,) = said(compression, alone, [p], [torch.randn(6) * compression.scale])
            seen.append(out / compression.scale)
        outs.append(torch.stack(seen))
    assert torch.allclose(outs[0], outs[1], atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_heard_and_leaves_the_rest_to_be_said_as_it_was(alone, value):
    parameters, compression = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))], SignCompression()
    said(compression, alone, parameters, [torch.tensor([1.0, 2.0, 6.0]), torch.ones(2)])
    before = compression.residual[parameters[0]].clone()
    out = said(compression, alone, parameters, [torch.tensor([1.0, value, 0.0]), torch.ones(2)])
    assert not out[0].isfinite().any()
    assert out[1].isfinite().all()
    assert torch.equal(compression.residual[parameters[0]], before)


def test_a_skipped_update_has_said_nothing(alone):
    p, compression = torch.nn.Parameter(torch.zeros(1, 3)), SignCompression()
    said(compression, alone, [p], [torch.tensor([[1.0, 2.0, 6.0]])])
    before = compression.residual[p].clone(), compression.axes[p][1].moment.clone()
    said(compression, alone, [p], [torch.tensor([[5.0, -2.0, 1.0]])], skipped=True)
    assert torch.equal(compression.residual[p], before[0])
    assert torch.equal(compression.axes[p][1].moment, before[1])


def test_each_rank_reads_its_own_share_and_another_number_of_ranks_an_equal_share_of_the_sum(tmp_path):
    shares = [{"a": torch.full((2,), float(rank))} for rank in range(4)]
    for rank, share in enumerate(shares):
        residuals.write(residuals.path_of(tmp_path, 7, rank, 4), share)
    assert residuals.read(tmp_path, 7, 4, 2, 4)["a"].tolist() == [2, 2]
    for world in 1, 2, 8:
        parts = [residuals.read(tmp_path, 7, 4, rank, world)["a"] for rank in range(world)]
        assert torch.stack(parts).mean(dim=0).tolist() == [1.5, 1.5]  # what all have left, as the mean over the ranks says it
    path = residuals.path_of(tmp_path, 7, 2, 4)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"update-7-rank-2-of-4\.pt, the residuals of rank 2, can't be loaded"):
        residuals.read(tmp_path, 7, 4, 2, 4)
    path.unlink()
    with pytest.raises(UserError, match="it is missing"):
        residuals.read(tmp_path, 7, 4, 0, 2)


def test_shares_that_no_checkpoint_names_are_removed(tmp_path):
    for updates in 3, 5, 8:
        residuals.write(residuals.path_of(tmp_path, updates, 0, 1), {"a": torch.ones(1)})
    for name, updates in ("last", 8), ("previous", 5):
        torch.save({"fusion": {"compression": {"updates": updates, "world": 1}}}, tmp_path / f"{name}.ckpt")
    torch.save({"fusion": {"compression": {}}}, tmp_path / "best.ckpt")
    residuals.clean(tmp_path)
    kept = ["update-5-rank-0-of-1.pt", "update-8-rank-0-of-1.pt"]
    assert sorted(file.name for file in (tmp_path / "residuals").iterdir()) == kept
    (tmp_path / "previous.ckpt").write_bytes(b"torn")
    residuals.clean(tmp_path)
    assert sorted(file.name for file in (tmp_path / "residuals").iterdir()) == kept


# Two ranks.


@pytest.mark.slow
def test_a_run_that_says_signs_goes_on_to_the_bit_and_on_another_number_of_ranks(tiny, fit_on_two, fit_here):
    recipe, sign = tiny(), "--trainer.strategy.init_args.compress=sign"
    whole, _ = fit_on_two(recipe, sign, "--trainer.max_epochs=3", "--model.schedule=Constant", runs="whole")
    short, _ = fit_on_two(recipe, sign, "--trainer.max_epochs=2", "--model.schedule=Constant", runs="short")
    copy = short.folder.with_name("copy")
    shutil.copytree(short.folder, copy)
    assert {file.name for file in (short.folder / "checkpoints" / "residuals").iterdir()} >= {f"update-16-rank-{r}-of-2.pt" for r in (0, 1)}
    assert "residual" not in short.checkpoint()["fusion"]["compression"]
    resumed, _ = fit_on_two(short.folder, "--trainer.max_epochs=3", runs="resumed")
    assert_same_end(resumed, whole)
    alone = fit_here("--resume", copy, "--trainer.max_epochs=3", "--trainer.devices=1")
    assert furthest(alone.column("train/loss_epoch"), whole.column("train/loss_epoch")) < 0.2


@pytest.mark.slow
def test_two_ranks_learn_from_fewer_bytes(tiny, fit_on_two):
    options = [tiny(), "--trainer.max_epochs=8", "--model.optimizer.init_args.lr=0.01"]
    plain, _ = fit_on_two(*options, runs="plain")
    for compress, fewer in (("fp16", 2), ("sign", 25)):
        small, _ = fit_on_two(*options, f"--trainer.strategy.init_args.compress={compress}", runs=compress)
        assert_fewer_bytes(plain, small, compress, fewer)


def assert_fewer_bytes(plain, small, compress, fewer):
    bytes_plain, bytes_small = plain.column("train/sent_bytes"), small.column("train/sent_bytes")
    assert len(set(bytes_plain)) == len(set(bytes_small)) == 1
    assert bytes_plain[0] == 4 * sum(t.numel() for n, t in plain.checkpoint()["state_dict"].items() if n.startswith("model."))  # all learn
    ratio = bytes_plain[0] / bytes_small[0]
    losses = [run.column("train/loss_epoch") for run in (plain, small)]
    print(f"{compress}: {bytes_small[0]:,.0f} bytes an update, {ratio:.1f} times fewer; losses {losses[0]} and {losses[1]}")
    assert ratio >= fewer
    fall_plain, fall_small = (curve[0] - curve[-1] for curve in losses)
    assert fall_plain > 0.1
    assert fall_small > 0.8 * fall_plain


def test_what_gloo_can_not_do_is_refused_with_the_reason_before_any_rank_is_started(tiny, tmp_path, fit_here):
    with pytest.raises(UserError, match="compress=bf16 needs NCCL"):
        fit_here("--recipe", tiny(), *TWO, "--trainer.strategy.init_args.compress=bf16")
    assert not list((tmp_path / "runs").glob("*/*"))


@pytest.mark.slow
def test_fp16_autocast_and_sign_compression_and_accumulation_work_together(tiny, fit_here, fit_on_two):
    recipe = tiny()
    fp16 = ["--trainer.plugins=fusion.training.Fp16", "--trainer.plugins.init_args.init_scale=1024"]
    sign = "--trainer.strategy.init_args.compress=sign"
    plain, _ = fit_on_two(recipe, sign, runs="plain")
    mixed, _ = fit_on_two(recipe, sign, *fp16, "--trainer.accumulate_grad_batches=2", runs="mixed")
    assert furthest(plain.column("val/loss"), mixed.column("val/loss")) < 0.02
    axes = plain.checkpoint()["fusion"]["compression"]["axes"]
    unturned = [name for name, sides in axes.items() if None in sides and plain.checkpoint()["state_dict"][name].dim() == 2]
    assert unturned
    assert all("embeddings" in name for name in unturned)


@pytest.mark.slow
def test_ddp_without_compression_is_one_process(tiny, fit_here, fit_on_two):
    recipe = tiny()
    one = fit_here("--recipe", recipe, runs="one")
    two, _ = fit_on_two(recipe, "--trainer.strategy.init_args.find_unused_parameters=true", runs="two")
    assert furthest_weights(one, two) < ROUNDING
