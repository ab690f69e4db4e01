"""An image folder, end to end, with a tiny random vision transformer. Needs PIL but not torchvision."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image  # comes with matplotlib
from train_cases import quick, tiny_config

from tlkernels.train import UserError, pipeline
from tlkernels.train.config import DataConfig
from tlkernels.train.data import load_data
from tlkernels.train.images import to_rgb
from tlkernels.train.loading import load
from tlkernels.train.rows import ImageRows

pytestmark = pytest.mark.usefixtures(quick.__name__)


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pictures(tmp_path):
    for name, color in (("blue", (20, 30, 220)), ("red", (220, 30, 20))):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(16):
            made = Image.new("RGB" if number % 2 else "RGBA", (20 + number, 24), color)
            made.save(tmp_path / "pictures" / name / f"{number}.png")
    return tmp_path / "pictures"


def test_an_image_folder(vision, pictures, tmp_path):
    config = tiny_config(tmp_path / "run", vision, str(pictures), steps=12)
    config.optim.lr = 1e-2
    pipeline.run(config)
    result = json.loads((tmp_path / "run/finetuned/result.json").read_text())
    assert result["accuracy"] == 1.0
    answers = load(tmp_path / "run").predict([Image.new("RGB", (30, 30), (0, 0, 255)), Image.new("L", (9, 9), 90)])
    assert answers[0][0] == "blue"


GREY = np.array([[0, 60], [130, 255]], np.uint8)  # each image below looks like this


def palette():
    image = Image.fromarray(3 - np.arange(4, dtype=np.uint8).reshape(2, 2)).convert("P")
    image.putpalette([level for grey in (255, 130, 60, 0) for level in (grey,) * 3])
    return image


def transparent(mode):
    """Black with transparency: without its transparency all of it would be black."""
    image = Image.fromarray(np.zeros((2, 2), np.uint8)).convert(mode)
    image.putalpha(Image.fromarray(255 - GREY))
    return image


def turned():
    image = Image.fromarray(np.rot90(GREY).copy())
    image.getexif()[274] = 6  # display it rotated by 90 degrees
    return image


WIDE = GREY.astype(np.uint16) * 257
MADE = {
    "L.png": lambda: Image.fromarray(GREY),
    "RGB.png": lambda: Image.fromarray(GREY).convert("RGB"),
    "P.png": palette,
    "P.gif": palette,
    "CMYK.tif": lambda: Image.fromarray(GREY).convert("RGB").convert("CMYK"),
    "LA.png": lambda: transparent("L"),
    "RGBA.png": lambda: transparent("RGB"),
    "RGBA.webp": lambda: transparent("RGB"),
    "16.png": lambda: Image.fromarray(WIDE),
    "16.tif": lambda: Image.fromarray(WIDE),
    "16 big.tif": lambda: Image.frombytes("I;16B", (2, 2), WIDE.astype(">u2").tobytes()),
    "32.tif": lambda: Image.fromarray(WIDE.astype(np.int32)),
    "exif.png": turned,
}


@pytest.mark.parametrize("name", MADE)
def test_every_mode_keeps_its_contrast(name, tmp_path):
    for number in range(10):
        (tmp_path / "xy"[number % 2]).mkdir(exist_ok=True)
        image = MADE[name]()
        lossless = {"lossless": True, "exact": True} if name.endswith("webp") else {}
        image.save(tmp_path / "xy"[number % 2] / f"{number} {name}", exif=image.getexif(), **lossless)
    data = load_data(DataConfig(path=str(tmp_path)), seed=0)
    seen = []
    ImageRows(
        data.train, lambda images, return_tensors: seen.extend(images) or {"pixel_values": torch.zeros(1)}, 2
    ).inputs(torch.arange(2), "cpu")
    for image in (*seen, to_rgb(MADE[name]())):
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(int) - GREY[..., None]).max() <= 1, np.asarray(image)[..., 0]


def test_what_has_no_range_is_refused():
    for pixels, match in ((GREY / 255.0, "floating-point"), (GREY.astype(np.int32) * 70_000, "got 0 to 17850000")):
        with pytest.raises(ValueError, match=match):
            to_rgb(Image.fromarray(pixels.astype(np.float32 if pixels.dtype.kind == "f" else np.int32)))


def test_images_that_are_cut_or_too_large_are_named(tmp_path, monkeypatch):
    for number in range(20):
        (tmp_path / "xy"[number % 2]).mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(
            tmp_path / "xy"[number % 2] / f"{number}.jpg"
        )
    rows = ImageRows(load_data(DataConfig(path=str(tmp_path)), seed=0).train, None, 2)
    path = Path(rows.table.place(3))
    whole = path.read_bytes()
    for broken in (whole[:-300], whole[:100], b"", b"text"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=f"the image in {path} cannot be read: "):
            rows.inputs(torch.tensor([3]), "cpu")
    path.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(UserError, match=f"the image in {path} cannot be read: DecompressionBombError"):
        rows.inputs(torch.tensor([3]), "cpu")


def test_a_broken_image(vision, pictures, tmp_path):
    for number in range(16):
        (pictures / "red" / f"{number}.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(UserError, match=r"the image in .*pictures/red/\d+.png cannot be read"):
        pipeline.run(tiny_config(tmp_path / "run", vision, str(pictures)))
