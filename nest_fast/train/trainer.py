"""The run: steps, evaluations, checkpoints, signals. All of its state is ``step`` and what a checkpoint holds."""

from __future__ import annotations

import contextlib
import math
import platform
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import nest_fast
from nest_fast.testing import import_timm
from nest_fast.train import checkpoint, data
from nest_fast.train.distributed import World
from nest_fast.train.log import Log
from nest_fast.train.meters import Clock, Mean, Rate
from nest_fast.train.model import build, image_size
from nest_fast.train.options import Options, UsageError, to_save

__all__ = ["Trainer"]

timm = import_timm()
from timm.data import Mixup  # noqa: E402
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2, param_groups_weight_decay  # noqa: E402
from timm.scheduler import CosineLRScheduler  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402

SAVE_AND_STOP = (signal.SIGTERM, signal.SIGINT)
SAVE_AND_GO_ON = (signal.SIGUSR1,)
_AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Everything a run is made of, set up anew or from a checkpoint.

    Args:
        options: of the run.
        world: its processes.
        saved: a checkpoint to go on from.
    """

    def __init__(self, options: Options, world: World, saved: dict[str, Any] | None) -> None:
        self.options, self.world = options, world
        self.train, self.val = self._sources()
        self.classes = self.train.classes
        if saved and saved["classes"] != self.classes:
            raise UsageError(f"resume: expected a checkpoint of the classes {self.classes[:3]}..., got one of "
                             f"{saved['classes'][:3]}...")  # fmt: skip
        torch.manual_seed(options.seed)
        np.random.seed(options.seed)
        random.seed(options.seed)
        self.model = build(
            options.model, len(self.classes), options.model_kwargs, options.drop_path, options.impl, options.accelerate
        ).to(world.device)
        self.prepare = data.preprocessing(options, image_size(self.model), getattr(self.model, "pretrained_cfg", {}))
        self.step = self.evaluated = 0
        self.best, self.use_ema, self.seconds, self.broken = -1.0, False, 0.0, set[str]()
        self.window, self.epoch_mean = Mean(world), Mean(world)
        self.ema = ModelEmaV3(self.model, options.ema, use_warmup=True) if options.ema else None
        if self.ema and options.fsdp:
            world.shard(self.ema.module)
        self.called = world.spread(self.model, options.fsdp)
        if options.compile:
            self.called.compile()
        self.per_epoch = len(self.train.labels) // options.batch_size
        self._optimizer_and_loss()
        self._schedule(options.epochs * self.per_epoch)
        if saved:
            self._restore(saved)
        steps = data.Steps(
            len(self.train.labels), options, world.rank, world.size, self.step, options.epochs * self.per_epoch
        )
        self.total, self.share = steps.stop, steps.share
        self.loader = data.train_loader(self.train, options, self.prepare, steps)
        self.val_loader = data.val_loader(self.val, options, self.prepare, world.rank, world.size)
        self.rng = saved["rng"][world.rank] if saved and world.rank < len(saved["rng"]) else None
        self.path: Path = options.out / "last.pt"
        self.clock = Clock(60 * options.checkpoint_minutes)
        self.rate = Rate(self.step * options.batch_size)

    def _sources(self) -> tuple[data.Source, data.Source]:
        """The first process may download; the others look after it."""
        found = error = None
        for turn in (True, False):
            if turn == self.world.first:
                try:
                    found = data.load_sources(self.options, download=turn)
                except UsageError as e:
                    error = e
            self.world.check(error)
        assert found is not None
        return found

    def _optimizer_and_loss(self) -> None:
        options = self.options
        # timm's Nest names its position embeddings wrongly in no_weight_decay(); the pattern finds them in both.
        skip = {"*pos_embed", *getattr(self.model, "no_weight_decay", set)()}
        self.lr = options.lr * options.batch_size / 256
        self.optimizer = create_optimizer_v2(
            self.model,
            "adamw",
            lr=self.lr,
            weight_decay=options.weight_decay,
            param_group_fn=lambda model: param_groups_weight_decay(model, options.weight_decay, True, skip),
        )
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=options.amp == "fp16")
        self.mixup = None
        self.loss: nn.Module
        if options.mixup or options.cutmix:
            self.mixup = Mixup(
                options.mixup, options.cutmix, label_smoothing=options.smoothing, num_classes=len(self.classes)
            )
            self.loss = SoftTargetCrossEntropy()
        else:
            self.loss = LabelSmoothingCrossEntropy(options.smoothing) if options.smoothing else nn.CrossEntropyLoss()

    def _schedule(self, total: int) -> None:
        warmup = round(self.options.warmup_epochs * self.per_epoch)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=max(1, total - warmup),
            lr_min=self.options.min_lr * self.options.batch_size / 256,
            warmup_t=warmup,
            warmup_lr_init=self.lr / max(1, warmup),
            warmup_prefix=True,
            t_in_epochs=False,
        )

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _restore(self, saved: dict[str, Any]) -> None:
        checkpoint.load_states(self.model, self.optimizer, saved["model"], saved["optimizer"])
        if self.ema:
            checkpoint.load_states(self.ema.module, None, saved["ema"] or saved["model"])
        self.scaler.load_state_dict(saved["scaler"])
        for group in self.optimizer.param_groups:  # the run's, where it has others than the checkpoint
            group["weight_decay"] = self.options.weight_decay if group["weight_decay"] else 0.0
        self.step, self.evaluated = saved["step"], saved["evaluated"]
        self.scheduler.step_update(self.step)
        self.best, self.use_ema, self.seconds = saved["best"], saved["use_ema"], saved["seconds"]
        self.broken = set(saved["broken"])
        self.window.total, self.epoch_mean.total = list(saved["window"]), list(saved["epoch_mean"])

    def save(self, best: bool = False) -> None:
        """Write ``last.pt``; all processes call it. The step it holds is done: nothing of it is computed again."""
        started, now = time.monotonic(), time.time()
        model, optimizer = checkpoint.states(self.model, self.optimizer)
        ema = checkpoint.model_state(self.ema.module) if self.ema else None
        self.window.reduce()
        self.epoch_mean.reduce()
        rng = self.world.gather(checkpoint.rng_state(self.world.device))
        error = None
        if self.world.first:
            state = {
                "format": checkpoint.FORMAT,
                "options": to_save(self.options),
                "classes": self.classes,
                "preprocessing": self.prepare,
                "step": self.step,
                "evaluated": self.evaluated,
                "model": model,
                "ema": ema,
                "optimizer": optimizer,
                "scaler": self.scaler.state_dict(),
                "rng": rng,
                "best": self.best,
                "use_ema": self.use_ema,  # whether the average was the better one when last evaluated
                "seconds": self.seconds + self.clock.alive(),
                "time": now,
                "broken": sorted(self.broken),
                "window": self.window.total,
                "epoch_mean": self.epoch_mean.total,
                "versions": {
                    "torch": str(torch.__version__),
                    "timm": timm.__version__,
                    "nest_fast": nest_fast.__version__,
                },
            }
            try:
                checkpoint.write(self.path, state)
                if best:
                    checkpoint.copy(self.path, self.options.out / "best.pt")
            except UsageError as e:
                error = e
        self.world.check(error)
        self.clock.saved(started)

    # --------------------------------------------------------------------------------------------------- the run

    def fit(self) -> int:
        """Train to the end, or to a signal; the exit status: 0, or 128 and the number of the signal."""
        options = self.options
        seen: dict[str, int] = {"save": 0, "stop": 0}

        def on_signal(number: int, _: object) -> None:
            if seen["stop"] and number == signal.SIGINT:
                raise KeyboardInterrupt
            seen["stop" if number in SAVE_AND_STOP else "save"] = number

        before = {number: signal.signal(number, on_signal) for number in (*SAVE_AND_STOP, *SAVE_AND_GO_ON)}
        self.log = Log(
            options.out,
            self.step,
            self.evaluated,
            self.total * options.batch_size,
            options.batch_size,
            self.world.first,
        )
        try:
            return self._fit(seen)
        finally:
            self.log.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _fit(self, seen: dict[str, int]) -> int:
        options, n = self.options, len(self.train.labels)
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        self.log.say(
            f"{options.model}, {parameters:.1f} M parameters, {len(self.classes)} classes; {n} images to train on, "
            f"{len(self.val.labels)} to validate with; {self.total} steps of {options.batch_size} images, "
            f"{self.world.size} process{'es' * (self.world.size > 1)} on {self.world.device.type}; {platform.machine()}"
        )
        batches = iter(self.loader) if self.step < self.total else iter(())
        if self.rng is not None:
            checkpoint.set_rng_state(self.rng, self.world.device)
        else:
            torch.manual_seed(
                int(np.random.SeedSequence([options.seed, self.step, self.world.rank]).generate_state(1)[0])
            )
        stop = 0
        while not stop:
            if self.step and self.step % self.per_epoch == 0 and self.evaluated < self.step:
                if self._due(ahead=self.clock.step * math.ceil(len(self.val.labels) / options.batch_size)):
                    self.save()
                stop = self._evaluate(seen)
            if stop or self.step >= self.total:
                break
            started = time.monotonic()
            self._step(batches)
            self.clock.stepped(started)
            wanted, stop = self.world.most(seen["save"] or self.clock.due(), seen["stop"])
            seen["save"] = 0
            if wanted or stop:
                self.save()
        if stop:
            self.log.warn(
                f"stopped by {signal.Signals(stop).name} after step {self.step}; --resume goes on from {self.path}"
            )
            return 128 + stop
        self._finish()
        return 0

    def _due(self, ahead: float) -> bool:
        return bool(self.world.most(self.clock.due(ahead))[0])

    def _step(self, batches: Any) -> None:
        options, accumulate = self.options, self.options.accumulate
        self.called.train()
        for part in range(accumulate):
            images, labels = self._next(batches, part)
            with self._synchronising(part == accumulate - 1), self._autocast():
                loss = self.loss(self.called(images).float(), labels)
            with self._synchronising(part == accumulate - 1):
                self.scaler.scale(loss / accumulate).backward()
            self.window.add(loss.detach(), self.share)
            self.epoch_mean.add(loss.detach(), self.share)
        norm = None
        if options.clip_grad:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        if self.ema:
            self.ema.update(self.model, step=self.step)
        self.scheduler.step_update(self.step)
        self.log.advance(options.batch_size)
        if self.step % options.log_every == 0 or self.step == self.total:
            self._log_step(norm)

    def _next(self, batches: Any, part: int) -> tuple[Tensor, Tensor]:
        batch = next(batches)
        self._note_broken(batch.broken)
        if not batch.valid.all():
            raise UsageError(f"data: expected images, got nothing but broken ones, the last {batch.broken[-1]}")
        device = self.world.device
        images, labels = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
        if self.mixup:
            # The same in every process and part, so that a step is mixed alike however it is dealt out.
            before = np.random.get_state()
            np.random.seed(np.random.SeedSequence([self.options.seed, self.step]).generate_state(4))
            images, labels = self.mixup(images, labels)
            np.random.set_state(before)
        return images, labels

    def _synchronising(self, last: bool) -> Any:
        """Gradients are exchanged with the last part's."""
        model: Any = self.called
        if self.options.fsdp:
            model.set_requires_gradient_sync(last)
        elif not last and self.world.started:
            return model.no_sync()
        return contextlib.nullcontext()

    def _autocast(self) -> Any:
        amp = self.options.amp
        return torch.autocast(self.world.device.type, _AMP[amp]) if amp != "off" else contextlib.nullcontext()

    def _note_broken(self, broken: list[str]) -> None:
        for told in broken:
            name = told.rpartition(": ")[0]
            if name not in self.broken:
                self.broken.add(name)
                self.log.warn(f"skipped a broken image: {told}")

    def _log_step(self, norm: Tensor | None) -> None:
        loss = self.window.take()
        if not math.isfinite(loss):
            raise UsageError(f"loss: expected a finite one, got {loss} in the steps to {self.step}; a lower --lr or "
                             f"--clip-grad 1 may help, {self.path} is from before")  # fmt: skip
        if norm is not None and hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        self.log.step({
            "step": self.step,
            "epoch": self.step / self.per_epoch,
            "loss": loss,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": None if norm is None else float(norm),
            "images_per_second": self.rate.take(self.step * self.options.batch_size),
            "seconds": self.seconds + self.clock.alive(),
        })  # fmt: skip

    # ---------------------------------------------------------------------------------------------- evaluation

    def _evaluate(self, seen: dict[str, int]) -> int:
        """Validate, tell, save; the number of a signal that stopped it."""
        sums = []
        for model in (self.model, self.ema.module if self.ema else None):
            found = self._validate(model, seen) if model is not None else None
            if isinstance(found, int):
                self.save()
                return found
            sums.append(found)
        plain, averaged = sums
        assert plain is not None
        images = plain[3]
        if not images:
            raise UsageError("data: expected images to validate with, got nothing but broken ones")
        self.broken = set[str]().union(*self.world.gather(self.broken))
        row = {
            "step": self.step,
            "epoch": self.step // self.per_epoch,
            "train_loss": self.epoch_mean.take(),
            "val_loss": plain[0] / images,
            "val_top1": 100 * plain[1] / images,
            "val_top5": 100 * plain[2] / images,
            "ema_loss": averaged[0] / images if averaged else None,
            "ema_top1": 100 * averaged[1] / images if averaged else None,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": self.seconds + self.clock.alive(),
            "val_images": int(images),
            "broken_images": len(self.broken),
        }
        score = max(row["val_top1"], row["ema_top1"] or 0.0)
        better, self.best = score > self.best, max(score, self.best)
        self.use_ema = averaged is not None and row["ema_top1"] >= row["val_top1"]
        self.evaluated = self.step
        self.log.epoch(row)
        told = f"epoch {row['epoch']}/{self.options.epochs}  loss {row['train_loss']:.4f}  validation: loss "
        told += f"{row['val_loss']:.4f}, top 1 {row['val_top1']:.2f} %, top 5 {row['val_top5']:.2f} %"
        told += f", average's top 1 {row['ema_top1']:.2f} %" if averaged else ""
        self.log.say(told + (f"; {len(self.broken)} broken images skipped" if self.broken else ""))
        self.save(best=better)
        return 0

    @torch.no_grad()
    def _validate(self, model: nn.Module, seen: dict[str, int]) -> list[float] | int:
        """Sums of loss, top 1, top 5 and images over all processes; or the signal that interrupted."""
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        for batch in self.val_loader:
            self._note_broken(batch.broken)
            images, labels = batch.images.to(self.world.device), batch.labels.to(self.world.device)
            valid = batch.valid.to(self.world.device)
            with self._autocast():
                logits = model(images)
            logits, labels = logits.float()[valid], labels[valid]
            hits = logits.topk(min(5, len(self.classes)), 1).indices == labels[:, None]
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([loss.double(), hits[:, 0].sum().double(), hits.sum().double(), valid.sum().double()])
            (stop,) = self.world.most(seen["stop"])
            if stop:
                return stop
        return self.world.sum(sums)

    def _finish(self) -> None:
        title = f"{self.options.model} on {Path(self.options.data).name}, best top 1 {self.best:.2f} %"
        curves = self.log.plot(title)
        minutes = (self.seconds + self.clock.alive()) / 60
        self.log.say(f"done: best top 1 {self.best:.2f} %, {minutes:.1f} minutes; {curves}")
        if self.broken:
            self.log.say(f"{len(self.broken)} broken images were skipped: {', '.join(sorted(self.broken))}")
