import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from training import BATCH_SIZE, SCHEDULE, SGD_OPTIONS, digits, fused, lrs, same_bits

from sgdr_fused.trainers import as_scheduler

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

STEPS = 25


def transformer():
    """Two layers of random weights that read an image's 64 pixels as words; with dropout."""
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=17,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            num_labels=10,
        )
    )


def fused_with_view(model):
    optimizer = fused(model)
    return optimizer, as_scheduler(optimizer)


def pair(model):
    sgd = torch.optim.SGD(model.parameters(), **SGD_OPTIONS, foreach=False)
    return sgd, CosineAnnealingWarmRestarts(sgd, **SCHEDULE)


def trainer(folder, optimizers, kind=transformers.Trainer, **options):
    """Trains on shuffled digits, logs every step and prints nothing."""
    model = transformer()
    arguments = transformers.TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH_SIZE,
        logging_steps=1,
        seed=1,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        **{"max_steps": STEPS, "save_strategy": "no", **options},
    )
    images, labels = digits().tensors
    words = (16 * images).long().flatten(1)
    dataset = [{"input_ids": x, "labels": y} for x, y in zip(words, labels, strict=True)]
    return kind(model, arguments, train_dataset=dataset, optimizers=optimizers(model))


def logged(runner, name):
    return [entry[name] for entry in runner.state.log_history if name in entry]


def test_trainer_logs_the_lr_of_each_step(tmp_path):
    runner = trainer(tmp_path, fused_with_view)
    runner.train()
    assert logged(runner, "learning_rate") == lrs(0, STEPS)


def test_trainer_equals_the_pair_in_weights_and_logs(tmp_path):
    runs = []
    for optimizers in (fused_with_view, pair):
        runs.append(trainer(tmp_path, optimizers))
        runs[-1].train()
    for name in ("learning_rate", "loss", "grad_norm"):
        assert logged(runs[0], name) == logged(runs[1], name)
    assert same_bits(runs[0].model, runs[1].model)


def test_training_resumed_from_a_checkpoint_equals_the_uninterrupted_one(tmp_path):
    """Resumed within an epoch and a cycle, with shuffled batches and dropout."""
    whole = trainer(tmp_path, fused_with_view, save_strategy="steps", save_steps=13)
    whole.train()
    resumed = trainer(tmp_path, fused_with_view)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-13"))
    assert logged(resumed, "learning_rate") == lrs(0, STEPS)
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert same_bits(resumed.model, whole.model)


def test_accumulated_batches_are_one_step_of_the_schedule(tmp_path):
    runner = trainer(tmp_path, fused_with_view, gradient_accumulation_steps=2, max_steps=10)
    runner.train()
    assert logged(runner, "learning_rate") == lrs(0, 10)


def test_view_works_if_the_trainer_makes_its_optimizer_late(tmp_path):
    class LateTrainer(transformers.Trainer):
        def create_optimizer_and_scheduler(self, num_training_steps):
            self.optimizer, self.lr_scheduler = fused_with_view(self.model)

        def create_optimizer(self, model=None):
            self.optimizer = self.optimizer or fused(self.model)
            return self.optimizer

        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = self.lr_scheduler or as_scheduler(self.optimizer)
            return self.lr_scheduler

    runner = trainer(tmp_path, lambda model: (None, None), LateTrainer)
    runner.train()
    assert logged(runner, "learning_rate") == lrs(0, STEPS)


def test_trainer_without_the_view_overrides_the_lr(tmp_path):
    """Without the view, the trainer makes a linear schedule and sets the LR at each step."""
    runner = trainer(tmp_path, lambda model: (fused(model), None))
    runner.train()
    linear = [SGD_OPTIONS["lr"] * (1 - step / STEPS) for step in range(STEPS)]
    assert logged(runner, "learning_rate") == pytest.approx(linear)
