"""Tasks with images: folders named for labels, rows that name files, and what cannot be read."""

import json
from io import BytesIO

import image_encoders
import numpy as np
import pytest
import transformers
from PIL import Image

from lowrank_cli import tasks
from lowrank_cli.config.composition import compose
from lowrank_cli.errors import UserError
from lowrank_cli.tasks import images

SHAPES = ["circle", "cross", "square", "triangle"]


def config(path, **values):
    """The task of ``image_folder`` on the data in ``path``."""
    settings = [f"task.{key}={json.dumps(value)}" for key, value in values.items()]
    return compose("train", ["model=vit_base", "task=image_folder", f"task.path={path}", *settings]).config.task


@pytest.fixture
def shapes(tmp_path):
    return image_encoders.images(tmp_path / "shapes")


def test_folders_are_labels(shapes):
    task = tasks.load(config(shapes))
    assert list(task.label_words) == SHAPES
    assert [len(split) for split in (task.train, task.dev, task.test)] == [16, 8, 12]
    example = task.test[-1]
    assert (example.prompt, example.answer.strip()) == ("test/triangle/2.png", "triangle")
    assert example.picture == shapes / "test/triangle/2.png"


def test_drawn_images_can_be_drawn_again(shapes):
    file = shapes / "test" / "cross" / "0.png"
    before = file.read_bytes()
    file.write_bytes(b"")
    assert image_encoders.images(shapes) == shapes
    assert file.read_bytes() == before


def test_folders_without_splits_are_split_once(shapes):
    one, other = (tasks.load(config(shapes / "train")) for _ in range(2))
    assert one == other
    assert [len(split) for split in (one.train, one.dev, one.test)] == [13, 2, 1]
    assert "train has no splits" in one.note


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_name_files_beside_them(kind, shapes):
    rows = [{"picture": f"train/{shape}/{n}.png", "kind": shape} for shape in SHAPES for n in range(4)]
    file = shapes / f"rows.{kind}"
    if kind == "parquet":
        import datasets

        features = datasets.Features(picture=datasets.Image(), kind=datasets.Value("string"))
        inside = [{**row, "picture": {"bytes": (shapes / row["picture"]).read_bytes(), "path": None}} for row in rows]
        datasets.Dataset.from_list(inside, features=features).to_parquet(file)
    else:
        lines = [json.dumps(row) for row in rows]
        csv = ["picture,kind", *(",".join(row.values()) for row in rows)]
        file.write_text("\n".join(lines if kind == "jsonl" else csv))
    task = tasks.load(config(file, image="picture", target="kind", template="{picture}", label_words=SHAPES))
    read = [*task.train, *task.dev, *task.test]
    assert sorted(example.answer.strip() for example in read) == sorted(row["kind"] for row in rows)
    assert isinstance(read[0].picture, bytes) == (kind == "parquet")


def test_an_image_is_scaled_and_turned_as_its_camera_says(tmp_path):
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (0, 0, 32, 32))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise: the left half is above
    buffer = BytesIO()
    image.save(buffer, "PNG", exif=exif)
    row = images.EncodedImage(buffer.getvalue(), 2, 16, "here")
    batch = images.collate([row], transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}))
    assert batch["labels"].tolist() == [2]
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    assert batch["pixel_values"][0, :, :14].mean() > 0.9
    assert batch["pixel_values"][0, :, 18:].mean() < -0.9


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_16_bit_greys_are_scaled(ending):
    buffer = BytesIO()
    Image.fromarray(np.array([[0, 0x4000, 0xFFFF]], dtype=np.uint16)).save(buffer, ending)
    with Image.open(buffer) as image:
        assert np.asarray(images.decoded(image))[0, :, 0].tolist() == [0, 0x40, 0xFF]


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_is_read_without_a_warning():
    buffer = BytesIO()
    Image.linear_gradient("L").convert("P").save(buffer, "PNG", transparency=bytes(3))
    with Image.open(buffer) as image:
        assert images.decoded(image).mode == "RGB"


def test_greys_without_a_range_are_refused(shapes):
    Image.new("F", (8, 8)).save(shapes / "train" / "cross" / "deep.tiff")
    with pytest.raises(UserError, match=r"cross/deep\.tiff' cannot be read as an image \(32-bit greys"):
        tasks.load(config(shapes))


def test_unreadable_images_are_named(shapes):
    broken = shapes / "train" / "cross" / "1.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"shapes:6: '.*cross/1\.png' cannot be read as an image \(none of PNG, JPEG"):
        tasks.load(config(shapes))
    broken.write_bytes(whole[:-40])
    task = tasks.load(config(shapes))
    (cut,) = (images.encode(example, 4, 16) for example in task.train if example.picture == broken)
    with pytest.raises(UserError, match=r"cross/1\.png' cannot be read as an image \(.*truncated"):
        images.collate([cut], transformers.ViTImageProcessorPil())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gone.png", r"rows\.jsonl:2: there is no image '.*gone\.png' \(column 'image'\)"),
        (7, r"rows\.jsonl:2: column 'image' must name the file of an image, not '7'"),
    ],
)
def test_rows_without_an_image_are_named(value, message, shapes):
    rows = [{"image": "test/cross/0.png", "label": "cross"}, {"image": value, "label": "cross"}]
    (shapes / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=message):
        tasks.load(config(shapes / "rows.jsonl", label_words=SHAPES))


def test_a_label_without_images_is_refused(shapes):
    (shapes / "train" / "hexagon").mkdir()
    with pytest.raises(UserError, match=r"the folder '.*train/hexagon' of a label holds no file \(\.png, "):
        tasks.load(config(shapes))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("model=minilm task=image_folder", "model.images: minilm reads no images, and task=image_folder has them"),
        ("model=vit_base task=tiny_topic", "model.images: vit_base reads images, and task=tiny_topic has none"),
        ("model=vit_base task=image_folder method=milora", "'milora' chooses modules by the tokens of a prompt"),
        ("model=vit_base model.kind=causal task=image_folder", "model.images: true is for model.kind=encoder"),
        ("model=vit_base task=image_folder task.answer=choices", "task.image: an image is answered with labels"),
        ("model=vit_base task=image_folder task.label_words=[]", r"names fewer than two labels; name them, or set"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(overrides, message):
    from lowrank_cli.launch import stage

    labels = [] if "label_words" in overrides else ["task.label_words=[a,b]"]
    with pytest.raises(UserError, match=message):
        stage.check("train", ["method=lora", *labels, *overrides.split()], None)
