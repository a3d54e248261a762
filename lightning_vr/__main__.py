"""``python -m lightning_vr``: the command line."""

from lightning_vr.cli import run

if __name__ == "__main__":
    run()
