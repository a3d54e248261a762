"""What two runs left behind, compared bit by bit."""

import csv
import math

import torch

ROW_NAMES = ("step", "of", "name", "noise_level")
"""Columns of files of curves that say what a row is of."""


OF_FOLDER = "csv_rows"
"""What a checkpoint has of the files beside it, which are others in another folder."""


def logs(folder):
    """Rows of all versions, also of files of curves: {(step, file and row, name): values}."""
    found = {}
    for path in sorted(folder.glob("version_*/*.csv")):
        seen = set()
        for row in csv.DictReader(path.read_text().splitlines()):
            if "step" not in row:
                continue  # measured once, when training starts
            step, *names = (row[name] for name in ROW_NAMES if name in row)
            is_curve = path.name != "metrics.csv"
            key = (step, path.name, *names) if is_curve else (step,)
            assert not is_curve or key not in seen, f"{key} is twice in {path}"
            seen.add(key)
            for name, value in row.items():
                if value and name not in (*ROW_NAMES, "epoch"):
                    found.setdefault((*key, name), set()).add(value)
    return found


def assert_equal(found, expected, where=""):
    """Nested states, bit by bit."""
    if isinstance(expected, torch.Tensor):
        same = torch.equal(found.nan_to_num(7e7), expected.nan_to_num(7e7))
        assert same, where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected.keys() - {OF_FOLDER}:
            assert_equal(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_equal(*pair, f"{where}.{i}")
    elif isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(found), where
    else:
        assert found == expected, where
