"""Tables that come with ImageNet and its like: the class of each picture of a folder without class folders, and boxes.

A picture goes by its file name without ``.jpg``.
"""

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from mp3d.data.picture_files import SUFFIXES, Box
from mp3d.errors import DataError

TINY_CLASSES = "val_annotations.txt"
"""Tiny-ImageNet keeps its validation pictures in one folder and their classes and boxes in this table."""
CLASS_TABLES = ("val.txt", "LOC_val_solution.csv", "ILSVRC2012_devkit_t12")
"""Of ImageNet's validation pictures, beside their folder: Caffe's list, Kaggle's table, the organisers' kit."""
TRUTH, SYNSETS = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
"""In the kit: a number for each picture, in the order of their names; the class of each number."""
KIT_NAME = "ILSVRC2012_val_{:08d}"


def stem(name: str) -> str:
    """File name without folder and without the suffix of a JPEG."""
    path = Path(name)
    return path.stem if path.suffix.lower() in SUFFIXES else path.name


def read_class_table(path: Path, class_names: tuple[str, ...]) -> dict[str, str]:
    """Class of each picture.

    Args:
        path: ``val_annotations.txt`` or ``val.txt`` (a file name, a tab or spaces, a class), a CSV table with the
            columns ImageId and PredictionString, as Kaggle has it, or the folder ``ILSVRC2012_devkit_t12``.
        class_names: what a number stands for, counted from 0, in tables with numbers instead of names.

    Raises:
        DataError: the table cannot be read, or has a number that stands for no class.
    """
    try:
        if path.is_dir():
            return _from_kit(path)
        if path.suffix.lower() == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                return {stem(row["ImageId"]): row["PredictionString"].split()[0] for row in csv.DictReader(file)}
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        pairs = [line.split("\t")[:2] if "\t" in line else line.rsplit(None, 1) for line in lines]
        return {stem(name): _name(given, class_names) for name, given in pairs}
    except (OSError, UnicodeDecodeError, ValueError, LookupError, AttributeError, TypeError, csv.Error) as error:
        detail = f"{path} cannot be read as a table of classes ({type(error).__name__})"
        raise DataError(f"{detail}; each line must begin with a file name, a tab and a class") from error


def read_boxes(path: Path, first_column: int) -> dict[str, tuple[Box, ...]]:
    """Boxes of each picture in a table of Tiny-ImageNet, whose corners are the first and the last pixel inside.

    A box whose corners share a column or row came about where an object outside was cut to the picture; it stays as it
    is, without extent.

    Args:
        path: ``<class>_boxes.txt``, or ``val_annotations.txt``.
        first_column: of the four numbers.

    Raises:
        DataError: the table cannot be read.
    """
    boxes: dict[str, tuple[Box, ...]] = defaultdict(tuple)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__})") from error
    for number, line in enumerate(lines, 1):
        name, *fields = line.split("\t")
        try:
            x1, y1, x2, y2 = (float(value) for value in fields[first_column - 1 :])
        except ValueError as error:
            wanted = "a file name and, behind a tab each, x1, y1, x2 and y2"
            raise DataError(f"{path}, line {number} cannot be read; wanted: {wanted}") from error
        flat = x1 >= x2 or y1 >= y2
        boxes[stem(name)] += ((x1, y1, x2, y2) if flat else (x1, y1, x2 + 1, y2 + 1),)
    return dict(boxes)


def _name(given: str, class_names: tuple[str, ...]) -> str:
    if given in class_names or not given.isdecimal():
        return given
    if int(given) >= len(class_names):
        raise DataError(f"class {given} of {len(class_names)} known ones; numbers count the folders of train from 0")
    return class_names[int(given)]


def _from_kit(folder: Path) -> dict[str, str]:
    try:
        synsets = np.atleast_1d(loadmat(folder / SYNSETS, squeeze_me=True)["synsets"])
        names = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    except Exception as error:  # scipy raises whatever its parsing of broken bytes runs into
        raise DataError(f"{folder / SYNSETS} cannot be read ({type(error).__name__}); unpack the kit again") from error
    numbers = (folder / TRUTH).read_text().split()
    return {KIT_NAME.format(place): names[int(number)] for place, number in enumerate(numbers, 1)}
