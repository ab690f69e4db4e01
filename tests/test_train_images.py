"""An image folder, end to end, on a tiny made vision transformer. PIL is enough; torchvision is not needed."""

import json

import pytest
import transformers
from PIL import Image  # comes with matplotlib
from train_cases import quick, tiny_config

from tlkernels.train import UserError, pipeline
from tlkernels.train.model import load

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
    pipeline.finetune(config)
    result = json.loads((tmp_path / "run/finetuned/result.json").read_text())
    assert result["accuracy"] == 1.0
    answers = load(tmp_path / "run").predict([Image.new("RGB", (30, 30), (0, 0, 255)), Image.new("L", (9, 9), 90)])
    assert answers[0][0] == "blue"


def test_a_broken_image(vision, pictures, tmp_path):
    for number in range(16):
        (pictures / "red" / f"{number}.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(UserError, match=r"the image of row \d+ cannot be read"):
        pipeline.finetune(tiny_config(tmp_path / "run", vision, str(pictures)))
