import pytest
import torch
from training import BATCHES, fused, loader, loss_of, lrs, network


def test_tensorboard_has_the_lr_of_each_step(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", exc_type=ImportError)
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = network()
    optimizer = fused(model)
    with tensorboard.SummaryWriter(tmp_path) as writer:
        for step, (images, labels) in enumerate(loader()):
            writer.add_scalar("lr", optimizer.param_groups[0]["lr"], step)
            optimizer.zero_grad()
            loss_of(model(images), labels).backward()
            optimizer.step()
    written = events.EventAccumulator(str(tmp_path)).Reload().Scalars("lr")
    assert [scalar.step for scalar in written] == list(range(BATCHES))
    # TensorBoard keeps float32.
    assert [scalar.value for scalar in written] == torch.tensor(lrs(0, BATCHES)).tolist()


def test_torchmetrics_averages_the_lr_of_an_epoch():
    torchmetrics = pytest.importorskip("torchmetrics")
    model = network()
    optimizer = fused(model)
    mean, largest = torchmetrics.MeanMetric(), torchmetrics.MaxMetric()
    accuracy = torchmetrics.classification.MulticlassAccuracy(num_classes=10)
    for _ in range(3):
        accuracy.reset()
        for images, labels in loader():
            (lr,) = optimizer.get_last_lr()
            mean.update(lr)
            largest.update(lr)
            optimizer.zero_grad()
            output = model(images)
            accuracy.update(output, labels)
            loss_of(output, labels).backward()
            optimizer.step()
    expected = torch.tensor(lrs(0, 3 * BATCHES))
    assert mean.compute() == pytest.approx(expected.mean().item())
    assert largest.compute() == expected.max()
    assert accuracy.compute() > 0.7
