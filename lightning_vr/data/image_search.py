"""The image files of a folder and its sub-folders, each file once whatever links lead to it.

Files and folders that stand in the folder come first, then links in the order of their paths, and
what a link leads to is found under the first path to it. A link back to a folder above it is left
out. What is left out is counted.
"""

import os
import stat
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

from lightning_vr.data.image_formats import image_extensions

HIDDEN = "hidden"
BROKEN = "broken links"
ABOVE = "links to folders above"
TWICE = "links to what is there already"
UNREADABLE = "that cannot be read"
SPECIAL = "no regular files"
LISTED = 8


@dataclass
class FoundImages:
    """Image files and what else there is.

    Attributes:
        paths: Paths of the images relative to the folder, sorted.
        left_out: Number of entries that were left out, by extension or kind.
        aliases: Pairs of paths to one file or folder: the one that was left out, and the other.
    """

    paths: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    aliases: list[tuple[Path, Path]] = field(default_factory=list)

    def left_out_text(self) -> str:
        """Return what was left out and how often, the most frequent first; empty if nothing."""
        kinds = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        parts = [f"{count} {kind}" for kind, count in kinds[:LISTED]]
        rest = sum(count for _, count in kinds[LISTED:])
        return ", ".join([*parts, f"{rest} others"] if rest else parts)


def find_images(root: Path) -> FoundImages:
    """Search a folder.

    Args:
        root: The folder.
    """
    return _Search(root).run()


class _Search:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.real_root = os.path.realpath(root)
        self.extensions = frozenset(image_extensions())
        self.found = FoundImages()
        self.folders: dict[str, Path] = {}
        self.files: dict[Hashable, Path] = {}
        self.links: list[Path] = []

    def run(self) -> FoundImages:
        self._walk(self.root)
        while self.links:
            links, self.links = sorted(self.links), []
            for link in links:
                self._follow(link)
        self.found.paths = sorted(path.relative_to(self.root) for path in self.files.values())
        return self.found

    def _walk(self, top: Path) -> None:
        # to resolve each path anew would take the square of their depth
        folders = [(top, os.path.realpath(top))]
        while folders:
            folder, real = folders.pop()
            if real in self.folders:
                self._leave_out_alias(folder, self.folders[real])
                continue
            self.folders[real] = folder
            folders += reversed(self._read(folder, real))

    def _read(self, folder: Path, real: str) -> list[tuple[Path, str]]:
        """Take the files of a folder, keep its links for later, and return its sub-folders."""
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            self.found.left_out[UNREADABLE] += 1
            return []
        subfolders = []
        for entry in entries:
            path, real_path = Path(entry.path), os.path.join(real, entry.name)
            if entry.name.startswith("."):
                self.found.left_out[HIDDEN] += 1
            elif entry.is_symlink():
                self.links.append(path)
            elif entry.is_dir():
                subfolders.append((path, real_path))
            else:
                self._add(path, real_path)
        return subfolders

    def _follow(self, link: Path) -> None:
        target = os.path.realpath(link)
        parent = os.path.realpath(link.parent)
        if not os.path.exists(target):
            self.found.left_out[BROKEN] += 1
        elif not os.path.isdir(target):
            self._add(link, target)
        elif any(_is_within(folder, target) for folder in (parent, self.real_root)):
            self.found.left_out[ABOVE] += 1
        else:
            self._walk(link)

    def _add(self, path: Path, real: str) -> None:
        extension = path.suffix.lower()
        if extension not in self.extensions:
            shown = "".join(x if x.isprintable() else "?" for x in extension)
            self.found.left_out[shown or "without extension"] += 1
            return
        try:
            status = os.stat(path)
        except OSError:
            self.found.left_out[UNREADABLE] += 1
            return
        if not stat.S_ISREG(status.st_mode):
            self.found.left_out[SPECIAL] += 1
            return
        # some network file systems number files anew: numbers count only where there are hard links
        has_hard_links = status.st_nlink > 1 and status.st_ino
        key = (status.st_dev, status.st_ino) if has_hard_links else real
        if key in self.files:
            self._leave_out_alias(path, self.files[key])
        else:
            self.files[key] = path

    def _leave_out_alias(self, path: Path, other: Path) -> None:
        self.found.left_out[TWICE] += 1
        self.found.aliases.append((path.relative_to(self.root), other.relative_to(self.root)))


def _is_within(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder
