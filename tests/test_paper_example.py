"""examples/paper.py."""

import json

import pytest
from pages import DOCS, REPOSITORY, example_module

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def example():
    with example_module("paper") as module:
        yield module


def test_label_noise_changes_a_fifth_of_the_training_labels_only(example):
    clean, noisy = (example.Split.load(3, noise) for noise in (0.0, 0.2))
    wrong = (clean.labels["train"] != noisy.labels["train"]).double().mean()
    assert wrong == pytest.approx(0.2, abs=0.001)
    for part in ("validation", "test"):
        assert clean.labels[part].equal(noisy.labels[part])
        assert clean.images[part].equal(noisy.images[part])


def test_each_seed_has_its_own_split(example):
    one, other = (example.Split.load(seed, 0.0) for seed in (0, 1))
    assert not one.images["test"].equal(other.images["test"])
    sizes = {part: len(labels) for part, labels in one.labels.items()}
    assert sizes == {"test": 597, "validation": 200, "train": 1000}


def test_every_method_learns_and_snapshots_differ_from_the_last_weights(example):
    errors = {}
    for method in example.TRAININGS:
        errors |= example.train(example.Job(method, noise=0.2, lr=0.1, seed=0, epochs=7))
    assert set(errors) == set(example.METHODS)
    for method, of_part in errors.items():
        assert of_part["test"] < 20, method
    assert errors[example.SNAPSHOTS] != errors[example.SGDR]


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ([1.0, 2.0, 3.0], [2.0, 3.1, 4.0], "holds here"),
        ([2.0, 3.1, 4.0], [1.0, 2.0, 3.0], "does not hold here: the contrary does"),
        ([1.0, 2.0, 3.0], [1.5, 1.5, 3.2], "cannot be told apart here"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "cannot be told apart here"),
        ([1.0], [9.0], "cannot be told apart here"),
    ],
)
def test_verdict_needs_two_standard_errors(example, better, worse, verdict):
    assert example.judge(better, worse)["verdict"] == verdict


def test_table_relations_and_progress_are_printed(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "LRS", (0.1,))
    example.main(["--epochs", "1", "--seeds", "2", "--processes", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert printed.out.count("in the paper 0.5 on CIFAR-10, 1.8 on CIFAR-100") == 2
    assert "training: 12 of 12 trainings" in printed.err
    assert "\r" not in printed.err
    written = json.loads((tmp_path / "paper.json").read_text())
    assert [result["noise"] for result in written["results"]] == [0.0, 0.2]
    for result in written["results"]:
        assert {m: len(e) for m, e in result["errors"].items()} == dict.fromkeys(example.METHODS, 2)
    assert (tmp_path / "paper.png").read_bytes().startswith(b"\x89PNG")


def test_page_matches_the_committed_results(example):
    results = json.loads((REPOSITORY / "examples" / "paper.json").read_text())["results"]
    page = " ".join((DOCS / "paper.md").read_text().split())
    for result in results:
        for relation in result["relations"]:
            judged = example.judge(
                *(result["errors"][relation[role]] for role in ("better", "worse"))
            )
            assert judged == {key: relation[key] for key in judged}
            row = (
                f"| {example.title_of(result['noise'])} | {relation['better']} | "
                f"{relation['worse']} | {judged['gain']:+.2f} ± {judged['standard_error']:.2f} | "
                f"{relation['in_the_paper']} | {judged['verdict']} |"
            )
            assert row in page
