"""A HuggingFace config, built on the meta device: no weights, no network, no remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mxnorm_pass.cli.errors import UsageError, reason
from mxnorm_pass.extras import needs_extra

with needs_extra("hf", "a model's config"):
    import transformers
    from transformers import PretrainedConfig, PreTrainedModel

_DEFAULT_DTYPE = torch.bfloat16


def looks_like_path(given: str) -> bool:
    """A hub id is "name" or "owner/name"."""
    return given.startswith(("/", ".", "~")) or given.count("/") > 1 or given.endswith(".json")


def load_config(given: str, *, layers: int | None, unquantized: bool) -> PretrainedConfig:
    """The config of a config.json, a checkpoint folder or a cached hub id.

    Args:
        layers: keep only so many layers.
        unquantized: leave out ``quantization_config``.

    Raises:
        UsageError: nothing is found, it is no config, or its model is not part of transformers.
    """
    values = _read(given)
    kind = values.get("model_type")
    known: Any = transformers.CONFIG_MAPPING
    if kind not in known:
        raise UsageError(
            f"{given!r} has model_type {kind!r}, which transformers {transformers.__version__} "
            f"does not have{_remote_code(values)}"
        )
    try:
        config = known[kind].from_dict(values)
        if layers is not None:
            config = _cut(config, layers)
    except UsageError:
        raise
    except Exception as error:  # whatever a config class makes of wrong values
        raise UsageError(f"{given!r} is no valid {kind} config: {reason(error)}") from None
    if unquantized and hasattr(config, "quantization_config"):
        del config.quantization_config
    return config  # type: ignore[no-any-return]


def _read(given: str) -> dict[str, Any]:
    path = Path(given).expanduser()
    expected = "give a config.json, a checkpoint folder, or a hub id that is in the local cache"
    if path.is_dir() and not (path / "config.json").is_file():
        raise UsageError(f"the folder {given!r} has no config.json; {expected}")
    if looks_like_path(given) and not path.exists():
        raise UsageError(f"{given!r} does not exist; {expected}")
    source = str(path) if path.exists() else given
    try:
        values, _ = PretrainedConfig.get_config_dict(source, local_files_only=True)
    except OSError as error:
        if path.exists():
            raise UsageError(f"cannot read {given!r}: {reason(error)}") from None
        hint = f"download it first, with `hf download {given} config.json`"
        raise UsageError(
            f"{given!r} is no file or folder, nor in the local cache; {expected} ({hint})"
        ) from None
    except ValueError as error:
        raise UsageError(f"cannot read {given!r}: {reason(error)}") from None
    if not isinstance(values, dict) or not values:
        raise UsageError(f"{given!r} is not a JSON object; {expected}")
    return values


def _remote_code(values: dict[str, Any]) -> str:
    remote = "auto_map" in values
    return "; it needs code from its repository, which is not run here" if remote else ""


def _cut(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same with the first ``layers`` layers, of a text model's part where there are several."""
    text = config.get_text_config()
    count = text.num_hidden_layers
    if layers > count:
        raise UsageError(f"--layers {layers}: the model has only {count}")
    values = config.to_dict()
    parts = [values[name] for name in config.sub_configs if getattr(config, name, None) is text]
    (section,) = parts or [values]
    section[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = layers
    for name, value in section.items():
        if "layer" in name and isinstance(value, list) and len(value) == count:
            section[name] = value[:layers]
    return type(config).from_dict(values)


def build(config: PretrainedConfig, dtype: str | None) -> PreTrainedModel:
    """The model on the meta device, its linears quantised as the config says.

    Raises:
        UsageError: the class is unknown or cannot be built, or cannot be quantised.
    """
    model_class = _model_class(config)
    wanted = getattr(torch, dtype) if dtype else getattr(config, "dtype", None) or _DEFAULT_DTYPE
    try:
        with torch.device("meta"):
            model: PreTrainedModel = model_class._from_config(config, dtype=wanted)
    except Exception as error:  # whatever a model class makes of sizes that do not fit
        raise UsageError(f"cannot build {model_class.__name__}: {reason(error)}") from None
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        _quantize(model, quantization)
    return model


def _model_class(config: PretrainedConfig) -> Any:
    names = getattr(config, "architectures", None)
    if not names:
        known: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if type(config) not in known:
            raise UsageError(
                f"the config names no `architectures`, and {config.model_type!r} has no causal "
                "language model; add the name of its model class"
            )
        return known[type(config)]
    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise UsageError(
            f"`architectures` names {names[0]!r}, which transformers {transformers.__version__} "
            f"does not have{_remote_code(config.to_dict())}"
        )
    return found


def _quantize(model: PreTrainedModel, quantization: Any) -> None:
    """Put torchao's quantised tensors into the linears, as loading the checkpoint would."""
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = values.get("quant_method")
    hint = "--unquantized explains the model without its quantization_config"
    if method != "torchao":
        raise UsageError(f"a checkpoint quantized by {method!r} cannot be explained; {hint}")
    with needs_extra("hf", "a config with a quantization_config"):
        import torchao.quantization  # noqa: F401
    try:
        from torchao.quantization import FqnToConfig, quantize_
        from transformers.quantizers.auto import AutoHfQuantizer

        quantizer: Any = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model)

        def chosen(module: nn.Module, name: str) -> bool:
            has_weight = isinstance(getattr(module, "weight", None), Tensor)
            return has_weight and quantizer.param_needs_quantization(model, f"{name}.weight")

        how = quantizer.quantization_config.quant_type
        quantize_(model, how, None if isinstance(how, FqnToConfig) else chosen)
    except Exception as error:  # whatever a torchao config does without weights
        raise UsageError(
            f"cannot quantize {type(model).__name__} without weights: {reason(error)}; {hint}"
        ) from None


def example_inputs(model: PreTrainedModel, tokens: int) -> dict[str, Tensor]:
    """Inputs on the meta device: one row of ``tokens`` ids, or one image for a vision model.

    Raises:
        UsageError: the row is longer than the model's positions, or the model takes other inputs.
    """
    config = model.config
    name = model.main_input_name
    if name == "pixel_values":
        return {name: _image(config, model.dtype)}
    if name != "input_ids":
        raise UsageError(
            f"{type(model).__name__} takes {name}; only models of input_ids or pixel_values can "
            "be explained from a config, others through mxnorm_pass.explain"
        )
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise UsageError(f"--tokens {tokens}: the model has only {longest} positions")
    text.use_cache = False
    ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    return {name: ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


def _image(config: PretrainedConfig, dtype: torch.dtype) -> Tensor:
    vision = getattr(config, "vision_config", config)
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(vision, "num_channels", 3)
    return torch.zeros((1, channels, height, width), dtype=dtype, device="meta")
