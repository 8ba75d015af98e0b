"""Checks of `fusion benchmark gpu` in this process: heads in fp16, speed and memory of a whole model, synchronisations of the fit loop."""

import gc
import io
import os
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import fusion.session as command
from fusion.benchmarks.findings import Finding
from fusion.benchmarks.gpu_runs import BF16, Runs
from fusion.encoders import Images, Texts, TimmImage, TransformersText
from fusion.features import Features
from fusion.heads import CrossAttention
from fusion.heads.registry import HEADS
from fusion.model import FusionModel

# Dense bf16 matrix products in FLOP/s, from the manufacturers' data sheets; measured for other cards.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}
NEEDS_GPU = "needs a GPU"


def heads(gpu: bool) -> Iterator[Finding]:
    """Every head under fp16 autocast: output close to float32 on the CPU, no device synchronisation in forward, finite gradients."""
    device, bad, worst = "cuda" if gpu else "cpu", [], 0.0
    for name, cls in HEADS.items():
        torch.manual_seed(0)
        head = cls({"text": 32, "image": 48}, 5, dim=64).eval()  # type: ignore[call-arg]
        on_cpu = random_features(name)
        expected = head(on_cpu).output.detach()
        head.to(device)
        features = move_data_to_device(on_cpu, torch.device(device))
        target = torch.arange(8, device=device) % 5
        try:
            with no_waits(gpu):
                with torch.autocast(device, dtype=torch.float16):
                    output = head(features).output
                (cross_entropy(output.float(), target) * 1024).backward()
        except RuntimeError as raised:
            bad.append(f"{name}: {str(raised).splitlines()[0][:80]}")
            continue
        error = float((output.detach().float().cpu() - expected).abs().max() / expected.abs().max())
        worst = max(worst, error)
        finite = all(bool(p.grad.isfinite().all()) for p in head.parameters() if p.grad is not None)
        if error > 0.02 or not finite:
            bad.append(f"{name}: error {error:.1e}" + ("" if finite else ", gradients not finite"))
    waits = "no device synchronisation; " if gpu else ""
    accuracy = f"largest error against float32 {worst:.1e} (relative to the largest output)"
    yield Finding(not bad, f"{len(HEADS)} heads in fp16", waits + "; ".join([accuracy, *bad]))


def random_features(name: str) -> dict[str, Any]:
    """Features of eight samples: texts of several lengths; three images shared by the samples, of which two have none."""
    text, image = torch.randn(8, 7, 32), torch.randn(3, 49, 48)
    mask, image_mask = torch.arange(7)[None] < torch.arange(1, 9)[:, None], (torch.arange(8) % 4 > 0)[:, None].expand(-1, 49)
    features = {"text": Features(text, mask, text.mean(1)), "image": Features(image, image_mask, image.mean(1), torch.arange(8) % 3)}
    return {modality: [f] for modality, f in features.items()} if name == "LevelWeighted" else features


@contextmanager
def no_waits(gpu: bool) -> Iterator[None]:
    """Make every device synchronisation raise RuntimeError."""
    if not gpu:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Step:
    """Training steps of ViT-B/16, BERT-base and CrossAttention under bf16 autocast with AdamW; of tiny models without a GPU."""

    def __init__(self, gpu: bool, longest: int = 512, batch: int | None = None) -> None:
        self.device = "cuda" if gpu else "cpu"
        small = {} if gpu else {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 96}
        encoders = {
            "image": TimmImage("vit_base_patch16_224" if gpu else "vit_tiny_patch16_224", pretrained=False),
            "text": TransformersText(config={"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": longest, **small}),
        }
        self.model: Any = FusionModel.build(encoders, CrossAttention, 1000).to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.batch, self.length = batch or (256 if gpu else 2), 64 if gpu else 9
        self.pixels = torch.randint(0, 255, (self.batch, 3, 224, 224), dtype=torch.uint8, device=self.device)

    def __call__(self, length: int | None = None) -> None:
        """length: tokens of the longest text; every other text is one token shorter, so that attention uses a mask."""
        length, index = length or self.length, torch.arange(self.batch, device=self.device)
        ids = torch.randint(5, 999, (self.batch, length), device=self.device)
        mask = torch.arange(length, device=self.device)[None] < length - index[:, None] % 2
        inputs = {"image": Images(self.pixels, index >= 0, any_present=True), "text": Texts(ids, mask)}
        self.optimizer.zero_grad()
        with torch.autocast(self.device, dtype=torch.bfloat16):
            output = self.model(inputs).output
        cross_entropy(output.float(), torch.zeros_like(index)).backward()
        self.optimizer.step()


def seconds(run: Callable[[], Any], times: int) -> float:
    """Mean seconds of a call over so many, synchronised once at the end."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(times):
        run()
    wait()
    return (time.perf_counter() - began) / times


def peak_flops() -> float:
    """Peak FLOP/s of this card's bf16 matrix products: from its data sheet, else measured."""
    name = torch.cuda.get_device_name()
    known = next((flops for part, flops in PEAKS.items() if part in name), None)
    if known is not None:
        return known
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    seconds(lambda: a @ a, 3)
    return 2 * 8192**3 / seconds(lambda: a @ a, 20)


def whole_model(gpu: bool) -> Iterator[Finding]:
    """Samples per second and model FLOPs utilisation (MFU), eager and compiled; and the first step with texts of a new length."""
    step, times = Step(gpu), 10 if gpu else 1
    step()
    with FlopCounterMode(display=False) as counted:
        step()
    flops = counted.get_total_flops()
    has_target = gpu and any(name in torch.cuda.get_device_name() for name in ("H100", "H200"))

    def speed(what: str, step_s: float, least: float) -> Finding:
        detail = f"{step.batch / step_s:,.0f} samples/s, {1e3 * step_s:.0f} ms per step of {step.batch}, {flops / 1e12:.2f} TFLOP"
        if not gpu:
            return Finding(None, what, f"{detail}; {NEEDS_GPU}")
        mfu = flops / step_s / peak_flops()
        target = f" (at least {least:.0%})" if has_target else ""
        return Finding(mfu >= least if has_target else None, what, f"{detail}, MFU {mfu:.1%}{target}")

    models = "ViT-B/16 + BERT-base + CrossAttention, bf16" if gpu else "tiny models, bf16"
    yield speed(f"{models}, eager", seconds(step, times), 0.40)
    lengths = range(step.length - 7, step.length - 1)
    first, later = (sum(seconds(lambda n=length: step(n), 1) for length in lengths) / len(lengths) for _ in range(2))  # type: ignore[misc]
    detail = f"the first step {1e3 * first:.0f} ms, later ones {1e3 * later:.0f} ms (ratio at most 1.5)"
    yield Finding(first <= 1.5 * later if gpu else None, "texts of a new length", detail)
    step.model = torch.compile(step.model, backend="inductor" if gpu else "eager")
    for _ in range(3):
        step()
    yield speed(f"{models}, compiled", seconds(step, times), 0.50)


def peak_gib(run: Callable[[], Any]) -> float:
    """Peak GPU memory of a call, beyond what was allocated before; 0 without a GPU."""
    if not torch.cuda.is_available():
        run()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def long_texts(gpu: bool) -> Iterator[Finding]:
    """Memory at 8,192 tokens: of a head, which must grow linearly with the tokens; of BERT-base; of a whole model."""
    device, longest = ("cuda", 8192) if gpu else ("cpu", 64)

    def head(length: int) -> None:
        torch.manual_seed(0)
        module = CrossAttention({"text": 384, "image": 384}, 10).to(device)
        tokens = {name: torch.randn(4, n, 384, device=device) for name, n in (("text", length), ("image", 196))}
        with torch.autocast(device, dtype=torch.bfloat16):
            output = module(tokens).output
        output.float().sum().backward()

    half, whole = peak_gib(lambda: head(longest // 2)), peak_gib(lambda: head(longest))
    detail = f"{whole:.2f} GiB for 4 texts of {longest:,} tokens, {half:.2f} for half as many (ratio at most 2.3)" if gpu else NEEDS_GPU
    yield Finding(whole <= 2.3 * half if gpu else None, "memory of CrossAttention", detail)

    small = {} if gpu else {"num_hidden_layers": 1}
    text = (
        TransformersText(config={"model_type": "bert", "vocab_size": 1000, "max_position_embeddings": longest, **small}).to(device).train()
    )
    mask = torch.arange(longest, device=device)[None] < torch.tensor([[longest], [longest // 2]], device=device)

    def bert() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            pooled = text(Texts(mask.long(), mask)).pooled
        pooled.float().sum().backward()

    used = peak_gib(bert)
    detail = f"{used:.1f} GiB for 2 texts of {longest:,} and {longest // 2:,} tokens (at most 11)" if gpu else NEEDS_GPU
    yield Finding(used <= 11 if gpu else None, "memory of BERT-base", detail)
    text.to("cpu")

    step = Step(gpu, longest=longest, batch=4)
    used = peak_gib(lambda: step(longest))
    detail = f"{used:.1f} GiB for 4 samples with texts of {longest:,} tokens (at most 48)" if gpu else NEEDS_GPU
    yield Finding(used <= 48 if gpu else None, "memory of the whole model", detail)


class SyncMonitor(Callback):
    """Records over 20 updates: the lines of code that synchronise the device, whether batches are pinned, the averaged weights' device."""

    FIRST, LAST = 10, 30

    def __init__(self) -> None:
        self.sites: Counter[str] = Counter()
        self.pinned, self.average, self.reached = False, "none", False
        self.showwarning = warnings.showwarning

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.FIRST:
            self.pinned = bool(next(iter(trainer.train_dataloader)).target.is_pinned())  # type: ignore[arg-type]
            averages = (getattr(callback, "averaged", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
            self.average = next((str(next(a.module.parameters()).device) for a in averages if a is not None), "none")
            warnings.simplefilter("always")
            self.showwarning, warnings.showwarning = warnings.showwarning, self.record
            set_sync_warnings("warn")
        if batch_idx == self.LAST:
            self.reached = True
            self.on_train_end(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        set_sync_warnings("default")
        warnings.showwarning = self.showwarning

    def record(self, message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            stack = (f for f in reversed(traceback.extract_stack()) if f.filename != __file__)
            frame = next((f for f in stack if "/fusion/" in f.filename or "/lightning/" in f.filename), None)
            self.sites[f"{os.path.basename(frame.filename)}:{frame.lineno}" if frame else "?"] += 1


def set_sync_warnings(mode: str) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode(mode)


def fit_loop(runs: Runs) -> Iterator[Finding]:
    """Device synchronisations of an update, besides logging: one is allowed, to check whether the gradients are finite."""
    standing_callbacks = command.standing_callbacks
    for name, options in (("bf16", BF16), ("EMA", ["--recipe", "engine/ema"])):
        monitor = SyncMonitor()
        command.standing_callbacks = lambda *args, monitor=monitor: [*standing_callbacks(*args), monitor]
        try:
            places = [f"--runs={runs.folder / 'monitored'}", f"--data.cache={runs.folder / 'cache'}"]
            lengths = ["--trainer.log_every_n_steps=50", f"--trainer.max_steps={SyncMonitor.LAST + 1}"]
            with redirect_stdout(io.StringIO()):
                command.fit([*runs.short, *runs.one_device, *options, *lengths, *places])
        finally:
            command.standing_callbacks = standing_callbacks
        updates = SyncMonitor.LAST - SyncMonitor.FIRST
        waits = sum(monitor.sites.values()) / updates
        detail = f"{waits:.1f} per update (at most 1): " + ", ".join(
            f"{site} {count / updates:.1f}" for site, count in monitor.sites.most_common(6)
        )
        good = monitor.reached and waits <= 1
        yield Finding(good if runs.on_gpu else None, f"device synchronisations of fit, {name}", detail if runs.on_gpu else NEEDS_GPU)
        if name == "EMA":
            yield Finding(("cuda" in monitor.average) if runs.on_gpu else None, "device of averaged weights", monitor.average)
        else:
            yield Finding(monitor.pinned if runs.on_gpu else None, "batches are pinned", str(monitor.pinned))


def overlap(gpus: int) -> Iterator[Finding]:
    """How much of the gradient exchange between two ranks is overlapped by the backward pass."""
    if gpus:  # releases memory cached by this process, for the rank on the same card
        gc.collect()
        torch.cuda.empty_cache()
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(measure_overlap, args=(gpus > 1, results), nprocs=2)
    together, alone, exchange = results.get()
    hidden = 1 - max(0.0, together - alone) / exchange
    milliseconds = f"a step {1e3 * together:.0f} ms, a step without exchange {1e3 * alone:.0f} ms, the exchange {1e3 * exchange:.0f} ms"
    yield Finding(hidden >= 0.85 if gpus > 1 else None, "gradient exchange", f"{hidden:.0%} overlapped (at least 85%): {milliseconds}")


def measure_overlap(rank: int, gpu: bool, results: Any) -> None:
    """Seconds of a step of two ranks, of a step without gradient exchange, and of the exchange alone."""
    command.choose_kernels("highest")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29561"}
    if gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if gpu else "gloo", rank=rank, world_size=2)
    step = Step(gpu)
    step.model = DistributedDataParallel(step.model, device_ids=[rank] if gpu else None, gradient_as_bucket_view=True)
    flat = torch.zeros(sum(p.numel() for p in step.model.parameters()), device=step.device)
    times = 10 if gpu else 2
    seconds(step, 2)
    together = seconds(step, times)
    with step.model.no_sync():
        alone = seconds(step, times)
    exchange = seconds(lambda: dist.all_reduce(flat), times)
    if rank == 0:
        results.put((together, alone, exchange))
    dist.barrier()
    dist.destroy_process_group()
