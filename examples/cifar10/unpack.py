"""Unpack CIFAR-10 into a folder of images, one sub-folder for each class.

    python examples/cifar10/unpack.py cifar-10-binary.tar.gz cifar10

The archive is the "binary version" of https://www.cs.toronto.edu/~kriz/cifar.html. It holds numbers
alone; the version for Python is a pickle, which could run code. Images are written as PNG.
"""

import argparse
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

RECORD = 1 + 3 * 32 * 32
"""Bytes of a label and its image: red, green and blue planes of 32 rows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    with tarfile.open(options.archive) as archive:
        files = {Path(member.name).name: member for member in archive if member.isfile()}
        names = read(archive, files["batches.meta.txt"]).decode().split()
        for part, batches in (
            ("train", sorted(name for name in files if name.startswith("data_batch"))),
            ("test", ["test_batch.bin"]),
        ):
            count = 0
            for batch in batches:
                count = write(read(archive, files[batch]), names, options.folder / part, count)
            print(f"{options.folder / part}: {count} images")


def read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return the bytes of a file of the archive."""
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def write(batch: bytes, names: list[str], folder: Path, start: int) -> int:
    """Write the images of a batch, numbered from ``start``; return the number after the last."""
    records = np.frombuffer(batch, dtype=np.uint8).reshape(-1, RECORD)
    for number, record in enumerate(records, start):
        place = folder / names[record[0]]
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.ascontiguousarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0))
        Image.fromarray(pixels).save(place / f"{number:05d}.png")
    return start + len(records)


if __name__ == "__main__":
    main()
