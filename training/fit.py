"""The training loop: truncated back-propagation through time over lanes whose state is carried from chunk to chunk.

    block  ──► chunk 0 ──► chunk 1 ──► ...      normaliser and LSTM states flow through, gradients stop at each border

Inputs are corrupted (spikes, offsets, frozen values, masks), targets are clean. Every random number follows from (seed, block),
so a run that was killed continues from its checkpoint and ends with the same weights. Several processes draw the same block and take
their lanes of it, so that they end, up to the rounding of sums, with the weights of one (`training.distributed`).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from service.events import listed
from service.outputs import write_bytes
from training.autoencoder import HORIZONS, LAGS, WINDOW, Outlook, Outputs, WaveformOutputs
from training.data import Block, Float32, Source
from training.detector import DetectorStep
from training.distributed import ALONE, World
from training.layout import Parts

CODE_NOISE = 0.05
AHEAD_BLOCKS, AHEAD_VALUES = 8, 1 << 13
"""Blocks that are prepared side by side, and lanes times features in them at most: row by row, it is the operators that cost."""


@dataclass(frozen=True)
class Plan:
    """How long, how wide, how fast."""

    steps: int = 600
    lanes: int = 32
    chunk: int = 128
    chunks: int = 4  # per block
    learning_rate: float = 4e-3
    seed: int = 0
    check_every: int = 5  # blocks between looks at the validation part
    patience: int = 8  # looks without a better one before stopping
    lead: int = 0  # first rows of each lane, which the normaliser alone sees


WAVEFORM_PLAN = Plan(steps=900, chunk=320, learning_rate=5e-3, patience=30, lead=500)
"""Patient: the loss of a few lanes' last rows is noisy, and a one-cycle run is best at its end."""


@dataclass
class Progress:
    """What a run has reached; all of it is in the checkpoint."""

    block: int = 0
    best_loss: float = math.inf
    looks_since_best: int = 0
    training: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)
    validation: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Prepared:
    """What the network is given of one chunk, and what it should answer."""

    inputs: Tensor  # [T, B, I] clean
    z: Tensor  # [T, B, F]
    present: Tensor  # [T, B, F] bool

    def to(self, device: torch.device) -> Prepared:
        return Prepared(self.inputs.to(device), self.z.to(device), self.present.to(device))

    def part(self, rows: slice, lanes: slice = slice(None)) -> Prepared:
        """A copy, laid out as if it were the whole."""
        return Prepared(*(whole[rows, lanes].contiguous() for whole in (self.inputs, self.z, self.present)))


@dataclass(frozen=True)
class Drawn:
    """A block of lanes, and the generator that everything else about the block is drawn from."""

    block: Block
    rng: np.random.Generator
    shaken: Shaken | None
    own: slice  # of the lanes, those of this process
    lead: int  # first rows, which the normaliser alone sees


@dataclass
class Lanes:
    """The state that flows from chunk to chunk."""

    parts: Parts  # of normaliser and clock
    events: Tensor  # [1, B]
    network: Parts

    @classmethod
    def fresh(cls, step: DetectorStep, rows: int) -> Lanes:
        slots = (*step.normaliser.slots, *step.clock.slots)
        parts = {slot.name: torch.zeros(slot.size, rows) for slot in slots} | {"previous_z": torch.zeros(step.features, rows)}
        return cls(parts, torch.zeros(1, rows), step.autoencoder.fresh(rows))


@torch.no_grad()
def prepare(step: DetectorStep, x: Tensor, t: Tensor, lanes: Lanes) -> Prepared:
    """Run normaliser and clock over x [T, B, F], t [T, B, 3]; `lanes` advances."""
    inputs, zs, presents = [], [], []
    learn = torch.ones(x.shape[1], dtype=torch.bool)
    for x_now, t_now in zip(x.unbind(0), t.unbind(0), strict=True):
        event, learned = step.normaliser(x_now.t(), learn, lanes.parts)
        kept = {name: torch.where(event.learns, part, lanes.parts[name]) for name, part in learned.items()}
        clock, cadence = step.clock(t_now.t(), lanes.events, lanes.parts)
        inputs.append(step.inputs(event, clock, lanes.parts["previous_z"]))
        previous = torch.where(event.present, event.z, lanes.parts["previous_z"])
        lanes.parts = {**kept, **cadence, "previous_z": previous}
        lanes.events = lanes.events + 1
        zs.append(event.z.t())
        presents.append(event.present.t())
    return Prepared(torch.stack(inputs), torch.stack(zs), torch.stack(presents))


def prepare_all(step: DetectorStep, drawn: Sequence[Drawn]) -> list[Prepared]:
    """Each block's own lanes behind its lead, from fresh normalisers: what they are is independent of the other blocks."""
    rows = max(len(one.block.x) for one in drawn)
    x = _side_by_side([one.block.x[:, one.own] for one in drawn], rows)
    t = _side_by_side([one.block.t[:, one.own] for one in drawn], rows)
    together = prepare(step, x, t, Lanes.fresh(step, x.shape[1]))
    ends = np.cumsum([one.own.stop - one.own.start for one in drawn])
    starts = [0, *ends[:-1]]
    return [
        together.part(slice(one.lead, len(one.block.x)), slice(start, end)) for one, start, end in zip(drawn, starts, ends, strict=True)
    ]


def _side_by_side(parts: Sequence[Float32], rows: int) -> Tensor:
    """Parts [T, B, N] of at most `rows` rows → [rows, ΣB, N]; rows behind a part's end are NaN."""
    whole = [np.concatenate([part, np.full((rows - len(part), *part.shape[1:]), np.nan, np.float32)]) for part in parts]
    return torch.from_numpy(np.concatenate(whole, axis=1))


def corrupted(prepared: Prepared, rng: np.random.Generator, lanes: int, own: slice) -> Tensor:
    """Inputs [T, B, I] with anomalies and gaps; the targets stay what they were. `prepared` holds the lanes `own` of a block of `lanes`.

    Random numbers are drawn for the whole block: however it is split over processes, a lane gets the same ones.
    """
    z = prepared.z.numpy().copy()
    T, B, F = z.shape
    block = (T, lanes, F)
    z += ((rng.random(block) < 0.02) * rng.normal(size=block).astype(np.float32) * 2)[:, own]
    hidden = ~prepared.present.numpy() | (rng.random(block) < 0.1)[:, own]
    for lane in range(lanes):
        f = rng.integers(F)
        start, length = rng.integers(max(1, T - 40)), rng.integers(3, 40)
        kind = rng.random()
        offset = rng.normal() * 1.5 if kind < 0.3 else 0.0
        b = lane - own.start
        if not 0 <= b < B:
            continue
        if kind < 0.3:
            z[start : start + length, b, f] += offset
        elif kind < 0.45:
            z[start : start + length, b, f] = z[start, b, f]
        elif kind < 0.7:
            hidden[start : start + length // 2, b, f] = True
    z += rng.normal(size=block).astype(np.float32)[:, own] * 0.05
    z[hidden] = 0
    inputs = prepared.inputs.clone()
    inputs[:, :, :F] = torch.from_numpy(z if F == 1 else _last(z, hidden, inputs[0, :, :F].numpy()))
    inputs[:, :, F : 2 * F] = torch.from_numpy(_changes(z, hidden))
    inputs[:, :, 2 * F : 3 * F] = torch.from_numpy((~hidden).astype(np.float32))
    timeless = torch.from_numpy((rng.random(lanes) < 0.3)[own])
    inputs[:, timeless, 3 * F : 3 * F + 4] = 0
    return inputs


@dataclass(frozen=True)
class Shaken:
    """Another patient, another machine: each lane of a block of waveforms larger or smaller, higher or lower, [B, 1] each."""

    factor: Tensor
    offset: Tensor

    @classmethod
    def drawn(cls, rng: np.random.Generator, lanes: int, own: slice) -> Shaken:
        factor, offset = np.exp(0.1 * rng.normal(size=lanes)), 0.05 * rng.normal(size=lanes)
        return cls(*(torch.from_numpy(part[own].astype(np.float32)).unsqueeze(1) for part in (factor, offset)))

    def apply(self, prepared: Prepared) -> Prepared:
        """Inputs and targets alike."""
        value, change = torch.split(prepared.inputs, 1, dim=2)
        inputs = torch.cat([value * self.factor + self.offset, change * self.factor], dim=2)
        return Prepared(inputs, prepared.z * self.factor + self.offset, prepared.present)


def noisy(prepared: Prepared, rng: np.random.Generator, lanes: int, own: slice) -> Tensor:
    """A waveform's inputs [T, B, 2] with a little noise; `prepared` holds the lanes `own` of a block of `lanes`."""
    noise = torch.from_numpy(0.03 * rng.standard_normal((len(prepared.z), lanes, 1), dtype=np.float32)[:, own])
    changed = torch.cat([noise[:1], noise[1:] - noise[:-1]])
    return prepared.inputs + torch.cat([noise, changed], dim=2)


def _last(z: Float32, hidden: np.ndarray[Any, Any], before: Float32) -> Float32:
    """Each feature's newest value that is not hidden [T, B, F]; `before` [B, F] until there is one."""
    row = np.where(hidden, 0, np.arange(1, len(z) + 1)[:, None, None])
    return np.take_along_axis(np.concatenate([before[None], z]), np.maximum.accumulate(row, axis=0), axis=0)


def _changes(z: Float32, hidden: np.ndarray[Any, Any]) -> Float32:
    """Difference to the last value that was present; 0 where hidden. [T, B, F]"""
    row = np.where(hidden, 0, np.arange(len(z))[:, None, None])
    last = np.maximum.accumulate(row, axis=0)
    before = np.concatenate([last[:1], last[:-1]])
    change = z - np.take_along_axis(z, before, axis=0)
    change[hidden] = 0
    return change


def counted(prepared: Prepared) -> Tensor:
    """Present values of each event [T], over all lanes and features."""
    return prepared.present.sum(dim=(1, 2))


def loss_of(outputs: Outputs, prepared: Prepared, counts_from: int, counts: Tensor) -> Tensor:
    """3 × smooth L1 of the reconstructed lags + Laplace likelihood of the next value, over present values from `counts_from` on.

    `counts` [T] are the present values of each event in all lanes that the mean is over. Where these lanes are a part of them, so is the
    loss: the parts' sum is the loss of all.
    """
    if isinstance(outputs, WaveformOutputs):
        return _waveform_loss(outputs.outlook, prepared, counts_from, counts)
    z, present = prepared.z, prepared.present.to(prepared.z.dtype)
    T = len(z)
    reconstruction = z.new_zeros(())
    for j, lag in enumerate(LAGS):
        first = max(lag, counts_from)
        if first < T:
            seen = slice(first - lag, T - lag)
            error = functional.smooth_l1_loss(outputs.lags[first:, :, :, j], z[seen], reduction="none", beta=0.3)
            reconstruction = reconstruction + _mean(error, present[seen], counts[seen])
    start = min(max(counts_from, 0), T - 2)
    log_scale = outputs.log_scale[start:-1].clamp(-5, 2)
    surprise = log_scale + (z[start + 1 :] - outputs.location[start:-1]).abs() * torch.exp(-log_scale)
    return 3 * reconstruction / len(LAGS) + _mean(surprise, present[start + 1 :], counts[start + 1 :])


def _waveform_loss(outlook: Outlook, prepared: Prepared, counts_from: int, counts: Tensor) -> Tensor:
    """8 × smooth L1 of the window, where all of it is in this sequence, + mean Laplace likelihood over the horizons."""
    z, present = prepared.z, prepared.present.to(prepared.z.dtype)
    T = len(z)
    loss = z.new_zeros(())
    first = max(counts_from, WINDOW)
    if first < T:
        target, weight, count = (
            part[first - WINDOW + 1 :].unfold(0, WINDOW, 1).flip(-1) for part in (z[:, :, 0], present[:, :, 0], counts)
        )
        error = functional.smooth_l1_loss(outlook.window[first:], target, reduction="none", beta=0.3)
        loss = loss + 8 * _mean(error, weight, count)
    for j, h in enumerate(HORIZONS):
        start = max(counts_from, 0)
        if start + h < T:
            log_scale, location = outlook.log_scale[start:-h, :, j : j + 1], outlook.location[start:-h, :, j : j + 1]
            surprise = log_scale + (z[start + h :] - location).abs() * torch.exp(-log_scale)
            loss = loss + _mean(surprise, present[start + h :], counts[start + h :]) / len(HORIZONS)
    return loss


def _mean(error: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return (error * weight).sum() / counts.sum().clamp(min=1).to(error.dtype)


def learning_rate(plan: Plan, step: int) -> float:
    """One cycle: up for a tenth of the steps, then down to nearly nothing along a cosine."""
    rise = max(1, plan.steps // 10)
    if step < rise:
        return plan.learning_rate * (0.04 + 0.96 * step / rise)
    return plan.learning_rate * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, plan.steps - rise))))


class Trainer:
    """Owns the weights while they are learned. `run` returns with the best ones (by validation loss) loaded."""

    def __init__(
        self,
        step: DetectorStep,
        source: Source,
        plan: Plan,
        checkpoint: Path | None = None,
        identity: Mapping[str, Any] | None = None,
        world: World = ALONE,
    ) -> None:
        """`identity` says what is trained on what: `data`, a hash, `features`, and by their names whatever else; a checkpoint of another
        one is not continued. In what world it is, is not asked.
        """
        self.step, self.source, self.plan, self.checkpoint, self.world = step, source, plan, checkpoint, world
        self.identity = {**asdict(plan), **(identity or {})}
        self.network = step.autoencoder.to(world.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=plan.learning_rate)
        self.progress = Progress()
        self.best = _copy(self.network)
        self._validation: tuple[Prepared, int, Parts] | None = None
        self._ahead: dict[int, tuple[Drawn, Prepared]] = {}

    @property
    def blocks(self) -> int:
        return max(1, self.plan.steps // self.plan.chunks)

    def run(self, on_block: Callable[[Progress], None] = lambda _: None) -> Progress:
        """Train to the end or until the validation part gets no better. `on_block` is called after each block is safe."""
        if self.world.size > 1:
            self._restore(self.world.agree(self._content()))
        if self.progress.block == 0:
            self._look()
        while self.progress.block < self.blocks and self.progress.looks_since_best < self.plan.patience:
            loss = self._block(self.progress.block)
            self.progress.block += 1
            self.progress.training.append((self.progress.block * self.plan.chunks, loss))
            if self.progress.block % self.plan.check_every == 0 or self.progress.block == self.blocks:
                self._look()
                self.save()
            on_block(self.progress)
        self.network.load_state_dict(self.best)
        return self.progress

    def _block(self, index: int) -> float:
        if index not in self._ahead:
            self._ahead = self._prepared_with(index)
        drawn, whole = self._ahead.pop(index)
        own, width = drawn.own, drawn.block.x.shape[1]
        noise = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + index)
        state, losses = self.network.fresh(own.stop - own.start), []
        for number, start in enumerate(range(0, len(whole.z) - len(LAGS), self.plan.chunk)):
            prepared = whole.part(slice(start, start + self.plan.chunk))
            if drawn.shaken is None:
                inputs = corrupted(prepared, drawn.rng, width, own)
            else:
                prepared = drawn.shaken.apply(prepared)
                inputs = noisy(prepared, drawn.rng, width, own)
            code_noise = CODE_NOISE * torch.randn(len(prepared.z), width, self.network.sizes.code, generator=noise)[:, own]
            self._set_rate(index * self.plan.chunks + number)
            loss, state = self._learn(prepared, inputs, code_noise, state, drawn.block.counts_from if number == 0 else 0)
            losses.append(loss)
        return float(np.mean(losses))

    def _draw(self, index: int) -> Drawn:
        rng = np.random.default_rng([self.plan.seed, index])
        block = self.source.block(rng, self.plan.lanes, self.plan.lead + self.plan.chunk * self.plan.chunks)
        width = block.x.shape[1]
        own = self.world.share(width)
        shaken = Shaken.drawn(rng, width, own) if self.network.sizes.waveform else None
        return Drawn(block, rng, shaken, own, min(self.plan.lead, len(block.x) // 4))

    def _prepared_with(self, index: int) -> dict[int, tuple[Drawn, Prepared]]:
        """Block `index` and those behind it that are prepared with it: nothing of that depends on the weights."""
        count = min(AHEAD_BLOCKS, max(1, AHEAD_VALUES // (self.plan.lanes * self.step.features)))
        first = index - index % count  # the same neighbours after a restart
        drawn = [self._draw(i) for i in range(first, min(first + count, self.blocks))]
        pairs = zip(drawn, prepare_all(self.step, drawn), strict=True)
        return {i: pair for i, pair in enumerate(pairs, start=first) if i >= index}

    def _set_rate(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.plan, step)

    def _learn(self, prepared: Prepared, inputs: Tensor, code_noise: Tensor, state: Parts, counts_from: int) -> tuple[float, Parts]:
        """One step of the optimizer; returns the loss over the lanes of all processes, and the state that the next chunk begins with."""
        device = self.world.device
        prepared = prepared.to(device)
        counts = self.world.total(counted(prepared))
        with self.world.autocast():
            outputs = _float32(self.network.sequence(inputs.to(device), state, code_noise.to(device)))
        loss = loss_of(outputs, prepared, counts_from, counts)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        loss = self.world.total_gradients(self.network.parameters(), loss)
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach()), {name: part.detach() for name, part in outputs.state.items()}

    @torch.no_grad()
    def validate(self) -> float:
        """Loss of the clean validation lanes, in float32 as the model will be served."""
        if self._validation is None:
            block = self.source.validation()
            own = self.world.share(block.x.shape[1])
            lanes = Lanes.fresh(self.step, own.stop - own.start)
            prepared = prepare(self.step, torch.from_numpy(block.x[:, own]), torch.from_numpy(block.t[:, own]), lanes)
            self._validation = prepared.to(self.world.device), block.counts_from, lanes.network
        prepared, counts_from, fresh = self._validation
        outputs = self.network.sequence(prepared.inputs, fresh)
        return float(self.world.total(loss_of(outputs, prepared, counts_from, self.world.total(counted(prepared)))))

    def _look(self) -> None:
        loss = self.validate()
        self.progress.validation.append((self.progress.block * self.plan.chunks, loss))
        if loss < self.progress.best_loss:
            self.progress.best_loss, self.progress.looks_since_best = loss, 0
            self.best = _copy(self.network)
        else:
            self.progress.looks_since_best += 1

    def _content(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "progress": asdict(self.progress),
            "network": _copy(self.network),
            "best": self.best,
            "optimizer": _on_cpu(self.optimizer.state_dict()),
        }

    def _restore(self, content: dict[str, Any]) -> None:
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.best, self.progress = content["best"], Progress(**content["progress"])

    def save(self) -> None:
        """Write the checkpoint, whole or not at all; process 0 does. Raises NotWritten."""
        if self.checkpoint is None or not self.world.first:
            return
        content = io.BytesIO()  # torch has errors of its own where a disk is full
        torch.save(self._content(), content)
        write_bytes(self.checkpoint, content.getvalue())

    def resume(self) -> bool:
        """Continue from the checkpoint, if there is one; `run` tells the other processes. Raises ValueError when it is of another run."""
        if self.checkpoint is None or not self.checkpoint.is_file():
            return False
        try:
            content = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
            identity = content["identity"]
        except Exception as error:  # zip, pickle and torch each have errors of their own; all mean the same here
            raise ValueError(
                f"{self.checkpoint} cannot be read, so there is nothing to continue from: leave --resume out to begin anew. "
                f"({type(error).__name__})"
            ) from error
        if identity != self.identity:
            raise ValueError(
                f"{self.checkpoint} belongs to a run with other settings or data: {_differing(identity, self.identity)}. "
                "Use the same ones, or leave --resume out to begin anew."
            )
        self._restore(content)
        return True


def _differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What of two identities is not the same, in words."""
    others = [name for name, value in now.items() if was.get(name) != value]
    parts = [f"{name} {was.get(name)}, now {now[name]}" for name in others if name not in ("data", "features")]
    if "features" in others:
        before, after = was.get("features") or [], now["features"]
        changes = (("without", set(before) - set(after)), ("with", set(after) - set(before)))
        changed = [f"{how} {listed(sorted(which))}" for how, which in changes if which]
        parts.append(f"the columns, now {' and '.join(changed) or 'in another order'}")
    elif "data" in others:
        parts.append("the files or their rows")
    return "; ".join(parts)


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in network.state_dict().items()}


def _on_cpu(optimizer: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state that may be unpickled where there is no GPU, or another one."""
    return {**optimizer, "state": {i: {name: value.cpu() for name, value in state.items()} for i, state in optimizer["state"].items()}}


def _float32(outputs: Outputs) -> Outputs:
    """Whatever the network computed in: the loss and the state carried on are float32."""
    state = {name: part.float() for name, part in outputs.state.items()}
    lags, location, log_scale = outputs.lags.float(), outputs.location.float(), outputs.log_scale.float()
    if isinstance(outputs, WaveformOutputs):
        said = outputs.outlook
        outlook = Outlook(said.seen.float(), said.window.float(), said.location.float(), said.log_scale.float())
        return WaveformOutputs(lags, location, log_scale, state, outlook)
    return Outputs(lags, location, log_scale, state)
