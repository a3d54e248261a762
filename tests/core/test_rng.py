import random

import numpy as np
import pytest
import torch

from lightning_vr.core.rng import generator, preserve_global_rng


def draw(*key):
    return torch.randn(1000, generator=generator(*key))


def test_a_key_gives_the_same_draws_in_any_order():
    """And in any process, as ``cli/test_fresh_interpreter.py`` has it."""
    first = draw(7, "train", 0, 3)
    draw(1)
    assert torch.equal(draw(7, "train", 0, 3), first)


def test_every_part_of_a_key_changes_the_draws():
    keys = [(7, "train", 0, 3), (8, "train", 0, 3), (7, "check", 0, 3), (7, "train", 1, 3)]
    keys += [(7, "train", 0, 4), (7, "train", 3, 0), (7, "train", 0), ("7", "train", 0, 3)]
    assert len({draw(*key)[0].item() for key in keys}) == len(keys)


def test_neighbouring_keys_are_uncorrelated(z_score):
    rows = torch.stack([draw(0, "train", step) for step in range(201)])
    products = (rows[1:] * rows[:-1]).flatten()
    assert abs(z_score(products)) < 4


def test_the_global_stream_is_not_used():
    state = torch.get_rng_state()
    draw(3, "measure")
    assert torch.equal(torch.get_rng_state(), state)


def states():
    return random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def draw_from_all_streams():
    return random.random(), np.random.rand(), torch.rand(1)


def draw_and_fail():
    draw_from_all_streams()
    raise ZeroDivisionError


def test_the_global_streams_are_restored_even_after_an_error():
    before = states()
    with preserve_global_rng():
        draw_from_all_streams()
    assert states() == before
    with pytest.raises(ZeroDivisionError), preserve_global_rng():
        draw_and_fail()
    assert states() == before


def test_the_global_streams_are_restored_when_a_loop_is_left_early():
    def batches():
        with preserve_global_rng():
            for _ in range(3):
                yield draw_from_all_streams()

    before = states()
    loop = batches()
    next(loop)
    loop.close()
    assert states() == before
