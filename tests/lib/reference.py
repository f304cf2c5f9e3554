"""Eager Llamas put together from ``mxnorm_pass.functional`` alone, and the models under test.

A reference norm returns the exact output and hands the fused one to its linears as an attribute of
it, which HuggingFace's Llama passes on untouched.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from formats import in_a_format
from torch import Tensor, nn
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig
from torchao.quantization import quantize_
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mxnorm_pass import functional
from mxnorm_pass.numerics.seed import linear_key

NORM_FED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def build_llama(
    dtype: torch.dtype = torch.float32, layers: int = 2, hidden: int = 64, **overrides: Any
) -> LlamaForCausalLM:
    """A small Llama with seeded weights and gains away from 1."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        # As many as query heads: under torch.compile HuggingFace sums the gradients of grouped
        # keys and values in another order than in eager mode, which bf16 shows.
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    config = LlamaConfig(**{**shape, **overrides})
    model = LlamaForCausalLM(config)
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.to(dtype)


def expected_sites(layers: int) -> list[tuple[str, tuple[str, ...]]]:
    """Norm and consumers of what fuses in an unmodified Llama."""
    sites = []
    for i in range(layers):
        layer = f"model.layers.{i}"
        attention = tuple(f"{layer}.self_attn.{n}_proj" for n in "qkv")
        mlp = (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
        sites += [(f"{layer}.input_layernorm", attention)]
        sites += [(f"{layer}.post_attention_layernorm", mlp)]
    return sites


def token_ids(batch: int = 2, length: int = 16) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def quantize_with_torchao(
    model: nn.Module, mode: str = "rceil", elements: Any = torch.float8_e4m3fn
) -> nn.Module:
    """torchao's MX inference: weights quantised once, activations cast in the forward."""
    config = MXDynamicActivationMXWeightConfig(
        activation_dtype=elements,
        weight_dtype=elements,
        kernel_preference=KernelPreference.EMULATED,
        scaling_mode=ScaleCalculationMode[mode.upper()],
    )
    quantize_(model, config, filter_fn=_is_converted)
    return model


def torchao_mode(mode: str) -> str:
    """The scale mode of ``functional`` that torchao's is."""
    return "rceil-log2" if mode == "rceil" else mode


def _is_converted(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def convert_to_mxfp8_training(
    model: nn.Module, mode: str = "rceil", wgrad_with_hp: bool = False
) -> nn.Module:
    """torchao's MXFP8 training linears in the place of every nn.Linear but lm_head."""
    # Not at the top: torchao 0.17, with which test_lowest.py runs, has them elsewhere.
    from torchao.prototype.moe_training.mxfp8_linear import MXFP8Linear

    for name, module in list(model.named_modules()):
        if not _is_converted(module, name):
            continue
        linear = MXFP8Linear(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            dtype=module.weight.dtype,
            kernel_preference=KernelPreference.EMULATED,
            scale_calculation_mode=ScaleCalculationMode[mode.upper()],
            wgrad_with_hp=wgrad_with_hp,
        )
        linear.weight, linear.bias = module.weight, module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    return model


@dataclass(frozen=True)
class Recipe:
    """What a reference model computes.

    Attributes:
        norm: keyword arguments of ``functional.mxnorm``.
        cast: the format, as :func:`in_a_format` reads it, for casts that the pass writes.
        kept: of casts that stay as the model has them; None: as ``cast``.
        gain: "fold" or "activation".
        every_linear: all linears are cast, not only those that a norm feeds.
        off: last name components of linears that stay plain and read the exact norm.
        also: those of further linears that read the fused norm.
        head: the last norm is fused into ``lm_head``.
        sites: other recipes for single norms, by name.
        tensor_scale: "bound", "amax" or "none", of what norms make of NVFP4.
        backward: "high-precision", or "mx": torchao's MXFP8 training backward, or "mx-hp-wgrad".
        training: the recipe of the linears' three matmuls; ``cast`` must be its forward's.
        seed: of the step, that such a recipe draws from.
    """

    norm: dict[str, Any] = field(default_factory=dict)
    cast: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] | None = None
    gain: str = "fold"
    every_linear: bool = False
    off: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    head: bool = False
    sites: dict[str, Recipe] = field(default_factory=dict)
    backward: str = "high-precision"
    tensor_scale: str = "bound"
    training: Any = None
    seed: Tensor | None = None

    @property
    def fuses(self) -> bool:
        """Are there casts for norms to be fused with?"""
        if self.training is None:
            return True
        return functional.recipe(self.training).forward.left.format is not None

    @property
    def kept_cast(self) -> dict[str, Any]:
        return self.cast if self.kept is None else self.kept


def reference_of(model: LlamaForCausalLM, recipe: Recipe) -> LlamaForCausalLM:
    """A deep copy of ``model`` whose layer norms and linears are those of the recipe."""
    reference = copy.deepcopy(model)
    head = ("lm_head",) if recipe.head else ()
    cast = {*NORM_FED, *recipe.also, *head} - {*recipe.off}
    plain = {"lm_head", *recipe.off} - {*head}
    for name, module in list(reference.named_modules()):
        parent, _, child = name.rpartition(".")
        owner = reference.get_submodule(parent)
        if (
            isinstance(module, LlamaRMSNorm)
            and recipe.fuses
            and (head or not name.endswith("model.norm"))
        ):
            setattr(owner, child, _Norm(module, recipe.sites.get(name, recipe)))
        elif isinstance(module, nn.Linear):
            called = _name_without_adapter(name)
            if called in cast or (recipe.every_linear and called not in plain):
                setattr(owner, child, _Linear(module, recipe, name))
    if recipe.head:
        # The model slices the last norm's output, which loses what hangs on it.
        reference.model.norm.register_forward_hook(_hand_to(reference.lm_head))
    return reference


def _hand_to(linear: nn.Module) -> Any:
    def hook(norm: nn.Module, args: Any, output: Tensor) -> None:
        linear.fused = output.fused

    return hook


def _name_without_adapter(name: str) -> str:
    """Last component of a linear's name; PEFT wraps q_proj into q_proj.base_layer and others."""
    *_, parent, child = ["", *name.split(".")]
    return parent if child in ("base_layer", "default") else child


class _Norm(nn.Module):
    def __init__(self, norm: LlamaRMSNorm, recipe: Recipe) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.variance_epsilon
        self.recipe = recipe

    def forward(self, x: Tensor) -> Tensor:
        forward = {k: v for k, v in self.recipe.norm.items() if k != "gradient"}
        # HuggingFace rounds to the input's dtype before the gain.
        rounding = {
            "norm_dtype": x.dtype,
            "out_dtype": torch.promote_types(x.dtype, self.weight.dtype),
        }
        estimated = None
        if forward.get("estimator") != "exact":
            # Else there is one norm, to which all gradients go.
            estimated = functional.mxnorm(
                x, self.weight, eps=self.eps, **self.recipe.norm, **rounding
            )
        in_cast = self.weight if self.recipe.gain == "activation" else None
        options = in_a_format({**forward, **self.recipe.cast, **rounding})
        scale = self._tensor_scale(x, in_cast, options)
        values, scales, _ = functional.mxnorm_cast(
            x, in_cast, eps=self.eps, tensor_scale=scale, **options
        )
        gain = self.weight if self.recipe.gain == "fold" else None
        exact = functional.mxnorm(x, self.weight, eps=self.eps, estimator="exact", **rounding)
        y = exact if estimated is None else estimated
        exact.fused = _Fused(y, (values, scales, scale), gain)
        return exact

    def _tensor_scale(
        self, x: Tensor, gain: nn.Parameter | None, options: dict[str, Any]
    ) -> Tensor | None:
        if options.get("format") != "nvfp4" or self.recipe.tensor_scale == "none":
            return None
        estimator, p = options.get("estimator", "mxnorm"), options.get("p", 2.0)
        if self.recipe.tensor_scale == "bound":
            bound = functional.bound_of_normalized(estimator, p, x.shape[-1], 16)
            return functional.nvfp4_norm_tensor_scale(bound, gain)
        kept = {
            n: options[n] for n in ("estimator", "p", "norm_dtype", "out_dtype") if n in options
        }
        if estimator == "mxnorm":
            kept["norm_dtype"], kept["out_dtype"] = None, torch.float32
        y = functional.mxnorm(x, gain, eps=self.eps, block_size=16, **kept)
        return functional.nvfp4_tensor_scale(y)


@dataclass(frozen=True)
class _Fused:
    output: Tensor
    quantized: tuple[Tensor, Tensor, Tensor | None]
    gain: Tensor | None


class _Linear(nn.Module):
    def __init__(self, linear: nn.Linear, recipe: Recipe, name: str) -> None:
        super().__init__()
        self.name = name
        self.weight, self.bias = linear.weight, linear.bias
        self.recipe = recipe
        self.fused: _Fused | None = None

    def forward(self, x: Tensor) -> Tensor:
        options = dict(self.recipe.kept_cast)
        if not hasattr(x, "first_reader"):
            x.first_reader = self.name  # type: ignore[attr-defined]
        first_reader = x.first_reader  # type: ignore[attr-defined]
        fused = getattr(x, "fused", self.fused)
        if fused is not None:
            x = fused.output
            # A weight with the gain in it has a new cast.
            options = dict(options if fused.gain is None else self.recipe.cast)
            options |= {"quantized": fused.quantized, "gain": fused.gain}
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        with torch.autocast("cpu", enabled=False):
            if self.recipe.training is not None:
                return self._in_training(x, weight, bias, options, first_reader)
            if self.recipe.backward == "high-precision":
                return functional.mx_linear(x, weight, bias, **in_a_format(options))
            return MXBackward.apply(x, weight, self.recipe, options)

    def _in_training(
        self, x: Tensor, weight: Tensor, bias: Any, options: dict[str, Any], first_reader: str
    ) -> Tensor:
        seed = self.recipe.seed
        given = {n: options[n] for n in ("quantized", "gain") if n in options}
        if seed is not None:
            given["seed"] = seed + linear_key(self.name)
            given["input_seed"] = seed + linear_key(first_reader)
        recipe = self.recipe.training
        return functional.recipe_linear(x, weight, bias, recipe=recipe, **given)


class MXBackward(torch.autograd.Function):
    """The backward of torchao's ``mx_mm`` (moe_training/mxfp8_linear.py) in functional casts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe, options: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        return functional.mx_linear(x, weight, **in_a_format(options))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors

        def rounded(t: Tensor) -> Tensor:
            values, scales = functional.mx_cast(t.contiguous(), **in_a_format(ctx.recipe.kept_cast))
            return functional.mx_dequantize(values, scales, t.dtype)

        grad2, x2 = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = (rounded(grad2) @ rounded(weight.t()).t()).reshape(x.shape)
        if ctx.recipe.backward == "mx-hp-wgrad":
            grad_weight = grad2.t() @ x2
        else:
            grad_weight = rounded(grad2.t()) @ rounded(x2.t()).t()
        return grad_x, grad_weight, None, None
