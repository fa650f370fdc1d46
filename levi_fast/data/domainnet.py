"""DomainNet: 345 classes of things in six domains (clipart, infograph, painting, quickdraw, real, sketch).

Reads the lists that come with the data set (Peng et al., *Moment Matching for Multi-Source Domain Adaptation*, ICCV
2019), ``DOMAIN_train.txt`` and ``DOMAIN_test.txt``, with lines such as
``real/aircraft_carrier/real_001_000001.jpg 0``, beside the folders of the domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from levi_fast.data.image_folders import with_validation
from levi_fast.data.images import ImageSet, ImageSplits
from levi_fast.errors import DataError

_TRAIN, _TEST = "_train.txt", "_test.txt"


def load_domainnet(data: str | Path, train_domains: Sequence[str], seed: int = 0) -> ImageSplits:
    """List the images of some domains to train on, and of every other domain as an OOD set.

    Training images are those of ``DOMAIN_train.txt``, of which a tenth, class by class, chooses the epoch; ID test
    images are those of ``DOMAIN_test.txt``, and so are the OOD images of every other domain.

    Args:
        data: folder with the lists and the domains' folders.
        train_domains: such as "real".
        seed: of the images that are held out.

    Raises:
        DataError: an unknown domain, a line that is not of the form, a class with two names, or no list at all.
    """
    root = Path(data)
    domains = sorted(path.name.removesuffix(_TEST) for path in root.glob(f"*{_TEST}")) if root.is_dir() else []
    if not domains:
        raise DataError(f"{data}: expected a folder with lists such as real{_TRAIN} and real{_TEST}")
    if not train_domains:
        raise DataError(f"train_domains (--split): expected the domains to train on, of {', '.join(domains)}")
    for domain in train_domains:
        if domain not in domains:
            raise DataError(f"train_domains (--split): {data} has no domain {domain!r}; it has {', '.join(domains)}")
    names: dict[int, str] = {}
    parts: dict[str, list[ImageSet]] = {"train": [], "test": []}
    for domain in dict.fromkeys(train_domains):
        parts["train"].append(read_image_list(root / f"{domain}{_TRAIN}", names))
        parts["test"].append(read_image_list(root / f"{domain}{_TEST}", names))
    for domain in domains:
        if domain not in train_domains:
            parts[f"ood {domain}"] = [read_image_list(root / f"{domain}{_TEST}", names)]
    sets = {}
    for split, lists in parts.items():
        files = tuple(file for one in lists for file in one.files)
        labels = tuple(label for one in lists for label in one.labels)
        sets[split] = replace(lists[0], name=split.removeprefix("ood "), files=files, labels=labels)
    # painting's training list lacks one class: a label's place is what the lists say
    listed = tuple(names.get(label, str(label)) for label in range(max(names) + 1))
    return ImageSplits(with_validation(sets, seed), listed)


def read_image_list(path: Path, names: dict[int, str]) -> ImageSet:
    """The images of a list, relative to the list's own folder.

    Args:
        path: the list.
        names: label -> name of its class; completed from the folders in the list.

    Raises:
        DataError: naming the line that cannot be used.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    files, labels = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        file, _, label = line.strip().rpartition(" ")
        parts = file.split("/")
        if len(parts) < 3 or not label.isdecimal() or ".." in parts or file.startswith("/"):
            raise DataError(f"{path}, line {number}: expected 'DOMAIN/CLASS/FILE LABEL', got {line.strip()!r}")
        known = names.setdefault(int(label), parts[-2])
        if known != parts[-2]:
            raise DataError(f"{path}, line {number}: label {label} is {known!r} elsewhere, here {parts[-2]!r}")
        files.append(file)
        labels.append(int(label))
    if not files:
        raise DataError(f"{path}: the list names no image")
    return ImageSet(path.name, path.parent, tuple(files), tuple(labels))
