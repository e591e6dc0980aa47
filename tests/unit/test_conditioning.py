"""The mask of known frames, and the video that is encoded, in chunks."""

import numpy as np
import pytest

from wan_jax import conditioning


def image(seed: int, height: int = 4, width: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.uniform(-1.1, 1.1, (height, width, 3)).astype(np.float32)


@pytest.mark.parametrize("frames", [1, 5, 17, 81, 121])
def test_mask_of_a_first_frame(frames):
    mask = conditioning.mask_bthwc(frames, height=3, width=5)
    assert mask.shape == (1, 1 + (frames - 1) // 4, 3, 5, 4)
    assert mask.dtype == np.float32
    assert (mask[:, 0] == 1).all()
    assert (mask[:, 1:] == 0).all()


@pytest.mark.parametrize("frames", [5, 17, 81, 121])
def test_mask_of_first_and_last_frame(frames):
    mask = conditioning.mask_bthwc(frames, height=3, width=5, last=True)
    assert (mask[:, 0] == 1).all()
    assert (mask[:, 1:-1] == 0).all()
    assert (mask[:, -1, ..., 3] == 1).all()
    assert (mask[:, -1, ..., :3] == 0).all()


@pytest.mark.parametrize(
    ("frames", "with_last"),
    [(1, False), (5, False), (17, False), (81, False), (5, True), (17, True), (81, True)],
)
def test_chunks_are_the_whole_video(frames, with_last):
    first, last = image(0), image(1) if with_last else None
    chunks = list(conditioning.pixel_chunks(first, frames=frames, last=last))
    assert chunks[0].shape == (1, 1, 4, 6, 3)
    assert all(piece.shape[1] == 4 for piece in chunks[1:])
    video = np.concatenate(chunks, 1)
    expected = np.zeros((1, frames, 4, 6, 3), np.float32)
    expected[0, 0] = first
    if last is not None:
        expected[0, -1] = last
    assert video.dtype == np.float32
    np.testing.assert_array_equal(video, expected)


def test_grey_is_one_array():
    chunks = list(conditioning.pixel_chunks(image(0), frames=81, last=image(1)))
    grey = chunks[1:-1]
    assert all(piece is grey[0] for piece in grey)
    assert not any(piece.flags.writeable for piece in grey)
    assert (grey[0] == 0).all()


@pytest.mark.parametrize("frames", [0, -3, 2, 4, 80, 6.5, True])
def test_other_numbers_of_frames_are_refused(frames):
    message = "frames is .*; 4n . 1 is needed"
    with pytest.raises(ValueError, match=message):
        conditioning.mask_bthwc(frames, height=3, width=5)
    with pytest.raises(ValueError, match=message):
        conditioning.pixel_chunks(image(0), frames=frames)  # at once, not when first asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": image(0)[None]}, r"the first frame has shape \(1, 4, 6, 3\)"),
        ({"first": image(0).astype(np.float64)}, "dtype float64"),
        ({"last": image(1, height=5)}, r"the last frame has shape \(5, 6, 3\); that of the first"),
        ({"last": image(1)[..., :1]}, r"the last frame has shape \(4, 6, 1\)"),
        ({"last": image(1), "frames": 1}, "first and last frame need 5 or more"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    arguments = {"first": image(0), "frames": 5, **options}
    with pytest.raises(ValueError, match=message):
        conditioning.pixel_chunks(**arguments)
