"""Why a norm is left as it is: every reason with its cause and its cure."""

from __future__ import annotations

from enum import Enum


class SkipReason(Enum):
    """Why a norm was left as it is.

    Attributes:
        value: one sentence for people.
        cause: what in the model or in the options leads to it.
        cure: what to change to have the norm fused, or that nothing is wrong.
    """

    cause: str
    cure: str

    def __new__(cls, sentence: str, cause: str, cure: str) -> SkipReason:
        reason = object.__new__(cls)
        reason._value_, reason.cause, reason.cure = sentence, cause, cure
        return reason

    NO_MX_CAST = (
        "no linear that reads this norm has an MX cast",
        "The linears that read the norm get no cast (`lm_head` and routers by default, first and "
        "last layers under some recipes), or it feeds no linear but attention (`q_norm`, "
        "`k_norm`), a residual add or experts.",
        "Name a linear that the near miss shows in `modules`, such as `{'lm_head': True}`; make it "
        "bf16 or fp32 with sides in whole blocks. Else nothing is wrong.",
    )
    DISABLED = (
        "turned off through `modules`",
        "`modules` turns the norm or all linears that read it off.",
        "Change the pattern, or add one behind it: the last match wins.",
    )
    CAST_NOT_RECOGNIZED = (
        "a cast to few bits reads this norm, but it computes no known MX cast",
        "The cast gives other bits than every MX scale mode, for instance as it leaves overflow to "
        "torch or keeps scales in fp32, or it is an unknown op, as those of torchao's NVFP4 "
        "training are.",
        "Use torchao's MX casts, or take the cast out and let the backend insert its own.",
    )
    CAST_ESCAPES = (
        "the cast's values or scales are read by something that is no matmul",
        "Something other than dequantisation and matmul reads the cast's values or scales, or the "
        "graph returns them.",
        "Let that reader take the norm's output instead of its cast.",
    )
    NORM_DIMENSION = (
        "the mean is not over the last dimension alone",
        "The mean of squares is taken over tokens, or over several dimensions.",
        "Move the channels last and take the mean over them alone, if the model allows it.",
    )
    NORM_FORM = (
        "not 1 / sqrt(mean(x^2) + eps)",
        "eps is a lower bound (`clamp`, `F.normalize`), added outside the root, negative or "
        "infinite; the sum of squares is not scaled by 1 / D, or x / rms by a constant; or rows "
        "that a linear or a cast reads are divided by another function of their norm.",
        "Compute x / sqrt(mean(x²) + eps), as `nn.RMSNorm` does, with constants in the gain.",
    )
    AFTER_LINEAR = (
        "the norm is applied to what a linear makes of x, not to x",
        "A linear reads x as it is, and its result is divided by the norm of x, as in "
        "hyper-connections; then the linear's input is no norm's output.",
        "Nothing is wrong. Normalise x in front of the linear, if the model allows it: without a "
        "bias that is the same.",
    )
    LAYER_NORM = (
        "a LayerNorm: it subtracts the mean, which MXNorm does not estimate",
        "The norm subtracts the mean, so it is no RMSNorm.",
        "None for a trained model; build a new one with `nn.RMSNorm`.",
    )
    EPS_INPUT = (
        "eps or a factor is an input of the graph, not a constant",
        "eps, or a number that the norm is multiplied with, is a tensor: a buffer, a parameter or "
        "an argument, or is computed from one.",
        "Make it a Python float.",
    )
    WIDTH = (
        "the width is not a multiple of the block size",
        "The rows are not in whole blocks of 32 elements (NVFP4: 16), or their width is symbolic.",
        "Choose a multiple of it; keep the last dimension static with `torch._dynamo.mark_static`.",
    )
    BLOCK_SIZES = (
        "the linears that read the norm cast it in blocks of several sizes",
        "Formats of several block sizes, such as MXFP8 and NVFP4, would give one norm as many "
        "estimates of its RMS.",
        "Give the linears of a norm one format in `modules`, or use `estimator='exact'`.",
    )
    DTYPE = (
        "the dtype is not supported",
        "The norm reads something else than bf16, fp16 or fp32.",
        "Convert the model, as with `model.to(torch.bfloat16)`.",
    )
    GAIN_SHAPE = (
        "the gain does not have one element per channel",
        "The parameter that scales the normalised rows is a scalar, or differs between tokens.",
        "Give it the shape [D].",
    )
    ROUNDING = (
        "estimator='exact' cannot reproduce where this norm rounds",
        "The exact estimator changes no bit, but this norm computes in bf16, rounds twice, or does "
        "not use mean and rsqrt.",
        "Compute x * rsqrt(mean(x²) + eps) in fp32 with the gain last, as HuggingFace does, or use "
        "`estimator='mxnorm'`.",
    )
    NO_WEIGHT_CAST = (
        "gain='fold' needs the cast of the high-precision weight in the graph",
        "`gain='fold'` is asked for, but a weight arrives quantised, the backward reads the "
        "casts, or NVFP4's scales were chosen for what they scale without it.",
        "Use `gain='auto'` or `'activation'`.",
    )
    BACKWARD = (
        "as an estimate the norm would not have the gradient of what it computes",
        "The norm is in a branch, a loop, an autograd.Function or under torch.func.grad, its own "
        "gradient is stopped or changed, or one op or cast reads it for fused and other linears.",
        "Move the norm out of it, or treat all linears that read one cast alike in `modules`; "
        "estimator='exact' needs no gradient of its own.",
    )
    DTENSOR = (
        "the graph works on DTensors or another tensor subclass",
        "Parameters or inputs are of a tensor subclass (torchao's are fine), as under tensor "
        "parallelism.",
        "Shard with `fully_shard` and compile layer by layer: layers compute with plain tensors.",
    )


SkipReason.__doc__ = "\n\n".join(
    [str(SkipReason.__doc__), *(f"    {r.name}: {r.cause} {r.cure}" for r in SkipReason)]
)
