"""What calibration found out about a model: block weights, channel order, norms that stay exact.

This module is a leaf: values, their checks and their file. Fitting them is not its business.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import types
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mxnorm_pass.extras import needs_extra
from mxnorm_pass.files import write_bytes
from mxnorm_pass.names import clean_module_path

__all__ = ["Calibration", "architecture_hash"]

_FORMAT_VERSION = 1
_HEADER = "mxnorm_pass.calibration"
_WEIGHTS, _CHANNELS, _ORDER = "weights/", "channels/", "order"


@dataclass(frozen=True, eq=False)
class Calibration:
    """How the RMS is estimated in a model that was trained with RMSNorm.

    Two calibrations are equal, and hash alike, where all their values are equal. Tensors are
    copied to the CPU; treat them as constants.

    Attributes:
        weights: norm name -> [K] float32, non-negative: rms~^p = sum_k w_k m_k^p over the absmaxes
            m of the K blocks.
        exact: names of norms that keep ``estimator="exact"``. They may have weights too, which
            then count where ``modules`` asks for ``{"estimator": "mxnorm"}``.
        p: exponent of the estimate.
        block_size: elements per block.
        order: [D] int64 or None: the order of the residual channels that the weights were fitted
            in, new channel i being old channel ``order[i]``. The model has to be in it, see
            :func:`mxnorm_pass.permute_channels`.
        channels: parameter name -> [D] float32, a statistic of each channel in the calibrated
            model, such as the gain itself; it tells the order that a model's channels are in.
        architecture: hash of the calibrated model's parameter names and shapes, see
            :func:`architecture_hash`; "" if unknown.

    Raises:
        ValueError: a value is negative, NaN or infinite, has a wrong type or shape, ``order`` is
            no permutation, or there is neither a weight nor an exact norm.
    """

    weights: Mapping[str, Tensor]
    exact: tuple[str, ...] = ()
    p: float = 2.0
    block_size: int = 32
    order: Tensor | None = None
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    architecture: str = ""

    def __post_init__(self) -> None:
        _check_scalars(self)
        weights = {n: _block_weights(n, w) for n, w in _named(self.weights, "weights")}
        channels = {n: _statistic(n, s) for n, s in _named(self.channels, "channels")}
        exact = _names(self.exact)
        if not weights and not exact:
            raise ValueError("the calibration is empty: it has no block weights and no exact norms")
        object.__setattr__(self, "weights", types.MappingProxyType(weights))
        object.__setattr__(self, "channels", types.MappingProxyType(channels))
        object.__setattr__(self, "exact", exact)
        object.__setattr__(self, "p", float(self.p))
        if self.order is not None:
            widths = {len(w) * self.block_size for w in weights.values()}
            object.__setattr__(self, "order", _permutation(self.order, widths))

    def fingerprint(self) -> str:
        """A hex SHA-256 of all values, the same in every process for equal calibrations."""
        return self._fingerprint

    def site_fingerprint(self, norm: str) -> str:
        """A hash of what the calibration says of one norm; "" if it says nothing."""
        weights = self.weights.get(norm)
        if weights is None and norm not in self.exact:
            return ""
        return _digest([self.p, self.block_size, norm in self.exact, weights])

    def under(self, prefix: str) -> Calibration:
        """The same calibration for the model inside another module, such as PEFT's wrapper.

        ``calibration.under("base_model.model")`` speaks of "base_model.model.model.layers.0...".
        """
        return replace(
            self,
            weights={f"{prefix}.{name}": w for name, w in self.weights.items()},
            exact=tuple(f"{prefix}.{name}" for name in self.exact),
            channels={f"{prefix}.{name}": s for name, s in self.channels.items()},
            architecture="",
        )

    def check_model(self, model: nn.Module) -> None:
        """Raise a ValueError that names the norms and widths which differ, if any do."""
        if self.architecture in ("", architecture_hash(model)):
            return
        differences = _differences(self, model)
        raise ValueError(
            f"the calibration belongs to another architecture than this {type(model).__name__}: "
            f"{_some(differences) or 'its norms agree, but other parameters do not'}. Calibrate "
            "this model with mxnorm_pass.calibrate"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file whose metadata is a JSON header.

        Raises:
            OSError: ``path`` cannot be written; what stood there before stays.
        """
        with needs_extra("hf", "a calibration's file"):
            from safetensors.torch import save

        tensors = {f"{_WEIGHTS}{name}": w for name, w in self.weights.items()}
        tensors |= {f"{_CHANNELS}{name}": s for name, s in self.channels.items()}
        if self.order is not None:
            tensors[_ORDER] = self.order
        data = save(tensors, metadata={_HEADER: json.dumps(asdict(_Header.of(self)))})
        write_bytes(path, data)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> Calibration:
        """Read what :meth:`save` wrote.

        Args:
            model: checked to be of the architecture that was calibrated.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no calibration, or one of a newer version or of another architecture.
        """
        header, tensors = _read(path)
        calibration = cls(
            weights=_below(tensors, _WEIGHTS),
            channels=_below(tensors, _CHANNELS),
            order=tensors.get(_ORDER),
            exact=tuple(header.exact),
            p=header.p,
            block_size=header.block_size,
            architecture=header.architecture,
        )
        if model is not None:
            calibration.check_model(model)
        return calibration

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Calibration):
            return NotImplemented
        return self._fingerprint == other._fingerprint

    def __hash__(self) -> int:
        return hash(self._fingerprint)

    def __reduce__(self) -> tuple[Any, ...]:
        # A mappingproxy can be neither pickled nor deep-copied.
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"weights": dict(self.weights), "channels": dict(self.channels)}
        return _rebuild, (values,)

    def __str__(self) -> str:
        order = "" if self.order is None else ", channels in an order of their own"
        return (
            f"Calibration of {len(self.weights)} norms, {len(self.exact)} exact, p = {self.p:g}"
            f"{order} ({self._fingerprint[:8]})"
        )

    @cached_property
    def _fingerprint(self) -> str:
        return _digest([getattr(self, f.name) for f in fields(self)])


@dataclass(frozen=True)
class _Header:
    version: int
    p: float
    block_size: int
    exact: list[str]
    architecture: str

    @classmethod
    def of(cls, calibration: Calibration) -> _Header:
        return cls(
            version=_FORMAT_VERSION,
            p=calibration.p,
            block_size=calibration.block_size,
            exact=list(calibration.exact),
            architecture=calibration.architecture,
        )


def architecture_hash(model: nn.Module) -> str:
    """A hex SHA-256 of the names and shapes of a model's parameters."""
    return hashlib.sha256(repr(sorted(_shapes(model).items())).encode()).hexdigest()


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {clean_module_path(n): tuple(p.shape) for n, p in model.named_parameters()}


def _differences(calibration: Calibration, model: nn.Module) -> list[str]:
    shapes = _shapes(model)
    modules = {clean_module_path(name) for name, _ in model.named_modules()}
    known = dict.fromkeys([*calibration.weights, *calibration.exact])
    found = [f"the model has no {name!r}" for name in known if name not in modules]
    for name, weights in calibration.weights.items():
        width = len(weights) * calibration.block_size
        shape = shapes.get(f"{name}.weight", (width,))
        if shape != (width,):
            found.append(f"{name!r} has width {shape[0]} in the model, {width} in the calibration")
    return found


def _rebuild(values: dict[str, Any]) -> Calibration:
    return Calibration(**values)


def _read(path: str | os.PathLike[str]) -> tuple[_Header, dict[str, Tensor]]:
    with needs_extra("hf", "a calibration's file"):
        from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no calibration file {os.fspath(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if text is None:
            raise ValueError("it is a safetensors file without a calibration's header")
        values = json.loads(text)
        if values.get("version") != _FORMAT_VERSION:
            raise ValueError(
                f"its format has version {values.get('version')}, this program reads "
                f"{_FORMAT_VERSION}"
            )
        return _Header(**values), tensors
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is no calibration file: {error}") from None


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Mapping):
            value = [(name, _digest([value[name]])) for name in sorted(value)]
        elif isinstance(value, Tensor):
            value = (value.dtype, tuple(value.shape), value.numpy().tobytes())
        digest.update(repr(value).encode())
    return digest.hexdigest()


def _check_scalars(calibration: Calibration) -> None:
    p, block_size = calibration.p, calibration.block_size
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not math.isfinite(p) or p <= 0:
        raise ValueError(f"p is {p!r}; it must be a finite number greater than 0")
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size is {block_size!r}; it must be an integer of at least 1")
    if not isinstance(calibration.architecture, str):
        raise ValueError(f"architecture is {calibration.architecture!r}; it must be a str")


def _named(mapping: object, label: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{label} is {mapping!r}; it must be a mapping from name to tensor")
    for name in mapping:
        if not isinstance(name, str):
            raise ValueError(f"{label} has the key {name!r}; it must be a module's full name")
    return mapping.items()


def _names(names: object) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ValueError(f"exact is {names!r}; it must be a tuple of norm names")
    listed = tuple(names)
    if not all(isinstance(name, str) for name in listed):
        raise ValueError(f"exact is {listed!r}; it must be a tuple of norm names")
    return tuple(dict.fromkeys(listed))


def _block_weights(name: str, weights: object) -> Tensor:
    values = _vector(f"weights[{name!r}]", weights, "[K]")
    if (values < 0).any():
        raise ValueError(f"weights[{name!r}] has negative elements; they must be at least 0")
    if not values.any():
        raise ValueError(f"weights[{name!r}] are all 0, which estimates every RMS as 0")
    return values


def _statistic(name: str, statistic: object) -> Tensor:
    return _vector(f"channels[{name!r}]", statistic, "[D]")


def _vector(label: str, tensor: object, shape: str) -> Tensor:
    if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
        raise ValueError(f"{label} is {tensor!r}; it must be a float32 tensor {shape}")
    if tensor.ndim != 1 or not len(tensor):
        raise ValueError(f"{label} has shape {tuple(tensor.shape)}; it must be {shape}")
    values = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not values.isfinite().all():
        raise ValueError(f"{label} has elements that are NaN or infinite")
    return values


def _permutation(order: object, widths: set[int]) -> Tensor:
    if not isinstance(order, Tensor) or order.dtype != torch.int64 or order.ndim != 1:
        raise ValueError(f"order is {order!r}; it must be an int64 tensor [D] or None")
    values = order.detach().to("cpu", copy=True).contiguous()
    if not torch.equal(values.sort().values, torch.arange(len(values))):
        raise ValueError(f"order is no permutation of the channels 0 to {len(values) - 1}")
    if widths and len(values) not in widths:
        raise ValueError(
            f"order has {len(values)} channels; the norms with weights have "
            f"{', '.join(map(str, sorted(widths)))}"
        )
    return values


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + more
