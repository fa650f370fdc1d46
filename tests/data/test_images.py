"""Images in the layouts of ImageNet and its shifted sets, DomainNet and the retinopathy competitions."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from levi_fast.config import LeviConfig
from levi_fast.data.domainnet import load_domainnet
from levi_fast.data.image_folders import load_image_folders, read_class_folders
from levi_fast.data.images import EncodedImages, ImageSet, image_files
from levi_fast.data.retinopathy import load_retinopathy, patient
from levi_fast.errors import DataError
from levi_fast.modeling import get_levi_model
from levi_fast.training.prediction import predict

Image = pytest.importorskip("PIL.Image")
# The first five of ImageNet's 1,000 classes.
WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361", "n01494475")


def draw(path: Path, colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def folders(root: Path, names: tuple[str, ...], count: int = 4) -> Path:
    for name in names:
        for place in range(count):
            draw(root / name / f"{name}_{place}.JPEG")
    return root


def error(load: object, *arguments: object) -> str:
    with pytest.raises(DataError) as caught:
        load(*arguments)  # type: ignore[operator]
    return str(caught.value)


class TestImageFolders:
    @pytest.fixture
    def imagenet(self, tmp_path: Path) -> Path:
        folders(tmp_path / "imagenet" / "train", WNIDS, 10)
        folders(tmp_path / "imagenet" / "val", WNIDS)
        return tmp_path / "imagenet"

    def test_val_alone_is_what_is_reported(self, imagenet: Path) -> None:
        splits = load_image_folders(imagenet)
        assert {split: len(one) for split, one in splits.sets.items()} == {"train": 45, "test": 20, "validation": 5}
        assert splits.names == WNIDS
        assert splits.sets["validation"].labels == (0, 1, 2, 3, 4)  # one of ten of each class
        test = splits.sets["test"]
        assert test.root == imagenet / "val" and test.files[4] == "n01443537/n01443537_0.JPEG" and test.labels[4] == 1
        assert not set(splits.sets["train"].files) & set(splits.sets["validation"].files)

    def test_beside_test_val_chooses_the_epoch(self, imagenet: Path) -> None:
        folders(imagenet / "test", WNIDS, 2)
        sizes = {split: len(one) for split, one in load_image_folders(imagenet).sets.items()}
        assert sizes == {"train": 50, "validation": 20, "test": 10}

    def test_sets_with_some_of_the_classes(self, imagenet: Path, tmp_path: Path) -> None:
        """ImageNet-R and ImageNet-A: predictions are made among the classes that are there."""
        folders(tmp_path / "imagenet-r", (WNIDS[4], WNIDS[1]), 3)
        found = load_image_folders(imagenet, {"r": str(tmp_path / "imagenet-r")}).sets["ood r"]
        assert found.labels == (1, 1, 1, 4, 4, 4) and found.classes == (1, 4)

    def test_sets_with_all_classes(self, imagenet: Path, tmp_path: Path) -> None:
        """ImageNet-Sketch."""
        folders(tmp_path / "sketch", WNIDS, 1)
        found = load_image_folders(imagenet, {"sketch": str(tmp_path / "sketch")}).sets["ood sketch"]
        assert found.labels == (0, 1, 2, 3, 4) and found.classes is None

    def test_folders_of_numbers_are_places_among_the_sorted_classes(self, tmp_path: Path) -> None:
        """ImageNet-V2: folder 10 is class 10, though it sorts before 2."""
        names = [f"n{place:08d}" for place in range(12)]
        found = read_class_folders(folders(tmp_path / "v2", tuple(map(str, range(12))), 1), names, "v2")
        assert dict(zip(found.files, found.labels, strict=True))["10/10_0.JPEG"] == 10
        assert sorted(found.labels) == list(range(12)) and found.classes is None

    def test_numbers_beyond_the_training_classes(self, imagenet: Path, tmp_path: Path) -> None:
        folders(tmp_path / "v2", ("0", "999"), 1)
        message = error(load_image_folders, imagenet, {"v2": str(tmp_path / "v2")})
        assert "v2: " in message and "expected 0 to 4, the places of the 5 training classes, got 999" in message

    def test_training_folders_of_numbers_go_by_name(self, tmp_path: Path) -> None:
        folders(tmp_path / "data" / "train", ("3", "7"))
        folders(tmp_path / "new", ("7",), 1)
        found = load_image_folders(tmp_path / "data", {"new": str(tmp_path / "new")}).sets["ood new"]
        assert found.labels == (1,) and found.classes == (1,)

    def test_unknown_classes(self, imagenet: Path, tmp_path: Path) -> None:
        folders(tmp_path / "some", (WNIDS[0], "n99999999"), 1)
        with pytest.warns(UserWarning, match="some: 1 of 2 classes are not among the training classes.*n99999999"):
            found = load_image_folders(imagenet, {"some": str(tmp_path / "some")}).sets["ood some"]
        assert found.labels == (0,)
        folders(tmp_path / "none", ("cat",), 1)
        assert "class 'cat' is not among the training classes n01440764" in error(
            load_image_folders, imagenet, {"none": str(tmp_path / "none")}
        )
        folders(imagenet / "val", ("n99999999",), 1)  # in distribution, that is a mistake
        assert "class 'n99999999' is not among the training classes" in error(load_image_folders, imagenet)

    def test_unusable_folders(self, imagenet: Path, tmp_path: Path) -> None:
        assert "expected a folder 'train' with one folder per class" in error(load_image_folders, tmp_path)
        (tmp_path / "empty" / "train" / "cat").mkdir(parents=True)
        assert "at least two folders of classes, got 1" in error(load_image_folders, tmp_path / "empty")
        (tmp_path / "empty" / "train" / "dog").mkdir()
        assert "expected images in the folders of classes, found none" in error(
            load_image_folders, tmp_path / "empty"
        )
        gone = {"gone": str(tmp_path / "gone")}
        assert "gone: expected a folder with one folder per class" in error(load_image_folders, imagenet, gone)

    def test_what_counts_as_an_image(self, tmp_path: Path) -> None:
        for name in ("b.JPEG", "a.png", "deep/c.webp", ".hidden.png", ".cache/d.png", "notes.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        assert image_files(tmp_path) == ["a.png", "b.JPEG", "deep/c.webp"]


class TestDomainNet:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Three domains of three classes; painting's training list lacks one, as in the real data set."""
        for domain in ("real", "sketch", "painting"):
            for part, count in (("train", 10), ("test", 2)):
                lines = []
                for label, name in enumerate(("aircraft_carrier", "t-shirt", "zigzag")):
                    if (domain, part, name) == ("painting", "train", "t-shirt"):
                        continue
                    for place in range(count):
                        lines.append(f"{domain}/{name}/{domain}_{label:03d}_{part}{place:06d}.jpg {label}")
                (tmp_path / f"{domain}_{part}.txt").write_text("\n".join(lines) + "\n")
        return tmp_path

    def test_one_domain_trains_and_the_others_are_ood(self, folder: Path) -> None:
        splits = load_domainnet(folder, ["real"])
        assert {split: len(one) for split, one in splits.sets.items()} == {
            "train": 27, "validation": 3, "test": 6, "ood painting": 6, "ood sketch": 6
        }  # fmt: skip
        assert splits.names == ("aircraft_carrier", "t-shirt", "zigzag")
        found = splits.sets["ood sketch"]
        assert found.files[2] == "sketch/t-shirt/sketch_001_test000000.jpg" and found.labels[2] == 1
        assert found.root == folder and found.classes is None

    def test_two_domains_train(self, folder: Path) -> None:
        splits = load_domainnet(folder, ["sketch", "real"])
        assert len(splits.sets["train"]) == 54 and len(splits.sets["test"]) == 12
        assert [split for split in splits.sets if split.startswith("ood")] == ["ood painting"]

    def test_a_class_that_training_lacks_keeps_its_place(self, folder: Path) -> None:
        splits = load_domainnet(folder, ["painting"])
        assert set(splits.sets["train"].labels) == {0, 2} and splits.names[1] == "t-shirt"

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("real/zigzag/real_1.jpg", r"line 31: expected 'DOMAIN/CLASS/FILE LABEL', got 'real/zigzag/real_1\.jpg'"),
            ("real/zigzag/real_1.jpg two", "line 31: expected 'DOMAIN/CLASS/FILE LABEL'"),
            ("real/../../secret/x.jpg 2", "line 31: expected 'DOMAIN/CLASS/FILE LABEL'"),
            ("real/zebra/real_1.jpg 2", "line 31: label 2 is 'zigzag' elsewhere, here 'zebra'"),
        ],
    )
    def test_a_line_that_cannot_be_used(self, folder: Path, line: str, message: str) -> None:
        path = folder / "real_train.txt"
        path.write_text(path.read_text() + line + "\n")
        with pytest.raises(DataError, match=message):
            load_domainnet(folder, ["real"])

    def test_domains_and_folders(self, folder: Path, tmp_path: Path) -> None:
        assert "(--split): expected the domains to train on, of painting, real, sketch" in error(
            load_domainnet, folder, []
        )
        assert "has no domain 'clipart'; it has painting, real, sketch" in error(load_domainnet, folder, ["clipart"])
        assert "expected a folder with lists" in error(load_domainnet, tmp_path / "gone", ["real"])


class TestRetinopathy:
    @pytest.fixture
    def kaggle(self, tmp_path: Path) -> Path:
        folder = tmp_path / "kaggle"
        rows = [(f"{number}_{side}", number % 5) for number in range(10, 30) for side in ("left", "right")]
        for name, _ in rows:
            draw(folder / "train" / f"{name}.jpeg")
        (folder / "trainLabels.csv").write_text("image,level\n" + "".join(f"{n},{level}\n" for n, level in rows))
        return folder

    @pytest.fixture
    def aptos(self, tmp_path: Path) -> Path:
        folder = tmp_path / "aptos"
        draw(folder / "train_images" / "000c1434d8d7.png")
        draw(folder / "train_images" / "001639a390f0.png")
        (folder / "train.csv").write_text("id_code,diagnosis\n000c1434d8d7,2\n001639a390f0,4\n")
        (folder / "test.csv").write_text("id_code\n0005cfc8afb6\n")  # ungraded, as Kaggle has it
        return folder

    def test_patients_are_dealt_out(self, kaggle: Path, aptos: Path) -> None:
        splits = load_retinopathy(kaggle, {"aptos": str(aptos)})
        assert {split: len(one) for split, one in splits.sets.items()} == {
            "train": 28, "validation": 4, "test": 8, "ood aptos": 2
        }  # fmt: skip
        seen = [{patient(file) for file in splits.sets[s].files} for s in ("train", "validation", "test")]
        assert sum(map(len, seen)) == len(set().union(*seen)) == 20
        for one in splits.sets.values():
            if one.root == kaggle:
                assert all(int(patient(f)) % 5 == label for f, label in zip(one.files, one.labels, strict=True))
        assert splits.names == ("0", "1", "2", "3", "4")
        assert splits.sets["ood aptos"].files == ("train_images/000c1434d8d7.png", "train_images/001639a390f0.png")
        assert splits.sets["ood aptos"].labels == (2, 4)

    def test_the_graded_test_photographs(self, kaggle: Path) -> None:
        draw(kaggle / "test" / "1_left.jpeg")
        (kaggle / "retinopathy_solution.csv").write_text("image,level,Usage\n1_left,3,Private\n")
        splits = load_retinopathy(kaggle)
        assert {split: len(one) for split, one in splits.sets.items()} == {"test": 1, "train": 36, "validation": 4}
        assert splits.sets["test"].labels == (3,)

    def test_unusable(self, kaggle: Path, tmp_path: Path) -> None:
        assert "expected trainLabels.csv with train/, or train.csv with train_images/" in error(
            load_retinopathy, tmp_path
        )
        (kaggle / "train" / "12_right.jpeg").unlink()
        assert "row 6 of" in error(load_retinopathy, kaggle)
        assert f"{kaggle / 'train'} has no image '12_right'" in error(load_retinopathy, kaggle)
        (kaggle / "trainLabels.csv").write_text("image,level\n10_left,5\n")
        assert "column 'level': expected a grade from 0 to 4, got '5'" in error(load_retinopathy, kaggle)
        (kaggle / "trainLabels.csv").write_text("image,level\n10_left,1\n10_right,1\n")
        assert "expected more patients than 2" in error(load_retinopathy, kaggle)


class TestEncodedImages:
    @pytest.fixture
    def images(self, tmp_path: Path) -> ImageSet:
        for place, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
            draw(tmp_path / "set" / f"{place}.png", colour)
        return ImageSet("some", tmp_path / "set", ("0.png", "1.png", "2.png"), (0, 1, 2), classes=(0, 2))

    def processor(self) -> object:
        from transformers import ViTImageProcessor

        return ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)

    def test_batches_are_decoded(self, images: ImageSet) -> None:
        encoded = EncodedImages(images, self.processor())
        batch = encoded.__getitems__([2, 0])
        assert batch["labels"].tolist() == [2, 0]
        assert batch["pixel_values"].shape == (2, 3, 8, 8) and batch["pixel_values"].dtype == torch.float32
        # blue: red and green are -1 after (0 - 0.5) / 0.5, blue is 1
        torch.testing.assert_close(batch["pixel_values"][0].mean(dim=(1, 2)), torch.tensor([-1.0, -1.0, 1.0]))
        some = encoded.subset([1, 2], "part")
        assert some.images.files == ("1.png", "2.png") and some.classes is not None and len(some) == 2

    def test_a_changed_file_is_another_row(self, images: ImageSet) -> None:
        before = EncodedImages(images, self.processor())
        keys, digest = list(before.input_bytes()), before.content_digest()
        assert len(set(keys)) == 3
        os.utime(images.root / "1.png", ns=(1, 1))
        after = EncodedImages(images, self.processor())
        changed = [a != b for a, b in zip(keys, after.input_bytes(), strict=True)]
        assert changed == [False, True, False] and after.content_digest() != digest

    def test_files_that_cannot_be_used(self, images: ImageSet) -> None:
        (images.root / "1.png").write_bytes((images.root / "1.png").read_bytes()[:40])
        encoded = EncodedImages(images, self.processor())
        with pytest.raises(DataError, match=r"1\.png: cannot be decoded"):
            encoded.__getitems__([0, 1])
        (images.root / "1.png").unlink()
        with pytest.raises(DataError, match=r"1\.png: no such image"):
            EncodedImages(images, self.processor())

    def test_predictions_are_made_among_the_classes_of_the_set(self, images: ImageSet) -> None:
        torch.manual_seed(0)
        config = LeviConfig(num_labels=3, taps="none", task_model={"type": "image", "widths": [8], "view_width": 4})
        model = get_levi_model(None, config)
        found = predict(model, EncodedImages(images, self.processor()), with_layers=True).logits
        whole = EncodedImages(ImageSet("all", images.root, images.files, images.labels), self.processor())
        free = predict(model, whole).logits
        np.testing.assert_array_equal(found[:, [0, 2]], free[:, [0, 2]])
        assert (found[:, 1] == -1e9).all() and set(found.argmax(axis=1)) <= {0, 2}
