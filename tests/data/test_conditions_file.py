"""What samples are asked for, in a file or as columns."""

import pytest
import torch

from lightning_vr.data.conditions import Conditions

PROMPTS = ["a three", 'a "seven", slanted', "7"]


def test_a_text_file_is_one_prompt_a_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("a three\n\nseven, slanted\n", encoding="utf-8")
    found = Conditions.of(tmp_path / "prompts.txt")
    assert found.columns == {"prompt": ["a three", "", "seven, slanted"]}
    assert found.labels is None


def test_a_csv_file_names_its_columns_and_quotes_texts(tmp_path):
    lines = ["\ufeffprompt, label,style", "a three,3,bold", '"a ""seven"", slanted",7,', "7,0,x"]
    (tmp_path / "prompts.csv").write_text("\n".join(lines), encoding="utf-8")
    found = Conditions.of(str(tmp_path / "prompts.csv"))
    assert found.columns == {"prompt": PROMPTS, "style": ["bold", "", "x"]}
    assert found.labels.tolist() == [3, 7, 0]


def test_rows_are_cycled_over():
    columns = {"prompt": PROMPTS, "size": torch.arange(3.0), "label": [3, 7, 0]}
    found = Conditions.of(columns).rows(torch.arange(5))
    assert found.columns["prompt"] == [*PROMPTS, *PROMPTS[:2]]
    assert found.columns["size"].tolist() == [0, 1, 2, 0, 1]
    assert found.labels.tolist() == [3, 7, 0, 3, 7]
    assert len(Conditions.of({"label": [1, 2]})) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing.csv", None, "a text file in UTF-8, but .*nothing.csv cannot be read .*No such"),
        ("prompts.json", b"[]", r"a file of the kind .csv or .txt, got .*prompts.json: name"),
        ("empty.csv", b"", "columns of equally many rows"),
        ("empty.txt", b"", "columns of equally many rows"),
        ("header.csv", b"prompt\n", "columns of equally many rows"),
        ("ragged.csv", b"prompt,label\na,1\na, b,2\n", "2 columns .* line 3 of .* has 3: put quo"),
        ("binary.txt", b"\xff\xfe\x00", "a text file in UTF-8, but .* cannot be read"),
        ("labels.csv", b"label\n1\nthree\n", "whole numbers in the column 'label' .*three"),
    ],
)
def test_a_file_that_is_no_table_of_conditions_is_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"`conditions` must (be|have|have the) {message}"):
        Conditions.of(tmp_path / name)


@pytest.mark.parametrize("columns", [{}, {"prompt": []}, {"a": ["x"], "b": ["x", "y"]}, {"a": "x"}])
def test_columns_of_unequal_length_are_refused(columns):
    with pytest.raises(ValueError, match="`conditions` must be columns of equally many rows"):
        Conditions.of(columns)
