import pytest
import torch
from training import (
    BATCHES,
    SCHEDULE,
    SGD_OPTIONS,
    fused,
    loader,
    loss_of,
    lrs,
    network,
    same_bits,
    trained,
)

from sgdr_fused.trainers import as_scheduler

accelerate = pytest.importorskip("accelerate")


class Run:
    """A training as in Accelerate's own examples.

    Args:
        with_view: Hand a scheduler to Accelerate, and step it.
        options: Of the Accelerator.
    """

    def __init__(self, with_view, **options):
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        model = network()
        optimizer = fused(model)
        view = [as_scheduler(optimizer)] if with_view else []
        self.model, self.optimizer, self.loader, *self.view = self.accelerator.prepare(
            model, optimizer, loader(), *view
        )

    def train(self, batches):
        """Trains on a number of batches and returns the LR shown at each."""
        shown = []
        while True:
            for images, labels in self.loader:
                with self.accelerator.accumulate(self.model):
                    shown += (self.view or [self.optimizer.optimizer])[0].get_last_lr()
                    self.accelerator.backward(loss_of(self.model(images), labels))
                    self.optimizer.step()
                    for view in self.view:
                        view.step()
                    self.optimizer.zero_grad()
                if len(shown) == batches:
                    return shown


@pytest.fixture(params=[False, True], ids=["alone", "with_view"])
def with_view(request):
    return request.param


def test_accelerate_equals_a_bare_loop(with_view):
    run = Run(with_view)
    assert run.train(3 * BATCHES) == lrs(0, 3 * BATCHES)
    assert same_bits(run.model, trained(epochs=3))


def test_view_stepped_apart_from_the_optimizer_changes_nothing():
    run = Run(with_view=True, step_scheduler_with_optimizer=False)
    assert run.train(2 * BATCHES) == lrs(0, 2 * BATCHES)


def test_training_resumed_from_saved_state_equals_the_uninterrupted_one(with_view, tmp_path):
    first = Run(with_view)
    first.train(BATCHES)
    first.accelerator.save_state(tmp_path)
    second = Run(with_view)
    second.accelerator.load_state(tmp_path)
    assert second.train(2 * BATCHES) == lrs(BATCHES, 3 * BATCHES)
    assert same_bits(second.model, trained(epochs=3))


def test_accumulated_batches_are_one_step_of_the_schedule(with_view):
    run = Run(with_view, gradient_accumulation_steps=2)
    shown = run.train(2 * BATCHES)
    assert shown[::2] == shown[1::2] == lrs(0, BATCHES)


def test_skipped_step_under_accelerates_scaler_leaves_the_schedule():
    accelerate.Accelerator(cpu=True)
    model = network()
    optimizer = fused(model)
    scaled = accelerate.optimizer.AcceleratedOptimizer(
        optimizer, scaler=torch.amp.GradScaler("cpu", init_scale=2.0)
    )
    for loss_scale, lr in ((float("inf"), lrs(0, 1)), (1.0, lrs(1, 2))):
        images, labels = next(iter(loader()))
        scaled.zero_grad()
        scaled.scaler.scale(loss_of(model(images), labels) * loss_scale).backward()
        scaled.step()
        assert optimizer.get_last_lr() == lr


def test_view_of_an_accelerated_optimizer_unwraps_it():
    run = Run(with_view=False)
    assert as_scheduler(run.optimizer).optimizer is run.optimizer.optimizer


def test_several_processes_do_not_speed_up_the_schedule(monkeypatch):
    """Accelerate steps a scheduler once per process: the pair's runs ahead."""
    ours = Run(with_view=True)
    sgd = torch.optim.SGD(network().parameters(), **SGD_OPTIONS)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(sgd, **SCHEDULE)
    theirs, their_view = ours.accelerator.prepare(sgd, scheduler)
    monkeypatch.setitem(accelerate.PartialState._shared_state, "num_processes", 4)
    assert ours.train(2 * BATCHES) == lrs(0, 2 * BATCHES)
    theirs.step()
    their_view.step()
    assert their_view.get_last_lr() == lrs(4, 5)
