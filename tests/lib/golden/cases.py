"""What is recorded: RMSNorm -> MX cast -> matmul as torchao spells it, and what must fuse."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from matching import BF16, EPS, F32, Norm, huggingface
from torch import Tensor, nn
from torch.utils._dtype_abbrs import dtype_abbrs
from torchao.prototype.mx_formats.config import (
    MXFP8Dim0CastKernelChoice,
    MXFP8Dim1CastKernelChoice,
    ScaleCalculationMode,
)
from torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig
from torchao.prototype.mx_formats.kernels import triton_to_mxfp8_dim0
from torchao.prototype.mx_formats.mx_tensor import MXTensor, to_dtype, to_mx
from torchao.prototype.mx_formats.utils import to_blocked
from torchao.quantization import quantize_
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

WIDTH = 128
MODES = ("floor", "rceil", "ceil", "even")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ELEMENTS = {"e4m3fn": E4M3, "e5m2": E5M2}


class Unavailable(Exception):
    """The installed torchao has nothing to record here; the message says what is missing."""


@dataclass(frozen=True)
class Fused:
    """What the pass must say of a norm that it fuses."""

    format: str
    consumers: tuple[str, ...]
    gain: Literal["fold", "activation"]


@dataclass(frozen=True)
class Case:
    """One model to trace.

    Attributes:
        model: builds it.
        outcome: what becomes of its one norm.
        shape, dtype: of the input.
        train: record the joint graph.
        export: record what ``torch.export`` makes of it; else ``torch.compile``.
        sm100: record what an sm100 GPU would run.
        needs_triton: torchao uses its Triton kernels here.
        options: of the pass.
    """

    name: str
    model: Callable[[], nn.Module]
    outcome: Fused
    shape: tuple[int, ...] = (2, 16, WIDTH)
    dtype: torch.dtype = BF16
    train: bool = False
    export: bool = False
    sm100: bool = False
    needs_triton: bool = False
    options: dict[str, Any] = field(default_factory=lambda: {"quantize": "existing"})

    @property
    def device(self) -> str:
        """Where the graph's tensors are. A CPU build cannot differentiate fake CUDA tensors."""
        return "cuda:0" if self.sm100 and not self.train else "cpu"


# Models


class Cast(nn.Module):
    """torchao's cast as a function, its inverse, and a plain matmul."""

    def __init__(self, mode: str, elem: torch.dtype, dtype: torch.dtype) -> None:
        super().__init__()
        self.mode, self.elem = ScaleCalculationMode[mode.upper()], elem
        self.weight = nn.Parameter(torch.ones(64, WIDTH, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        scales, values = to_mx(x, self.elem, 32, self.mode)
        return F.linear(to_dtype(values, scales, self.elem, 32, x.dtype), self.weight)


class ScaledLinear(nn.Module):
    """``F.scaled_mm`` on torchao's swizzled scales."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = ScaleCalculationMode[mode.upper()]
        scales, values = self.cast(torch.ones(WIDTH, WIDTH, dtype=BF16))
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)

    def cast(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # The method: Dynamo does not look into it, where it would see tensors on the CPU.
        cast = MXTensor.to_mx(x, E4M3, 32, self.mode, is_swizzled_scales=True)
        return cast.scale, cast.qdata

    def forward(self, x: Tensor) -> Tensor:
        scales, values = self.cast(x.flatten(0, -2))
        recipe, swizzle = F.ScalingType.BlockWise1x32, F.SwizzleType.SWIZZLE_32_4_4
        return F.scaled_mm(
            values,
            self.values.t(),
            scale_a=scales,
            scale_recipe_a=recipe,
            scale_b=self.scales,
            scale_recipe_b=recipe,
            swizzle_a=swizzle,
            swizzle_b=swizzle,
            output_dtype=BF16,
        )


class KernelLinear(nn.Module):
    """torchao's dim0 cast kernel, which ``torch.export`` keeps as an op."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        scales, values = to_mx(torch.ones(WIDTH, WIDTH, dtype=BF16), E4M3, 32)
        self.register_buffer("values", values)
        self.register_buffer("scales", to_blocked(scales))

    def forward(self, x: Tensor) -> Tensor:
        values, scales = triton_to_mxfp8_dim0(x.flatten(0, -2), scaling_mode=self.mode)
        operands = (values, self.values.t(), to_blocked(scales), self.scales)
        return torch._scaled_mm(*operands, out_dtype=BF16)


class TrainingLinear(nn.Linear):
    """torchao's MXFP8 training with its choice of cast kernels; None: those of its linear."""

    def __init__(
        self,
        mode: str,
        kernels: tuple[str, str] | None = None,
        preference: KernelPreference = KernelPreference.AUTO,
    ) -> None:
        super().__init__(WIDTH, WIDTH, bias=False, dtype=BF16)
        self.mode, self.preference = ScaleCalculationMode[mode.upper()], preference
        dim0, dim1 = kernels or ("triton", "cuda")
        self.mx_mm = _mx_mm()
        self.dim0 = MXFP8Dim0CastKernelChoice[dim0.upper()]
        if dim1.upper() not in MXFP8Dim1CastKernelChoice.__members__:
            raise Unavailable(f"torchao has no dim1 kernel {dim1!r}")
        self.dim1 = MXFP8Dim1CastKernelChoice[dim1.upper()]

    def forward(self, x: Tensor) -> Tensor:
        formats = (E4M3, E4M3, E4M3, 32)
        choices = (self.preference, self.dim0, self.dim1, self.mode)
        return self.mx_mm.apply(x, self.weight, *formats, *choices, False)


def _mx_mm() -> Any:
    """``mx_mm``, which torchao 0.18 has moved."""
    for name in ("moe_training.mxfp8_linear", "mx_formats.mx_linear"):
        try:
            return importlib.import_module(f"torchao.prototype.{name}").mx_mm
        except ImportError:
            continue
    raise Unavailable("torchao has no mx_mm")


class Model(nn.Module):
    """norm -> linears."""

    def __init__(self, norm: nn.Module, **linears: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.names = tuple(linears)
        for name, linear in linears.items():
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.norm(x)
        return tuple(getattr(self, name)(y) for name in self.names)


def _llama_norm(dtype: torch.dtype = BF16) -> nn.Module:
    return Norm(huggingface, torch.ones(WIDTH, dtype=dtype), EPS)


def _torch_norm(dtype: torch.dtype = BF16) -> nn.Module:
    return nn.RMSNorm(WIDTH, EPS, dtype=dtype)


def _linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, bias=False, dtype=BF16)


def _inference(mode: str, preference: KernelPreference, elem: torch.dtype = E4M3) -> nn.Module:
    config = MXDynamicActivationMXWeightConfig(
        activation_dtype=elem,
        weight_dtype=elem,
        kernel_preference=preference,
        scaling_mode=ScaleCalculationMode[mode.upper()],
    )
    model = Model(_llama_norm(), q=_linear(), k=_linear())
    quantize_(model, config)
    return model


# Cases


def _format(mode: str, elem: str = "e4m3fn") -> str:
    return f"mxfp8 {elem} {mode} block 32"


def _casts() -> Iterator[Case]:
    for mode in MODES:
        for elem, dtype in (("e4m3fn", BF16), ("e4m3fn", F32), ("e5m2", BF16)):

            def model(m=mode, e=ELEMENTS[elem], d=dtype) -> nn.Module:
                return Model(_llama_norm(d), q=Cast(m, e, d))

            outcome = Fused(_format(mode, elem), ("q",), "activation")
            name = f"cast-{mode}-{elem}-{dtype_abbrs[dtype]}"
            yield Case(name, model, outcome, dtype=dtype)


def _emulated() -> Iterator[Case]:
    for mode, elem in [*((mode, "e4m3fn") for mode in MODES), ("rceil", "e5m2")]:

        def inference(m=mode, e=ELEMENTS[elem]) -> nn.Module:
            return _inference(m, KernelPreference.EMULATED, e)

        outcome = Fused(_format(mode, elem), ("q", "k"), "activation")
        yield Case(f"inference-{mode}-{elem}", inference, outcome)
    for mode in ("rceil", "floor"):

        def training(m=mode) -> nn.Module:
            linear = TrainingLinear(m, preference=KernelPreference.EMULATED)
            return Model(_llama_norm(), q=linear)

        outcome = Fused(_format(mode), ("q",), "fold")
        yield Case(f"training-{mode}", training, outcome, train=True)


def _plain() -> Iterator[Case]:
    norms = {"llama": _llama_norm, "torch": _torch_norm}
    for name, norm in norms.items():
        for train in (False, True):

            def model(n=norm) -> nn.Module:
                return Model(n(), q=_linear(), k=_linear())

            outcome = Fused(_format("rceil"), ("q", "k"), "fold")
            kind = "training" if train else "inference"
            yield Case(f"plain-{name}-{kind}", model, outcome, train=train, options={})


def _on_sm100() -> Iterator[Case]:
    for mode in ("rceil", "floor"):

        def inference(m=mode) -> nn.Module:
            return _inference(m, KernelPreference.AUTO)

        outcome = Fused(_format(mode), ("q", "k"), "activation")
        yield Case(f"sm100-inference-{mode}", inference, outcome, sm100=True)

        def scaled_mm(m=mode) -> nn.Module:
            return Model(_llama_norm(), q=ScaledLinear(m))

        outcome = Fused(_format(mode), ("q",), "activation")
        yield Case(f"sm100-scaled_mm-{mode}", scaled_mm, outcome, sm100=True)
    for mode, *kernels in (
        ("rceil", "triton", "cuda"),
        ("floor", "triton", "cuda"),
        ("rceil", "torch", "triton"),
    ):

        def training(m=mode, k=tuple(kernels)) -> nn.Module:
            return Model(_llama_norm(), q=TrainingLinear(m, k))

        yield Case(
            f"sm100-training-{mode}-{'-'.join(kernels)}",
            training,
            Fused(_format(mode), ("q",), "fold"),
            # The dim1 kernels take multiples of 128 rows.
            shape=(1, 128, WIDTH),
            train=True,
            sm100=True,
            needs_triton="triton" in kernels,
        )


def _exported() -> Iterator[Case]:
    def inference() -> nn.Module:
        return _inference("rceil", KernelPreference.EMULATED)

    outcome = Fused(_format("rceil"), ("q", "k"), "activation")
    yield Case("export-inference-rceil", inference, outcome, export=True)

    def kernels() -> nn.Module:
        return Model(_llama_norm(), q=KernelLinear("rceil"))

    yield Case(
        "sm100-export-rceil-triton",
        kernels,
        Fused(_format("rceil"), ("q",), "activation"),
        export=True,
        sm100=True,
        needs_triton=True,
    )


_KINDS = (_casts, _emulated, _plain, _on_sm100, _exported)
CASES = {case.name: case for kind in _KINDS for case in kind()}
