"""Initial noise from a file: which layouts are taken, and what is said of other files."""

from pathlib import Path

import numpy as np
import pytest

from wan_jax import noise_file

SHAPE = (1, 3, 4, 5, 16)  # b, T, h, w, c


def stored(batch: int | None = None, dtype: str = "<f4") -> np.ndarray:
    rng = np.random.default_rng(1)
    lead = () if batch is None else (batch,)
    return rng.standard_normal((*lead, 16, 3, 4, 5)).astype(dtype)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8"])
@pytest.mark.parametrize("fortran", [False, True])
def test_load_noise_moves_channels_last(tmp_path, dtype, fortran):
    noise = stored(dtype=dtype)
    np.save(tmp_path / "n.npy", np.asfortranarray(noise) if fortran else noise)
    loaded = noise_file.load_noise(tmp_path / "n.npy", shape=SHAPE)
    assert loaded.shape == SHAPE
    assert loaded.dtype == np.float32 and loaded.dtype.isnative
    assert loaded.flags.c_contiguous
    for c, t in [(0, 0), (3, 1), (15, 2)]:
        np.testing.assert_array_equal(loaded[0, t, :, :, c], noise[c, t].astype(np.float32))


def test_load_noise_batches(tmp_path):
    np.save(tmp_path / "one.npy", stored(1))
    np.save(tmp_path / "two.npy", stored(2))
    assert noise_file.load_noise(tmp_path / "one.npy", shape=SHAPE).shape == SHAPE
    loaded = noise_file.load_noise(str(tmp_path / "two.npy"), shape=(2, *SHAPE[1:]))
    np.testing.assert_array_equal(loaded[1, 2, 3, 4], stored(2)[1, :, 2, 3, 4])


def damaged(path: Path, kind: str) -> None:
    """Writes a noise file with one thing wrong with it."""
    noise = stored()
    arrays = {
        "latent layout": np.moveaxis(noise, 0, -1),
        "short": noise[:, :2],
        "batch": stored(2),
        "integers": noise.astype(np.int32),
        "complex": noise.astype(np.complex64),
        "nan": np.where(np.arange(5) == 2, np.nan, noise),
        "overflow": np.full(noise.shape, 1e300),
    }
    if kind in arrays:
        np.save(path, arrays[kind])
    elif kind == "pickled":
        np.save(path, noise.astype(object), allow_pickle=True)
    elif kind == "npz":
        with open(path, "wb") as file:
            np.savez(file, noise=noise)
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        np.save(path, noise)
        data = path.read_bytes()
        path.write_bytes(
            {
                "truncated": data[:-5],
                "only a header": data[:128],
                "half a header": data[:60],
                "empty": b"",
                "text": b"not an array",
                "bad zip": b"PK\x03\x04 and no more",
                "huge": data.replace(b"(16, 3, 4, 5)", b"(9999999999999,)").replace(
                    b" " * 3, b"", 1
                ),
            }[kind]
        )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("latent layout", r"shape \(3, 4, 5, 16\)"),
        ("short", r"shape \(16, 2, 4, 5\)"),
        ("batch", r"shape \(2, 16, 3, 4, 5\)"),
        ("integers", "dtype int32"),
        ("complex", "dtype complex64"),
        ("nan", "192 of 960 values that are not finite"),
        ("overflow", "960 of 960 values that are not finite"),
        ("pickled", "cannot be read: it is no array of numbers"),
        ("npz", "an .npz archive"),
        ("folder", "cannot be read: .*Is a directory"),
        ("missing", "cannot be read: .*No such file"),
        ("truncated", "cannot be read"),
        ("only a header", "cannot be read"),
        ("half a header", "cannot be read"),
        ("empty", "cannot be read"),
        ("text", "cannot be read"),
        ("bad zip", "cannot be read"),
        ("huge", "cannot be read"),
    ],
)
def test_load_noise_errors(tmp_path, kind, message):
    damaged(tmp_path / "n.npy", kind)
    accepted = r"accepted: a .npy file of floats, shape \(1, 16, 3, 4, 5\) or \(16, 3, 4, 5\)"
    with pytest.raises(ValueError, match=rf"noise file '.*n\.npy' .*{message}.*; {accepted}"):
        noise_file.load_noise(tmp_path / "n.npy", shape=SHAPE)


def test_load_noise_without_a_batch_is_one_sample(tmp_path):
    np.save(tmp_path / "n.npy", stored())
    with pytest.raises(ValueError, match=r"shape \(16, 3, 4, 5\); .* shape \(2, 16, 3, 4, 5\)$"):
        noise_file.load_noise(tmp_path / "n.npy", shape=(2, *SHAPE[1:]))
