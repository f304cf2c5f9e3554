"""``functional`` with an inverse RMS handed to it: what remains is equal bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor


@contextmanager
def given_rho(rho: Tensor) -> Iterator[None]:
    """While this is active, the one ``torch.rsqrt`` returns ``rho``."""
    with mock.patch.object(torch, "rsqrt", return_value=rho) as rsqrt:
        yield
    rsqrt.assert_called_once()
    assert rsqrt.call_args.args[0].shape == rho.shape
