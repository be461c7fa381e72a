"""The small training in each trainer, on a CPU or a GPU, and how often the host waits for the GPU.

test_waits.py runs them, and ../cuda_on_cpu/test_trainers.py on the fake CUDA runtime.
"""

import contextlib
import csv
import os
import warnings
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from torch.utils.data import DataLoader, Subset
from training import (
    BATCH_SIZE,
    BATCHES,
    SCHEDULE,
    SGD_OPTIONS,
    digits,
    fused,
    loss_of,
    lrs,
    network,
)

from sgdr_fused.trainers import as_scheduler

IS_FAKE = "FAKE_CUDA_KERNELS" in os.environ
STEPS = 10
NEVER = 1000  # as an interval in steps


def pair(model):
    """torch's optimizer and scheduler, whose LR is a number on the host."""
    sgd = torch.optim.SGD(model.parameters(), **SGD_OPTIONS, foreach=False)
    return sgd, CosineAnnealingWarmRestarts(sgd, **SCHEDULE)


def fused_with_view(model):
    optimizer = fused(model)
    return optimizer, as_scheduler(optimizer)


def batches(steps):
    """An epoch of so many batches."""
    assert steps <= BATCHES
    return DataLoader(Subset(digits(), range(steps * BATCH_SIZE)), batch_size=BATCH_SIZE)


# Each training takes (folder, device, optimizers, steps, every), where optimizers(model) makes
# optimizer and scheduler, and logs the LR every so many steps. It returns the logged LRs, and the
# optimizer's part of the checkpoint that the trainer has saved at the end.


def lightning(folder, device, optimizers, steps, every, callbacks=()):
    import lightning as L
    from lightning.pytorch.callbacks import LearningRateMonitor
    from lightning.pytorch.loggers import CSVLogger

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, batch):
            images, labels = batch
            return loss_of(self.network(images), labels)

        def configure_optimizers(self):
            optimizer, scheduler = optimizers(self.network)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    logger = CSVLogger(folder)
    trainer = L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        log_every_n_steps=every,
        logger=logger,
        enable_progress_bar=bool(callbacks),
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[LearningRateMonitor("step"), *callbacks],
    )
    trainer.fit(Module(), batches(steps))
    trainer.save_checkpoint(folder / "last.ckpt")
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    metrics = Path(logger.log_dir, "metrics.csv")
    rows = csv.DictReader(metrics.read_text().splitlines()) if metrics.exists() else []
    return [
        float(v) for row in rows for name, v in row.items() if name.startswith("lr-")
    ], checkpoint["optimizer_states"][0]


def lightning_with_progress_bar(folder, device, optimizers, steps, every):
    """The bar of docs/recipes.md, which shows the LR at each step."""
    from lightning.pytorch.callbacks import TQDMProgressBar

    from sgdr_fused import CosineWarmRestarts

    class ProgressBar(TQDMProgressBar):
        def get_metrics(self, trainer, module):
            metrics = super().get_metrics(trainer, module)
            group = trainer.optimizers[0].param_groups[0]
            if "T_0" in group:
                schedule = CosineWarmRestarts.of_group(group)
                metrics["lr"] = schedule.lr_at(trainer.global_step)
            return metrics

    return lightning(folder, device, optimizers, steps, every, [ProgressBar()])


def hugging_face(folder, device, optimizers, steps, every):
    from transformers import Trainer, TrainingArguments

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, images, labels):
            return {"loss": loss_of(self.network(images), labels)}

    model = Classifier()
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            logging_steps=every,
            logging_nan_inf_filter=False,  # it waits at each step
            save_steps=steps,
            use_cpu=device == "cpu",
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=[{"images": x, "labels": y} for x, y in digits()],
        optimizers=optimizers(model),
    )
    trainer.train()
    checkpoint = folder / f"checkpoint-{steps}"
    assert torch.load(checkpoint / "scheduler.pt", weights_only=True)["_last_lr"]
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    return logged, torch.load(checkpoint / "optimizer.pt", weights_only=True)


def accelerate(folder, device, optimizers, steps, every):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from torch.utils.tensorboard import SummaryWriter

    AcceleratorState._reset_state(reset_partial_state=True)  # of the device before
    accelerator = Accelerator(cpu=device == "cpu")
    model = network()
    optimizer, scheduler = optimizers(model)
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, batches(steps), scheduler
    )
    logged = []
    with SummaryWriter(folder) as writer:
        for step, (images, labels) in enumerate(loader):
            if step % every == every - 1:
                (lr,) = scheduler.get_last_lr()
                writer.add_scalar("lr", lr, step)
                logged.append(lr)
            accelerator.backward(loss_of(model(images), labels))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    accelerator.save_state(folder / "checkpoint")
    return logged, torch.load(folder / "checkpoint" / "optimizer.bin", weights_only=True)


def timm(folder, device, optimizers, steps, every):
    """The loop of timm's train script, and what it computes of param_groups."""
    from timm.utils import AverageMeter, CheckpointSaver, NativeScaler, update_summary

    model = network().to(device)
    optimizer, scheduler = optimizers(model)
    loss_scaler = NativeScaler(device=device)
    saver = CheckpointSaver(
        model,
        optimizer,
        amp_scaler=loss_scaler,
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
    )
    losses = AverageMeter()
    logged = []
    for update, (images, labels) in enumerate(batches(steps)):
        loss = loss_of(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        if update % every == every - 1:
            losses.update(loss.item())
            lrl = [param_group["lr"] for param_group in optimizer.param_groups]
            logged.append(float(f"{sum(lrl) / len(lrl):.17g}"))
        loss_scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
        if hasattr(scheduler, "step_update"):
            scheduler.step_update(num_updates=update + 1, metric=losses.avg)
        else:
            scheduler.step()
    lr = scheduler.get_last_lr()[0]
    update_summary(0, {"loss": losses.avg}, {}, folder / "summary.csv", lr=lr)
    assert float((folder / "summary.csv").read_text().split(",")[-1]) == lr
    saver.save_checkpoint(0)
    return logged, torch.load(folder / "last.pth.tar", weights_only=True)["optimizer"]


# By name: the module that it needs, and the function.
TRAININGS = {
    "lightning": ("lightning", lightning),
    "lightning_with_progress_bar": ("lightning", lightning_with_progress_bar),
    "hugging_face": ("transformers", hugging_face),
    "accelerate": ("accelerate", accelerate),
    "timm": ("timm.utils", timm),
}


def assert_logs_and_checkpoint_are_right(logged, state):
    """For what a training of STEPS steps has returned, which has logged each step."""
    expected = lrs(0, STEPS + 1)
    # A GPU's cosine is another one than the host's.
    assert logged == pytest.approx(expected[:-1], rel=1e-12)
    (group,) = state["param_groups"]
    assert [type(group[name]) for name in ("lr", "step", "cycle")] == [float, int, int]
    assert (group["step"], group["lr"]) == (STEPS, pytest.approx(expected[-1], rel=1e-12))


def waits_per_step(train, folder, device, optimizers):
    """How often the host waits for all that the GPU has to do, in a step that is not logged."""

    def waits(steps):
        own = folder / f"{optimizers.__name__}_{steps}"
        own.mkdir()
        with counted_waits() as found:
            train(own, device, optimizers, steps, NEVER)
        return len(found)

    return (waits(STEPS) - waits(4)) / (STEPS - 4)


@contextlib.contextmanager
def counted_waits():
    """Gives a list to which the waits within the block are added."""
    found = []
    if IS_FAKE:
        import runtime_log

        runtime_log.clear()
        yield found
        # An event is waited for up to its record only, and memory is freed when Python likes.
        few = ("cudaEvent", "cudaFree")
        found += [c for c in runtime_log.synchronizing() if not c.name.startswith(few)]
    elif torch.cuda.is_available():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found += [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    else:
        yield found
