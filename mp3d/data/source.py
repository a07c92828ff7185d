"""What a reader returns: the list of things to read, each with the function that reads it.

A data set plugs in as one function ``read_x(root, ...) -> Source``. Listing is quick and looks at names and headers
only; the pixels are read later, one item per task, by Ray Data or by a plain loop (``mp3d.data.prepare``). Readers
know neither Ray nor Parquet.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mp3d.data.series import CTSeries, Picture
from mp3d.errors import Refusal


@dataclass(frozen=True)
class PictureBatch:
    """The pictures of an item that could be read, and those that could not: one broken file loses no other.

    Attributes:
        pictures: in the order of :attr:`Item.members`.
        refused: member and refusal.
        warnings: reason codes of what was tolerated in any of them.
    """

    pictures: tuple[Picture, ...]
    refused: tuple[tuple[str, Refusal], ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """One CT series, or one batch of pictures of the same split.

    Attributes:
        key: where it lies, relative to the root: unique in the data set and stable, so that preparing again gives the
            same parts. Only its keyed hash is stored.
        patient: the unit of splitting. Only its keyed hash is stored.
        split: the official split (``train``, ``val``, ``test``), or None where ``prepare`` is to draw one by patient.
        load: reads it; a module-level function or a ``functools.partial`` of one, with absolute paths, because it
            travels to another process. Raises :class:`~mp3d.errors.Refusal`.
        members: the keys of the pictures of a batch; empty for a series.
    """

    key: str
    patient: str
    split: str | None
    load: Callable[[], CTSeries | PictureBatch]
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A listed data set.

    Attributes:
        dataset: its name in every row.
        reader: reader and version, e.g. ``volumes/1``; the version changes when the same files would give other rows.
        class_names: of the labels 1, 2, ... of boxes, or of the image labels 0, 1, ... of pictures.
        items: in a stable order.
        refused: what was refused while listing: key and refusal.
        options: the reader's arguments that change what is stored (no paths); another value is another data set.
        notes: what the user should know, a line each: counts of files that were not used and why; no names.
    """

    dataset: str
    reader: str
    class_names: tuple[str, ...]
    items: tuple[Item, ...]
    refused: tuple[tuple[str, Refusal], ...] = ()
    options: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
