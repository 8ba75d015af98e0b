"""Which extra of this project has which package, for errors that name it."""

from collections.abc import Iterator
from contextlib import contextmanager

from fusion.errors import UserError

TRAIN = ("torch", "torchvision", "lightning", "timm", "transformers", "torchmetrics", "omegaconf", "jsonargparse", "pyarrow", "filelock")
EXTRAS = {
    **dict.fromkeys(TRAIN, "train"),
    **dict.fromkeys(("onnxruntime", "tokenizers"), "edge"),
    **dict.fromkeys(("onnx", "onnxscript"), "export"),
    **dict.fromkeys(("starlette", "uvicorn", "prometheus_client", "python_multipart"), "serve"),
    **dict.fromkeys(("huggingface_hub", "safetensors"), "hub"),
    "peft": "adapters",
    "ray": "ray",
}


@contextmanager
def installed(what: str) -> Iterator[None]:
    """Context for imports: raises UserError for a package of an extra that isn't installed; a missing module of any other is a bug.

    what: what needs it, for the message.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise UserError(f"{what} needs {package}, which is not installed: {install(package)}") from error


def install(package: str) -> str:
    """How to install a package of an extra: by its own name, since fusion may not be on the index that pip reads.

    >>> install("onnxruntime")
    'pip install onnxruntime, or fusion with its extra edge'
    """
    return f"pip install {package}, or fusion with its extra {EXTRAS[package]}"
