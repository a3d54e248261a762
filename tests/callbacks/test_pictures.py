"""Pictures that a run draws again and again take no memory that stays."""

import gc

import torch

from lightning_vr.callbacks.pictures import frees_figure, save_picture


def test_a_figure_is_freed_when_it_is_drawn(tmp_path):
    path = tmp_path / "points.png"
    save_picture(torch.zeros(4, 2), path)  # fonts stay
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            save_picture(torch.zeros(4, 2), path)
        assert gc.collect() < 500  # of about 4000 for each
    finally:
        gc.enable()


def test_drawing_leaves_the_search_for_garbage_as_it_was():
    @frees_figure
    def draw():
        assert not gc.isenabled()
        raise ValueError

    for is_enabled in (True, False):
        (gc.enable if is_enabled else gc.disable)()
        try:
            draw()
        except ValueError:
            assert gc.isenabled() == is_enabled
        finally:
            gc.enable()
