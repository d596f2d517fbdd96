"""Image classification sets held in memory as tensors, and batches of them without workers.

Pixels stay 8-bit until a batch is made; cropping, flipping and normalising work on whole batches.
Mean and standard deviation are those of the training pixels, scaled to [0, 1].
"""

import difflib
import glob
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.reading import reading
from gossamer.shrink.file import write_whole

if TYPE_CHECKING:
    from PIL import Image

    Row: TypeAlias = tuple[Image.Image, Any]

CACHE = "GOSSAMER_CACHE"  # names a folder in which decoded images are kept

_TEST_FRACTION = 0.2
_KEPT_FORMAT = 1  # counts up when the same files come to be decoded otherwise
_LABEL_COLUMNS = ("label", "labels", "fine_label")
# What publishers call the splits, and what they are called here.
_SPLITS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their classes.

    images: (n, c, h, w), uint8 in [0, 255] or float32 in [0, 1]; labels: (n,), int64.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        n = len(self.images)
        if self.images.dim() != 4 or self.images.dtype not in (torch.uint8, torch.float32):
            raise ValueError(
                f"got images {tuple(self.images.shape)} of {self.images.dtype}; wanted "
                "(n, c, h, w) of uint8 or float32"
            )
        if self.labels.shape != (n,) or self.labels.dtype != torch.int64:
            raise ValueError(
                f"got labels {tuple(self.labels.shape)} of {self.labels.dtype}; wanted one int64 "
                f"for each of the {n} images"
            )

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A set in three splits. mean, std: (c,), of the training pixels scaled to [0, 1]."""

    name: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one image."""
        _, c, h, w = self.train.images.shape
        return c, h, w

    @property
    def num_classes(self) -> int:
        """How many classes the labels tell apart."""
        return len(self.classes)


def load_data(
    name_or_path: str,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    image_size: int | None = None,
) -> ImageData:
    """Read and decode a whole set into memory.

    `name_or_path` is one of
        `digits`: 1,797 grey 8x8 digits that scikit-learn brings along;
        a Parquet file, or a folder of Parquet files named train*, val* and test*;
        an image folder with one subfolder per class, below train/, val/ and test/ or directly;
        a set of the Hugging Face hub, `owner/name`, which comes through the hub's own cache.
    Images are in a column of images or named `image` or `img`, classes in `label`, `labels` or
    `fine_label`. Grey sets keep one channel; one image in colour makes the whole set RGB.

    What is missing is held out of train, with the proportions of the classes kept: 20 % for test,
    always the same images, and `val_fraction` of the rest for validation, drawn with `seed`. A
    set that has validation images but no test images is tested on the former.
    `image_size` resizes every image to that many pixels a side, bilinearly.

    With the environment variable GOSSAMER_CACHE, a folder, local sets are decoded once: what came
    of them is kept there until their files change, in size or in time of change.

    Raises:
        ValueError: nothing found there, no labels, images that cannot be read or differ in size.
        OSError: the folder of GOSSAMER_CACHE cannot be written.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"got val_fraction={val_fraction}; wanted a fraction between 0 and 1")
    if image_size is not None and image_size < 1:
        raise ValueError(f"got image_size={image_size}; wanted a number of pixels, at least 1")
    kept = _kept(name_or_path, image_size)
    if kept is not None and kept.exists():
        classes, splits = _read_kept(kept)
    else:
        # `datasets` puts lock files into its cache folder even when it only streams.
        with TemporaryDirectory(prefix="gossamer-") as scratch:
            digits = name_or_path == "digits"
            names, sources = _digits() if digits else _source(name_or_path, scratch)
            classes, splits = _decode(sources, names, image_size)
        if kept is not None:
            _keep(kept, classes, splits)
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    if "test" not in splits:
        splits["train"], splits["test"] = _hold_out(splits["train"], _TEST_FRACTION, seed=0)
    if "validation" not in splits:
        splits["train"], splits["validation"] = _hold_out(splits["train"], val_fraction, seed)
    mean, std = _mean_and_std(splits["train"].images)
    return ImageData(
        name=name_or_path,
        train=splits["train"],
        val=splits["validation"],
        test=splits["test"],
        classes=classes,
        mean=mean,
        std=std,
    )


def _kept(name: str, image_size: int | None) -> Path | None:
    """The file for the decoded images of a local set; None where they are not to be kept.

    Its name is a digest of all that decides about the pixels: another set has another file.
    """
    import PIL

    path = Path(name).expanduser()
    if not os.environ.get(CACHE) or name == "digits" or not path.exists():
        return None
    builder, patterns = _local_files(path)
    files = [
        (split, file, os.stat(file).st_size, os.stat(file).st_mtime_ns)
        for split, pattern in sorted(patterns.items())
        for file in sorted(glob.glob(pattern, recursive=True))
    ]
    told = [_KEPT_FORMAT, PIL.__version__, builder, image_size, files]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    return Path(os.environ[CACHE]).expanduser() / f"images-{digest[:32]}.safetensors"


def _keep(file: Path, classes: tuple[str, ...], splits: Mapping[str, Split]) -> None:
    tensors = {f"{name}.images": split.images for name, split in splits.items()}
    tensors |= {f"{name}.labels": split.labels for name, split in splits.items()}
    header = {"classes": json.dumps(classes)}
    write_whole(file, lambda new: safetensors.torch.save_file(tensors, new, header))


def _read_kept(file: Path) -> tuple[tuple[str, ...], dict[str, Split]]:
    with reading(str(file), "remove it"), safetensors.safe_open(file, framework="pt") as opened:
        classes = json.loads(opened.metadata()["classes"])
        names = {key.partition(".")[0] for key in opened.keys()}  # noqa: SIM118
        splits = {
            name: Split(opened.get_tensor(f"{name}.images"), opened.get_tensor(f"{name}.labels"))
            for name in names
        }
    return tuple(classes), splits


def _digits() -> tuple[None, dict[str, Iterable["Row"]]]:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = map(Image.fromarray, (digits.images / 16).astype(np.float32))
    return None, {"train": zip(images, digits.target.tolist(), strict=True)}


def _source(name: str, scratch: str) -> tuple[list[str] | None, dict[str, Iterable["Row"]]]:
    """The class names, where the source has them, and the rows of each split."""
    import datasets

    path = Path(name).expanduser()
    if path.exists():
        builder, files = _local_files(path)
        found = datasets.load_dataset(builder, data_files=files, streaming=True, cache_dir=scratch)
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not path.parent.exists():
        try:
            found = datasets.load_dataset(name)
        except OSError as error:  # no network, a time-out, no such set, no access
            raise ValueError(
                f"{_not_found(name, path)}; as a set of the Hugging Face hub it cannot be had "
                f"either: {error}"
            ) from error
    else:
        raise ValueError(f"{_not_found(name, path)}; a set of the hub is given as owner/name")
    found = {_SPLITS[split]: rows for split, rows in found.items() if split in _SPLITS}
    if "train" not in found:
        raise ValueError(f"{name} has the splits {_listed(found)}; wanted train among them")

    features = found["train"].features
    images = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    images += [key for key in ("image", "img") if key in features]
    labels = [key for key in _LABEL_COLUMNS if key in features]
    if not images or not labels:
        raise ValueError(
            f"{name} has the columns {_listed(features)}; wanted a column of images, and their "
            f"classes in {_listed(_LABEL_COLUMNS)}. In an image folder, give every class a "
            "subfolder of its own"
        )
    image, label = images[0], labels[0]
    kind = features[label]
    if not re.match(r"u?int|bool|string|large_string", str(getattr(kind, "dtype", ""))):
        raise ValueError(f"{name}: column {label!r} holds {kind}; wanted one class per image")
    undecoded = datasets.Image(decode=False)
    rows: dict[str, Iterable[Row]] = {
        split: _rows(dataset.cast_column(image, undecoded), image, label, f"{name}: {split}")
        for split, dataset in found.items()
    }
    return kind.names if isinstance(kind, datasets.ClassLabel) else None, rows


def _local_files(path: Path) -> tuple[str, dict[str, str]]:
    """The builder of `datasets` for `path`, and the pattern of each split's files."""
    root = glob.escape(path.resolve().as_posix())
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{path} is no Parquet file; wanted one (.parquet), or a folder")
        return "parquet", {"train": root}
    tables = sorted(file.name for file in path.glob("*.parquet"))
    if tables:
        prefixes = [p for p in ("train", "val", "test") if any(t.startswith(p) for t in tables)]
        if not prefixes:
            raise ValueError(
                f"{path} holds {_listed(tables)}; wanted names that start with train, val or test"
            )
        return "parquet", {_SPLITS[prefix]: f"{root}/{prefix}*.parquet" for prefix in prefixes}
    folders = [sub for sub in path.iterdir() if sub.is_dir() and sub.name[0] != "."]
    splits = [folder for folder in folders if folder.name in _SPLITS]
    # A class may be called train; then it holds images, and stands among other classes.
    nested = any(sub.is_dir() for split in splits for sub in split.iterdir())
    if nested or (splits and len(splits) == len(folders)):
        return "imagefolder", {_SPLITS[split.name]: f"{root}/{split.name}/**" for split in splits}
    return "imagefolder", {"train": f"{root}/**"}


def _not_found(name: str, path: Path) -> str:
    siblings = [other.name for other in path.parent.glob("[!.]*")]
    near = difflib.get_close_matches(path.name, ["digits", *siblings])
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return f"no data set {name!r}{hint}: it is not digits, and there is no {path.absolute()}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _rows(dataset: Any, image: str, label: str, where: str) -> Iterator["Row"]:
    for i, row in enumerate(dataset.select_columns([image, label])):
        try:
            yield _open_image(row[image]), row[label]
        except OSError as error:
            raise ValueError(f"{where} image {i} cannot be decoded: {error}") from error


def _open_image(cell: dict[str, Any]) -> "Image.Image":
    """`cell` (encoded bytes, or the path of a file) as an upright 8-bit image, grey or RGB."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"]) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":
            raise OSError(f"{image.mode} pixels have more than 8 bits; convert them to 8 first")
        mode = "L" if image.mode in {"1", "L", "LA"} else "RGB"
        return image.convert(mode)


def _decode(
    sources: Mapping[str, Iterable["Row"]], names: list[str] | None, image_size: int | None
) -> tuple[tuple[str, ...], dict[str, Split]]:
    """The classes and the splits, all of one size and one number of channels."""
    from PIL import Image

    images: dict[str, list[np.ndarray[Any, Any]]] = {split: [] for split in sources}
    labels: dict[str, list[Any]] = {split: [] for split in sources}
    size = None if image_size is None else (image_size, image_size)
    for split, rows in sources.items():
        for image, label in rows:
            if image_size is not None:
                image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
            size = size or image.size
            if image.size != size:
                raise ValueError(
                    f"got images of {size[0]}x{size[1]} and of {image.width}x{image.height} "
                    f"pixels ({split} image {len(images[split])}); wanted one size: set image_size"
                )
            if label is None or (names and label == -1):  # -1: `datasets` for unknown
                raise ValueError(
                    f"{split} image {len(labels[split])} has no label; wanted one for every image"
                )
            images[split].append(np.asarray(image))
            labels[split].append(label)
        if not labels[split]:
            raise ValueError(f"the {split} split is empty; wanted images in every split")
    rgb = any(array.ndim == 3 for arrays in images.values() for array in arrays)
    values = range(len(names)) if names else sorted({y for ys in labels.values() for y in ys})
    index = {value: i for i, value in enumerate(values)}
    splits = {
        split: Split(
            _stack(images.pop(split), rgb), torch.tensor([index[y] for y in labels[split]])
        )
        for split in sources
    }
    return tuple(names or map(str, values)), splits


def _stack(arrays: list[np.ndarray[Any, Any]], rgb: bool) -> Tensor:
    """(h, w) and (h, w, 3) arrays as (n, c, h, w); grey ones are repeated where c is 3."""
    if not rgb:
        return torch.from_numpy(np.stack(arrays)).unsqueeze(1)
    coloured = [np.stack([a] * 3, axis=-1) if a.ndim == 2 else a for a in arrays]
    return torch.from_numpy(np.stack(coloured)).permute(0, 3, 1, 2).contiguous()


def _hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """What stays, and about `fraction` of the images of every class (to within one image)."""
    n = len(split)
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[split.labels[shuffled].argsort(stable=True)]
    # Taken wherever the rounded quota grows: evenly along the sorted labels, and exact in total.
    quota = (torch.arange(n + 1, dtype=torch.float64) * fraction).round()
    taken = quota.diff() > 0
    if taken.all() or not taken.any():
        raise ValueError(
            f"{n} training images are too few to hold out {fraction:.0%} of them; bring more "
            "images or a split of your own"
        )
    rest, held = (by_class[chosen].sort().values for chosen in (~taken, taken))
    return (
        Split(split.images[rest], split.labels[rest]),
        Split(split.images[held], split.labels[held]),
    )


def _pixel_scale(images: Tensor) -> float:
    return 255.0 if images.dtype == torch.uint8 else 1.0


def _mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel, (c,) each, of (n, c, h, w) pixels scaled to [0, 1]; in chunks, in float64."""
    sums = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for chunk in torch.split(images, 1024):
        pixels = chunk.double() / _pixel_scale(images)
        sums += torch.stack([pixels.sum((0, 2, 3)), pixels.square().sum((0, 2, 3))])
    mean, square = sums / (images.numel() / images.shape[1])
    # A channel of one colour has no spread; half a grey level keeps the division finite.
    std = (square - mean.square()).clamp_min((0.5 / 255) ** 2).sqrt()
    return mean.float(), std.float()


def crop_and_flip(
    images: Tensor, top: Tensor, left: Tensor, flipped: Tensor, padding: int
) -> Tensor:
    """Cut each image from its zero-padded self at (top, left), then mirror it where `flipped`.

    images: (b, c, h, w); top, left: (b,), int64 in 0 ... 2 * padding; flipped: (b,), bool.
    One gather for the whole batch.
    """
    b, c, h, w = images.shape
    padded = F.pad(images, (padding,) * 4)
    x = torch.arange(w, device=images.device)
    columns = left[:, None] + torch.where(flipped[:, None], x.flip(0), x)
    rows = top[:, None] + torch.arange(h, device=images.device)
    pixels = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
    index = pixels.view(b, 1, h * w).expand(-1, c, -1)
    return padded.flatten(2).gather(2, index).view(b, c, h, w)


class Batches:
    """The batches (x, y) of a split: x (b, c, h, w) float32, normalised; y (b,) int64.

    The split lies on `device`, 8-bit as it is. `augment` crops at random from the image padded by
    `crop_padding` pixels (black: zero before normalisation; None: an eighth of the shorter side,
    the usual 4 of 32) and, with `flip`, mirrors every other image; leave `flip` off where mirror
    images mean something else (digits).

    All randomness is drawn at the start of an epoch from a generator seeded by (seed, epoch): the
    epoch set by `set_epoch` gives the same batches on any device, whatever was iterated before.

    Raises:
        ValueError: sizes that do not fit, or no whole batch to give.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        mean: Tensor,
        std: Tensor,
        shuffle: bool = False,
        augment: bool = False,
        flip: bool = True,
        crop_padding: int | None = None,
        seed: int = 0,
        drop_last: bool = False,
        device: str | torch.device = "cpu",
        channels_last: bool = False,
    ):
        channels = split.images.shape[1]
        if mean.shape != (channels,) or std.shape != (channels,):
            raise ValueError(
                f"got mean {tuple(mean.shape)} and std {tuple(std.shape)} for images of "
                f"{channels} channels; wanted ({channels},): pass those of the same ImageData"
            )
        if crop_padding is None:
            crop_padding = max(1, round(min(split.images.shape[2:]) / 8))
        if batch_size < 1 or crop_padding < 0 or seed < 0:
            raise ValueError(
                f"got batch_size={batch_size}, crop_padding={crop_padding}, seed={seed}; wanted "
                "at least 1, 0 and 0"
            )
        if drop_last and len(split) < batch_size:
            raise ValueError(
                f"{len(split)} images do not fill one batch of {batch_size}, and drop_last drops "
                "the rest: lower batch_size"
            )
        scale = _pixel_scale(split.images)
        self.images = split.images.to(device)
        self.labels = split.labels.to(device)
        self.mean = (mean * scale).view(-1, 1, 1).to(device)
        self.std = (std * scale).view(-1, 1, 1).to(device)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment = augment
        self.flip = flip
        self.crop_padding = crop_padding
        self.seed = seed
        self.drop_last = drop_last
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.epoch = 0
        self._given = self._first = 0

    def __len__(self) -> int:
        batches = len(self.labels) / self.batch_size
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, that the next iteration gives, from its first batch on."""
        self.epoch, self._first = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Where the iteration stands, as plain data."""
        return {"epoch": self.epoch, "given": self._given}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Have the next iteration go on where another stood."""
        self.epoch, self._first = int(state["epoch"]), int(state["given"])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, device = len(self.labels), self.images.device
        # SeedSequence keeps (seed, epoch) pairs apart; their sum would not.
        (mixed,) = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed))
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        corners = torch.randint(2 * self.crop_padding + 1, (2, n), generator=generator)
        flipped = (torch.rand(n, generator=generator) < 0.5) & self.flip
        order, corners, flipped = order.to(device), corners.to(device), flipped.to(device)
        first, self._first = self._first, 0
        for batch in range(first, len(self)):
            chosen = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            x = self.images[order[chosen]]
            if self.augment:
                top, left = corners[:, chosen]
                x = crop_and_flip(x, top, left, flipped[chosen], self.crop_padding)
            x = x.float().sub_(self.mean).div_(self.std)
            self._given = batch + 1
            yield x.contiguous(memory_format=self.memory_format), self.labels[order[chosen]]
