"""Pre-train a Llama from scratch under RMSNorm or MXNorm, and any recipe of casts.

    python examples/prepare_text.py --package python torch sympy --out build/text
    python examples/pretrain.py --text build/text --norm mxnorm --recipe mxfp8
    python examples/pretrain.py --text build/text --size 30m --norm mxnorm --recipe mxfp4-rht-sr \\
        --forward mxfp8 --steps 700 --checkpoint build/run --checkpoint-every 100 \\
        --metrics build/run.jsonl
    torchrun --nproc-per-node 2 examples/pretrain.py --text build/text --size 125m --recipe mxfp8

The model is HuggingFace's, unmodified; arms differ in the options of torch.compile alone. With
--checkpoint the same command resumes a run that was killed, and gives the losses that it would have
given: order of the data and random draws are those of the settings. torchrun splits each batch and
the parameters over several GPUs.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pretrain_ranks
import torch
from benchlib import invocation, machine
from checkpointlib import BadInput
from prepare_text import Text, load_text
from pretrain_checkpoint import CheckpointError, load_newest, save
from pretrain_metrics import Line, Metrics
from pretrain_norms import norm_statistics
from pretrain_settings import GRADIENTS, INNERS, NORMS, SIZES, Places, Run, new_run
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM


class Diverged(Exception):
    """The loss or the gradient is not finite."""


class OutOfTime(Exception):
    """The deadline of a run passed before its last step."""


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        held_out: loss in nats per token.
        steps: the logged lines.
        tokens_per_s: median of the logged lines, without the first, which compiles.
        peak_memory: bytes, of the device, the first rank's; on a CPU of the process.
        seconds: of this process, compiles and evaluations included.
    """

    run: Run
    held_out: float
    steps: tuple[Line, ...]
    tokens_per_s: float
    peak_memory: int
    seconds: float


class Order:
    """Which rows each step reads: every epoch all of them, in a new order.

    It is kept on the device: to copy rows there would be to wait for it at every step.
    """

    def __init__(self, rows: int, batch: int, seed: int, device: str = "cpu") -> None:
        self._rows, self._batch, self._seed, self._device = rows, batch, seed, device
        self._epochs: dict[int, Tensor] = {}

    def __call__(self, step: int) -> Tensor:
        """[batch], int64."""
        first, last = step * self._batch, (step + 1) * self._batch
        epochs = range(first // self._rows, (last - 1) // self._rows + 1)
        starts = [epoch * self._rows for epoch in epochs]
        parts = [
            self._epoch(epoch)[max(first - start, 0) : last - start]
            for epoch, start in zip(epochs, starts, strict=True)
        ]
        return torch.cat(parts)

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = torch.randperm(self._rows, generator=generator)
            self._epochs[epoch] = order.to(self._device)
        return self._epochs[epoch]


class Training:
    """Model, optimizer, and the position in the text."""

    def __init__(self, run: Run, text: Text) -> None:
        self.run, self.device = run, torch.device(run.device)
        forget_other_runs(self.device)
        self.rows = as_rows(text.train, run, "text")
        held_out = as_rows(text.val, run, "held-out text")
        self.held_out = held_out[: min(run.held_out_rows, len(held_out)) // run.batch * run.batch]
        if not len(self.held_out):
            raise BadInput(
                f"{min(len(held_out), run.held_out_rows)} held-out rows of {run.sequence} tokens, "
                f"a batch has {run.batch}: hold out more text, or use a smaller batch or sequence"
            )
        self.text_hash = text.sha256
        torch.manual_seed(run.seed)
        with self.device:
            self.model = LlamaForCausalLM(SIZES[run.size].config(text.vocab_size, run.sequence))
        self.compiled = pretrain_ranks.compiled(self.model, run)
        self.optimizer = make_optimizer(self.model, run)
        self.order = Order(len(self.rows), run.batch, run.seed, run.device)
        self.step = 0
        # Loss and gradient norm of the steps since the last line, on the device.
        self.pending: list[Tensor] = []

    def train_step(self) -> None:
        rate = self.run.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(pretrain_ranks.share(self.rows[self.order(self.step)]))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss, norm = pretrain_ranks.mean(loss.detach().float()), pretrain_ranks.whole(norm).float()
        self.pending.append(torch.stack([loss, norm]))
        self.step += 1

    def loss(self, rows: Tensor) -> Tensor:
        """Mean over the tokens of [rows, tokens], int32; a scalar with its graph."""
        ids = rows.long()
        with self.autocast():
            loss: Tensor = self.compiled(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16)

    def taken(self) -> list[list[float]]:
        """Loss and gradient norm of the pending steps. It waits for the device.

        Raises:
            Diverged: one of them is not finite.
        """
        values: list[list[float]] = torch.stack(self.pending).tolist() if self.pending else []
        for i, (loss, norm) in enumerate(values):
            if not abs(loss) + norm < float("inf"):
                step = self.step - len(values) + i + 1
                raise Diverged(f"loss {loss} and gradient norm {norm} at step {step}")
        return values

    def evaluate(self) -> float:
        """Loss on the held-out rows, by the graph that is trained, which no new compile delays."""
        with self.random_state_kept():
            batches = map(pretrain_ranks.share, self.held_out.split(self.run.batch))
            losses = torch.stack([self.loss(rows).detach() for rows in batches])
            loss = float(pretrain_ranks.mean(losses.mean()))
        if not abs(loss) < float("inf"):
            raise Diverged(f"held-out loss {loss} after step {self.step}")
        return loss

    def norms(self) -> list[dict[str, Any]]:
        with self.random_state_kept(), self.autocast():
            ids = self.held_out[: self.run.batch].long()
            return [asdict(found) for found in norm_statistics(self.model, ids, self.run.p)]

    @contextmanager
    def random_state_kept(self) -> Iterator[None]:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            yield

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that resumes from it."""
        return {**asdict(self.run), "text": self.text_hash}

    def state(self) -> dict[str, Any]:
        """All ranks must ask for it; that of the first is whole."""
        on_gpu = self.device.type == "cuda"
        return {
            "settings": self.settings(),
            "step": self.step,
            "model": pretrain_ranks.gathered(self.model.state_dict()),
            "optimizer": pretrain_ranks.gathered(self.optimizer.state_dict()),
            "pending": self.pending,
            "cpu_random": torch.get_rng_state(),
            "gpu_random": torch.cuda.get_rng_state(self.device) if on_gpu else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.pending = [values.to(self.device) for values in state["pending"]]
        pretrain_ranks.load(self.model, self.optimizer, state)
        torch.set_rng_state(state["cpu_random"].cpu())
        if state["gpu_random"] is not None:
            torch.cuda.set_rng_state(state["gpu_random"].cpu(), self.device)


def forget_other_runs(device: torch.device) -> None:
    """Of this process: what they compiled, and their share of the peak memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def as_rows(tokens: Any, run: Run, what: str) -> Tensor:
    """[rows, sequence], int32, on the run's device."""
    count = len(tokens) // run.sequence
    if not count:
        raise BadInput(f"the {what} has {len(tokens)} tokens, one row {run.sequence}: give more")
    whole = torch.from_numpy(tokens[: count * run.sequence].astype("int32"))
    return whole.view(count, run.sequence).to(run.device)


def make_optimizer(model: LlamaForCausalLM, run: Run) -> torch.optim.AdamW:
    """AdamW that decays matrices, not gains."""
    gains = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    groups = [
        {"params": matrices, "weight_decay": run.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.95), fused=run.device != "cpu")


class Stopwatch:
    """Tokens per second between two lines of the log, without what is no training."""

    def __init__(self) -> None:
        self.begun = self._lap = time.perf_counter()
        self._away = 0.0
        self._speeds: list[float] = []
        self.tokens = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._away += time.perf_counter() - begun

    def lap(self) -> float:
        now = time.perf_counter()
        self._speeds.append(self.tokens / (now - self._lap - self._away))
        self._lap, self._away, self.tokens = now, 0.0, 0
        return self._speeds[-1]

    @property
    def typical(self) -> float:
        """The median, without the first, which compiles."""
        return statistics.median(self._speeds[1:] or self._speeds or [0.0])


def train(run: Run, text: Text, places: Places, *, progress: bool = True) -> Result:
    """Train from the newest checkpoint or from the start, to the last step.

    Raises:
        BadInput: text, checkpoint and settings do not fit each other.
        CheckpointError: a checkpoint cannot be read or written.
        Diverged: a loss is not finite; the metrics say so, and the last good checkpoint stays.
        OutOfTime: the deadline passed.
    """
    if run.deterministic:
        # cuBLAS reads it at its first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(run.deterministic, warn_only=True)
    training = Training(run, text)
    metrics = Metrics(places.metrics if pretrain_ranks.is_first() else None)
    if places.checkpoint is not None:
        resume(training, places.checkpoint)
    header = {"run": asdict(run), "text": text.sha256, "ranks": pretrain_ranks.count()}
    header |= {"machine": machine(), **invocation()}
    metrics.start({"kind": "run", "parameters": training.parameters, **header}, training.step)
    try:
        return Loop(training, metrics, places).run(progress)
    except Diverged as error:
        metrics.add("diverged", training.step, error=str(error))
        kept = "" if places.checkpoint is None else "; the last good checkpoint is kept"
        raise Diverged(f"{error}: try a lower --lr or another --seed{kept}") from None
    finally:
        metrics.close()


def resume(training: Training, folder: Path) -> None:
    # Of several ranks each keeps its part alone on its device.
    device = training.run.device if pretrain_ranks.count() == 1 else "cpu"
    state = load_newest(folder, device)
    pretrain_ranks.check_same_step(None if state is None else state["step"])
    if state is None:
        return
    old, new = state["settings"], training.settings()
    changed = [f"{key}: {old.get(key)!r} there, {new[key]!r} here" for key in new
               if old.get(key) != new[key]]  # fmt: skip
    if changed:
        raise BadInput(
            f"the checkpoint in {str(folder)!r} is of another run ({'; '.join(changed)}): "
            "give the same settings, or another folder"
        )
    training.restore(state)


class Loop:
    """The steps of a run, and what is done between them."""

    def __init__(self, training: Training, metrics: Metrics, places: Places) -> None:
        self.training, self.metrics, self.places = training, metrics, places
        self.watch = Stopwatch()

    def run(self, progress: bool) -> Result:
        run, training = self.training.run, self.training
        title = f"{run.size} {run.recipe} {run.norm}"
        disable = None if progress and pretrain_ranks.is_first() else True
        with tqdm(total=run.steps, initial=training.step, desc=title, disable=disable) as bar:
            while training.step < run.steps:
                training.train_step()
                self.watch.tokens += run.tokens_per_step
                bar.update()
                if due(training.step, run.log_every) or training.step == run.steps:
                    bar.set_postfix_str(self.log())
                    self.stop_in_time()
                self.pause()
        return self.finish()

    def log(self) -> str:
        """One line over the steps since the last; returns what the progress bar shows of it."""
        training = self.training
        values = training.taken()
        training.pending = []
        losses, norms = zip(*values, strict=True)
        loss, speed = statistics.fmean(losses), self.watch.lap()
        self.metrics.add(
            "step",
            training.step,
            loss=loss,
            highest_loss=max(losses),
            lr=training.run.learning_rate(training.step - 1),
            gradient_norm=norms[-1],
            tokens_per_s=round(speed, 1),
        )
        return f"loss {loss:.3f}, {speed:,.0f} tokens/s"

    def stop_in_time(self) -> None:
        deadline, training = self.places.deadline, self.training
        if deadline is not None and time.time() > deadline:
            raise OutOfTime(f"the time is over after step {training.step} of {training.run.steps}")

    def pause(self) -> None:
        """What is done at some steps beside training: held-out text, norms, a checkpoint."""
        run, training, places = self.training.run, self.training, self.places
        evaluate = due(training.step, run.evaluate_every) and training.step < run.steps
        norms = due(training.step, run.norms_every)
        keep = places.checkpoint is not None and due(training.step, places.checkpoint_every)
        if not (evaluate or norms or keep):
            return
        # The steps so far belong to the training's time, and must be finite before they are kept.
        training.taken()
        with self.watch.paused():
            if evaluate:
                self.metrics.add("held_out", training.step, loss=training.evaluate())
            if norms:
                self.metrics.add("norms", training.step, norms=training.norms())
            if keep:
                state = training.state()
                if pretrain_ranks.is_first():
                    save(places.checkpoint, training.step, state)

    def finish(self) -> Result:
        training = self.training
        held_out = training.evaluate()
        result = Result(
            run=training.run,
            held_out=held_out,
            steps=tuple(self.metrics.of("step")),
            tokens_per_s=self.watch.typical,
            peak_memory=peak_memory(training.device),
            seconds=time.perf_counter() - self.watch.begun,
        )
        self.metrics.add(
            "end",
            training.step,
            loss=held_out,
            held_out_tokens=training.held_out.numel(),
            tokens_per_s=round(result.tokens_per_s, 1),
            peak_memory_bytes=result.peak_memory,
            seconds=round(result.seconds, 1),
        )
        return result


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Pre-train a Llama. Settings that are not given are those of the size."
    )
    add = parser.add_argument
    add("--text", type=Path, required=True, help="folder that prepare_text.py wrote")
    add("--size", choices=SIZES, default="nano")
    add("--norm", choices=NORMS, default="mxnorm")
    add(
        "--recipe",
        default="mxfp8",
        help="a name or JSON; bf16: no casts, plain Inductor; none: the forward alone, in MXFP8",
    )
    add("--forward", help="format of the forward, such as mxfp8, in the place of the recipe's")
    add("--p", type=float)
    add("--gradient", choices=GRADIENTS)
    add("--inner", choices=INNERS)
    add("--lr", type=float)
    add("--seed", type=int)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int)
    length.add_argument("--tokens", type=lambda text: int(float(text)))
    add("--warmup", type=int, help="steps; default: 100, at most a tenth of all")
    add("--batch", type=int, help="rows a step")
    add("--sequence", type=int, help="tokens a row")
    add("--held-out-rows", type=int)
    add("--log-every", type=int)
    add("--evaluate-every", type=int)
    add("--norms-every", type=int)
    add("--deterministic", action="store_true", default=None)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--metrics", type=Path, help="JSONL file")
    add("--checkpoint", type=Path, help="folder; the same command resumes from it")
    add("--checkpoint-every", type=int, default=100, help="steps")
    return parser.parse_args(argv)


def run_of(args: argparse.Namespace) -> Run:
    names = {field.name for field in fields(Run)} | {"tokens"}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    return new_run(**given)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    try:
        run, places = run_of(args), Places(args.metrics, args.checkpoint, args.checkpoint_every)
        with pretrain_ranks.joined(run):
            result = train(run, load_text(args.text), places)
            if pretrain_ranks.is_first():
                print(summary(result))
    except BadInput as error:
        print(f"pretrain.py: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, Diverged, OSError) as error:
        print(f"pretrain.py: {error}", file=sys.stderr)
        return 1
    return 0


def summary(result: Result) -> str:
    return (
        f"held-out loss {result.held_out:.4f} after {result.run.steps} steps, "
        f"{result.tokens_per_s:,.0f} tokens/s, {result.peak_memory / 2**30:.2f} GiB, "
        f"{result.seconds:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
