"""A folder of images of one's own as DATASET: any kind of image, with classes or without."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import inside, load
from PIL import Image

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
    "flat": {"b.png": "cats", "a.jpg": "cats", "c.PNG": "cats"},
    "deep": {"train/dog/1.png": "dog", "cow/1.png": "cow", "test/dog/3.png": "dog"},
    "both": {"1.png": "cats", "dog/3.png": "dog", "ant/2.png": "ant"},
    "hidden": {"a.png": "cats", ".b.png": None, "b.png": "cats", "sub/.c/d/c.png": None},
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_class_of_an_image_is_its_folder(tmp_path, kind):
    """Other files are ignored; the folder itself may be below a hidden one."""
    classes = FOLDERS[kind]
    folder = write_folder(tmp_path / ".data" / "cats", *classes)
    (folder / "empty").mkdir()
    for name in "README.txt", "Thumbs.db", "._b.png", "labels.csv":
        (folder / name).write_text("no image")
    images, labels, names = script.load_folder(folder, 8)
    assert names == sorted({name for name in classes.values() if name})
    assert images.shape[1:] == (3, 8, 8) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    found = [(number, names[label]) for number, label in zip(greys(images), labels)]
    files = sorted(zip(classes, enumerate(classes.values())))
    assert found == [pair for _, pair in files if pair[1]], "sorted by path"


@pytest.mark.parametrize("kind", ["text", "empty", "cut"])
def test_an_unreadable_image_is_named(tmp_path, capsys, kind):
    folder = write_folder(tmp_path / "cats", "a.png", "b.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "broken.png")
    whole = (folder / "broken.png").read_bytes()
    bad = {"text": b"hello", "empty": b"", "cut": whole[: len(whole) // 2]}[kind]
    (folder / "broken.png").write_bytes(bad)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        script.load_folder(folder, 8)
    message = str(end.value).strip()  # it begins on a line of its own, below the bar
    assert message.startswith(f"{folder / 'broken.png'} cannot be read as an image (")
    assert message.endswith("): repair or remove it.") and "\n" not in message


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
            assert source == f"{tmp_path.name}/my cats/", "cats/train is not dogs/train"
    assert not (tmp_path / "data").exists()


# %% Whole runs


def test_02_is_content_with_two_images_of_any_kind(project, figures):
    (project.folder / "cats").mkdir()
    Image.new("LA", (30, 9), (200, 90)).save(project.folder / "cats" / "one.png")
    Image.new("I;16", (5, 50), 999).save(project.folder / "cats" / "other.png")
    project.prepare("02_ddpm.py", DATASET="cats")
    done = project.run_here("02_ddpm.py")
    assert done.returncode == 0, done.stderr
    assert f"2 images of {project.folder.name}/cats/," in done.stdout
    state = project.state("02_ddpm.py")
    assert state["settings"]["DATASET"].endswith("/cats/") and state["seen"] == 2
    assert state["settings"]["IMAGE_SHAPE"] == (3, 16, 16)
    assert project.names["ddpm"].sample(2).shape == (2, 3, 16, 16)
    project.edit("02_ddpm.py", IMAGE_SIZE=8)
    done = project.run_here("02_ddpm.py")
    assert done.returncode == 1
    assert "IMAGE_SHAPE was (3, 16, 16) and now is (3, 8, 8)" in done.stderr


def test_03_takes_the_subfolders_as_classes(project, figures):
    files = [f"{animal}/{i}.png" for animal in ("lynx", "ant", "bee") for i in range(4)]
    write_folder(project.folder / "cats", *files)
    project.prepare("03_conditional_ddpm.py", DATASET="cats")
    done = project.run_here("03_conditional_ddpm.py")
    assert done.returncode == 0, done.stderr
    assert f"12 images of {project.folder.name}/cats/," in done.stdout
    ddpm = project.names["ddpm"]
    assert ddpm.null_label == 3 and ddpm.class_names == ["ant", "bee", "lynx"]
    assert ddpm.model.label_embedding.num_embeddings == 4
    assert ddpm.sample(2, ["lynx", 0]).shape == (2, 3, 16, 16)
    # Another class of the same network: the labels would mean something else.
    (project.folder / "cats" / "bee").rename(project.folder / "cats" / "wasp")
    done = project.run_here("03_conditional_ddpm.py")
    assert done.returncode == 1 and "CLASS_NAMES was" in done.stderr and "'wasp'" in done.stderr
