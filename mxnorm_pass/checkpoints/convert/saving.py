"""What ``save_pretrained`` of transformers must know of a converted model."""

from __future__ import annotations

import sys
from collections import OrderedDict
from itertools import chain
from typing import Any

import torch
from torch import nn

from mxnorm_pass.checkpoints.convert.formats import config_of, is_converted


def check_quantizer(model: nn.Module) -> None:
    """Raises a ValueError where the model belongs to another library's quantisation."""
    method = _method(model)
    if method not in (None, "torchao"):
        raise ValueError(
            f"the model is quantised by {method} already, which saves and loads its weights: "
            "convert one that is loaded in bfloat16"
        )


def describe_for_transformers(model: nn.Module) -> None:
    """Let a transformers model save its converted weights, and say in its config what they are.

    Its config gets a ``TorchAoConfig``, by which ``from_pretrained`` knows them. Other models are
    left alone, and so are those that torchao has quantised in other ways: they can be saved.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    weights = {n: m._parameters.get("weight") for n, m in linears.items()}
    configs = {n: config_of(w) for n, w in weights.items() if w is not None and is_converted(w)}
    if not configs or not _is_replaceable(model):
        return
    from transformers.quantizers.auto import AutoHfQuantizer

    config = _torchao_config(configs, [name for name in linears if name not in configs])
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)


def _torchao_config(configs: dict[str, Any], left: list[str]) -> Any:
    from torchao.quantization import FqnToConfig
    from transformers import TorchAoConfig

    first, *others = configs.values()
    if all(other == first for other in others):
        return TorchAoConfig(first, modules_to_not_convert=left)
    return TorchAoConfig(FqnToConfig(OrderedDict(configs)), modules_to_not_convert=left)


def _is_replaceable(model: Any) -> bool:
    """Is there no quantizer, or one whose config can only have come from here or says the same?"""
    if _method(model) is None:
        return True
    kind = type(model.hf_quantizer.quantization_config.quant_type).__name__
    return kind.startswith(("MXDynamicActivation", "NVFP4DynamicActivation", "FqnToConfig"))


def _method(model: nn.Module) -> str | None:
    """How the weights are quantised; None also where they were unpacked as they were loaded."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if config is None or getattr(config, "dequantize", False):
        return None
    method = str(getattr(config.quant_method, "value", config.quant_method))
    # Of architectures that it cannot run packed, transformers unpacks the file without a word.
    return None if method == "gguf" and not _holds_bytes(model) else method


def _holds_bytes(model: nn.Module) -> bool:
    tensors = chain(model.parameters(), model.buffers())
    return any(tensor.dtype in (torch.uint8, torch.int8) for tensor in tensors)
