"""Makes the videos of a plan: progress, records, and what an interruption leaves."""

import contextlib
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import wan_jax
from wan_jax import (
    devices,
    hosts,
    labels,
    loading,
    machine,
    media,
    noise,
    outputs,
    pipeline,
    plans,
    resume,
)
from wan_jax.cli import Reporter, Stopped, handled, say
from wan_jax.jobs import Plan
from wan_jax.outputs import Job, record_path, target
from wan_jax.planning.budget import budget, start
from wan_jax.planning.memory import work_of
from wan_jax.progress import Progress
from wan_jax.sampler import Carry, DivergedError
from wan_jax.weights import quantization

Array = jax.Array
_EVERY = 60.0  # seconds between states that are saved during the steps


def execute(values: flags.FlagValues, plan: Plan) -> None:
    """Load the checkpoint and make every video of the plan.

    One that fails does not keep the others from being made; then RuntimeError says how many did.
    """
    for path in plan.skipped:
        say(f"skipped {path}: it is there already")
    if not plan.jobs:
        return
    start(values.max_memory)
    devices.start(values)
    _check_device(values)
    spread = devices.plan(values, plan.config, plan.jobs)
    _check_memory(values, plan, spread)
    report = Reporter()
    with hosts.in_turn():
        source = loading.prepare(
            plan.source,
            lora=plan.loras,
            dtype=values.dtype,
            cache_dir=values.cache_dir,
            callback=report,
            notify=say,
        )
    wan = wan_jax.load(
        source,
        lora=plan.loras,
        dtype=values.dtype,
        cache_dir=values.cache_dir,
        offload=values.offload_model,
        text_on_cpu=values.t5_cpu,
        plan=spread,
        vae_dtype=values.vae_dtype,
        max_memory=values.max_memory,
        quantize=values.quantize,
        callback=report,
    )
    if len(set(hosts.exchange(wan.digest))) > 1:
        raise ValueError(f"--ckpt_dir {values.ckpt_dir} is not the same in every process")
    wan.make_room([job.request for job in plan.jobs])
    runs = _runs(values, wan, plan.jobs)
    texts = list(dict.fromkeys(text for run in runs for text in run.texts()))
    contexts = dict(zip(texts, wan.encode_text(texts, report), strict=True)) if texts else {}
    shared = report.lap()
    failed = 0
    for run in runs:
        try:
            _make(run, [contexts[text] for text in run.texts()], report, shared)
        except (ValueError, DivergedError, OSError, RuntimeError) as error:
            if len(runs) == 1 or hosts.count() > 1:  # the others wait for this one's part
                raise
            failed += 1
            report.lap()
            say(f"failed {run.job.output}: {' '.join(str(error).split())[:300]}")
    say(report.line())
    if failed:
        raise RuntimeError(f"{failed} of {len(runs)} videos failed")


def _check_device(values: flags.FlagValues) -> None:
    """ValueError naming --quantize if the device cannot run it; else say what there is to say."""
    try:
        quantization.check_device(values.quantize, notify=say)
    except ValueError as error:
        raise ValueError(f"--{error}") from error


def _check_memory(values: flags.FlagValues, plan: Plan, spread: plans.Plan | None) -> None:
    """ValueError naming --max_memory if the videos cannot keep it, before anything is read."""
    limit = budget(
        values.max_memory,
        plan.config,
        spread,
        dtype=values.dtype,
        vae_dtype=values.vae_dtype,
        offload=values.offload_model,
        text_on_cpu=values.t5_cpu,
        quantize=values.quantize,
    )
    if limit is None:
        return
    works = list(dict.fromkeys(work_of(job.request) for job in plan.jobs))
    try:
        streamed = limit.streamed(works)
    except ValueError as error:
        raise ValueError(f"--{error}") from error
    if streamed:
        say(f"max_memory: layers of {' and '.join(streamed)} come from the host's memory")


def _runs(values: flags.FlagValues, wan: wan_jax.Wan, jobs: Sequence[Job]) -> list["_Run"]:
    """The runs of jobs; videos of a prompt whose drawn seed a state tells get that seed too."""
    images = _Images(wan)
    runs = [_Run(values, wan, job, images) for job in jobs]
    seeds = {run.job.prompt: run.saved.seed for run in runs if run.saved is not None}
    for run in runs:
        run.job = run.job.with_seed(seeds.get(run.job.prompt))
    return runs


def _make(
    run: "_Run", contexts: list[np.ndarray], report: Reporter, shared: Mapping[str, float]
) -> None:
    """Denoise, decode into the file, write the record."""
    job, wan = run.job, run.wan
    whole = target(job.output, job.settings["frames"])
    record: dict[str, Any] = {}

    def described() -> dict[str, Any]:
        # Gone before the video is replaced: a record never tells of another video.
        record_path(whole).unlink(missing_ok=True)
        record.update(run.record(shared, report.lap()))
        return record

    with run.kept():
        latents = run.denoise(contexts, report)
        npz = job.output.suffix.lower() == ".npz"
        # One frame goes as floats: what becomes an image is rounded, what becomes a video is not.
        floats = npz or job.settings["frames"] == 1
        frames = wan.decode(latents, dtype="float32" if floats else "uint8", callback=report)
        if not hosts.is_first():
            for _ in frames:
                pass
            return
        try:
            media.save_video(
                frames,
                job.output,
                fps=wan.config.defaults.fps,
                latents=np.asarray(latents)[0] if npz else None,
                metadata=described,
            )
        except OSError as error:
            raise OSError(f"{job.output} cannot be written: {error}") from error
        labels.write_json(record, record_path(whole))
    run.finish()
    say(f"saved {media.output_path(job.output, job.settings['frames'])}")


class _Agreed(Stopped):
    """Stopped, in every process after the same step."""


class _Images:
    """What the images of a job tell, kept for those after it that have the same."""

    def __init__(self, wan: wan_jax.Wan) -> None:
        self._wan = wan
        self._key: tuple[Any, ...] = ()
        self._known: pipeline.Known | None = None

    def encode(self, job: Job, report: Reporter) -> pipeline.Known | None:
        """As Wan.encode_images()."""
        names = ("image_sha256", "last_image_sha256", "fit", "resolution", "frames")
        key = tuple(str(job.settings.get(name)) for name in names)
        if key != self._key:
            self._known = None  # before the next one takes as much
            self._known, self._key = self._wan.encode_images(job.request, report), key
        return self._known


class _Run:
    """One job from noise to latents, and its state on disk where --resume_dir is given.

    Raises ValueError if there is a state and it is damaged.
    """

    def __init__(
        self, values: flags.FlagValues, wan: wan_jax.Wan, job: Job, images: _Images
    ) -> None:
        self.job, self.wan = job, wan
        self._images = images
        self.saved: resume.Saved | None = None
        self._values = values
        self._carry: Carry | None = None
        self._earlier: dict[str, float] = {}  # seconds of interrupted runs, by stage
        self._now: dict[str, float] = {}
        self._store: resume.Store | None = None
        self._saved_at = time.perf_counter()
        if values.resume_dir is not None:
            identity = job.wanted | {"checkpoint": wan.digest, "copy": job.copy}
            self._store = resume.Store(Path(values.resume_dir), identity)
            self.saved = self._store.load()
        if self.saved is not None:
            self._carry = self.saved.carry
            self._earlier = self.saved.seconds

    @property
    def _is_denoised(self) -> bool:
        done = 0 if self._carry is None else self._carry.done
        return done == len(self.job.request.schedule.table)

    def texts(self) -> tuple[str, ...]:
        """The texts whose states denoise() needs."""
        return () if self._is_denoised else self.job.request.texts

    def denoise(self, contexts: list[np.ndarray], report: Reporter) -> Array:
        """Latents [1, t, h, w, c]; Stopped after a step if a signal came and the state is kept."""
        start, begun = self._start(), time.perf_counter()
        if self._is_denoised:
            assert isinstance(start, Carry)
            return start.state.x

        def on_progress(progress: Progress) -> None:
            report(progress)
            if progress.carry is not None and self._store is not None:
                self._carry = progress.carry
                self._now["denoise"] = time.perf_counter() - begun
                if hosts.any_of(bool(signals)):
                    step = f"stopped after step {progress.done} of {progress.total}"
                    raise _Agreed(step, *signals[:1] or (signal.SIGTERM,))
                self._save_now_and_then()

        known = self._images.encode(self.job, report)
        with held_back(active=self._store is not None) as signals:
            latents = self.wan.denoise(
                self.job.request, np.stack(contexts), start, on_progress, known=known
            )
            if self._store is not None and hosts.any_of(bool(signals)):
                raise _Agreed("stopped after the last step", *signals[:1] or (signal.SIGTERM,))
        return latents

    def _start(self) -> Array | Carry:
        request = self.job.request
        if self.saved is not None:
            if self.saved.made_by != self._made_by():
                say("warning: other versions or another device left the state; bits may differ")
            say(f"seed {request.seed}, taken up after step {self.saved.carry.done}")
            return self.saved.carry
        if self.job.noise is not None:
            return jnp.asarray(self.job.noise)
        say(f"seed {request.seed}")
        first = self.job.settings["video"]
        return noise.initial_noise(request.seed, 1, shape=request.latent_shape, first=first)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """What ends the block early leaves the state after the last step that was told of.

        But where latents diverge, they would do so again.
        """
        try:
            yield
        except BaseException as error:
            if self._store is None or self._carry is None:
                raise
            if isinstance(error, DivergedError) and not self._is_denoised:
                raise
            try:
                self._save(self._store, self._carry)
            except (OSError, RuntimeError) as failure:  # also for buffers that a step had taken
                say(f"the state cannot be saved: {failure}")
                raise error from None  # the first is the one to tell
            finally:
                if isinstance(error, _Agreed):
                    hosts.exchange("saved")  # a process that ends takes the others with it
            file = self._store.file
            if isinstance(error, Stopped):
                raise Stopped(
                    f"{error}; the same command takes it up from {file}", error.signum
                ) from None
            say(f"the latents so far are in {file}; the same command takes them up")
            raise

    def _save(self, store: resume.Store, carry: Carry) -> None:
        store.save(
            carry,
            seed=self.job.request.seed,
            seconds=_sums(self._earlier, self._now),
            made_by=self._made_by(),
        )
        self._saved_at = time.perf_counter()

    def _save_now_and_then(self) -> None:
        """Now and then during the steps: who is killed, or loses another process, loses little."""
        if time.perf_counter() - self._saved_at < _EVERY:
            return
        assert self._store is not None and self._carry is not None
        try:
            self._save(self._store, self._carry)
        except OSError as error:
            self._saved_at = time.perf_counter()
            say(f"the state cannot be saved: {error}")

    def finish(self) -> None:
        """The video is there: the state is of no more use."""
        if self._store is not None:
            with contextlib.suppress(OSError):
                self._store.remove()

    def record(self, shared: Mapping[str, float], own: Mapping[str, float]) -> dict[str, Any]:
        """All there is to know of the video. shared: seconds of what its run did for all."""
        values = self._values
        return {
            **self.job.settings,
            "fps": self.wan.config.defaults.fps,
            "seed_drawn": self.job.seed_drawn,
            "noise_file": values.noise_file,
            **({"images": list(self.job.images)} if self.job.images else {}),
            "task": values.task,
            "config": values.config,
            "checkpoint": values.ckpt_dir,
            "checkpoint_digest": self.wan.digest,
            **({"loras": outputs.described(self.wan.loras)} if self.wan.loras else {}),
            "offload_model": values.offload_model,
            "max_memory": values.max_memory,
            **self._made_by(),
            "resumed_after": None if self.saved is None else self.saved.carry.done,
            "seconds": _sums(self._earlier, shared, own),
            "peak_memory_bytes": machine.peak_bytes(),
        }

    def _made_by(self) -> dict[str, Any]:
        """What besides the settings can change the last bits."""
        return {
            "versions": machine.versions(),
            "device": machine.device(),
            "t5_cpu": self._values.t5_cpu,
            "xla_flags": machine.xla_flags(),
        }


def _sums(*parts: Mapping[str, float]) -> dict[str, float]:
    stages = dict.fromkeys(stage for part in parts for stage in part)
    return {stage: sum(part.get(stage, 0.0) for part in parts) for stage in stages}


@contextlib.contextmanager
def held_back(*, active: bool) -> Iterator[list[int]]:
    """Signals that end a program are listed during the block, not raised; a second one is raised.

    Ctrl-C, SIGTERM and, unless it is ignored as under nohup, SIGHUP of a terminal that is gone.
    """
    signals: list[int] = []
    if not active:
        yield signals
        return

    def handle(signum: int, frame: Any) -> None:
        del frame
        if signals:
            raise Stopped("stopped", signum)
        signals.append(signum)
        say("stopping after this step; a second signal stops at once")

    heard = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        heard.append(signal.SIGHUP)
    with handled(heard, handle):
        yield signals
