"""Data of the classification recipes: sets, splits, augmentation, caches, and files from elsewhere."""

import gzip

import numpy as np
import pytest
import torch
from PIL import Image

from qat import QATError
from qat.recipes import data as recipe_data
from qat.recipes.classification import is_unbalanced
from qat.recipes.data import Augment, load, read_idx, split_by_group

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

RNG = np.random.RandomState(0)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def pictures(dataset):
    return {image.numpy().tobytes() for image in dataset.images}


def test_digits_splits_are_disjoint_and_complete(digits):
    from sklearn.datasets import load_digits

    parts = [pictures(part) for part in (digits.train, digits.val, digits.test)]
    distinct = len({image.tobytes() for image in load_digits().images})
    assert len(set.union(*parts)) == sum(map(len, parts)) == distinct


def test_digits_classes_have_equal_shares(digits):
    shares = np.bincount(digits.test_labels) / np.bincount(load_all_digit_labels())
    assert shares == pytest.approx(0.3, abs=0.005)


def load_all_digit_labels():
    from sklearn.datasets import load_digits

    return load_digits().target


def test_splits_do_not_depend_on_the_random_state(digits):
    torch.manual_seed(77)
    np.random.seed(77)  # noqa: NPY002
    assert load("digits").sha256 == digits.sha256
    assert pictures(load("digits").test) == pictures(digits.test)


def test_calibration_images_are_training_images(digits):
    images = torch.cat([images for images, _ in digits.calibration(100, 32)])
    plain = {image.numpy().tobytes() for image, _ in (digits.plain_train[i] for i in range(len(digits.plain_train)))}
    assert len(images) == 100
    assert {image.numpy().tobytes() for image in images} <= plain


def test_training_images_are_normalised(digits):
    images = torch.cat([images for images, _ in digits.loader(digits.plain_train, 256)])
    assert images.mean((0, 2, 3)) == pytest.approx(torch.zeros(3), abs=1e-4)
    assert images.std((0, 2, 3)) == pytest.approx(torch.ones(3), abs=1e-3)


def test_shift_takes_a_crop_of_the_reflected_picture():
    images = torch.from_numpy(RNG.permutation(64).reshape(1, 1, 8, 8)).float().expand(50, -1, -1, -1)
    padded = np.pad(images[0, 0].numpy(), 1, mode="reflect")
    crops = {padded[r : r + 8, c : c + 8].tobytes() for r in range(3) for c in range(3)}
    found = {image[0].numpy().tobytes() for image in Augment(shift=1)(images)}
    assert found <= crops
    assert len(found) > 5


@pytest.mark.parametrize(("augment", "dim"), [(Augment(flip=True), 3), (Augment(flip_vertical=True), 2)])
def test_flip_mirrors_about_half_of_the_pictures(augment, dim):
    torch.manual_seed(0)
    images = torch.randn(200, 1, 4, 4)
    flipped = (augment(images) == images.flip(dim)).all((1, 2, 3))
    same = (augment(images) == images).all((1, 2, 3))
    assert 60 < int(flipped.sum()) < 140
    assert 60 < int(same.sum()) < 140


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_split_by_group_draws_the_share_of_each_group(fraction):
    groups = RNG.randint(0, 4, 400)
    among = np.arange(0, 400, 2)
    drawn, left = split_by_group(groups, fraction, among)
    assert sorted([*drawn, *left]) == among.tolist()
    for group in range(4):
        assert np.sum(groups[drawn] == group) == round(np.sum(groups[among] == group) * fraction)


def pairs(*parts):
    return sorted((image.numpy().tobytes(), int(label)) for p in parts for image, label in zip(p.images, p.labels, strict=True))


def test_folds_hold_out_every_training_and_validation_image_once(digits):
    folds = [digits.fold(index, 4) for index in range(4)]
    everything = pairs(digits.plain_train, digits.val)
    assert pairs(*(fold.val for fold in folds)) == everything
    for fold in folds:
        assert pairs(fold.plain_train, fold.val) == everything
        assert pairs(fold.train) == pairs(fold.plain_train)
        assert (fold.train.augment, fold.plain_train.augment, fold.val.augment) == (Augment(shift=1), None, None)
        counts = np.bincount(fold.val.labels) - np.bincount(torch.cat([digits.train.labels, digits.val.labels])) / 4
        assert abs(counts).max() < 1
        assert fold.test is digits.test
    assert pairs(digits.fold(1, 4).val) == pairs(folds[1].val)


@pytest.mark.parametrize(
    ("index", "count", "message"),
    [
        (4, 4, "fold 4 of 4: choose one from 0 to 3"),
        (0, 1, "1 folds: must be at least 2"),
        (0, 500, "500 folds: .* rarest class"),
    ],
)
def test_folds_that_there_are_not(digits, index, count, message):
    with pytest.raises(QATError, match=message):
        digits.fold(index, count)


def write_elpv(folder, **changes):
    probability = RNG.choice([0.0, 1 / 3, 2 / 3, 1.0], 200, p=[0.6, 0.1, 0.05, 0.25])
    arrays = {
        "images": RNG.randint(0, 256, (200, 16, 16)).astype(np.uint8),
        "probability": probability,
        "cell_type": RNG.choice(["mono", "poly"], 200),
    }
    np.savez_compressed(folder / "elpv-16.npz", **{**arrays, **changes})
    return arrays


def test_elpv_loads_from_its_cache_alone(tmp_path):
    arrays = write_elpv(tmp_path)
    loaded = load("elpv", tmp_path, 16)
    expected = {image.tobytes(): int(p >= 0.5) for image, p in zip(arrays["images"], arrays["probability"], strict=True)}
    found = pairs(loaded.train, loaded.val, loaded.test)
    assert dict(found) == expected
    assert len(found) == 200
    assert is_unbalanced(loaded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cell_type": np.array([{}] * 200)}, "Object arrays cannot be loaded"),
        ({"images": np.zeros((200, 16, 16))}, "images is float64 of rank 3"),
        ({"images": np.zeros((200, 16), np.uint8)}, "images is uint8 of rank 2"),
        ({"images": np.zeros((10, 16, 16), np.uint8)}, "10 images, 200 labels"),
    ],
)
def test_bad_cache_is_refused(tmp_path, changes, message):
    write_elpv(tmp_path, **changes)
    with pytest.raises(QATError, match=message):
        load("elpv", tmp_path, 16)


def test_file_that_is_no_cache_is_refused(tmp_path):
    (tmp_path / "elpv-16.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(QATError, match="Delete it to make it anew"):
        load("elpv", tmp_path, 16)


def gzipped(path, content):
    path.write_bytes(gzip.compress(content))
    return path


def test_idx_file_is_read(tmp_path):
    content = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, *range(6)])
    assert read_idx(gzipped(tmp_path / "a.gz", content)).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x00\x08",
        bytes([0, 0, 8, 1, 0, 0, 0, 9, 1]),
        bytes([0, 0, 13, 1, 0, 0, 0, 1, 1]),
        bytes([0, 0, 8, 3] + [255] * 12),
    ],
)
def test_bad_idx_file_is_refused(tmp_path, content):
    with pytest.raises(QATError, match="not an IDX file"):
        read_idx(gzipped(tmp_path / "a.gz", content))


def write_pictures(root, train, val):
    """Two classes of so many pictures each."""
    for part, count in (("train", train), ("val", val)):
        for label in ("cat", "dog"):
            (root / part / label).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(RNG.randint(0, 256, (20, 24, 3)).astype(np.uint8)).save(root / part / label / f"{i}.png")


def test_folder_of_pictures_is_split_by_class(tmp_path):
    write_pictures(tmp_path, 50, 2)
    loaded = load("imagefolder", tmp_path, 16)
    assert loaded.sizes() == {"train": 98, "val": 2, "test": 4}
    assert not set(loaded.train.indices) & set(loaded.val.indices)
    assert loaded.test[0][0].shape == (3, 16, 16)


def test_few_pictures_leave_one_of_each_class_to_validate(tmp_path):
    write_pictures(tmp_path, 3, 1)
    assert load("imagefolder", tmp_path, 16).sizes() == {"train": 4, "val": 2, "test": 2}


def test_a_class_of_one_picture_is_refused(tmp_path):
    write_pictures(tmp_path, 1, 1)
    with pytest.raises(QATError, match="cat holds 1 pictures; one to train and one to validate"):
        load("imagefolder", tmp_path, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mnist",), "data='mnist': choose one of digits, fashion-mnist"),
        (("digits", "data", 4), "image_size=4: must be at least 8"),
        (("imagefolder", "nowhere"), "does not exist; it must hold a folder of pictures for each class"),
    ],
)
def test_impossible_data_raises(arguments, message):
    with pytest.raises(QATError, match=message):
        load(*arguments)


def test_every_data_set_is_in_the_table():
    assert all(f"\n{name} " in recipe_data.__doc__ for name in recipe_data.LOADERS)
