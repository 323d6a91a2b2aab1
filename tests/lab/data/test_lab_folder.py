"""What is found in a reader's folder, and what is said when nothing is, or something is missing."""

import os
import re
import shutil

import numpy as np
import pytest
from data_files import readers_folder, tone, write_idx, write_mnist, write_picture, write_speech, write_wav

from keelnorm.lab.data import DataError, discover
from keelnorm.lab.data import data_folder as folders
from keelnorm.lab.data.data_folder import files_of, reading_from


def kinds(folder):
    return sorted(identity.partition("@")[0] for identity in discover(folder))


def write_classes(folder, *names):
    for place, name in enumerate(names):
        write_picture(folder / name / "0.png", (place, 0, 0))


def test_all_kinds_are_found_in_the_folders_of_a_folder(tmp_path):
    write_mnist(tmp_path / "digits")
    write_speech(tmp_path / "words")
    write_classes(tmp_path / "pets", "cat", "dog")
    (tmp_path / "README.txt").write_text("mine")
    found = discover(tmp_path)
    assert sorted(re.sub("[0-9a-f]{8}", "#", each) for each in found) == ["images@#", "mnist@#", "speech@#.3"]
    assert discover(tmp_path) == found


@pytest.mark.parametrize("place", ["", "below"])
def test_each_kind_is_found_in_the_folder_itself_too(tmp_path, place):
    write_mnist(tmp_path / "a" / place)
    write_speech(tmp_path / "b" / place)
    write_classes(tmp_path / "c" / place, "cat", "dog")
    assert [kinds(tmp_path / each) for each in "abc"] == [["mnist"], ["speech"], ["images"]]


def test_levels_of_training_and_test_are_pooled(tmp_path):
    write_classes(tmp_path / "train", "cat", "dog")
    write_classes(tmp_path / "test", "cat", "dog")
    [identity] = discover(tmp_path)
    with reading_from(tmp_path):
        assert len(files_of(identity)) == 4


def test_an_identity_is_that_of_names_and_contents_and_of_nothing_else(tmp_path):
    for name in ("one", "two"):
        write_mnist(tmp_path / name / "mnist")
    [identity] = discover(tmp_path / "one")
    assert discover(tmp_path / "two") == [identity]  # elsewhere, written at another time
    write_mnist(tmp_path / "two" / "mnist", seed=1)
    assert discover(tmp_path / "two") != [identity]  # other pixels
    for path in list((tmp_path / "one" / "mnist").iterdir()):
        path.rename(path.with_name(path.name.replace("t10k", "train")))
    assert discover(tmp_path / "one") != [identity]


def test_of_large_data_sets_names_and_sizes_count(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "READ_BYTES", 10)
    for name, fill in (("one", 1), ("two", 2), ("more", 1)):
        values = np.full((3 + (name == "more"), 5, 5), fill)
        write_idx(tmp_path / name / "t10k-images-idx3-ubyte", values)
        write_idx(tmp_path / name / "t10k-labels-idx1-ubyte", values[:, 0, 0])
    one, two, more = (discover(tmp_path / name) for name in ("one", "two", "more"))
    assert one == two != more


def test_data_that_changed_are_not_taken_for_those_that_were_measured(tmp_path):
    write_mnist(tmp_path)
    [identity] = discover(tmp_path)
    with reading_from(tmp_path):
        assert len(files_of(identity)) == 2
        write_mnist(tmp_path, seed=1)
        with pytest.raises(DataError, match=f"does not hold the files that {identity} stands for .*with --data-dir"):
            files_of(identity)
        shutil.rmtree(tmp_path)
        with pytest.raises(DataError, match="no mnist there"):
            files_of(identity)


def test_without_a_folder_there_is_nothing_to_read_from(tmp_path):
    with pytest.raises(DataError, match="give --data-dir"):
        files_of("mnist@00000000")
    with pytest.raises(RuntimeError), reading_from(tmp_path):
        raise RuntimeError
    with pytest.raises(DataError, match="give --data-dir"):
        files_of("mnist@00000000")


def test_a_packed_file_beside_the_same_unpacked_counts_once(tmp_path):
    write_mnist(tmp_path, packed=True)
    write_mnist(tmp_path, packed=False)
    [identity] = discover(tmp_path)
    with reading_from(tmp_path):
        assert [path.name for path in files_of(identity)] == ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def test_images_packed_and_labels_not_belong_together(tmp_path):
    write_mnist(tmp_path, packed=True)
    write_mnist(tmp_path, packed=False)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    assert kinds(tmp_path) == ["mnist"]


def test_nothing_found_says_what_was_there_and_what_may_be(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(
        DataError, match=r"no data were found in .*which has notes.txt, thesis/; looked for: MNIST's IDX"
    ):
        discover(tmp_path)
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text("")
    with pytest.raises(DataError, match="and 3 more"):
        discover(tmp_path)


def test_what_is_no_folder_says_what_is(tmp_path):
    with pytest.raises(DataError, match="is not a folder; --data-dir takes a folder with MNIST's"):
        discover(tmp_path / "absent")


@pytest.mark.parametrize(("gone", "lacks"), [("labels-idx1", "no labels"), ("images-idx3", "no images")])
def test_half_a_pair_names_the_other_half(tmp_path, gone, lacks):
    write_mnist(tmp_path)
    (tmp_path / f"t10k-{gone}-ubyte.gz").unlink()
    with pytest.raises(DataError, match=rf"{lacks} beside it: put t10k-{gone}-ubyte or t10k-{gone}-ubyte.gz there"):
        discover(tmp_path)


def test_two_data_sets_in_one_folder_are_not_mixed(tmp_path):
    write_mnist(tmp_path, "emnist-letters-train")
    write_mnist(tmp_path, "emnist-letters-test")
    assert kinds(tmp_path) == ["mnist"]
    write_mnist(tmp_path, "emnist-digits-train")
    with pytest.raises(DataError, match=r"holds IDX files of 2 data sets \(emnist-digits--, emnist-letters--\)"):
        discover(tmp_path)


def test_two_of_a_kind_side_by_side_have_to_be_named(tmp_path):
    write_mnist(tmp_path / "fashion")
    write_mnist(tmp_path / "mnist")
    with pytest.raises(DataError, match=r"fashion and .*mnist both hold MNIST's .*--data-dir .*fashion"):
        discover(tmp_path)


def test_a_class_without_a_picture_is_named(tmp_path):
    write_classes(tmp_path, "cat", "dog")
    (tmp_path / "emu").mkdir()
    with pytest.raises(DataError, match=r"emu stands among folders of classes, and has no \.png"):
        discover(tmp_path)
    write_mnist(tmp_path / "emu")  # that is no class
    (tmp_path / ".cache").mkdir()
    (tmp_path / "_old").mkdir()
    assert kinds(tmp_path) == ["images", "mnist"]


def test_a_recording_that_does_not_tell_who_says_what_is_named(tmp_path):
    write_speech(tmp_path)
    write_wav(tmp_path / "song.wav", tone(300))
    with pytest.raises(DataError, match=r"song.wav does not tell word and speaker; name it \{word\}_\{speaker\}"):
        discover(tmp_path)


def test_a_pipe_is_no_data(tmp_path):
    write_classes(tmp_path, "cat", "dog")
    for name in ("t10k-images-idx3-ubyte", "yes_ann_0.wav", "cat/1.png"):
        os.mkfifo(tmp_path / name)
    assert kinds(tmp_path) == ["images"]  # and nothing waits for what would be written


def test_background_noise_is_no_word(tmp_path):
    for word in ("yes", "no"):
        write_wav(tmp_path / word / "ab12_nohash_0.wav", tone(300))
    write_wav(tmp_path / "_background_noise_" / "running_tap.wav", tone(300))
    [identity] = discover(tmp_path)
    with reading_from(tmp_path):
        assert {path.parent.name for path in files_of(identity)} == {"yes", "no"}


def test_real_folders_are_found():
    found = discover(readers_folder("mnist"))
    assert "mnist" in {identity.partition("@")[0] for identity in found}
