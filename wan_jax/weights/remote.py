"""Checkpoints that lie elsewhere: on the Hugging Face hub and in gs:// buckets.

PyTorch files are brought here, only those that are read; a converted folder in a bucket is read
where it lies, through bucket_path(). huggingface_hub and gcsfs are imported when they are needed.
"""

import contextlib
import fnmatch
import functools
import glob
import hashlib
import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from wan_jax.config import PARTS
from wan_jax.weights.facts import one_line
from wan_jax.weights.folders import alone, check_space
from wan_jax.weights.layouts import PLACES, PTH
from wan_jax.weights.sources import DEFAULTS_FILE, TOKENIZERS

EXAMPLE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
Notify = Callable[[str], None]
OnBytes = Callable[[int, int], None]


def _as_safetensors(name: str) -> str:
    """The name that to_safetensors.py gives to what the original keeps in a .pth."""
    return name.replace(".pth", ".safetensors")


def _patterns(part: str) -> tuple[tuple[str, ...], ...]:
    """A part's files in the Diffusers layout, the original one and ComfyUI's, weights first."""
    diffusers, *others = (place for place in PLACES[part] if place)
    original: list[tuple[str, ...]] = [("diffusion_pytorch_model*.safetensors*", "config.json")]
    if part in PTH:
        original = [(PTH[part],), (_as_safetensors(PTH[part]),)]
    comfyui = [(f"{place}/*.safetensors",) for place in others[:1]]
    return ((f"{diffusers}/*.safetensors", f"{diffusers}/*.json"), *original, *comfyui)


# In the order in which open_folder() looks for the layouts.
_FILES = {part: _patterns(part) for part in PARTS}
_FILES["tokenizer"] = tuple((f"{place}/*",) for place in TOKENIZERS)
_SMALL = (DEFAULTS_FILE, "model_index.json")  # wanted where they are
_HUB_NAME = r"\b[\w.-]{1,96}\b"
_HUB_ID = re.compile(rf"(?!.*(--|\.\.)){_HUB_NAME}/{_HUB_NAME}(@[\w./-]+)?", re.ASCII)
_HUB_SECONDS = 10.0  # for the hub's first answer; after that, what is here already will do
_PIECE, _AT_ONCE = 2**24, 8  # bytes of one request to a bucket, and requests at a time


def is_hub_id(text: str) -> bool:
    """Whether this has the form of a model on the hub: "organisation/name", maybe "@revision".

    So have many relative paths; ask for a folder of this name first.
    """
    return _HUB_ID.fullmatch(text) is not None


def is_bucket(text: str) -> bool:
    """Whether this is a path in a bucket, gs://..."""
    return text.startswith("gs://")


def wanted_files(names: Iterable[str], parts: Collection[str] | None, *, what: str) -> list[str]:
    """Those of a checkpoint's files that these parts are read from; the tokenizer is umt5's.

    names: all files, relative to the checkpoint. parts: None is all, CLIP only where it is there.
    Raises ValueError, beginning with `what`, for a part that has none.
    """
    held = sorted(names)
    if any(name.startswith(("transformer_2/", "high_noise_model/")) for name in held):
        raise ValueError(f"{what} has a second transformer, as Wan2.2 does; Wan2.1 has one")
    wanted = {name for name in held if name in _SMALL}
    for part in _with_tokenizer(parts):
        layout = next((p for p in _FILES[part] if fnmatch.filter(held, p[0])), None)
        if layout is None and (part != "clip" or parts is not None):
            places = " and no ".join(patterns[0] for patterns in _FILES[part][:2])
            raise ValueError(f"{what} is not a Wan2.1 checkpoint: it has no {places}")
        wanted.update(name for p in layout or () for name in fnmatch.filter(held, p))
    return sorted(wanted)


def _with_tokenizer(parts: Collection[str] | None) -> tuple[str, ...]:
    chosen = PARTS if parts is None else tuple(parts)
    return (*chosen, "tokenizer") if "umt5" in chosen else chosen


def peek(text: str) -> dict[str, Any] | None:
    """config.json of the DiT of a hub id or a gs:// folder; None if there is none to be had."""
    if not is_bucket(text) and not is_hub_id(text):
        return None
    for name in ("transformer/config.json", "config.json"):
        with contextlib.suppress(Exception):  # of many libraries; the download says what is wrong
            if is_bucket(text):
                place = f"{text.rstrip('/').removeprefix('gs://')}/{name}"
                with bucket_errors(text):
                    found = _bucket_filesystem().cat_file(place)
            else:
                import huggingface_hub as hub

                repo, _, revision = text.partition("@")
                file = hub.hf_hub_download(
                    repo, name, revision=revision or None, etag_timeout=_HUB_SECONDS
                )
                found = Path(file).read_bytes()
            values = json.loads(found)
            if isinstance(values, dict):
                return values
    return None


def download_hub(text: str, *, notify: Notify, parts: Collection[str] | None = None) -> Path:
    """The folder, in the hub's own cache, of a model's files; what is there is not fetched again.

    Without a network, what an earlier call has fetched. notify is told what is about to be
    fetched. Raises ValueError of one line naming the model.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    repo, _, given = text.partition("@")
    revision = given or None
    fetch = functools.partial(hub.snapshot_download, repo)
    try:
        try:
            info = hub.HfApi().model_info(
                repo, revision=revision, files_metadata=True, timeout=_HUB_SECONDS
            )
        except Exception:  # no network, whose errors are another library's, or no token any more
            named = [p for part in _with_tokenizer(parts) for ps in _FILES[part] for p in ps]
            return Path(fetch(revision=revision, allow_patterns=named, local_files_only=True))
        sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}
        names = wanted_files(sizes, parts, what=text)
        held = {n: hub.try_to_load_from_cache(repo, n, revision=info.sha) for n in names}
        missing = [name for name, path in held.items() if not isinstance(path, str)]
        if missing:
            needed = sum(sizes[name] for name in missing)
            cache = Path(constants.HF_HUB_CACHE)
            check_space(cache, needed, remedy="set HF_HOME to a folder on another disk")
            notify(f"downloading {needed / 1e9:.1f} GB of {text} into {cache}")
        folder = fetch(
            revision=revision if missing else info.sha,
            allow_patterns=[glob.escape(name) for name in names],
            local_files_only=not missing,
        )
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, errors.HfHubHTTPError):
            raise  # of one line already
        raise ValueError(_hub_message(text, error)) from error
    return Path(folder)


def _hub_message(text: str, error: BaseException) -> str:
    from huggingface_hub import constants, errors

    repo, _, revision = text.partition("@")
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo}"
        return f"{text} is gated: accept its terms at {page}, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{text} is neither a folder here nor a model on the Hugging Face hub that you may "
            f"see; an id looks like {EXAMPLE}; for a private model run `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}; a branch, a tag or a commit is needed"
    if isinstance(error, errors.LocalEntryNotFoundError):
        cause = error.__context__ or error  # why the hub was not asked
        if isinstance(cause, errors.HfHubHTTPError):
            return _hub_message(text, cause)
        return (
            f"{text} is not a folder here, and the Hugging Face hub cannot be reached for it "
            f"({one_line(cause)}); without a network a local folder is needed"
        )
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"{text} may not be read with your token; run `hf auth login` with one that may"
    return f"downloading {text} stopped ({one_line(error)}); run again to go on"


def bucket_path(text: str) -> Any:
    """A gs:// path as an etils.epath.Path; ValueError without gcsfs, which reads and writes it."""
    from etils import epath

    with bucket_errors(text):
        _bucket_filesystem()
    return epath.Path(text)


def _bucket_filesystem() -> Any:
    import fsspec

    # A listing that is remembered hides what Orbax, or another host, has written since.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gs")


@contextlib.contextmanager
def bucket_errors(path: str) -> Iterator[None]:
    """Errors of a bucket inside the block become a ValueError of one line naming the path."""
    logger = logging.getLogger("gcsfs")  # which shows the traceback of each of its errors
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except ValueError:
        raise
    except ImportError as error:
        raise ValueError(f"{path} needs gcsfs: `pip install gcsfs` ({one_line(error)})") from error
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not there: no such bucket, or nothing of this name") from error
    except Exception as error:  # of any of four libraries
        line = one_line(error)
        refused = getattr(error, "code", None) in (401, 403) or line.startswith("Forbidden")
        if refused or type(error).__module__.startswith("google.auth"):
            raise ValueError(
                f"{path} may not be used with the credentials found here ({line}); run "
                "`gcloud auth application-default login` or set GOOGLE_APPLICATION_CREDENTIALS"
            ) from error
        raise ValueError(f"{path} cannot be used: {line}") from error
    finally:
        logger.setLevel(level)


def download_bucket(
    path: str,
    cache: Path,
    *,
    notify: Notify,
    callback: OnBytes | None = None,
    parts: Collection[str] | None = None,
) -> Path:
    """A copy, in a folder of `cache`, of the PyTorch files of a gs:// folder.

    Files that are there already are not fetched again. A change in the bucket makes another copy.
    callback(done, total) is told bytes. Raises ValueError naming what is wrong.
    """
    path = path.rstrip("/")
    root = path.removeprefix("gs://") + "/"
    with bucket_errors(path):
        filesystem = _bucket_filesystem()
        found = filesystem.find(path, detail=True)
    if not found:
        raise ValueError(f"{path} is not there: the bucket has nothing of this name")
    files = {name.removeprefix(root): info for name, info in found.items()}
    sizes = {name: files[name]["size"] for name in wanted_files(files, parts, what=path)}
    facts = [f"{name} {size} {files[name].get('generation')}" for name, size in sizes.items()]
    digest = hashlib.sha256("\n".join([path, *facts]).encode()).hexdigest()[:12]
    target = cache / f"{path.split('/')[-1]}-{digest}"
    missing = _missing(target, sizes)
    if not missing:
        return target
    needed = sum(missing.values())
    check_space(target, needed, remedy="set cache_dir to a folder on another disk")
    notify(f"downloading {needed / 1e9:.1f} GB of {path} into {target}")
    with alone(target):
        for left in list(target.rglob(".*.partial")):  # of a process that was killed
            left.unlink()
        missing = _missing(target, sizes)  # another process may have brought some
        done, total = sum(sizes.values()) - sum(missing.values()), sum(sizes.values())

        def step(count: int) -> None:
            nonlocal done
            done += count
            if callback is not None:
                callback(done, total)

        for name, size in missing.items():
            source = f"{path.removeprefix('gs://')}/{name}"
            _fetch(filesystem, source, target / name, size=size, step=step)
    return target


def _missing(target: Path, sizes: dict[str, int]) -> dict[str, int]:
    """The files, and their sizes, that are not in the folder in that size."""
    held = {f.relative_to(target).as_posix(): f.stat().st_size for f in target.rglob("*.*")}
    return {name: size for name, size in sizes.items() if held.get(name) != size}


def _fetch(
    filesystem: Any, source: str, target: Path, *, size: int, step: Callable[[int], None]
) -> None:
    """Write an object into a file, which appears when it is whole; step is told bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.partial")
    try:
        with work.open("wb") as file:
            for first in range(0, size, _PIECE * _AT_ONCE):
                starts = list(range(first, min(first + _PIECE * _AT_ONCE, size), _PIECE))
                ends = [min(start + _PIECE, size) for start in starts]
                sources = [source] * len(ends)
                with bucket_errors(f"gs://{source}"):
                    pieces = filesystem.cat_ranges(sources, starts, ends, on_error="raise")
                if sum(map(len, pieces)) != ends[-1] - first:
                    raise ValueError(f"gs://{source} changed while it was read; run again")
                file.writelines(pieces)
                step(ends[-1] - first)
        work.replace(target)
    finally:
        work.unlink(missing_ok=True)


def upload_folder(folder: Path, target: str, *, last: str, callback: OnBytes | None = None) -> None:
    """Copy a converted checkpoint into a bucket; its file `last` is written when all else is there.

    What was written is removed again if it cannot be finished. callback(done, total) is told
    bytes. Raises ValueError naming what is wrong with the bucket.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = {file: f"{target.rstrip('/')}/{file.relative_to(folder).as_posix()}" for file in files}
    total, done = sum(file.stat().st_size for file in files), 0
    # An index of arrays must not come before the arrays.
    index = [f for f in files if f.name == "manifest.ocdbt"]
    arrays = [f for f in files if f not in index and f != folder / last]
    with bucket_errors(target):
        filesystem = _bucket_filesystem()
        before = {f"gs://{name}" for name in filesystem.find(target)}  # maybe another host's
        try:
            for wave in (arrays, index, [folder / last]):
                for first in range(0, len(wave), _AT_ONCE // 2):
                    batch = wave[first : first + _AT_ONCE // 2]
                    filesystem.put([str(f) for f in batch], [names[f] for f in batch])
                    done += sum(f.stat().st_size for f in batch)
                    if callback is not None:
                        callback(done, total)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                held = {f"gs://{name}" for name in filesystem.find(target)}
                if names[folder / last] not in held:  # or another host has finished it
                    filesystem.rm(sorted(held & set(names.values()) - before))
            raise
