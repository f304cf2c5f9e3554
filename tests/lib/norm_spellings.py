"""Unusual spellings of x / sqrt(mean(x^2) + eps) * w, and what resembles it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_square(h: Tensor) -> Tensor:
    return h.pow(2).mean(-1, keepdim=True)


def scaled(x: Tensor, rho: Tensor, w: Tensor) -> Tensor:
    return (x.float() * rho * w).type_as(x)


# The squares


def abs_squared(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return scaled(x, torch.rsqrt(x.float().abs().pow(2).mean(-1, keepdim=True) + eps), w)


def abs_times_abs(x: Tensor, w: Tensor, eps: float) -> Tensor:
    magnitude = x.float().abs()
    return scaled(x, torch.rsqrt((magnitude * magnitude).mean(-1, keepdim=True) + eps), w)


def squared_after_scaling(x: Tensor, w: Tensor, eps: float) -> Tensor:
    small = x.float() * x.shape[-1] ** -0.5
    return scaled(x, torch.rsqrt(small.square().sum(-1, keepdim=True) + eps), w)


# The sum


def einsum(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    total = torch.einsum("...d,...d->...", h, h)[..., None]
    return scaled(x, torch.rsqrt(total / x.shape[-1] + eps), w)


def row_times_column(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    total = (h.unsqueeze(-2) @ h.unsqueeze(-1)).squeeze(-1)
    return scaled(x, torch.rsqrt(total / x.shape[-1] + eps), w)


def bmm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    rows = x.float().reshape(-1, 1, x.shape[-1])
    total = torch.bmm(rows, rows.mT).view(*x.shape[:-1], 1)
    return scaled(x, torch.rsqrt(total / x.shape[-1] + eps), w)


def vecdot(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    total = torch.linalg.vecdot(h, h).unsqueeze(-1)
    return scaled(x, torch.rsqrt(total / x.shape[-1] + eps), w)


def squared_vector_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
    return scaled(x, torch.rsqrt(norm**2 / x.shape[-1] + eps), w)


def pooled(x: Tensor, w: Tensor, eps: float) -> Tensor:
    rows = x.float().square().reshape(-1, 1, x.shape[-1])
    mean = F.avg_pool1d(rows, x.shape[-1]).view(*x.shape[:-1], 1)
    return scaled(x, torch.rsqrt(mean + eps), w)


def adaptively_pooled(x: Tensor, w: Tensor, eps: float) -> Tensor:
    rows = x.float().square().reshape(-1, 1, x.shape[-1])
    mean = F.adaptive_avg_pool1d(rows, 1).view(*x.shape[:-1], 1)
    return scaled(x, torch.rsqrt(mean + eps), w)


def times_ones(x: Tensor, w: Tensor, eps: float) -> Tensor:
    width = x.shape[-1]
    mean = x.float().square() @ torch.full((width, 1), 1 / width)
    return scaled(x, torch.rsqrt(mean + eps), w)


def last_of_cumsum(x: Tensor, w: Tensor, eps: float) -> Tensor:
    total = x.float().square().cumsum(-1)[..., -1:]
    return scaled(x, torch.rsqrt(total / x.shape[-1] + eps), w)


def two_halves(x: Tensor, w: Tensor, eps: float) -> Tensor:
    first, second = x.float().square().chunk(2, -1)
    total = first.sum(-1, keepdim=True) + second.sum(-1, keepdim=True)
    return scaled(x, torch.rsqrt(total / x.shape[-1] + eps), w)


def mean_of_means(x: Tensor, w: Tensor, eps: float) -> Tensor:
    mean = x.float().square().unflatten(-1, (-1, 4)).mean(-1).mean(-1, keepdim=True)
    return scaled(x, torch.rsqrt(mean + eps), w)


def variance_and_mean(x: Tensor, w: Tensor, eps: float) -> Tensor:
    variance, mean = torch.var_mean(x.float(), -1, correction=0, keepdim=True)
    return scaled(x, torch.rsqrt(variance + mean**2 + eps), w)


# The root, and constants around it


def exp_of_log(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return scaled(x, torch.exp(-0.5 * torch.log(mean_square(x.float()) + eps)), w)


def hypotenuse(x: Tensor, w: Tensor, eps: float) -> Tensor:
    rms = mean_square(x.float()).sqrt()
    return (x.float() / torch.hypot(rms, torch.full((), eps**0.5)) * w).type_as(x)


def clamped_at_zero(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return scaled(x, torch.rsqrt(mean_square(x.float()).clamp(min=0) + eps), w)


def root_before(x: Tensor, w: Tensor, eps: float) -> Tensor:
    width = x.shape[-1]
    rho = torch.rsqrt(x.float().square().sum(-1, keepdim=True) + width * eps)
    return (x.float() * math.sqrt(width) * rho * w).type_as(x)


def root_after(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """No eps at all."""
    unit = x.float() / x.float().norm(dim=-1, keepdim=True)
    return (unit * x.shape[-1] ** 0.5 * w).type_as(x)


def root_after_the_gain(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """No eps at all."""
    unit = x.float() / x.float().norm(dim=-1, keepdim=True)
    return (unit * w * x.shape[-1] ** 0.5).type_as(x)


def halved_twice(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return (0.5 * x.float() * (2 * torch.rsqrt(mean_square(x.float()) + eps)) * w).type_as(x)


UNUSUAL = {
    function.__name__.replace("_", " "): function
    for function in (
        abs_squared,
        abs_times_abs,
        squared_after_scaling,
        einsum,
        row_times_column,
        bmm,
        vecdot,
        squared_vector_norm,
        pooled,
        adaptively_pooled,
        times_ones,
        last_of_cumsum,
        two_halves,
        mean_of_means,
        variance_and_mean,
        exp_of_log,
        hypotenuse,
        clamped_at_zero,
        root_before,
        halved_twice,
    )
}
WITHOUT_EPS = {"root after": root_after, "root after the gain": root_after_the_gain}


# Other functions of the row's norm


def normalize(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * w


def clamped_rms(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x / mean_square(x).sqrt().clamp(min=eps) * w


def clamped_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x / (x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5).clamp(min=eps) * w


def clamped_mean(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(mean_square(x).clamp(min=eps)) * w


def maximum(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(torch.maximum(mean_square(x), torch.tensor(eps))) * w


def two_gains(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return (x * w) * (torch.rsqrt(mean_square(x).clamp(min=0) + eps) * w)


OTHER_FORMS = {
    function.__name__.replace("_", " "): function
    for function in (normalize, clamped_rms, clamped_norm, clamped_mean, maximum, two_gains)
}


# Sites only where a linear or a cast reads them: each is common for other ends, too


def halved(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return 0.5 * x * torch.rsqrt(mean_square(x) + eps) * w


def negated(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return -x * torch.rsqrt(mean_square(x) + eps) * w


def unit_rows(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return F.normalize(x, dim=-1) * w


def unit_rows_by_sum(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + eps) * w


def fourth_root(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x * (mean_square(x) + eps).pow(-0.25) * w


def without_root(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x / (mean_square(x) + eps) * w


def zero_where_small(x: Tensor, w: Tensor, eps: float) -> Tensor:
    square = mean_square(x)
    return x * torch.where(square > eps, torch.rsqrt(square), torch.zeros(())) * w


FUNCTIONS_OF_THE_NORM = {
    function.__name__.replace("_", " "): function
    for function in (
        halved,
        negated,
        unit_rows,
        unit_rows_by_sum,
        fourth_root,
        without_root,
        zero_where_small,
    )
}


# LayerNorms


def layer_norm_of_moments(x: Tensor, w: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt(mean_square(x) - mean**2 + eps) * w


def layer_norm_clamped(x: Tensor, w: Tensor, eps: float) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / centered.norm(dim=-1, keepdim=True).clamp(min=eps) * x.shape[-1] ** 0.5 * w


def standardized(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, correction=0, keepdim=True) + eps) * w


LAYER_NORMS = {
    function.__name__.replace("_", " "): function
    for function in (layer_norm_of_moments, layer_norm_clamped, standardized)
}


# No function of the row's norm alone


def l1(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x / (x.abs().mean(-1, keepdim=True) + eps) * w


def largest(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x / x.abs().amax(-1, keepdim=True).clamp(min=eps) * w


def cubic(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x / torch.linalg.vector_norm(x, 3, dim=-1, keepdim=True).clamp(min=eps) * w


def variance_of_moments(x: Tensor, w: Tensor, eps: float) -> Tensor:
    variance = mean_square(x) - x.mean(-1, keepdim=True) ** 2
    return x * torch.rsqrt(variance + eps) * w


def by_hand_softmax(x: Tensor, w: Tensor, eps: float) -> Tensor:
    exp = (x - x.amax(-1, keepdim=True)).exp()
    return exp / exp.sum(-1, keepdim=True) * w


def norm_of_another(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x.sin() / x.norm(dim=-1, keepdim=True).clamp(min=eps) * w


def norm_of_scaled(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(mean_square(x * w).clamp(min=eps)) * w


def norm_of_half(x: Tensor, w: Tensor, eps: float) -> Tensor:
    half = x[..., : x.shape[-1] // 2]
    return x / half.norm(dim=-1, keepdim=True).clamp(min=eps) * w


def multiplied_by_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x * mean_square(x).clamp(min=eps).sqrt() * w


def gated_by_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x * torch.sigmoid(-mean_square(x)) * w


def power_of_two_of_largest(x: Tensor, w: Tensor, eps: float) -> Tensor:
    scale = torch.exp2(x.abs().amax(-1, keepdim=True).clamp(min=eps).log2().floor())
    return (x / scale).clamp(-448, 448) * scale * w


def norm_of_the_row_above(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).roll(1, -2).clamp(min=eps) * w


def norm_so_far(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Over the rows, too."""
    return x * torch.rsqrt(mean_square(x).cumsum(-2).clamp(min=eps)) * w


NO_NORMS = {
    function.__name__.replace("_", " "): function
    for function in (
        l1,
        largest,
        cubic,
        variance_of_moments,
        by_hand_softmax,
        norm_of_another,
        norm_of_scaled,
        norm_of_half,
        multiplied_by_norm,
        gated_by_norm,
        power_of_two_of_largest,
        norm_of_the_row_above,
        norm_so_far,
    )
}
