import os
from pathlib import Path

import pytest

from lightning_vr.data import image_formats
from lightning_vr.data.image_formats import image_extensions
from lightning_vr.data.image_search import FoundImages, find_images


@pytest.fixture
def root(tmp_path):
    """Two folders of two images each, in a folder that holds another one too."""
    for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/deep/1.png"):
        touch(tmp_path / "root" / name)
    touch(tmp_path / "beside.png")
    return tmp_path / "root"


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def names(found):
    return [str(path) for path in found.paths]


OWN = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/deep/1.png"]


@pytest.mark.parametrize("place", ["all", "cat/up", "dog/deep/up"])
@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_link_back_to_a_folder_above_adds_nothing(root, place, target):
    (root / place).symlink_to((root / target).resolve())
    found = find_images(root)
    assert names(found) == OWN
    assert found.left_out == {"links to folders above": 1}


def test_link_to_the_root_of_all_files_is_not_followed(root):
    (root / "all").symlink_to("/")
    assert names(find_images(root)) == OWN


def test_folder_with_two_links_to_it_is_taken_once_under_its_own_name(root):
    (root / "a_link").symlink_to(root / "dog")
    (root / "z_link").symlink_to("dog/deep")
    found = find_images(root)
    assert names(found) == OWN
    assert found.aliases == [(Path("a_link"), Path("dog")), (Path("z_link"), Path("dog/deep"))]


def test_folder_elsewhere_is_taken_once_under_the_first_of_its_links(root, tmp_path):
    touch(tmp_path / "elsewhere/deep/2.png")
    for name in ("b", "a", "cat/c"):
        (root / name).symlink_to(tmp_path / "elsewhere")
    (root / "d").symlink_to(tmp_path / "elsewhere/deep")
    (tmp_path / "elsewhere/again").symlink_to(root / "cat")
    assert names(find_images(root)) == ["a/deep/2.png", *OWN]


def test_links_of_links_and_loops_of_links_end(root):
    (root / "one").symlink_to(root / "two")
    (root / "two").symlink_to(root / "one")
    (root / "three").symlink_to(root / "four")
    (root / "four").symlink_to(root / "cat")
    found = find_images(root)
    assert names(found) == OWN
    assert found.left_out == {"broken links": 2, "links to what is there already": 2}


@pytest.mark.parametrize("make_link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_file_with_two_links_to_it_is_taken_once(root, tmp_path, make_link):
    touch(tmp_path / "store/x.png")
    for place in ("dog/y.png", "cat/z.png"):
        make_link(tmp_path / "store/x.png", root / place)
        make_link(root / "cat/0.png", root / f"{place}.jpg")
    found = find_images(root)
    assert names(found) == ["cat/0.png", "cat/1.png", "cat/z.png", *OWN[2:]]
    assert found.left_out == {"links to what is there already": 3}


def test_linked_file_is_taken_by_the_name_of_its_link(root, tmp_path):
    touch(tmp_path / "store/0a1b2c")
    (root / "x.PNG").symlink_to(tmp_path / "store/0a1b2c")
    assert names(find_images(root)) == [*OWN, "x.PNG"]


def test_result_does_not_depend_on_how_the_folder_is_named(root, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(root)
    (root / "self").symlink_to(tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    for name in ("root", "link", "root/../link/.", tmp_path / "link"):
        assert names(find_images(Path(name))) == OWN


def test_what_is_left_out_is_counted_by_extension_and_kind(root):
    for name in ("a.txt", "b.txt", "c.TXT", "README", ".hidden.png", ".git/x.png", "d.mp4"):
        touch(root / name)
    (root / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(root / "pipe.png")
    found = find_images(root)
    assert names(found) == OWN
    assert found.left_out_text() == (
        "3 .txt, 2 hidden, 1 .mp4, 1 broken links, 1 no regular files, 1 without extension"
    )


def test_folder_that_cannot_be_read_is_counted(root, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "deep":
            raise PermissionError
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = find_images(root)
    assert names(found) == OWN[:3]
    assert found.left_out_text() == "1 that cannot be read"


def test_many_kinds_are_summed_up_and_shown_safely():
    found = FoundImages()
    found.left_out.update({f".{number:04}": 1 for number in range(20)})
    assert found.left_out_text().endswith(".0007, 12 others")


def test_name_with_control_characters_is_shown_without_them(root):
    touch(root / "x.a\n\x1b[2J")
    assert find_images(root).left_out_text() == "1 .a??[2j"


def test_common_extensions_are_taken_whatever_their_case(tmp_path):
    common = [".jfif", ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"]
    for extension in common:
        touch(tmp_path / f"x{extension}")
        touch(tmp_path / f"y{extension.upper()}")
    supported = set(image_extensions())
    assert set(common) - supported <= {".avif", ".webp"}
    found = find_images(tmp_path)
    assert len(found.paths) == 2 * len(supported & set(common))


def test_format_that_pillow_lacks_is_left_out_and_counted(root, monkeypatch):
    monkeypatch.setattr(image_formats.features, "get_supported", lambda: [])
    touch(root / "x.avif")
    assert find_images(root).left_out == {".avif": 1}
    monkeypatch.setitem(image_formats.Image.EXTENSION, ".heic", "HEIF")
    assert ".heic" in image_extensions()
