"""What a file is that was taken for a checkpoint, by its first bytes."""

import zipfile
from pathlib import Path

_BEGINNINGS = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"BM": "a BMP image",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip file",
    b"%PDF": "a PDF",
    b"\x7fELF": "a program",
    b"version https://git-lfs": "a pointer to a file that git-lfs has not fetched",
    b"#!": "a script",
}
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def file_kind(path: Path) -> str | None:
    """Return what a file is, as the end of a sentence, or None if it may be a checkpoint."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
    if not head:
        return "an empty file"
    if not head.strip(b"\0"):
        return "a file of zero bytes: its disk was full, or the copy was cut off"
    if head.startswith(_ZIP):
        return _zip_kind(path, size)
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    if size > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "a safetensors file, which holds weights alone"
    if head.startswith(_PICKLE):
        return None
    return _text_kind(path, head)


def _zip_kind(path: Path, size: int) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return f"a checkpoint or zip archive that is cut off after {size} bytes"
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript archive"
    if any(name.endswith("data.pkl") for name in names):
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive"
    return "a zip archive that torch has not written"


def _text_kind(path: Path, head: bytes) -> str | None:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        # a character may be cut at the end of what was read
        if error.start < len(head) - 4:
            return None
        text = head[: error.start].decode()
    if not text.isprintable() and set(text) - set("\t\r\n") and "\0" in text:
        return None
    if path.suffix in (".yaml", ".yml"):
        return "a YAML file, as --config takes it"
    return "a text file"
