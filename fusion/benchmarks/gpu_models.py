"""Checks of `fusion benchmark gpu` in this process: heads in fp16, a whole model's speed and memory, and what the fit loop waits for."""

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

# Products of bf16 matrices without sparsity, in FLOP/s, from the makers' data sheets; of other cards it is measured.
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
NEEDS_GPU = "waits for a GPU"


def heads(gpu: bool) -> Iterator[Finding]:
    """Every head in fp16 autocast: near float32 on the CPU, forward without a wait for the device, and with finite gradients."""
    device, bad, worst = "cuda" if gpu else "cpu", [], 0.0
    for name, cls in HEADS.items():
        torch.manual_seed(0)
        head = cls({"text": 32, "image": 48}, 5, dim=64).eval()  # type: ignore[call-arg]
        on_cpu = given(name)
        expected = head(on_cpu).output.detach()
        head.to(device)
        features = move_data_to_device(on_cpu, torch.device(device))
        target = torch.arange(8, device=device) % 5
        try:
            with no_waits(gpu):
                with torch.autocast(device, dtype=torch.float16):
                    output = head(features).output
                (cross_entropy(output.float(), target) * 1024).backward()
        except RuntimeError as error:
            bad.append(f"{name}: {str(error).splitlines()[0][:80]}")
            continue
        off = float((output.detach().float().cpu() - expected).abs().max() / expected.abs().max())
        worst = max(worst, off)
        finite = all(bool(p.grad.isfinite().all()) for p in head.parameters() if p.grad is not None)
        if off > 0.02 or not finite:
            bad.append(f"{name} off by {off:.1e}" + ("" if finite else ", gradients not finite"))
    waits = "no wait for the device; " if gpu else ""
    off_by = f"outputs at most {worst:.1e} of the largest off float32"
    yield Finding(not bad, f"{len(HEADS)} heads in fp16", waits + "; ".join([off_by, *bad]))


def given(name: str) -> dict[str, Any]:
    """Texts of many lengths; three pictures that eight samples share, two of which have none."""
    text, image = torch.randn(8, 7, 32), torch.randn(3, 49, 48)
    mask, there = torch.arange(7)[None] < torch.arange(1, 9)[:, None], (torch.arange(8) % 4 > 0)[:, None].expand(-1, 49)
    features = {"text": Features(text, mask, text.mean(1)), "image": Features(image, there, image.mean(1), torch.arange(8) % 3)}
    return {modality: [f] for modality, f in features.items()} if name == "LevelWeighted" else features


@contextmanager
def no_waits(gpu: bool) -> Iterator[None]:
    """Whatever would wait for the device raises RuntimeError."""
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
    """Training steps of ViT-B/16, BERT-base and CrossAttention under bf16 autocast, AdamW; of the smallest of the kind without a GPU."""

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
        """length: of the longest text; every other one is a token shorter, so that attention has a mask."""
        length, rows = length or self.length, torch.arange(self.batch, device=self.device)
        ids = torch.randint(5, 999, (self.batch, length), device=self.device)
        mask = torch.arange(length, device=self.device)[None] < length - rows[:, None] % 2
        inputs = {"image": Images(self.pixels, rows >= 0, anyone=True), "text": Texts(ids, mask)}
        self.optimizer.zero_grad()
        with torch.autocast(self.device, dtype=torch.bfloat16):
            output = self.model(inputs).output
        cross_entropy(output.float(), torch.zeros_like(rows)).backward()
        self.optimizer.step()


def seconds(run: Callable[[], Any], times: int) -> float:
    """Of one run, over so many, waited for once."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(times):
        run()
    wait()
    return (time.perf_counter() - began) / times


def peak_flops() -> float:
    """Of this card's bf16 products: by its data sheet, else measured."""
    name = torch.cuda.get_device_name()
    known = next((flops for part, flops in PEAKS.items() if part in name), None)
    if known is not None:
        return known
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    seconds(lambda: a @ a, 3)
    return 2 * 8192**3 / seconds(lambda: a @ a, 20)


def whole_model(gpu: bool) -> Iterator[Finding]:
    """Samples a second and the share of the card's operations that is used (MFU), eager and compiled; and texts of lengths not seen yet."""
    step, times = Step(gpu), 10 if gpu else 1
    step()
    with FlopCounterMode(display=False) as counted:
        step()
    flops = counted.get_total_flops()
    judges = gpu and any(name in torch.cuda.get_device_name() for name in ("H100", "H200"))

    def speed(how: str, taken: float, least: float) -> Finding:
        told = f"{step.batch / taken:,.0f} samples/s, {1e3 * taken:.0f} ms a step of {step.batch}, {flops / 1e12:.2f} TFLOP"
        if not gpu:
            return Finding(None, how, f"{told}; {NEEDS_GPU}")
        used = flops / taken / peak_flops()
        return Finding(used >= least if judges else None, how, f"{told}, MFU {used:.1%}" + (f" (at least {least:.0%})" if judges else ""))

    what = "ViT-B/16 + BERT-base + CrossAttention, bf16" if gpu else "the smallest of each kind, bf16"
    yield speed(f"{what}, eager", seconds(step, times), 0.40)
    lengths = range(step.length - 7, step.length - 1)
    new, seen = (sum(seconds(lambda n=length: step(n), 1) for length in lengths) / len(lengths) for _ in range(2))  # type: ignore[misc]
    told = f"the first step {1e3 * new:.0f} ms, later ones {1e3 * seen:.0f} ms (at most 1.5 times)"
    yield Finding(new <= 1.5 * seen if gpu else None, "texts of a new length", told)
    step.model = torch.compile(step.model, backend="inductor" if gpu else "eager")
    for _ in range(3):
        step()
    yield speed(f"{what}, compiled", seconds(step, times), 0.50)


def peak_gib(run: Callable[[], Any]) -> float:
    """Beyond what is allocated before; 0 without a GPU."""
    if not torch.cuda.is_available():
        run()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def long_texts(gpu: bool) -> Iterator[Finding]:
    """Memory at 8,192 tokens: of a head, which must grow with them and not with their square; of BERT-base; of a whole model."""
    device, longest = ("cuda", 8192) if gpu else ("cpu", 64)

    def head(length: int) -> None:
        torch.manual_seed(0)
        made = CrossAttention({"text": 384, "image": 384}, 10).to(device)
        tokens = {name: torch.randn(4, n, 384, device=device) for name, n in (("text", length), ("image", 196))}
        with torch.autocast(device, dtype=torch.bfloat16):
            output = made(tokens).output
        output.float().sum().backward()

    half, whole = peak_gib(lambda: head(longest // 2)), peak_gib(lambda: head(longest))
    told = f"{whole:.2f} GiB for 4 texts of {longest:,} tokens, {half:.2f} of half as many (at most 2.3 times)" if gpu else NEEDS_GPU
    yield Finding(whole <= 2.3 * half if gpu else None, "memory of CrossAttention", told)

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
    told = f"{used:.1f} GiB for 2 texts of {longest:,} and {longest // 2:,} tokens (at most 11)" if gpu else NEEDS_GPU
    yield Finding(used <= 11 if gpu else None, "memory of BERT-base", told)
    text.to("cpu")

    step = Step(gpu, longest=longest, batch=4)
    used = peak_gib(lambda: step(longest))
    told = f"{used:.1f} GiB for 4 samples with texts of {longest:,} tokens (at most 48)" if gpu else NEEDS_GPU
    yield Finding(used <= 48 if gpu else None, "memory of the whole model", told)


class Look(Callback):
    """Over 20 updates of a run: the lines that wait for the device, whether batches are pinned, and where averaged weights lie."""

    FIRST, LAST = 10, 30

    def __init__(self) -> None:
        self.sites: Counter[str] = Counter()
        self.pinned, self.average, self.reached = False, "none", False
        self.usual = warnings.showwarning

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.FIRST:
            self.pinned = bool(next(iter(trainer.train_dataloader)).target.is_pinned())  # type: ignore[arg-type]
            averages = (getattr(callback, "averaged", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
            self.average = next((str(next(a.module.parameters()).device) for a in averages if a is not None), "none")
            warnings.simplefilter("always")
            self.usual, warnings.showwarning = warnings.showwarning, self.note
            set_sync_warnings("warn")
        if batch_idx == self.LAST:
            self.reached = True
            self.on_train_end(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        set_sync_warnings("default")
        warnings.showwarning = self.usual

    def note(self, message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            stack = (f for f in reversed(traceback.extract_stack()) if f.filename != __file__)
            frame = next((f for f in stack if "/fusion/" in f.filename or "/lightning/" in f.filename), None)
            self.sites[f"{os.path.basename(frame.filename)}:{frame.lineno}" if frame else "?"] += 1


def set_sync_warnings(mode: str) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode(mode)


def fit_loop(runs: Runs) -> Iterator[Finding]:
    """What an update waits for, outside of logging: once, for whether its gradients are finite."""
    usual = command.standing_callbacks
    for name, options in (("bf16", BF16), ("EMA", ["--recipe", "engine/ema"])):
        look = Look()
        command.standing_callbacks = lambda *asked, look=look: [*usual(*asked), look]
        try:
            places = [f"--runs={runs.folder / 'looked at'}", f"--data.cache={runs.folder / 'cache'}"]
            lengths = ["--trainer.log_every_n_steps=50", f"--trainer.max_steps={Look.LAST + 1}"]
            with redirect_stdout(io.StringIO()):
                command.fit([*runs.short, *runs.one_device, *options, *lengths, *places])
        finally:
            command.standing_callbacks = usual
        updates = Look.LAST - Look.FIRST
        waits = sum(look.sites.values()) / updates
        told = f"{waits:.1f} an update (at most 1): " + ", ".join(
            f"{site} {count / updates:.1f}" for site, count in look.sites.most_common(6)
        )
        good = look.reached and waits <= 1
        yield Finding(good if runs.on_gpu else None, f"waits of fit, {name}", told if runs.on_gpu else NEEDS_GPU)
        if name == "EMA":
            yield Finding(("cuda" in look.average) if runs.on_gpu else None, "averaged weights lie on", look.average)
        else:
            yield Finding(look.pinned if runs.on_gpu else None, "batches are pinned", str(look.pinned))


def overlap(gpus: int) -> Iterator[Finding]:
    """How much of the exchange of gradients is hidden behind the backward pass, of two ranks."""
    if gpus:  # what this process keeps for later, a rank on the same card needs
        gc.collect()
        torch.cuda.empty_cache()
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(measure_overlap, args=(gpus > 1, results), nprocs=2)
    together, alone, exchange = results.get()
    hidden = 1 - max(0.0, together - alone) / exchange
    milliseconds = f"a step {1e3 * together:.0f} ms, without exchange {1e3 * alone:.0f} ms, the exchange alone {1e3 * exchange:.0f} ms"
    yield Finding(hidden >= 0.85 if gpus > 1 else None, "exchange of gradients", f"{hidden:.0%} hidden (at least 85%): {milliseconds}")


def measure_overlap(rank: int, gpu: bool, results: Any) -> None:
    """Seconds of a step of two ranks, of one that exchanges nothing, and of an exchange alone."""
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
