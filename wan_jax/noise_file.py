"""Initial noise from a file, laid out as the reference lays it out.

A leaf: NumPy and the standard library.
"""

import os

import numpy as np


def load_noise(path: str | os.PathLike[str], *, shape: tuple[int, ...]) -> np.ndarray:
    """Reads the initial noise of a run from a .npy file laid out as the reference does.

    shape: what the caller needs, (b, T, h, w, c) in latent frames and latent pixels, c = 16.
    The file holds any floating dtype, [c, T, h, w] (only for b = 1) or [b, c, T, h, w].
    Returns float32 [b, T, h, w, c]. Raises ValueError, naming the file, if it is missing, cut
    short, pickled, not of that shape, not floating or not finite.
    """
    batch, length, height, width, channels = shape
    wanted = (batch, channels, length, height, width)
    accepted = f"accepted: a .npy file of floats, shape {wanted}"
    accepted += f" or {wanted[1:]}" if batch == 1 else ""
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
    except Exception as error:  # NumPy's parser fails in a dozen ways, all of them the file's fault
        why = "it is no array of numbers" if "pickle" in str(error) else error
        raise ValueError(f"noise file {str(path)!r} cannot be read: {why}; {accepted}") from error
    if not hasattr(loaded, "dtype"):
        raise ValueError(f"noise file {str(path)!r} is an .npz archive; {accepted}")
    if not np.issubdtype(loaded.dtype, np.floating):
        raise ValueError(f"noise file {str(path)!r} has dtype {loaded.dtype}; {accepted}")
    if loaded.shape != wanted and (batch != 1 or loaded.shape != wanted[1:]):
        raise ValueError(f"noise file {str(path)!r} has shape {loaded.shape}; {accepted}")
    with np.errstate(over="ignore"):
        noise = loaded.reshape(wanted).astype(np.float32)
    bad = noise.size - np.count_nonzero(np.isfinite(noise))
    if bad:
        raise ValueError(
            f"noise file {str(path)!r} has {bad} of {noise.size} values that are not finite in "
            f"float32; {accepted}"
        )
    return np.ascontiguousarray(np.moveaxis(noise, 1, -1))
