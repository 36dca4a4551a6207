"""A folder of images of one's own as DATASET: any kind of image, with classes or without."""

import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import inside, load
from PIL import Image, PngImagePlugin

script = load("02_ddpm.py")
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def picture(colour=RED, size=(12, 10), mode="RGB"):
    return Image.new(mode, size, colour)


def read(image, path, size=8, **options):
    """Save an image, and read it with the script: uint8 (3, size, size)."""
    image.save(path, **options)
    pixels = script.read_image(path, size)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, size, size)
    return pixels


def only(pixels):
    """The one colour that all pixels have."""
    colours = pixels.flatten(1).unique(dim=1)
    assert colours.shape[1] == 1, f"{colours.shape[1]} colours"
    return tuple(colours[:, 0].tolist())


def write_folder(folder, *names):
    """Save a small image under each of these paths, each of another grey."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture((10 * number,) * 3).save(path)
    return folder


def greys(images):
    """The numbers of the images of `write_folder`."""
    return [only(image)[0] // 10 for image in images]


# %% One image


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 255), (100, 100, 100)),
        ("LA", (100, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("1", 1, (255, 255, 255)),
        ("1", 0, (0, 0, 0)),
        ("I;16", 0, (0, 0, 0)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 257 * 100, (100, 100, 100)),
    ],
)
def test_each_kind_of_png(tmp_path, mode, colour, expected):
    assert only(read(picture(colour, mode=mode), tmp_path / "x.png")) == expected


def test_half_transparent_is_half_white(tmp_path):
    red, green, blue = only(read(picture((0, 100, 255, 128), mode="RGBA"), tmp_path / "x.png"))
    assert abs(red - 127) <= 1 and abs(green - 177) <= 1 and blue == 255


def test_16_bits_keep_the_order_of_the_greys(tmp_path):
    """A ramp over all 65,536 values becomes a ramp over 0 ... 255, its middle in the middle."""
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16)
    image = Image.fromarray(np.tile(ramp, (64, 1)))
    pixels = read(image, tmp_path / "x.png", size=64)
    expected = torch.from_numpy(ramp.astype(np.int64) // 257)
    assert all(torch.equal(row.long(), expected) for row in pixels.flatten(0, 1))
    grey = only(read(picture(32768, mode="I;16"), tmp_path / "grey.png"))
    assert grey[0] in (127, 128)
    grey = only(read(picture(32768, mode="I;16"), tmp_path / "grey.tif"))
    assert grey[0] in (127, 128)


def test_palettes(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putpixel((2, 1), 1)  # column 2, row 1
    image.putpixel((3, 1), 2)
    opaque = read(image, tmp_path / "opaque.png")
    assert opaque[:, 1, 2].tolist() == [*GREEN] and opaque[:, 1, 3].tolist() == [*BLUE]
    assert opaque[:, 0, 0].tolist() == [*RED]
    one = read(image, tmp_path / "one.png", transparency=0)  # the first colour is transparent
    assert one[:, 0, 0].tolist() == [255, 255, 255] and one[:, 1, 2].tolist() == [*GREEN]
    several = read(image, tmp_path / "several.png", transparency=bytes([255, 0, 255]))
    assert several[:, 0, 0].tolist() == [*RED] and several[:, 1, 3].tolist() == [*BLUE]
    assert several[:, 1, 2].tolist() == [255, 255, 255]


def test_cmyk_and_other_files(tmp_path):
    cyan = only(read(picture((255, 0, 0, 0), mode="CMYK"), tmp_path / "x.jpg", quality=95))
    assert cyan[0] < 20 and min(cyan[1:]) > 235, cyan
    for name in "x.bmp", "x.tif", "x.webp", "x.ppm", "x.jpeg":
        red = only(read(picture(), tmp_path / name))
        assert red[0] > 245 and max(red[1:]) < 10, name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_the_camera_was_held(tmp_path, orientation):
    """EXIF's eight ways to store the same picture: red above left, green above right, blue below.

    EXIF 2.3, tag 274, says which side of the picture the first row and the first column of the file
    are: 1 top and left, 2 top and right, 3 bottom and right, 4 bottom and left, 5 left and top,
    6 right and top, 7 right and bottom, 8 left and bottom.
    """
    upright = Image.new("RGB", (16, 16), BLUE)
    upright.paste(RED, (0, 0, 8, 8))
    upright.paste(GREEN, (8, 0, 16, 8))
    pixels = np.asarray(upright)
    from_below, from_right = pixels[::-1], pixels[:, ::-1]
    sides = [pixels, from_right, from_below[:, ::-1], from_below]
    stored = [*sides, *(side.swapaxes(0, 1) for side in sides)]
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored[orientation - 1]))
    read_back = read(image, tmp_path / "x.jpg", 16, exif=exif, quality=95)
    difference = (read_back.permute(1, 2, 0).int() - torch.from_numpy(pixels.copy()).int()).abs()
    corners = difference[[2, 2, -3, -3]][:, [2, -3]]  # far from the edges, which JPEG blurs
    assert corners.max() < 40


def test_wide_and_tall_images_are_cropped_in_the_middle(tmp_path):
    wide = Image.new("RGB", (24, 8), BLUE)
    wide.paste(RED, (8, 0, 16, 8))  # the middle third
    assert only(read(wide, tmp_path / "wide.png")) == RED
    assert only(read(wide.transpose(Image.Transpose.ROTATE_90), tmp_path / "tall.png")) == RED


def test_large_images_are_shrunk_by_means_and_small_ones_are_enlarged(tmp_path):
    fine = np.zeros((64, 64, 3), np.uint8)
    fine[::2] = 255  # lines of one pixel: every second one left out would be all white or black
    pixels = read(Image.fromarray(fine), tmp_path / "fine.png").float()
    assert (pixels - 127.5).abs().max() < 30
    assert only(read(picture(size=(1, 1)), tmp_path / "dot.png")) == RED


# %% A folder


FOLDERS = {  # files and the class of each; None: not an image of the dataset
    "flat": {"b.png": "images", "a.jpg": "images", "c.PNG": "images"},
    "deep": {"train/dog/1.png": "dog", "val/cow/1.png": "cow", "test/dog/3.png": "dog"},
    "both": {"1.png": "images", "dog/3.png": "dog", "ant/2.png": "ant"},
    "hidden": {"a.png": "images", ".b.png": None, "b.png": "images", "sub/.c/d/c.png": None},
    "clutter": {"a/1.png": "a", "@eaDir/a.png": None, "b/b.png": "b", "__MACOSX/b.png": None},
    "no clutter": {"#recycled/1.png": "#recycled", "desktop.initial/2.png": "desktop.initial"},
    "split": {"train/dog/1.png": "dog", "test/dog/2.png": "dog", "Train/cat/in/3.png": "cat"},
    "split without classes": {
        "train/1.png": "images",
        "train/2.png": "images",
        "test/1.png": "images",
    },
    "split inside a folder": {"cats/train/1.png": "images", "cats/test/2.png": "images"},
    "split and a stray": {"train/cat/1.png": "cat", "test/dog/1.png": "dog", "logo.png": "images"},
    "split, not all in classes": {
        "train/cat/1.png": "cat",
        "train/dog/2.png": "dog",
        "train/3.png": "images",
    },
    "split and wrapped": {"train/images/cat/1.png": "cat", "test/images/dog/2.png": "dog"},
    "wrapped": {"Pets/Pets/cat/1.png": "cat", "Pets/Pets/dog/2.png": "dog"},
    "no classes": {"Pets/cat/1.png": "images", "Pets/cat/2.png": "images", "3.png": "images"},
    "sessions": {"ann/2019/1.png": "ann", "ann/2020/2.png": "ann", "bob/2019/3.png": "bob"},
    "vehicles": {"bus/1.png": "bus", "train/city/2.png": "train"},  # this train is a class
    "results": {"1.png": "images", "2.png": "images", "out/samples.png": None},
    "other kinds": {"1.gif": "images", "2.jfif": "images", "3.ico": "images"},
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_class_of_an_image_is_its_folder(tmp_path, kind):
    """Other files are ignored; the folder itself may be below a hidden one."""
    classes = FOLDERS[kind]
    folder = write_folder(tmp_path / ".data" / "cats", *classes)
    (folder / "empty.jpg").mkdir()  # a folder, in spite of its name
    if kind == "results":
        (folder / "out" / "denoising.gif").write_bytes(b"")
    for name in "README.txt", "Thumbs.db", "._b.png", "labels.csv":
        (folder / name).write_text("no image")
    images, labels, names = script.load_folder(folder, 8)
    assert names == sorted({name for name in classes.values() if name})
    assert images.shape[1:] == (1, 8, 8) and images.dtype == torch.uint8, "grey: one channel"
    assert labels.dtype == torch.int64
    found = {(number, names[label]) for number, label in zip(greys(images), labels)}
    assert found == {pair for pair in enumerate(classes.values()) if pair[1]}


def test_links_are_followed_and_may_form_circles(tmp_path, capsys):
    write_folder(tmp_path, "pets/cat/1.png", "elsewhere/dog/2.png", "elsewhere/3.png")
    try:
        (tmp_path / "pets" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
        (tmp_path / "pets" / "cat" / "3.png").symlink_to(tmp_path / "elsewhere" / "3.png")
        for name in "again", "once more", "and again":  # without a check, 3 to the power of 40
            (tmp_path / "pets" / "cat" / name).symlink_to(tmp_path / "pets")
        (tmp_path / "pets" / "broken.png").symlink_to(tmp_path / "nowhere")
    except OSError:
        pytest.skip("no links here")
    images, labels, names = script.load_folder(tmp_path / "pets", 8)
    assert names == ["cat", "dog"]
    assert {*zip(greys(images), labels.tolist())} == {(0, 0), (1, 1), (2, 0)} and len(images) == 3
    assert capsys.readouterr().out.count("leads in a circle") == 3


def test_images_that_do_not_fit_into_memory_end_with_one_line(tmp_path):
    folder = write_folder(tmp_path / "cats", "a.png", "b.png")
    message = r"2 images need 600,000 GB of memory: lower IMAGE_SIZE"
    with pytest.raises(SystemExit, match=message):
        script.load_folder(folder, 10**7)


def test_numbers_sort_as_numbers_and_letters_have_one_form(tmp_path):
    names = [*(f"{i}" for i in range(1, 13)), "cafe\u0301", "photo 2", "photo 10", "x01", "x1"]
    write_folder(tmp_path / "all", *(f"{name}/{i}.png" for name in names for i in range(2)))
    _, labels, found = script.load_folder(tmp_path / "all", 8)
    assert found == [*names[:12], "caf\u00e9", *names[13:]], "x01 and x1 in a fixed order, too"
    assert labels.bincount().tolist() == [2] * 17


def test_one_coloured_image_makes_all_of_them_coloured(tmp_path):
    folder = write_folder(tmp_path / "cats", "a.png", "b.png")
    picture(RED).save(folder / "c.png")
    images, _, _ = script.load_folder(folder, 8)
    assert images.shape == (3, 3, 8, 8) and only(images[2]) == RED


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        (np.full((9, 9), 0.5, np.float32), "x.tif", 127),
        (np.full((9, 9), 100.0, np.float32), "x.tif", 100),
        (np.full((9, 9), 200, np.int32), "x.tif", 200),
        (np.full((9, 9), 257 * 90, np.int32), "x.tif", 90),
        (np.full((9, 9), 257 * 90, np.uint16), "x.png", 90),
        (np.full((9, 9), 4000, np.uint16), "x.png", None),  # 12 bits, or very dark: who knows?
        (np.full((9, 9), 16_000, np.uint16), "x.png", None),  # 14 bits
        (np.full((9, 9), 1.00001, np.float32), "x.tif", 255),
        (np.full((9, 9), 1.5, np.float32), "x.tif", None),
        (np.full((9, 9), 1, np.int32), "x.tif", 255),  # a mask
        (np.full((9, 9), -3, np.int32), "x.tif", None),
        (np.full((9, 9), np.nan, np.float32), "x.tif", None),
    ],
)
def test_many_bits_come_out_right_or_are_named(tmp_path, capsys, values, name, expected):
    folder = write_folder(tmp_path / "cats", "a.png", "b.png")
    Image.fromarray(values).save(folder / name)
    images, _, _ = script.load_folder(folder, 8)
    said = capsys.readouterr().out
    if expected is None:
        assert (
            len(images) == 2 and f"{name} (values from " in said and "save it with 8 bits" in said
        )
    else:
        assert only(images[2]) == (expected,) and said == ""


def test_what_cannot_be_read_is_named_at_once_and_left_out(tmp_path, capsys):
    """Five damaged files and two of another kind cost one line, not seven starts."""
    folder = write_folder(tmp_path / "cats", "a.png", "b.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    for i, bad in enumerate((b"hello", b"", whole[: len(whole) // 2], b"x", b"y")):
        (folder / f"broken_{i}.png").write_bytes(bad)
    for name in "notes.txt", "photo.heic":
        (folder / name).write_text("no image")
    images, _, _ = script.load_folder(folder, 8)
    assert len(images) == 3
    said = capsys.readouterr().out
    assert said.startswith("Left out 7, not readable: ") and "photo.heic (" in said
    assert all(f"broken_{i}.png (" in said for i in range(5)) and said.count("\n") == 1


def test_a_damaged_file_does_not_stay_open(tmp_path, monkeypatch):
    """Otherwise, a thousand of them would use up what a process may open."""
    folder, opened = write_folder(tmp_path / "cats", *(f"{i}.png" for i in range(5))), []

    def damaged(file, size):
        assert not any(image() for image in opened), "an earlier file is still open"
        image = Image.open(file)
        opened.append(weakref.ref(image))
        if len(opened) < 4:
            raise OSError("damaged")
        return torch.zeros(3, size, size)

    monkeypatch.setattr(script, "read_image", damaged)
    assert len(script.load_folder(folder, 8)[0]) == 2 and len(opened) == 5


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_pipe_and_a_folder_without_permission_are_named(tmp_path, capsys, monkeypatch):
    folder = write_folder(tmp_path / "cats", "a/1.png", "b/2.png", "c/3.png")
    os.mkfifo(folder / "a" / "pipe.png")  # opening it would wait for ever
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("c"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    _, _, names = script.load_folder(folder, 8)
    said = capsys.readouterr().out
    assert names == ["a", "b"] and "pipe.png (no file)" in said and "Permission denied" in said


def test_a_folder_of_results_is_named(tmp_path, capsys):
    folder = write_folder(tmp_path / "cats", "a.png", "b.png", "out/samples.png")
    (folder / "out" / "checkpoint.pt").write_bytes(b"")
    assert len(script.load_folder(folder, 8)[0]) == 2
    assert capsys.readouterr().out.startswith(f"Left out {folder / 'out'}: it holds results of ")


def test_a_sound_image_with_much_text_in_it_is_read(tmp_path, capsys):
    folder, text = write_folder(tmp_path / "cats", "a.png"), PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 3_000_000, zip=True)
    picture().save(folder / "b.png", pnginfo=text)
    assert len(script.load_folder(folder, 8)[0]) == 2 and capsys.readouterr().out == ""


def test_a_fingerprint_tells_images_apart_not_folders(tmp_path):
    def fingerprint(name, *files):
        return script.fingerprint(script.load_folder(write_folder(tmp_path / name, *files), 8)[0])

    one = fingerprint("job1/pics", "a.png", "b.png")
    assert one == fingerprint("job2/other", "a.png", "b.png") and one.startswith("2 x 1 x 8 x 8, ")
    assert one != fingerprint("job3", "a.png", "b.png", "c.png")
    picture(RED).save(tmp_path / "job2/other/b.png")
    assert one != fingerprint("job2/other", "a.png")


@pytest.mark.parametrize("name", ["empty", "lonely", "MNITS", "mnist", "a file.png"])
def test_what_is_no_folder_of_images_is_refused_in_one_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.txt").write_text("no image")
    write_folder(tmp_path / "lonely", "1.png")
    picture().save(tmp_path / "a file.png")
    with inside(tmp_path), pytest.raises(SystemExit) as end:
        script.load_dataset(name, Path("data"), 8)
    path = tmp_path.resolve() / name
    message = f"{path} is neither a dataset known here nor a folder with 2 images."
    assert end.value.code == f"DATASET: {message}"


def test_a_folder_may_be_relative_or_in_the_home_folder_or_a_path(tmp_path, monkeypatch):
    for name in "HOME", "USERPROFILE":
        monkeypatch.setenv(name, str(tmp_path))
    write_folder(tmp_path / "my cats", "a/1.png", "b/2.png")
    with inside(tmp_path):
        for name in "my cats", "./my cats/", "~/my cats", tmp_path / "my cats":
            images, labels, names, source = script.load_dataset(name, Path("data"), 8)
            assert len(images) == len(labels) == 2 and names == ["a", "b"]
            assert source == "my cats/"
    assert not (tmp_path / "data").exists()


# %% Whole runs


def test_02_is_content_with_two_images_of_any_kind(project, figures):
    """The same images elsewhere are the same; other images are refused, and nothing is lost."""
    (project.folder / "cats").mkdir()
    Image.new("LA", (30, 9), (200, 90)).save(project.folder / "cats" / "one.png")
    Image.new("I;16", (5, 50), 29_999).save(project.folder / "cats" / "other.png")
    project.prepare("02_ddpm.py", DATASET="cats")
    done = project.run_here("02_ddpm.py")
    assert done.returncode == 0, done.stderr
    assert "2 images of cats/; 1 classes: images\n" in done.stdout
    path = project.folder_of("02_ddpm.py") / "checkpoint.pt"
    before, state = path.read_bytes(), project.state("02_ddpm.py")
    assert state["settings"]["IMAGE_SHAPE"] == (1, 16, 16) and state["seen"] == 2
    assert project.names["ddpm"].sample(2).shape == (2, 1, 16, 16)
    (project.folder / "cats").rename(project.folder / "moved")
    project.edit("02_ddpm.py", DATASET="moved")
    assert project.run_here("02_ddpm.py").returncode == 0
    write_folder(project.folder / "moved", "third.png")
    done = project.run_here("02_ddpm.py")
    assert done.returncode == 1 and path.read_bytes() == before
    assert "IMAGES was '2 x 1 x 16 x 16, " in done.stderr and "now is '3 x " in done.stderr


def test_03_takes_the_subfolders_as_classes(project, figures):
    files = [f"{animal}/{i}.png" for animal in ("lynx", "ant", "bee") for i in range(4)]
    write_folder(project.folder / "cats", *files)
    project.prepare("03_conditional_ddpm.py", DATASET="cats")
    done = project.run_here("03_conditional_ddpm.py")
    assert done.returncode == 0, done.stderr
    assert "12 images of cats/; 3 classes: ant, bee, lynx\n" in done.stdout
    ddpm = project.names["ddpm"]
    assert ddpm.null_label == 3 and ddpm.class_names == ["ant", "bee", "lynx"]
    assert ddpm.model.label_embedding.num_embeddings == 4
    assert ddpm.sample(2, ["lynx", 0]).shape == (2, 1, 16, 16)
    # Another class of the same network: the labels would mean something else.
    (project.folder / "cats" / "bee").rename(project.folder / "cats" / "bug")
    done = project.run_here("03_conditional_ddpm.py")
    assert done.returncode == 1 and "CLASS_NAMES was" in done.stderr and "'bug'" in done.stderr


def test_a_label_that_is_the_name_of_a_class_means_that_class():
    module = load("03_conditional_ddpm.py")
    names = [*map(str, range(1, 13)), "caf\u00e9"]
    for label, number in (
        (1, 0),
        ("12", 11),
        (0, 0),
        ("cafe\u0301", 12),
        (np.int64(12), 11),
        (13, 13),
    ):
        assert module.to_labels(label, 1, names).tolist() == [number], label
    assert module.to_labels(torch.tensor([1, 12]), 2, names).tolist() == [1, 12], "as in training"
    assert module.to_labels(None, 2, names).tolist() == [13, 13]
    for label in "cat", 14, -1, torch.tensor([14]):
        with pytest.raises(ValueError, match=r"there is no class .*: 1, 2, 3"):
            module.to_labels(label, 1, names)
