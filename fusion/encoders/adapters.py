"""Adapters (LoRA and similar) in frozen encoders, with the peft library."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from fusion.errors import UserError, nearest


def add_adapters(encoders: Mapping[str, nn.Module] | nn.ModuleDict, adapters: Mapping[str, Mapping[str, Any]]) -> None:
    """Insert adapters into encoders, whose own weights are then frozen.

    adapters: by modality, a peft configuration as plain data: {"peft_type": "LORA", "r": 8, "target_modules": ["query", "value"]}
    (Hu et al., 2022); peft_type is LORA unless given. Adapters are float32, also in an encoder of half precision.

    Raises UserError for a modality without encoder, for a configuration that peft rejects, and if peft is not installed.
    """
    if not adapters:
        return
    try:
        import peft
    except ImportError as error:
        raise UserError("adapters need the peft library: pip install peft") from error
    for modality, settings in adapters.items():
        if modality not in encoders:
            raise UserError(f"model.adapters: unknown modality '{modality}'. {nearest(modality, list(encoders))}")
        kinds = {kind.value: config for kind, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        kind = str(settings.get("peft_type", "LORA")).upper()
        if kind not in kinds:
            raise UserError(f"model.adapters.{modality}: unknown peft_type '{kind}'. {nearest(kind, kinds)}")
        encoders[modality].requires_grad_(False)  # also what is outside its body, as the projection of a pair
        body: Any = encoders[modality].body
        try:
            config = kinds[kind](**{key: value for key, value in settings.items() if key != "peft_type"})
            peft.inject_adapter_in_model(config, body)
        except Exception as error:  # of any type, from within peft
            raise UserError(f"model.adapters.{modality}: {type(error).__name__}: {' '.join(str(error).split())}") from error
        for p in body.parameters():
            if p.requires_grad:
                p.data = p.data.float()
