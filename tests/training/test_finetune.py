"""Fine-tuning: rows of labels go by name or by position, the null row to the null row, and what is fresh is said to be."""

import dataclasses

import pytest
import torch

from ditkernels.checkpoints.format import Checkpoint, CheckpointError, save_checkpoint
from ditkernels.checkpoints.run import Run
from ditkernels.training.start import find_start
from ditkernels.training.trainer import Trainer, train
from tests.helpers.runs import newest_checkpoint
from tests.training.test_trainer import config, run, same_bits, small_model, some_data

NAMES = {name: row for row, name in enumerate("abcdefghij")}


def model_of(classes, *, null=True, random=False, heads=2):
    return small_model(random=random, num_classes=classes, class_dropout_prob=0.1 if null else 0.0, num_heads=heads)


def given_checkpoint(folder, *, null=True, names=NAMES, space=None):
    """A checkpoint of ours of a model with ten classes."""
    model = model_of(10, null=null, random=True)
    settings = {"num_heads": 2, "input_size": [4, 4], "num_classes": 10, "class_dropout_prob": 0.1 if null else 0.0}
    state = {"class_to_idx": dict(names), "latent_space": space}
    save_checkpoint(folder, Checkpoint(model.state_dict(), model.state_dict(), 5, {"model": settings}, state=state))
    return model


def begun(tmp_path, source, names, *, null=True, classes=None, fresh=None, **changes):
    """A model that starts from ``source``, of a run whose data has these names."""
    classes = classes or len(names)
    model = fresh or model_of(classes, null=null)
    settings = config(tmp_path, init_from=str(source), label_dropout=0.1 if null else 0.0, num_classes=classes, **changes)
    data = dataclasses.replace(some_data(settings), class_to_idx=dict(names))
    trainer = Trainer(settings, data, None, model)
    trainer.begin(find_start(settings, Run(settings.results_dir), trainer.world))
    return trainer.model


def table(model):
    return model.y_embedder.embedding_table.weight.detach()


def outputs(model, label):
    x, t = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([500.0])
    with torch.no_grad():
        return model.eval()(x, t, torch.tensor([label]))


TEN, ELEVEN, TWELVE = list("abcdefghij"), list("abcdefghijk"), list("abcdefghijkl")


@pytest.mark.parametrize("names", [TEN, ELEVEN, TWELVE, TEN[:9], TEN[::-1], ["a", "x", "c", "z"], [*"kjihgfedcba"]])
@pytest.mark.parametrize("gives_null", [True, False])
@pytest.mark.parametrize("has_null", [True, False])
def test_rows_go_by_name_and_the_null_row_to_the_null_row(tmp_path, caplog, names, gives_null, has_null):
    caplog.set_level("INFO", "ditkernels")
    given = given_checkpoint(tmp_path / "given", null=gives_null)
    fresh = model_of(len(names), null=has_null)
    before = table(fresh).clone()
    here = {name: row for row, name in enumerate(names)}
    found = begun(tmp_path, tmp_path / "given", here, null=has_null, fresh=fresh)
    for name, row in here.items():
        if name in NAMES:
            assert torch.equal(outputs(found, row), outputs(given, NAMES[name])), name
        else:
            assert torch.equal(table(found)[row], before[row]), name
    if has_null:
        kept = table(given)[10] if gives_null else before[len(names)]
        assert torch.equal(table(found)[len(names)], kept)
        assert ("guidance needs training" in caplog.text) == (not gives_null)
    kept = len(set(names) & set(NAMES))
    assert f"of {len(names)} classes {kept} kept, by name, {len(names) - kept} fresh" in caplog.text


@pytest.mark.parametrize("classes", [9, 10, 11])
@pytest.mark.parametrize("null_class", [True, False])
def test_rows_of_a_public_file_go_by_position(tmp_path, caplog, classes, null_class):
    caplog.set_level("INFO", "ditkernels")
    given = model_of(10, null=null_class, random=True)
    torch.save(given.state_dict(), tmp_path / "public.pt")
    names = {str(label): label for label in range(classes)}
    found = begun(tmp_path, tmp_path / "public.pt", names, null_class=null_class)
    kept = min(10, classes)
    assert torch.equal(table(found)[:kept], table(given)[:kept])
    if null_class:
        assert torch.equal(table(found)[classes], table(given)[10])
    assert f"of {classes} classes {kept} kept, by position, {classes - kept} fresh" in caplog.text


def test_the_one_class_of_an_unconditional_run_gets_the_null_row(tmp_path):
    given = given_checkpoint(tmp_path / "given")
    found = begun(tmp_path, tmp_path / "given", {}, classes=1, null=False, unconditional=True)
    assert torch.equal(outputs(found, 0), outputs(given, 10))


def test_rows_without_names_on_both_sides_go_by_position(tmp_path):
    given = given_checkpoint(tmp_path / "given", names={"a": 0, "b": 1})
    found = begun(tmp_path, tmp_path / "given", {"b": 0, "q": 1}, classes=5)
    assert torch.equal(table(found)[[0, 2, 3, 4]], table(given)[[1, 2, 3, 4]])


def test_the_way_can_be_chosen(tmp_path):
    given = given_checkpoint(tmp_path / "given")
    reversed_names = {name: row for row, name in enumerate(TEN[::-1])}
    by_place = begun(tmp_path / "place", tmp_path / "given", reversed_names, init_classes="position")
    assert torch.equal(table(by_place), table(given))
    own = model_of(10)
    before = table(own).clone()
    fresh = begun(tmp_path / "fresh", tmp_path / "given", reversed_names, init_classes="fresh", fresh=own)
    assert torch.equal(table(fresh)[:10], before[:10])
    assert torch.equal(table(fresh)[10], table(given)[10])


def test_what_cannot_be_matched_is_refused(tmp_path):
    given_checkpoint(tmp_path / "given")
    with pytest.raises(CheckpointError, match=r"no name of a class in common; --init-classes position or fresh"):
        begun(tmp_path, tmp_path / "given", {"x": 0, "y": 1})
    with pytest.raises(CheckpointError, match="init_classes: got names, and the data has none"):
        begun(tmp_path, tmp_path / "given", {}, classes=10, init_classes="names")
    torch.save(model_of(10, random=True).state_dict(), tmp_path / "public.pt")
    with pytest.raises(CheckpointError, match="init_classes: got names, and the checkpoint has none"):
        begun(tmp_path, tmp_path / "public.pt", NAMES, init_classes="names")


def test_another_number_of_heads_is_refused_where_it_is_recorded(tmp_path):
    given_checkpoint(tmp_path / "given")
    with pytest.raises(CheckpointError, match=r"was trained with 2 heads, the model has 4; --num-heads 2"):
        begun(tmp_path, tmp_path / "given", NAMES, fresh=model_of(10, heads=4))
    given = model_of(10, random=True)
    torch.save(given.state_dict(), tmp_path / "public.pt")
    begun(tmp_path, tmp_path / "public.pt", NAMES, fresh=model_of(10, heads=4))


# ---- Other numbers of the same classes ------------------------------------------------------------------------------


def data_of(settings, names, labels):
    data = some_data(settings)
    images = dataclasses.replace(data.train.data, labels=labels)
    return dataclasses.replace(
        data, train=type(data.train)(images, data.train.stream.batch_size, data.train.stream.seed), class_to_idx=names
    )


def test_a_run_goes_on_with_other_numbers_of_its_classes_bit_for_bit(tmp_path, caplog):
    """Renumbered data with renumbered rows is the same run: losses and weights are equal, but for the order of rows."""
    caplog.set_level("INFO", "ditkernels")
    here, moved = {"c": 0, "a": 1, "b": 2}, torch.tensor([1, 2, 0])
    labels = some_data(config(tmp_path)).train.data.labels
    whole = run(tmp_path / "whole", model=small_model(random=True))
    run(tmp_path, model=small_model(random=True), steps=2)
    other = config(tmp_path, resume="auto")
    renamed = data_of(other, here, moved[labels])
    with pytest.raises(CheckpointError, match=r"another recipe: class_to_idx: .* --override class_to_idx"):
        train(other, model=small_model(random=True), data=renamed)
    resumed = train(dataclasses.replace(other, override="class_to_idx"), model=small_model(random=True), data=renamed)
    assert "from step 2 on: class_to_idx" in caplog.text
    for mine, theirs in ((resumed.model, whole.model), (resumed.ema, whole.ema)):
        rows = table(mine)[[1, 2, 0, 3]]
        assert torch.equal(rows, table(theirs))
        with torch.no_grad():
            mine.y_embedder.embedding_table.weight.copy_(rows)
        assert same_bits(mine, theirs)
    assert newest_checkpoint(tmp_path / "run").checkpoint.state["class_to_idx"] == here
