"""Recordings: samples, spectrograms, divisions by speaker, and the stand-in; and the text that every reader has."""

import math
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import readers_folder, tone, write_speech, write_wav

from keelnorm.lab.data import DataError, characters, digits, discover, spoken, wav
from keelnorm.lab.data.data_folder import reading_from
from keelnorm.lab.data.spoken import read_recordings
from keelnorm.lab.data.text import divided
from keelnorm.lab.data.wav import log_mel, read_wav, span, word_and_speaker


@pytest.mark.parametrize("width", [1, 2, 4])
def test_samples_are_those_that_were_written(tmp_path, width):
    samples = np.array([0.0, 0.5, -0.5, -1.0, 0.25])
    write_wav(tmp_path / "a.wav", samples, width=width, rate=16000)
    found, rate = read_wav(tmp_path / "a.wav")
    assert rate == 16000
    assert found.tolist() == samples.tolist()  # powers of two, which all widths hold exactly


def test_channels_are_averaged(tmp_path):
    write_wav(tmp_path / "a.wav", np.array([[0.5, 0.25], [0.0, -0.5]]), channels=2)
    assert read_wav(tmp_path / "a.wav")[0].tolist() == [0.375, -0.25]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"width": 3}, "has 24 bits a sample; 8, 16 and 32 can be read: convert it to 16"),
        ({"rate": 4000}, "has 4000 samples a second; at least 7600 are needed"),
        (
            {"claimed_rate": 2**32 - 1},
            "has 4294967295 samples a second by its header, and at most 768000 samples a second are",
        ),
        ({"frames": 2**31 - 99}, "says that it has 2147483549 samples of 2 bytes, and has 4800 bytes; fetch it again"),
        ({"frames": 5000}, "says that it has 5000 samples of 2 bytes, and has 4800 bytes; fetch it again"),
    ],
    ids=["24 bits", "slow", "rate", "gigabytes", "short"],
)
def test_a_recording_that_cannot_be_used_is_named(tmp_path, how, says, peak_bytes):
    write_wav(tmp_path / "a.wav", tone(300), **how)
    with pytest.raises(DataError, match=f"a.wav {says}"):
        read_wav(tmp_path / "a.wav")
    assert peak_bytes() < 2**23


@pytest.mark.parametrize("content", [b"", b"ID3 an mp3", b"RIFF\x24\0\0\0WAVEfmt \x10"], ids=["empty", "mp3", "cut"])
def test_what_is_no_wav_file_is_named(tmp_path, content):
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.wav can't be read as a WAV file of PCM samples \(.+\); convert it"):
        read_wav(path)


def test_of_a_long_recording_no_more_is_read_than_a_spectrogram_spans(tmp_path):
    write_wav(tmp_path / "a.wav", tone(300, seconds=100))
    found, rate = read_wav(tmp_path / "a.wav")
    assert len(found) == span(rate)
    whole = torch.from_numpy(np.round(tone(300, seconds=100) * 2**15) / 2**15).float()
    assert torch.equal(log_mel(found, rate), log_mel(whole, rate))


def test_a_recording_without_samples_is_named(tmp_path):
    write_wav(tmp_path / "a.wav", np.array([]))
    with pytest.raises(DataError, match=r"a.wav has no samples; remove it"):
        read_wav(tmp_path / "a.wav")


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_a_tone_lies_in_the_band_of_its_frequency(rate):
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in wav.HERTZ)
    for band in (3, 12, 20):
        mel = low + (high - low) * (band + 1) / (wav.BANDS + 1)
        spectrogram = log_mel(torch.from_numpy(tone(700 * (10 ** (mel / 2595) - 1), rate)).float(), rate)
        assert spectrogram.shape == (wav.BANDS, wav.FRAMES)
        assert int(spectrogram[:, 5].argmax()) == band
        # Half the full scale in a band's middle: an amplitude of 1/4 on either side of zero, at every rate.
        assert float(spectrogram[band, 5]) == pytest.approx(math.log(0.25**2 * 1.5), abs=0.5)


def test_the_length_is_fixed_and_silence_is_the_floor():
    short = log_mel(torch.from_numpy(tone(500, seconds=0.1)).float(), 8000)
    long = log_mel(torch.from_numpy(tone(500, seconds=5)).float(), 8000)
    assert short.shape == long.shape
    assert torch.allclose(short[:, -1], torch.full((wav.BANDS,), math.log(wav.FLOOR)))
    assert float(long[:, -1].max()) > -5


def test_names_tell_word_and_speaker():
    assert word_and_speaker(Path("fsdd/7_jackson_32.wav")) == ("7", "jackson")
    assert word_and_speaker(Path("sc/yes/0ab3b47d_nohash_1.wav")) == ("yes", "0ab3b47d")


def test_recordings_are_divided_by_speaker(tmp_path):
    write_speech(tmp_path)
    [identity] = discover(tmp_path)
    with reading_from(tmp_path):
        found = spoken(identity)
    assert found.names == ("ann", "bob", "eve")
    assert found.x.shape == (36, wav.BANDS, wav.FRAMES)
    assert not found.stand_in
    assert found.y.tolist() == [0] * 18 + [1] * 18
    split = found.held_out(1, seed=0)
    assert torch.equal(split.test_x, found.x[found.speakers == 1])
    assert torch.equal(split.test_y, found.y[found.speakers == 1])
    assert len(split.validation_y) == 24 // 5
    every = torch.cat([split.train_x, split.validation_x, split.test_x])
    assert len(every.flatten(1).unique(dim=0)) == 36
    assert torch.equal(split.train_x, found.held_out(1, seed=0).train_x)
    assert not torch.equal(split.train_x, found.held_out(1, seed=1).train_x)
    mixed = found.at_random(seed=0)
    assert [len(part) for part in (mixed.train_y, mixed.validation_y, mixed.test_y)] == [22, 7, 7]
    with pytest.raises(ValueError, match="speaker 3 can't be held out; there are 3, numbered from 0"):
        found.held_out(3, seed=0)


def test_one_word_alone_is_no_task(tmp_path):
    write_wav(tmp_path / "yes_ann_0.wav", tone(300))
    write_wav(tmp_path / "yes_bob_0.wav", tone(300))
    with pytest.raises(DataError, match=r"all have the word 'yes'; two or more are needed"):
        read_recordings(sorted(tmp_path.iterdir()))


def test_of_a_large_collection_a_part_is_taken(monkeypatch):
    monkeypatch.setattr(wav, "MOST_WORDS", 2)
    monkeypatch.setattr(wav, "MOST_SPEAKERS", 2)
    monkeypatch.setattr(wav, "MOST_EACH", 3)
    said = {"ann": 2, "bob": 5, "eve": 4}
    files = [
        Path(f"{word}_{speaker}_{number}.wav")
        for word in ("a", "b", "c")
        for speaker, times in said.items()
        for number in range(times)
    ]
    taken = wav.recordings_used(files)
    assert {name for name, _ in taken.values()} == {"a", "b"}
    assert [path.name for path in taken][:6] == [
        f"a_{who}_{number}.wav" for who in ("bob", "eve") for number in range(3)
    ]
    assert len(taken) == 12


def test_the_stand_in_reads_rows_as_frames_and_groups_by_ink():
    found = spoken("digits")
    assert found.stand_in
    assert found.x.shape == (1797, 8, 8)
    assert len(found.names) == 6
    from sklearn.datasets import load_digits

    bunch = load_digits()
    assert np.allclose(found.x[5].numpy() * 16, bunch.images[5].T)
    counts = found.speakers.bincount()
    assert int(counts.max() - counts.min()) <= 6
    # More ink from group to group, within each class.
    ink = found.x.mean(dim=(1, 2))
    for label in range(10):
        means = [float(ink[(found.y == label) & (found.speakers == group)].mean()) for group in range(6)]
        assert means == sorted(means)
    split = found.held_out(0, seed=0)
    assert split.classes == digits(0).classes


def test_characters_are_the_standard_librarys_and_split_by_file(tmp_path):
    parts = characters()
    assert all(part.dtype == torch.uint8 and int(part.max()) < 128 for part in parts)
    total = sum(map(len, parts))
    assert len(parts[0]) > 0.7 * total
    stdlib = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    first = stdlib[0].read_text(encoding="utf-8").encode("ascii", "replace")
    assert bytes(parts[1][: len(first)].tolist()) == first
    files = [tmp_path / f"{number:02}.py" for number in range(12)]
    for number, file in enumerate(files):
        file.write_text(chr(ord("a") + number) + "é", encoding="utf-8")
    train, validation, test = (bytes(part.tolist()).decode() for part in divided(files))
    assert (train, validation, test) == ("c?d?e?f?g?h?i?j?", "a?k?", "b?l?")
    with pytest.raises(ValueError, match="of which at least ten are needed; there are 9"):
        divided(files[:9])


def test_real_recordings():
    folder = readers_folder("fsdd")
    [identity] = [each for each in discover(folder) if each.startswith("speech@")]
    with reading_from(folder):
        found = spoken(identity)
    assert len(found.names) == int(identity.rpartition(".")[2])
    assert int(found.y.max()) + 1 == 10
    assert len(found.y) == 600
    assert bool(found.x.isfinite().all())
