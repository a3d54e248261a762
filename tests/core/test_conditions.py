"""Conditions: nested tensors of a row for each sample, and what stands for none."""

import pytest
import torch

from lightning_vr.core.conditions import condition_rows, expanded, null_condition, replaced
from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean, Noised
from lightning_vr.estimators.draws import UNLABELLED, drop_conditions


def nested(rows=3):
    text = torch.arange(rows * 4.0).reshape(rows, 2, 2)
    return {"text": text, "added": {"size": torch.arange(rows), "flag": torch.ones(rows, 1)}}


def test_one_row_serves_all_samples_and_takes_no_memory():
    found = expanded({"text": torch.ones(1, 2), "added": {"size": torch.ones(5, 1)}}, 5)
    assert found["text"].shape == (5, 2)
    assert found["text"].stride(0) == 0
    assert found["added"]["size"].shape == (5, 1)


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        ({"text": torch.ones(4, 2)}, "have one row, or 3 as there are samples, got 4 in 'text'"),
        ({"added": {"size": torch.ones(2)}}, "have one row, or 3 .* got 2 in 'added.size'"),
        ({"text": torch.tensor(1.0)}, "have one row, or 3 .* got none in 'text'"),
        ({"text": ["a", "b", "c"]}, "hold tensors, got list as 'text'"),
        ({"added": {"mode": None}}, "hold tensors, got NoneType as 'added.mode'"),
        (torch.ones(3, 2), "be a dictionary of the network's arguments, got Tensor"),
    ],
)
def test_what_has_no_row_for_each_sample_is_refused_by_name(cond, message):
    with pytest.raises(ValueError, match=f"^`cond` must {message}"):
        expanded(cond, 3)


def test_samples_and_their_copies_keep_their_rows_at_any_depth():
    clean = Clean(torch.randn(3, 2), cond=nested())
    assert clean.repeated(2).cond["added"]["size"].tolist() == [0, 0, 1, 1, 2, 2]
    assert clean.rows(slice(1, 3)).cond["text"].equal(nested()["text"][1:])
    assert condition_rows(None, slice(1)) is None


@pytest.mark.parametrize(
    ("null", "text", "size"),
    [
        ("zeros", 0.0, 0),
        ({"text": [[1.0, 2.0], [3.0, 4.0]], "added": {"size": 7, "flag": 0.5}}, None, 7),
        ({"text": torch.ones(1, 2, 2), "added": {"size": [7], "flag": [[0.5]]}}, 1.0, 7),
    ],
)
def test_what_stands_for_no_condition_has_its_form(null, text, size):
    found = null_condition(null, nested())
    expected = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]) if text is None else text
    assert (found["text"] == expected).all()
    assert found["text"].shape == (1, 2, 2)
    assert found["added"]["size"].tolist() == [size]
    assert found["added"]["size"].dtype == torch.int64


@pytest.mark.parametrize(
    ("null", "message"),
    [
        ({"text": 0.0}, r"have the names of the condition, \['added', 'text'\], got \['text'\]"),
        ({"text": 0.0, "added": 0.0}, "have the names of the condition 'added', .* got float"),
        (
            {"text": [1.0], "added": {"size": 0, "flag": 0}},
            r"have the shape \(2, 2\) of a row of 'text'",
        ),
        ({"text": "none", "added": {"size": 0, "flag": 0}}, "hold tensors or numbers, got 'none'"),
    ],
)
def test_what_has_another_form_than_the_condition_is_refused(null, message):
    with pytest.raises(ValueError, match=f"`null_cond` must {message}"):
        null_condition(null, nested())


def test_rows_are_replaced_where_asked_and_keep_their_type():
    where = torch.tensor([True, False, True])
    found = replaced(nested(), null_condition("zeros", nested()), where)
    assert found["added"]["size"].tolist() == [0, 1, 0]
    assert found["text"][1].equal(nested()["text"][1])
    assert not found["text"][where].any()


def drawn(count, **options):
    x, one = torch.zeros(count, 2), torch.ones(count)
    return Noised(x, x, x, one, one, one, one, **options)


def test_labels_and_conditions_are_dropped_together_as_guidance_leaves_them_out():
    count = 4000
    noised = drawn(
        count,
        group=torch.zeros(count, dtype=torch.int64),
        cond={"text": torch.ones(count, 3)},
        cond_group=torch.ones(count, dtype=torch.int64),
    )
    null = {"text": torch.zeros(1, 3)}
    found = drop_conditions(noised, 0.2, 0.2, null, generator(0))
    dropped = found.group == UNLABELLED
    assert abs(float(dropped.float().mean()) - 0.2) < 4 * (0.2 * 0.8 / count) ** 0.5
    assert torch.equal(found.cond["text"][:, 0] == 0, dropped)
    assert torch.equal(found.cond_group == UNLABELLED, dropped)  # all references serve such a row

    rarer = drop_conditions(noised, 0.2, 0.1, null, generator(0))
    assert torch.equal(rarer.group, found.group)
    assert ((rarer.cond["text"][:, 0] == 0) <= dropped).all()


def test_without_dropout_no_random_number_is_drawn():
    noised, source = drawn(4, cond={"text": torch.ones(4, 3)}), generator(0)
    state = source.get_state()
    assert drop_conditions(noised, 0.5, 0.0, None, source) is noised
    assert torch.equal(source.get_state(), state)
