"""Counting what would make the host wait for a GPU: reading a value, on any device."""

import traceback
from collections import Counter
from unittest.mock import patch

import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    torch.ops.aten._local_scalar_dense.default,  # item, float, bool, if
    torch.ops.aten.nonzero.default,  # and indexing by a mask
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten._unique2.default,
}
COPIES = ("tolist", "cpu", "numpy")  # which read without an operation where the tensor is on the CPU


class Reads(TorchDispatchMode):
    """While it holds, counts the reads by the line of our code, or of Lightning's, that they come from. Left out are tensors of batches
    that never leave the host."""

    def __init__(self):
        super().__init__()
        self.sites = Counter()
        self.patches = [patch.object(torch.Tensor, name, self.counting(getattr(torch.Tensor, name))) for name in COPIES]

    def __enter__(self):
        for one in self.patches:
            one.start()
        return super().__enter__()

    def __exit__(self, *error):
        for one in self.patches:
            one.stop()
        return super().__exit__(*error)

    def counting(self, method):
        def read(tensor, *args, **options):
            self.count()
            return method(tensor, *args, **options)

        return read

    def count(self):
        ours = (f for f in reversed(traceback.extract_stack()) if "/fusion/" in f.filename or "/lightning/" in f.filename)
        frame = next(ours, None)
        site = f"{frame.filename.rpartition('/')[2]}:{frame.name}" if frame else "?"
        if "/fusion/data/" not in (frame.filename if frame else ""):
            self.sites[site] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            self.count()
        return func(*args, **(kwargs or {}))


class CountReads(Callback):
    """Counts over whole updates, from the start of one batch to the start of another."""

    def __init__(self, first, last):
        self.first, self.last, self.reads = first, last, Reads()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.first:
            self.reads.__enter__()
        if batch_idx == self.last:
            self.reads.__exit__(None, None, None)

    @property
    def an_update(self):
        return {site: count / (self.last - self.first) for site, count in self.reads.sites.most_common()}
