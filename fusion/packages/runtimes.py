"""Runtimes of exported models: named arrays in, values out."""

import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from fusion.console import log_level
from fusion.errors import UserError, first_line, nearest
from fusion.extras import install


class Runtime(Protocol):
    """Runs a model file. threads: number of threads of one run; None: as many as there are cores."""

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the values (B, K) float32 for the arrays of a batch, by the names of the graph's inputs."""


class OnnxRuntime:
    """ONNX Runtime on the CPU, or on CUDA where it has been installed with it.

    Args:
        path: the .onnx file.
        names: the graph's inputs, in order.
        threads: number of threads of one run; None for one per core.
        device: "cpu" or "cuda".
    """

    file: ClassVar[str] = "model.onnx"

    def __init__(self, path: Path, names: list[str], threads: int | None = None, device: str = "cpu") -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"a package of onnx needs onnxruntime: {install('onnxruntime')}") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
            # Threads that wait for work would spin on cores that decode and tokenize.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        wanted = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
        if device not in wanted:
            raise UserError(f"device '{device}' is unknown. {nearest(device, wanted)}")
        if wanted[device] not in onnxruntime.get_available_providers():
            raise UserError(f"this onnxruntime has no {wanted[device]}; install onnxruntime-gpu, or use device cpu")
        try:
            self.session = onnxruntime.InferenceSession(os.fspath(path), options, providers=[wanted[device]])
        except Exception as error:  # of several types of its own
            raise UserError(f"onnxruntime {onnxruntime.__version__} can't load {path} ({first_line(error)})") from error
        known = {one.name for one in self.session.get_inputs()}
        self.names = [name for name in names if name in known]  # the exporter removes inputs that nothing depends on

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.session.run(None, {name: arrays[name] for name in self.names})[0]


class TorchRuntime:
    """A program of torch.export, which can contain any code: see `Package.load`.

    Args:
        path: the .pt2 file.
        names: the graph's inputs, in order.
        threads: number of threads of torch in this process; None leaves it.
        device: of the tensors.
    """

    file: ClassVar[str] = "model.pt2"

    def __init__(self, path: Path, names: list[str], threads: int | None = None, device: str = "cpu") -> None:
        torch = torch_for(path)
        if threads is not None:
            torch.set_num_threads(threads)
        self.names, self.device = names, device
        self.model = self.load(torch, path)
        self.torch = torch

    def load(self, torch: Any, path: Path) -> Any:
        try:
            program = torch.export.load(os.fspath(path))
            if self.device != "cpu":  # of which the program itself makes tensors
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(program, self.device)
            model = program.module()
            give_short_paths(model, torch.Tensor)
            return model
        except Exception as error:  # of any type
            raise UserError(f"torch {torch.__version__} can't load {path} ({first_line(error)})") from error

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        with self.torch.inference_mode():
            tensors = [self.torch.from_numpy(arrays[name]).to(self.device) for name in self.names]
            return self.model(*tensors).cpu().numpy()


class CompiledRuntime(TorchRuntime):
    """A program compiled ahead of time by AOTInductor, for CPUs of the level that `export` names."""

    def load(self, torch: Any, path: Path) -> Any:
        import torch._inductor

        if self.device != "cpu":
            raise UserError(f"device {self.device}: a compiled package runs on CPUs; export --to torch, or use device cpu")
        reject_older_cpu()
        try:
            # A newer CPU than the package was compiled for is no reason for a warning.
            with log_level(logging.ERROR, "torch.export.pt2_archive._package"):
                return torch._inductor.aoti_load_package(os.fspath(path))
        except Exception as error:  # of any type
            raise UserError(f"torch {torch.__version__} can't load {path} ({first_line(error)})") from error


RUNTIMES: dict[str, type[OnnxRuntime] | type[TorchRuntime]] = {"onnx": OnnxRuntime, "torch": TorchRuntime, "aot": CompiledRuntime}


def give_short_paths(model: Any, tensor: type) -> None:
    """Gives a graph's weights names at its top. Looked up through all modules at every call, they take a third of a small model's time."""
    for i, node in enumerate(node for node in model.graph.nodes if node.op == "get_attr"):
        value = model
        for name in node.target.split("."):
            value = getattr(value, name)
        if isinstance(value, tensor):
            node.target = f"constant_{i}"
            setattr(model, node.target, value)
    model.recompile()


def torch_for(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path} needs torch: {install('torch')}; a package that was exported --to onnx doesn't") from error
    return torch


def reject_older_cpu() -> None:
    """Raises UserError for a machine on which code of x86-64-v3 (AVX2) would be an illegal instruction."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise UserError(f"a compiled package runs on x86-64 CPUs, and this machine is {platform.machine()}; export --to onnx or torch")
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split()
    except OSError:  # not Linux
        return
    lacking = [flag for flag in ("avx2", "fma", "bmi2") if flags and flag not in flags]
    if lacking:
        raise UserError(f"a compiled package needs a CPU with {', '.join(lacking)} (x86-64-v3), which this one lacks; export --to onnx")
