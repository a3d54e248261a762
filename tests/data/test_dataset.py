import pytest
import torch

from lightning_vr.data import InMemoryDataset


def test_sample_holds_its_row_its_label_and_its_position():
    x = torch.arange(12.0).reshape(6, 2)
    data = InMemoryDataset(x, torch.tensor([0, 1, 2, 0, 1, 2]), key="x0", num_classes=3)
    for index in range(6):
        sample = data[index]
        assert set(sample) == {"x0", "label", "index"}
        assert torch.equal(sample["x0"], x[index])
        assert sample["label"] == index % 3
        assert sample["index"] == index
        assert sample["label"].dtype == sample["index"].dtype == torch.int64
        assert sample["label"].shape == sample["index"].shape == ()


def test_data_without_labels_has_none_in_its_samples():
    assert set(InMemoryDataset(torch.zeros(2, 1), key="image")[0]) == {"image", "index"}


def test_data_end_where_their_length_says():
    data = InMemoryDataset(torch.zeros(3, 1), key="x0")
    assert [int(sample["index"]) for sample in data] == [0, 1, 2]
    assert data[-1]["index"] == 2
    with pytest.raises(IndexError):
        data[3]


def test_clean_data_are_single_precision():
    assert InMemoryDataset(torch.zeros(2, 1).double(), key="x0")[0]["x0"].dtype == torch.float32


def test_standard_deviation_is_over_all_entries():
    data = InMemoryDataset(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), key="x0")
    assert data.standard_deviation() == pytest.approx(5**0.5)


def with_nan() -> torch.Tensor:
    x = torch.zeros(1797, 1, 8, 8)
    x[17, 0, 3, 3] = float("nan")
    x[40, 0, 0, 0] = float("inf")
    x[41] = float("-inf")
    return x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (with_nan(), "`x` must be finite, but 3 of 1797 samples are not, the first at index 17"),
        (
            torch.zeros(4, 2, dtype=torch.complex64),
            "`x` must be a real floating-point tensor, got torch.com",
        ),
        (
            torch.zeros(4, 2, dtype=torch.uint8),
            "`x` must be a real floating-point tensor, got torch.uint8",
        ),
        (torch.zeros(0, 2), r"`x` must have shape \(n, \*\) with n of 1 or more .*, got \(0, 2\)"),
        (torch.zeros(4), r"`x` must have shape \(n, \*\) with n of 1 or more .*, got \(4,\)"),
    ],
)
def test_data_that_are_not_a_finite_real_batch_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        InMemoryDataset(x, key="image")


@pytest.mark.parametrize(
    ("label", "num_classes", "message"),
    [
        ([0, 1, -1, 3], 3, r"in \[0, 3\), .* 2 of 4 are not, the first at index 2, which is -1"),
        ([0, 1, 2], 3, r"integers of shape \(4,\), .*, got torch.int64 of shape \(3,\)"),
        ([0.0, 1.0, 2.0, 0.0], 3, r"`label` .*, got torch.float32 of shape \(4,\)"),
        ([0, 1, 2, 0], None, "`num_classes` must be given with `label`"),
    ],
)
def test_invalid_labels_are_refused(label, num_classes, message):
    with pytest.raises(ValueError, match=message):
        InMemoryDataset(torch.zeros(4, 2), torch.tensor(label), key="x0", num_classes=num_classes)
