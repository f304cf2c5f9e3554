"""``mxnorm_pass.compare``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from mxnorm_pass.checkpoints.batches import (
    Batch,
    Loss,
    check_batch,
    has_tokens,
    logits_of,
    loss_of,
    run,
    token_rows,
)
from mxnorm_pass.checkpoints.channels.permute import in_eval_mode
from mxnorm_pass.checkpoints.compare.comparison import (
    Comparison,
    Divergence,
    Ratio,
    SiteComparison,
    Step,
)
from mxnorm_pass.checkpoints.compare.watch import Observation, WatchedModel
from mxnorm_pass.checkpoints.progress import progress_bar
from mxnorm_pass.options.parse import parse
from mxnorm_pass.report.site import Site

# So many of the norms that cost most are set to exact one after the other.
_STEPS = 8


@torch.no_grad()
def compare(model: nn.Module, batch: Batch, options: Mapping[str, Any] | None = None) -> Comparison:
    """What MXNorm does to a model on a batch, norm by norm and as a whole.

    The model runs as it is, with the exact RMS and MX casts, and with the options, through the
    graphs that the backend rewrites, interpreted node by node: nothing is compiled to code. Rows
    of the batch run one by one, and no activations are kept; padding, by ``attention_mask``, does
    not count. To say which norms hurt, the first row with tokens then runs once for each norm with
    that norm exact, and the whole batch with the worst norms exact together.

    Args:
        batch: the model's inputs as a dict (input_ids, attention_mask, labels) or one tensor.
        options: as for ``torch.compile``.

    Raises:
        ValueError: the batch is empty, all padding, or holds NaN or infinite numbers, the model's
            outputs do, no norm is fused, or an option is wrong.
    """
    check_batch(batch, 0)
    given = dict(options or {})
    parse(given)
    model = getattr(model, "_orig_mod", model)
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    rows = list(_rows(batch))
    with in_eval_mode(model), progress_bar("compare", 3 * len(rows)) as bar:
        runs = _Runs(model, device, bar)
        exact = WatchedModel(model, _exact_options(given))
        estimated = WatchedModel(model, given)
        exact.observed, estimated.observed = {}, {}
        whole = _Whole()
        for i, row in enumerate(rows):
            exact.batch = estimated.batch = row
            outputs = tuple(runs(which, row) for which in (model, exact, estimated))
            whole.add(row, outputs, f"row {i}")
        _check_fused(estimated)
        whole.check()
        observed, estimated.observed, exact_observed = estimated.observed, None, exact.observed
        costs = _costs(runs, estimated, next(filter(has_tokens, rows), rows[0]))
        steps = _steps(runs, estimated, rows, costs)
    length = _length(rows[0])
    sites = [
        _site(site, observed[site.norm], exact_observed.get(site.norm), costs, length)
        for site in estimated.sites
        if site.norm in observed
    ]
    return whole.result(tuple(sites), steps)


@dataclass(frozen=True)
class _Runs:
    """Runs of a model that tick a progress bar."""

    model: nn.Module
    device: torch.device
    bar: Any

    def __call__(self, which: Callable[..., Any], row: Batch) -> Any:
        # A cache of keys and values is an output that nobody reads.
        without_cache = {"use_cache": False} if self._takes_cache else {}
        output = run(lambda *a, **k: which(*a, **{**without_cache, **k}), row, self.device)
        self.bar.update()
        return output

    @property
    def _takes_cache(self) -> bool:
        return "use_cache" in inspect.signature(self.model.forward).parameters

    def loss(self, which: Callable[..., Any], rows: Sequence[Batch]) -> float:
        return sum((loss_of(self(which, row), row) for row in rows), Loss()).mean


def _exact_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same casts, every RMS exact."""
    kept = {k: v for k, v in options.items() if k not in ("calibration", "p", "estimator")}
    modules = {
        name: {k: v for k, v in rule.items() if k not in ("p", "estimator")}
        if isinstance(rule, Mapping)
        else rule
        for name, rule in options.get("modules", {}).items()
    }
    return {**kept, "modules": modules, "estimator": "exact"}


def _rows(batch: Batch) -> Iterator[Batch]:
    """The batch's rows, each a batch of one; the whole where its tensors are not cut alike."""
    if isinstance(batch, Tensor):
        yield from batch.split(1)
        return
    sizes = {v.shape[0] if v.ndim else 0 for v in batch.values() if isinstance(v, Tensor)}
    if len(sizes) != 1 or not all(isinstance(v, Tensor) for v in batch.values()):
        yield batch
        return
    for i in range(sizes.pop()):
        yield {name: value[i : i + 1] for name, value in batch.items()}


def _length(row: Batch) -> int:
    """Tokens of a row."""
    values = [row] if isinstance(row, Tensor) else list(row.values())
    return next((int(v.shape[1]) for v in values if isinstance(v, Tensor) and v.ndim > 1), 1)


def _check_fused(watched: WatchedModel) -> None:
    if not watched.sites:
        raise ValueError(f"the backend fuses no norm of this model:\n{watched.report}")


@dataclass
class _Whole:
    """Sums over tokens of the three models' outputs."""

    losses: list[Loss] | None = field(default_factory=lambda: [Loss(), Loss(), Loss()])
    kl: list[float] = field(default_factory=lambda: [0.0, 0.0])
    same: list[int] = field(default_factory=lambda: [0, 0])
    tokens: int = 0

    def add(self, row: Batch, outputs: tuple[Any, ...], name: str) -> None:
        """Outputs as it is, with exact RMS, and with the options."""
        logits = [token_rows(row, logits_of(output)).float() for output in outputs]
        if not logits[0].isfinite().all():
            raise ValueError(f"the model's outputs on {name} hold NaN or infinite numbers")
        self._add_losses(row, outputs)
        *references, last = (t.log_softmax(-1) for t in logits)
        self.tokens += len(last)
        for i, reference in enumerate(references):
            self.kl[i] += float((reference.exp() * (reference - last)).sum())
            self.same[i] += int((reference.argmax(-1) == last.argmax(-1)).sum())

    def check(self) -> None:
        if not self.tokens:
            raise ValueError("the batch is all padding: its attention_mask keeps no token")

    def _add_losses(self, row: Batch, outputs: Sequence[Any]) -> None:
        if self.losses is None:
            return
        try:
            self.losses = [a + loss_of(o, row) for a, o in zip(self.losses, outputs, strict=True)]
        except ValueError:  # neither labels nor token ids
            self.losses = None

    def result(self, sites: tuple[SiteComparison, ...], steps: tuple[Step, ...]) -> Comparison:
        as_is, exact, loss = [each.mean for each in self.losses] if self.losses else [None] * 3
        from_as_is, from_exact = (
            Divergence(kl / self.tokens, same / self.tokens)
            for kl, same in zip(self.kl, self.same, strict=True)
        )
        return Comparison(self.tokens, as_is, exact, loss, from_as_is, from_exact, sites, steps)


def _costs(runs: _Runs, watched: WatchedModel, row: Batch) -> dict[str, float]:
    """By how much the loss of a row falls if a norm alone is exact; empty without a loss."""
    norms = [site.norm for site in watched.sites if site.estimator == "mxnorm"]
    runs.bar.total += len(norms) + 1
    costs: dict[str, float] = {}
    try:
        loss = runs.loss(watched, [row])
    except ValueError:
        return costs
    for norm in norms:
        watched.exact = frozenset({norm})
        costs[norm] = loss - runs.loss(watched, [row])
    watched.exact = frozenset()
    return costs


def _steps(
    runs: _Runs, watched: WatchedModel, rows: Sequence[Batch], costs: Mapping[str, float]
) -> tuple[Step, ...]:
    ranked = sorted(costs, key=lambda norm: -costs[norm])[:_STEPS]
    worst = [norm for norm in ranked if costs[norm] > 0]
    runs.bar.total += len(worst) * len(rows)
    steps = []
    for count in range(1, len(worst) + 1):
        watched.exact = frozenset(worst[:count])
        steps.append(Step(tuple(worst[:count]), runs.loss(watched, rows)))
    watched.exact = frozenset()
    return tuple(steps)


def _site(
    site: Site,
    seen: Observation,
    exact: Observation | None,
    costs: Mapping[str, float],
    length: int,
) -> SiteComparison:
    return SiteComparison(
        norm=site.norm,
        consumers=site.consumers,
        how=site.how,
        ratio=_ratio(seen, length),
        input_error=seen.relative_error,
        cast_error=exact.relative_error if exact is not None else float("nan"),
        loss_increase=costs.get(site.norm),
    )


def _ratio(seen: Observation, length: int) -> Ratio:
    ratios = torch.cat(seen.ratios)
    low, median, high = ratios.quantile(torch.tensor([0.01, 0.5, 0.99])).tolist()
    worst = int(ratios.log().abs().argmax())
    token = divmod(int(torch.cat(seen.places)[worst]), length)
    return Ratio(median, low, high, float(ratios[worst]), token)
