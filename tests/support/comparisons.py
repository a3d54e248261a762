"""What two runs left behind, compared bit by bit."""

import csv
import math

import torch


def logs(folder):
    """Rows of all versions: {(step, name): values}."""
    found = {}
    for path in sorted(folder.glob("version_*/metrics.csv")):
        for row in csv.DictReader(path.read_text().splitlines()):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    found.setdefault((row["step"], name), set()).add(value)
    return found


def assert_equal(found, expected, where=""):
    """Nested states, bit by bit."""
    if isinstance(expected, torch.Tensor):
        same = torch.equal(found.nan_to_num(7e7), expected.nan_to_num(7e7))
        assert same, where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_equal(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_equal(*pair, f"{where}.{i}")
    elif isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(found), where
    else:
        assert found == expected, where
