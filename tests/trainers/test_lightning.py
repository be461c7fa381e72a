import pytest
import torch
from training import BATCHES, digits, fused, loader, loss_of, lrs, network, same_bits, trained

from sgdr_fused.trainers import as_scheduler

L = pytest.importorskip("lightning")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")
loggers = pytest.importorskip("lightning.pytorch.loggers")
plugins = pytest.importorskip("lightning.pytorch.plugins")


class Digits(L.LightningModule):
    """A module with only a network and an optimizer."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def training_step(self, batch):
        images, labels = batch
        return loss_of(self.network(images), labels)

    def configure_optimizers(self):
        return fused(self.network)


class DigitsWithView(Digits):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        view = {"scheduler": as_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": view}


@pytest.fixture(params=[Digits, DigitsWithView])
def module(request):
    return request.param()


def trainer(folder, epochs=3, **options):
    """A trainer that runs on the CPU and prints nothing."""
    return L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        log_every_n_steps=1,
        logger=loggers.CSVLogger(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )


def test_lightning_equals_a_bare_loop(tmp_path, module):
    trainer(tmp_path).fit(module, loader())
    assert same_bits(module.network, trained(epochs=3))


def test_learning_rate_monitor_sees_the_lr_of_each_step(tmp_path, module):
    monitor = callbacks.LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
    trainer(tmp_path, callbacks=[monitor]).fit(module, loader())
    assert monitor.lrs == {"lr-FusedSGDR": lrs(0, 3 * BATCHES)}
    assert monitor.last_momentum_values == {"lr-FusedSGDR-momentum": 0.9}


def test_fit_resumed_from_a_checkpoint_equals_the_uninterrupted_one(tmp_path, module):
    def run(module, checkpoint=None):
        monitor = callbacks.LearningRateMonitor("step")
        keep = callbacks.ModelCheckpoint(tmp_path / "checkpoints", filename="{step}", save_top_k=-1)
        runner = trainer(tmp_path, callbacks=[monitor, keep], enable_checkpointing=True)
        runner.fit(module, loader(), ckpt_path=checkpoint, weights_only=True)
        return monitor.lrs["lr-FusedSGDR"]

    run(module)
    resumed = type(module)()
    checkpoint = tmp_path / "checkpoints" / f"step={BATCHES}.ckpt"
    assert run(resumed, checkpoint) == lrs(BATCHES, 3 * BATCHES)
    assert same_bits(resumed.network, module.network)


def test_accumulated_batches_are_one_step_of_the_schedule(tmp_path, module):
    runner = trainer(tmp_path, accumulate_grad_batches=2, gradient_clip_val=1.0)
    runner.fit(module, loader())
    assert runner.optimizers[0].get_last_lr() == lrs(3 * BATCHES // 2, 3 * BATCHES // 2 + 1)


def test_bfloat16_mixed_precision_learns(tmp_path, module):
    trainer(tmp_path, precision="bf16-mixed").fit(module, loader())
    images, labels = digits().tensors
    accuracy = (module.network(images).argmax(1) == labels).float().mean()
    assert accuracy > 0.8


def test_skipped_step_under_lightnings_scaler_leaves_the_schedule(tmp_path):
    class FirstLossIsInfinite(Digits):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch) * (float("inf") if batch_idx == 0 else 1.0)

    precision = plugins.MixedPrecision(
        "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8)
    )
    runner = trainer(tmp_path, epochs=1, plugins=[precision])
    module = FirstLossIsInfinite()
    runner.fit(module, loader())
    assert runner.optimizers[0].get_last_lr() == lrs(BATCHES - 1, BATCHES)
    assert all(p.isfinite().all() for p in module.parameters())


def test_lightning_does_not_clip_what_the_scaler_has_not_unscaled(tmp_path):
    """SGD(fused=True) raises the same error."""
    precision = plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    runner = trainer(tmp_path, epochs=1, plugins=[precision], gradient_clip_val=1.0)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        runner.fit(Digits(), loader())


def test_manual_optimization_can_restart_the_schedule(tmp_path):
    class Manual(Digits):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch))
            optimizer.step()
            if batch_idx == 4:
                optimizer.restart()

    runner = trainer(tmp_path, epochs=1)
    runner.fit(Manual(), loader())
    optimizer = runner.optimizers[0]
    assert optimizer.cycle == 1
    assert optimizer.get_last_lr() == lrs(7 + 5, 7 + 6)
