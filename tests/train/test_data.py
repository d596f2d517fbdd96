"""Image sets in memory: what is read, how it is split, and what a batch is."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gossamer.train.data import CACHE, Batches, Split, crop_and_flip, load_data

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def picture(value, mode="RGB", size=(6, 5)):
    """One noisy image; `value` picks the noise. size: (width, height)."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(value).integers(0, 256, shape, np.uint8))


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def write_parquet(path, images, labels, column="label", names=None):
    import datasets

    cells = [{"bytes": encoded(image), "path": None} for image in images]
    columns = {"image": cells, **({column: labels} if labels is not None else {})}
    features = {"image": datasets.Image()}
    if labels is not None:
        features[column] = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.to_parquet(path)


def write_folder(root, classes, count, mode="RGB", size=(6, 5)):
    for y, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(100 * y + i, mode, size).save(root / name / f"{i:02}.png")


def rows(split):
    """The split as a set of hashable images."""
    return {image.numpy().tobytes() for image in split.images}


# Digits


def test_digits_are_split_evenly_and_always_alike():
    data, again = load_data("digits"), load_data("digits")
    assert (len(data.train), len(data.val), len(data.test)) == (1294, 144, 359)
    assert data.in_shape == (1, 8, 8)
    assert data.classes == tuple("0123456789")
    assert data.num_classes == 10
    assert data.train.images.dtype == torch.float32
    assert (data.train.images.min(), data.train.images.max()) == (0, 1)
    for one, other in ((data.train, again.train), (data.val, again.val), (data.test, again.test)):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    whole = torch.cat([split.labels for split in (data.train, data.val, data.test)]).bincount()
    assert ((data.test.labels.bincount() - 0.2 * whole).abs() <= 1).all()
    assert ((data.val.labels.bincount() - 0.1 * 0.8 * whole).abs() <= 1).all()


def test_splits_are_disjoint_and_the_seed_moves_only_validation():
    data, other = load_data("digits"), load_data("digits", seed=1)
    # All 1,797 digits are different, so that images can be told apart by their pixels.
    parts = [rows(split) for split in (data.train, data.val, data.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797
    assert torch.equal(data.test.images, other.test.images)
    assert rows(data.val) != rows(other.val)
    assert len(load_data("digits", val_fraction=0.5).val) == 719


def test_mean_and_std_are_those_of_the_training_pixels():
    data = load_data("digits")
    pixels = data.train.images.double()
    assert data.mean.item() == pytest.approx(pixels.mean().item(), abs=1e-6)
    assert data.std.item() == pytest.approx(pixels.std(correction=0).item(), abs=1e-6)
    assert data.mean.shape == data.std.shape == (1,)


def test_digits_can_be_resized():
    assert load_data("digits", image_size=16).in_shape == (1, 16, 16)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_val_fraction_must_be_a_fraction(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        load_data("digits", val_fraction=fraction)


def test_too_few_images_to_hold_out(tmp_path):
    write_folder(tmp_path, ["a", "b"], 2)
    with pytest.raises(ValueError, match="3 training images are too few to hold out 10%"):
        load_data(str(tmp_path))


# Parquet


def test_parquet_folder_with_three_splits(tmp_path):
    files = ((6, "train-0"), (4, "train-1"), (3, "validation-0"), (2, "test-0"))
    for start, (count, file) in enumerate(files):
        images = [picture(10 * start + i) for i in range(count)]
        labels = [i % 2 for i in range(count)]
        write_parquet(tmp_path / f"{file}.parquet", images, labels, names=["cat", "dog"])
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.val), len(data.test)) == (10, 3, 2)
    assert data.classes == ("cat", "dog")
    assert data.in_shape == (3, 5, 6)
    assert data.train.images.dtype == torch.uint8
    expected = np.asarray(picture(31)).transpose(2, 0, 1)
    assert torch.equal(data.test.images[1], torch.from_numpy(expected.copy()))
    assert data.test.labels.tolist() == [0, 1]
    pixels = data.train.images.double() / 255
    assert torch.allclose(data.mean.double(), pixels.mean((0, 2, 3)))
    assert torch.allclose(data.std.double(), pixels.std((0, 2, 3), correction=0))


def test_one_grey_parquet_file_is_split(tmp_path):
    images = [picture(i, "L") for i in range(40)]
    write_parquet(tmp_path / "all.parquet", images, [7, 3] * 20, column="fine_label")
    data = load_data(str(tmp_path / "all.parquet"), val_fraction=0.25)
    assert (len(data.train), len(data.val), len(data.test)) == (24, 8, 8)
    assert data.in_shape == (1, 5, 6)
    assert data.classes == ("3", "7")  # labels without names count from 0 in their order
    for split, count in ((data.train, 12), (data.val, 4), (data.test, 4)):
        assert split.labels.bincount().tolist() == [count, count]


def test_validation_without_test_is_the_test_set(tmp_path):
    write_parquet(tmp_path / "train.parquet", [picture(i) for i in range(20)], [0, 1] * 10)
    write_parquet(tmp_path / "val.parquet", [picture(50 + i) for i in range(6)], [0, 1] * 3)
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 6)


def test_plain_bytes_and_string_labels(tmp_path):
    import pyarrow
    import pyarrow.parquet

    columns = {"image": [encoded(picture(i)) for i in range(20)], "labels": ["no", "yes"] * 10}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    data = load_data(str(tmp_path))
    assert data.classes == ("no", "yes")
    assert (len(data.train), len(data.val), len(data.test)) == (14, 2, 4)


def test_missing_labels(tmp_path):
    images = [picture(i) for i in range(4)]
    write_parquet(tmp_path / "train.parquet", images, None)
    with pytest.raises(ValueError, match=r"the columns image; wanted .* label, labels, fine_label"):
        load_data(str(tmp_path))
    write_parquet(tmp_path / "train.parquet", images, [0, 1, -1, 0], names=["a", "b"])
    with pytest.raises(ValueError, match="train image 2 has no label"):
        load_data(str(tmp_path))
    write_parquet(tmp_path / "train.parquet", images, [0, 1, None, 0])
    with pytest.raises(ValueError, match="train image 2 has no label"):
        load_data(str(tmp_path))


def test_labels_must_be_classes(tmp_path):
    import pyarrow
    import pyarrow.parquet

    columns = {"image": [encoded(picture(0))], "label": [0.5]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"'label' holds .*float64.*; wanted one class per image"):
        load_data(str(tmp_path))


def test_parquet_names_that_say_no_split(tmp_path):
    write_parquet(tmp_path / "part-0.parquet", [picture(0)], [0])
    with pytest.raises(ValueError, match=r"part-0\.parquet; wanted names that start with train"):
        load_data(str(tmp_path))
    (tmp_path / "part-0.parquet").rename(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="the splits test; wanted train"):
        load_data(str(tmp_path))


def test_empty_split(tmp_path):
    write_parquet(tmp_path / "train.parquet", [], [])
    with pytest.raises(ValueError, match="train split is empty"):
        load_data(str(tmp_path))


def test_nothing_is_written_elsewhere(tmp_path, monkeypatch):
    import datasets

    cache, scratch = tmp_path / "cache", tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    write_folder(tmp_path / "set", ["a", "b"], 6)
    write_parquet(tmp_path / "train.parquet", [picture(i) for i in range(12)], [0, 1] * 6)
    before = sorted(tmp_path.rglob("*"))
    load_data(str(tmp_path / "set"))
    load_data(str(tmp_path / "train.parquet"))
    assert sorted(tmp_path.rglob("*")) == before


# Decoded images that are kept


def same(one, other):
    parts = [(getattr(data, name)) for data in (one, other) for name in ("train", "val", "test")]
    return one.classes == other.classes and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        for a, b in zip(parts[:3], parts[3:], strict=True)
    )


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """An image folder, and the cache that is set."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    write_folder(tmp_path / "set" / "train", ["a", "b"], 10)
    write_folder(tmp_path / "set" / "test", ["a", "b"], 3)
    return tmp_path / "set", tmp_path / "cache"


def test_local_sets_are_decoded_once_where_a_cache_is_named(cached, monkeypatch):
    root, cache = cached
    monkeypatch.delenv(CACHE)
    plain = load_data(str(root))
    assert not cache.exists()
    monkeypatch.setenv(CACHE, str(cache))
    first = load_data(str(root))
    monkeypatch.setattr("gossamer.train.data._decode", None)  # whoever decodes again, fails
    again = load_data(str(root))
    assert same(plain, first)
    assert same(plain, again)
    other = load_data(str(root), seed=1, val_fraction=0.3)  # splits are drawn after decoding
    assert len(other.val) == 6
    assert len(list(cache.iterdir())) == 1  # one, and no temporary one


def test_what_decides_about_the_pixels_has_its_own_file(cached):
    root, cache = cached
    load_data(str(root))
    assert load_data(str(root), image_size=4).in_shape == (3, 4, 4)
    assert len(list(cache.iterdir())) == 2
    picture(999).save(root / "test" / "a" / "00.png")
    changed = load_data(str(root))
    assert len(list(cache.iterdir())) == 3
    assert np.asarray(picture(999)).transpose(2, 0, 1).tobytes() in rows(changed.test)
    picture(998).save(root / "test" / "a" / "99.png")
    assert len(load_data(str(root)).test) == 7


def test_only_local_sets_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    load_data("digits")
    assert not list(tmp_path.iterdir())


def test_a_damaged_cache_says_what_to_remove(cached):
    root, cache = cached
    load_data(str(root))
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged .*remove it"):
        load_data(str(root))


# Image folders


def test_image_folder_of_classes(tmp_path):
    # A class called train, and characters that mean something in a pattern.
    root = tmp_path / "my [set] *1"
    write_folder(root, ["bus", "train"], 10, "L")
    data = load_data(str(root))
    assert data.classes == ("bus", "train")
    assert (len(data.train), len(data.val), len(data.test)) == (14, 2, 4)
    assert data.in_shape == (1, 5, 6)


def test_image_folder_of_splits(tmp_path):
    write_folder(tmp_path / "train", ["a", "b"], 5)
    write_folder(tmp_path / "val", ["a", "b"], 2)
    write_folder(tmp_path / "test", ["a", "b"], 3)
    (tmp_path / "notes").mkdir()
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.val), len(data.test)) == (10, 4, 6)
    assert data.classes == ("a", "b")
    expected = np.asarray(picture(101)).transpose(2, 0, 1)
    assert torch.equal(data.val.images[3], torch.from_numpy(expected.copy()))
    assert data.val.labels.tolist() == [0, 0, 1, 1]


def test_image_folder_without_classes(tmp_path):
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="give every class a subfolder of its own"):
        load_data(str(tmp_path))


def test_one_image_in_colour_makes_the_set_rgb(tmp_path):
    write_folder(tmp_path, ["a", "b"], 10, "L")
    picture(0, "RGB").save(tmp_path / "b" / "09.png")
    data = load_data(str(tmp_path))
    assert data.in_shape == (3, 5, 6)
    grey = [(image[0] == image[1]).all() for image in data.train.images]
    assert sum(grey) >= len(grey) - 1


def test_mixed_sizes_need_image_size(tmp_path):
    write_folder(tmp_path, ["a", "b"], 10)
    picture(0, size=(9, 7)).save(tmp_path / "b" / "05.png")
    with pytest.raises(ValueError, match=r"6x5 and of 9x7 pixels .* set image_size"):
        load_data(str(tmp_path))
    data = load_data(str(tmp_path), image_size=4)
    assert data.in_shape == (3, 4, 4)
    small = picture(100).resize((4, 4), Image.Resampling.BILINEAR)
    assert np.asarray(small).transpose(2, 0, 1).tobytes() in (
        rows(data.train) | rows(data.val) | rows(data.test)
    )
    with pytest.raises(ValueError, match="image_size=0"):
        load_data(str(tmp_path), image_size=0)


def test_photographs_are_turned_upright(tmp_path):
    write_folder(tmp_path, ["a", "b"], 10, size=(6, 5))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    for file in tmp_path.rglob("*.png"):
        Image.open(file).save(file, exif=exif)
    assert load_data(str(tmp_path)).in_shape == (3, 6, 5)


def test_images_that_cannot_be_used(tmp_path):
    write_folder(tmp_path, ["a", "b"], 2)
    (tmp_path / "b" / "01.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="train image 3 cannot be decoded"):
        load_data(str(tmp_path))
    deep = np.full((5, 6), 40_000, np.uint16)
    Image.fromarray(deep).save(tmp_path / "b" / "01.png")
    with pytest.raises(ValueError, match=r"train image 3 .* more than 8 bits"):
        load_data(str(tmp_path))


# Names and paths that lead nowhere


def test_missing_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"did you mean digits\?.*owner/name"):
        load_data("digit")
    write_folder(tmp_path / "flowers", ["a", "b"], 1)
    with pytest.raises(ValueError, match=r"did you mean flowers\?.*there is no .*flower;"):
        load_data(str(tmp_path / "flower"))
    (tmp_path / "table.csv").write_text("x")
    with pytest.raises(ValueError, match="is no Parquet file"):
        load_data(str(tmp_path / "table.csv"))


def test_hub_names(monkeypatch):
    import datasets

    def unreachable(name):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"there is no .*; as a set of the Hugging Face hub .*reach"
    ):
        load_data("someone/pictures")

    features = datasets.Features(img=datasets.Image(), fine_label=datasets.ClassLabel(2))
    columns = {"img": [picture(i) for i in range(20)], "fine_label": [0, 1] * 10}
    published = datasets.Dataset.from_dict(columns, features=features)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name: datasets.DatasetDict(train=published, valid=published, extra=published),
    )
    data = load_data("someone/pictures")
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 20)


# Batches


@pytest.fixture(scope="module")
def colours():
    """33 noisy 3x8x8 images, each with its own label, and a mean and std to normalise them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (33, 3, 8, 8), dtype=torch.uint8, generator=generator)
    scale = {"mean": torch.tensor([0.4, 0.5, 0.6]), "std": torch.tensor([0.2, 0.3, 0.25])}
    return Split(images, torch.arange(33)), scale


def test_plain_batches_are_the_normalised_split_in_order(colours):
    split, scale = colours
    batches = Batches(split, batch_size=8, **scale)
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    mean, std = (scale[key].view(3, 1, 1) for key in ("mean", "std"))
    assert torch.allclose(x, (split.images / 255 - mean) / std, atol=1e-5)
    assert x.dtype == torch.float32
    assert torch.equal(y, split.labels)
    assert [len(labels) for _, labels in batches] == [8, 8, 8, 8, 1]
    assert len(batches) == 5


def test_float_images_keep_their_scale(colours):
    split, scale = colours
    floats = Split(split.images / 255, split.labels)
    kept = floats.images.clone()
    (x, _), (reference, _) = (
        next(iter(Batches(s, batch_size=33, **scale))) for s in (floats, split)
    )
    assert torch.allclose(x, reference, atol=1e-5)
    assert torch.equal(floats.images, kept)


def test_drop_last(colours):
    split, scale = colours
    batches = Batches(split, batch_size=8, drop_last=True, **scale)
    assert len(batches) == 4
    assert [len(labels) for _, labels in batches] == [8] * 4
    with pytest.raises(ValueError, match="33 images do not fill one batch of 34"):
        Batches(split, batch_size=34, drop_last=True, **scale)


def test_an_epoch_is_the_same_whatever_came_before(colours):
    split, scale = colours

    def epoch(batches, number):
        batches.set_epoch(number)
        return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])

    def fresh(seed=3):
        return Batches(split, batch_size=8, shuffle=True, augment=True, seed=seed, **scale)

    used = fresh()
    for number in (0, 1, 2):
        epoch(used, number)
    next(iter(used))  # an epoch left half way
    torch.manual_seed(99)  # and another global state
    x, y = epoch(used, 5)
    again_x, again_y = epoch(fresh(), 5)
    assert torch.equal(x, again_x)
    assert torch.equal(y, again_y)
    assert sorted(y.tolist()) == list(range(33))
    for other_x, other_y in (epoch(used, 6), epoch(fresh(seed=4), 5), epoch(fresh(seed=5), 3)):
        assert not torch.equal(y, other_y)
        assert not torch.equal(x, other_x)


def crop_and_flip_one_by_one(images, top, left, flipped, padding):
    """The plain twin: one image after the other, with slices."""
    c, h, w = images.shape[1:]
    out = []
    for image, y, x, mirrored in zip(images, top, left, flipped, strict=True):
        canvas = torch.zeros(c, h + 2 * padding, w + 2 * padding, dtype=images.dtype)
        canvas[:, padding : padding + h, padding : padding + w] = image
        crop = canvas[:, y : y + h, x : x + w]
        out.append(crop.flip(2) if mirrored else crop)
    return torch.stack(out)


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 7)])
def test_crop_and_flip_equals_its_slow_twin(shape, padding):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(1, 256, (50, *shape), dtype=torch.uint8, generator=generator)
    top, left = torch.randint(2 * padding + 1, (2, 50), generator=generator)
    flipped = torch.rand(50, generator=generator) < 0.5
    got = crop_and_flip(images, top, left, flipped, padding)
    assert got.dtype == torch.uint8
    assert torch.equal(got, crop_and_flip_one_by_one(images, top, left, flipped, padding))


@pytest.mark.parametrize(("side", "padding"), [(4, 1), (8, 1), (28, 4), (32, 4), (224, 28)])
def test_crops_move_by_an_eighth_of_the_image(side, padding):
    split = Split(torch.zeros(1, 3, side, 2 * side, dtype=torch.uint8), torch.zeros(1).long())
    scale = {"mean": torch.zeros(3), "std": torch.ones(3)}
    assert Batches(split, batch_size=1, augment=True, **scale).crop_padding == padding
    assert Batches(split, batch_size=1, crop_padding=0, **scale).crop_padding == 0


def test_augmentation_draws_every_crop_and_both_mirrors():
    # One bright pixel in the middle tells where each image went; its neighbour, which way round.
    image = torch.zeros(1, 1, 7, 7, dtype=torch.uint8)
    image[..., 3, 3], image[..., 3, 4] = 255, 128
    split = Split(image.expand(400, 1, 7, 7), torch.zeros(400, dtype=torch.int64))
    unscaled = {"mean": torch.zeros(1), "std": torch.ones(1)}

    def drawn(**options):
        batches = Batches(
            split, batch_size=400, augment=True, crop_padding=1, **unscaled, **options
        )
        ((x, _),) = batches
        places = [tuple((one[0] == 1).nonzero()[0].tolist()) for one in x]
        mirrored = sum(one[0, y, x - 1].item() > 0 for one, (y, x) in zip(x, places, strict=True))
        return set(places), mirrored

    every = {(y, x) for y in (2, 3, 4) for x in (2, 3, 4)}
    places, mirrored = drawn()
    assert places == every
    assert 150 < mirrored < 250
    assert drawn(flip=False) == (every, 0)


def test_padding_is_black_before_normalisation():
    split = Split(torch.full((64, 1, 4, 4), 255, dtype=torch.uint8), torch.zeros(64).long())
    mean, std = torch.tensor([0.5]), torch.tensor([0.25])
    ((x, _),) = Batches(split, batch_size=64, augment=True, mean=mean, std=std)
    assert x.unique().tolist() == pytest.approx([-2, 2])


def test_channels_last_changes_the_layout_only(colours):
    split, scale = colours
    options = {"batch_size": 8, "shuffle": True, "augment": True, **scale}
    x, _ = next(iter(Batches(split, channels_last=True, **options)))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, next(iter(Batches(split, **options)))[0])


def test_unusable_batches(colours):
    split, scale = colours
    with pytest.raises(ValueError, match=r"mean \(1,\).* 3 channels; wanted \(3,\)"):
        Batches(split, batch_size=8, mean=torch.zeros(1), std=scale["std"])
    for wrong in ({"batch_size": 0}, {"crop_padding": -1}, {"seed": -1}):
        with pytest.raises(ValueError, match="wanted at least 1, 0 and 0"):
            Batches(split, **{"batch_size": 8} | wrong, **scale)


def test_splits_check_their_tensors():
    images, labels = torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    assert len(Split(images, labels)) == 2
    for wrong in (images.double(), images[0]):
        with pytest.raises(ValueError, match="got images"):
            Split(wrong, labels)
    for bad in (labels.int(), labels[:1]):
        with pytest.raises(ValueError, match="got labels"):
            Split(images, bad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_device_gives_the_same_batches(colours):
    split, scale = colours
    options = {"batch_size": 8, "shuffle": True, "augment": True, **scale}
    for (x, y), (cuda_x, cuda_y) in zip(
        Batches(split, **options), Batches(split, device="cuda", **options), strict=True
    ):
        assert torch.allclose(x, cuda_x.cpu(), atol=1e-6)
        assert torch.equal(y, cuda_y.cpu())


# The shared sets


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "in_shape", "num_classes", "mean"),
    [
        ("mnist", (54_000, 6_000, 10_000), (1, 28, 28), 10, [0.1307]),
        ("tiny_imagenet100_32", (45_000, 5_000, 5_000), (3, 32, 32), 100, [0.483, 0.451, 0.399]),
    ],
)
def test_shared_sets(name, sizes, in_shape, num_classes, mean):
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs the shared {name}")
    data = load_data(str(SHARED / name))
    assert (len(data.train), len(data.val), len(data.test)) == sizes
    assert data.in_shape == in_shape
    assert data.num_classes == num_classes
    assert data.train.labels.unique().tolist() == list(range(num_classes))
    assert data.mean.tolist() == pytest.approx(mean, abs=1e-3)


def test_heavy_packages_are_imported_late():
    code = (
        "import sys, gossamer.train.data, gossamer.train.models;"
        "sys.exit(str([m for m in ('datasets', 'sklearn', 'pyarrow', 'PIL') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
