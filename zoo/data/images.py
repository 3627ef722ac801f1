"""Image files: what is in them, as the eye would see it, and folders of them by class.

    train = ImageFolder("photos/train")
    held_out = ImageFolder("photos/val")                # numbered as the training folder is
    data = Data(train, held_out, transforms, transforms)

    train, held_out = split(ImageFolder("photos"), 0.2)       # one folder, a fifth of it held out

Files are found at any depth in a class's folder, by the endings of `IMAGE_SUFFIXES` in either case.
Names that begin with a dot, and folders that archives and servers leave behind, are not looked at.
"""

import concurrent.futures
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from zoo.kinds import check_kinds

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".avif",
)  # fmt: skip
FOREIGN = (".heic", ".heif", ".dng", ".cr2", ".nef", ".arw", ".psd", ".svg", ".dcm")
"""Endings of images that Pillow does not read: they are named rather than overlooked."""

LEFT_BEHIND = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found", "__pycache__")
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND", "GIF": b";"}  # of a file that is whole


def to_uint8(image: Image.Image, channels: int = 3, white: float | None = None) -> np.ndarray:
    """A Pillow image as `uint8 [height, width, channels]`, turned as its EXIF data says.

    Transparent places are white, as a viewer shows them. Deep images (16 bits, integers, floats)
    are scaled by `white`, the value that becomes 255: without it 65535 for integers and 1 for
    floats.

    Raises:
      ValueError: if a deep image does not fit its `white`.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_scaled(np.asarray(image), white))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, image)
    if image.mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return array[..., None] if channels == 1 else array


def _scaled(values: np.ndarray, white: float | None) -> np.ndarray:
    whole, values = values.dtype.kind in "iu", values.astype(np.float64)
    top = white or (65535.0 if whole else 1.0)
    low, high = values.min(initial=0), values.max(initial=0)
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are no numbers; mend them")
    if low < 0 or high > top:
        raise ValueError(
            f"its values go from {low:g} to {high:g}, which do not fit 0 to {top:g}; give white=, "
            "the value that is to become 255"
        )
    if white is None and whole and 0 < high <= 4095:
        raise ValueError(
            f"it has 16 bits a pixel, but no value above {high:g}, so that most of its steps would "
            "be lost; give white=4095 if it holds 12 bits (1023: 10, 255: 8), or white=65535 to "
            "take it as it is"
        )
    return np.round(values * (255 / top)).astype(np.uint8)


def read_image(
    file: str | os.PathLike, channels: int = 3, white: float | None = None
) -> np.ndarray:
    """An image file as `uint8 [height, width, channels]`; see `to_uint8`. Of several, the first.

    Raises:
      ValueError: if it cannot be read, with the file's name.
    """
    try:
        with Image.open(file) as image:
            return to_uint8(image, channels, white)
    except FileNotFoundError:
        raise ValueError(f"There is no image file {os.fspath(file)!r}.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(repr(os.fspath(file)), "it").rstrip(".")
        raise ValueError(f"{os.fspath(file)!r} is not a readable image: {reason}.") from None


def is_whole(file: Path) -> bool:
    """Whether a file's first and last bytes are those of a whole image; False: they do not tell."""
    try:
        with Image.open(file) as image:
            end = _ENDS.get(image.format or "")
        with open(file, "rb") as raw:
            raw.seek(max(0, file.stat().st_size - 64))
            return end is not None and end in raw.read()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def walk(root: Path) -> Iterator[Path]:
    """Files below a folder, sorted, links followed, without hidden ones."""
    seen = set()
    for folder, inner, names in os.walk(root, followlinks=True):
        inner[:] = sorted(n for n in inner if not hidden(n))
        if (place := os.path.realpath(folder)) in seen:
            inner.clear()
            continue
        seen.add(place)
        yield from (Path(folder, name) for name in sorted(names) if not hidden(name))


def hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: `.DS_Store`, `._a.jpg`, `__MACOSX`."""
    return name.startswith(".") or name in LEFT_BEHIND


@dataclass(frozen=True)
class ImageFolder:
    """A folder with one folder of image files for each class, numbered by sorted name.

    Files are decoded when they are read, by `to_uint8`. An example is
    `{"image": uint8 [height, width, channels], "label": int}`.

    Attributes:
      path: the folder.
      classes: names of the classes, by number; None: of the folders that hold images, sorted. A
        held-out folder beside a training folder is numbered as that one (`zoo.data.Data`).
      corrupt: files that cannot be read: `refuse` them when a run begins, from their first and last
        bytes, or `skip` them, with a count; then every file is decoded once to find them.
      white: of deep images, see `to_uint8`.
      channels: 3, or 1 for grey.

    Raises:
      FileNotFoundError: if there is no such folder, or no image in a folder of it.
      ValueError: if a folder with images is not among `classes`.
    """

    path: str | Path
    classes: tuple[str, ...] | None = None
    corrupt: Literal["refuse", "skip"] = "refuse"
    white: float | None = None
    channels: Literal[1, 3] = 3

    def __post_init__(self):
        check_kinds(self)
        if self.white is not None and not self.white > 0:
            raise ValueError(f"white={self.white} becomes 255; give a number above 0.")
        root = Path(self.path)
        if not root.is_dir():
            raise FileNotFoundError(f"There is no folder {str(root)!r} to read images from.")
        found = self._found
        if not found:
            raise FileNotFoundError(
                f"{str(root)!r} holds no images; expected one folder per class with files that end "
                f"in {', '.join(IMAGE_SUFFIXES)}."
            )
        if self.classes is None and {name.lower() for name in found} <= SPLIT_NAMES:
            first = next(iter(found))
            raise ValueError(
                f"The folders of {str(root)!r} are {', '.join(found)}: they are splits, not "
                f"classes; give {str(root / first)!r}."
            )
        classes = tuple(found) if self.classes is None else tuple(self.classes)
        if len(set(classes)) < len(classes):
            raise ValueError(f"classes={classes} names a class twice.")
        if unknown := [name for name in found if name not in classes]:
            raise ValueError(
                f"{str(root)!r} has a folder {unknown[0]!r}, which is none of the "
                f"{len(classes)} classes {_some(classes)}."
            )
        object.__setattr__(self, "classes", classes)

    def numbered_as(self, classes: Sequence[str]) -> "ImageFolder":
        """The same folder with the numbers of other classes, of which it may lack some."""
        return ImageFolder(self.path, tuple(classes), self.corrupt, self.white, self.channels)

    @functools.cached_property
    def _found(self) -> dict[str, list[Path]]:
        """Files by the name of their class; folders without images are none."""
        folders = sorted(p for p in Path(self.path).iterdir() if p.is_dir() and not hidden(p.name))
        found = {}
        for folder in folders:
            files = [f for f in walk(folder) if f.suffix.lower() in IMAGE_SUFFIXES + FOREIGN]
            if files:
                found[folder.name] = files
        return found

    @functools.cached_property
    def files(self) -> tuple[tuple[Path, int], ...]:
        """All files with the number of their class, without those that are skipped."""
        number = {name: i for i, name in enumerate(self.classes or ())}
        files = [(file, number[name]) for name, own in self._found.items() for file in own]
        if self.corrupt == "refuse":
            return tuple(files)
        good = _each(self._decodes, [file for file, _ in files])
        kept = tuple(pair for pair, ok in zip(files, good, strict=True) if ok)
        if len(kept) < len(files):
            first = files[good.index(False)][0]
            print(f"{len(files) - len(kept)} of {len(files)} images in {str(self.path)!r} cannot "
                  f"be read and are left out, {str(first)!r} the first.", flush=True)  # fmt: skip
        if not kept:
            raise FileNotFoundError(f"None of the images in {str(self.path)!r} can be read.")
        return kept

    def _sound(self, file: Path) -> bool:
        return is_whole(file) or self._decodes(file)

    def _decodes(self, file: Path) -> bool:
        try:
            read_image(file, self.channels, self.white)
        except ValueError:
            return False
        return True

    @property
    def labels(self) -> np.ndarray:
        """The number of the class of each file."""
        return np.array([label for _, label in self.files], np.int32)

    def check(self) -> None:
        """Look at the first and last bytes of each file, and decode a few.

        Raises:
          ValueError: naming the first that cannot be read, and how many cannot.
        """
        if self.corrupt == "skip":
            return
        files = [file for file, _ in self.files]
        good = _each(self._sound, files)
        if not all(good):
            bad = files[good.index(False)]
            kind = ""
            if bad.suffix.lower() in FOREIGN:
                kind = f" ({bad.suffix} is not read; convert it to PNG or JPEG)"
            raise ValueError(
                f"{good.count(False)} of {len(files)} images in {str(self.path)!r} cannot be read, "
                f"{str(bad)!r} the first{kind}; mend or remove them, or leave them out with "
                "corrupt='skip'."
            )
        for file in files[:: max(1, len(files) // 8)]:
            read_image(file, self.channels, self.white)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, label = self.files[index]
        return {"image": read_image(file, self.channels, self.white), "label": label}


def _each(function: Any, files: list[Path]) -> list[bool]:
    with concurrent.futures.ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool:
        return list(pool.map(function, files))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
