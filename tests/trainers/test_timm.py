import csv

import pytest
import torch
from training import BATCHES, fused, loader, loss_of, lrs, same_bits

from sgdr_fused import CosineWarmRestarts, FusedSGDR
from sgdr_fused.trainers import as_scheduler

timm = pytest.importorskip("timm", exc_type=ImportError)
models = pytest.importorskip("timm.models", exc_type=ImportError)
optim = pytest.importorskip("timm.optim", exc_type=ImportError)
utils = pytest.importorskip("timm.utils", exc_type=ImportError)


class Run:
    """A training as in timm's train script, with all that it calls.

    Args:
        folder: For checkpoints and the summary.
    """

    def __init__(self, folder):
        torch.manual_seed(0)
        self.folder = folder
        self.model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
        self.optimizer = fused(self.model)
        self.scheduler = as_scheduler(self.optimizer)
        self.loss_scaler = utils.NativeScaler(device="cpu")
        self.saver = utils.CheckpointSaver(
            self.model, self.optimizer, amp_scaler=self.loss_scaler, checkpoint_dir=str(folder)
        )

    def train(self, start, stop):
        """Takes the epochs from ``start`` to ``stop - 1`` and returns the LR of each step."""
        seen = []
        for epoch in range(start, stop):
            losses = utils.AverageMeter()
            for i, (images, labels) in enumerate(loader()):
                seen += [group["lr"] for group in self.optimizer.param_groups]
                self.optimizer.zero_grad()
                loss = loss_of(self.model(images), labels)
                self.loss_scaler(
                    loss, self.optimizer, clip_grad=1.0, parameters=self.model.parameters()
                )
                losses.update(loss.item())
                self.scheduler.step_update(epoch * BATCHES + i + 1, metric=losses.avg)
            self.scheduler.step(epoch + 1, losses.avg)
            lr = self.optimizer.param_groups[0]["lr"]
            utils.update_summary(epoch, {"loss": losses.avg}, {}, self.folder / "summary.csv", lr)
            self.saver.save_checkpoint(epoch, metric=-losses.avg)
        return seen


def test_timms_script_trains_on_our_schedule(tmp_path):
    assert Run(tmp_path).train(0, 2) == lrs(0, 2 * BATCHES)


def test_timms_summary_has_the_lr(tmp_path):
    Run(tmp_path).train(0, 2)
    with open(tmp_path / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lr"]) for row in rows] == lrs(0, 21)[10::10]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])


def test_training_resumed_from_timms_checkpoint_equals_the_uninterrupted_one(tmp_path):
    whole = Run(tmp_path)
    whole.train(0, 3)
    resumed = Run(tmp_path)
    epoch = models.resume_checkpoint(
        resumed.model,
        tmp_path / "checkpoint-0.pth.tar",
        resumed.optimizer,
        resumed.loss_scaler,
    )
    assert resumed.train(epoch, 3) == lrs(BATCHES, 3 * BATCHES)
    assert same_bits(resumed.model, whole.model)


def test_timms_layer_decay_is_an_lr_per_group():
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    groups = optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scales = [group["lr_scale"] for group in groups]
    optimizer = FusedSGDR(
        [{**group, "lr": 0.1 * group["lr_scale"]} for group in groups], T_0=7, momentum=0.9
    )
    for images, labels in list(loader())[:3]:
        optimizer.zero_grad()
        loss_of(model(images), labels).backward()
        optimizer.step()
    expected = [CosineWarmRestarts(lr=0.1 * scale, T_0=7).lr_at(3) for scale in scales]
    assert optimizer.get_last_lr() == expected
    assert len(set(scales)) > 1
