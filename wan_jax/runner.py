"""Makes the videos of a plan: progress, records, and what an interruption leaves."""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import wan_jax
from wan_jax import labels, loading, machine, media, noise, pipeline, resume
from wan_jax.cli import Reporter, Stopped, say
from wan_jax.jobs import Plan
from wan_jax.outputs import Job, record_path
from wan_jax.pipeline import Progress
from wan_jax.sampler import Carry, DivergedError


def execute(values: flags.FlagValues, plan: Plan) -> None:
    """Load the checkpoint and make every video of the plan.

    One that fails does not keep the others from being made; then RuntimeError says how many did.
    """
    for path in plan.skipped:
        say(f"skipped {path}: it is there already")
    if not plan.jobs:
        return
    _start(values)
    report = Reporter()
    wan = wan_jax.load(
        plan.source,
        dtype=values.dtype,
        cache_dir=values.cache_dir,
        offload=values.offload_model,
        text_on_cpu=values.t5_cpu,
        callback=report,
        notify=say,
    )
    texts = {text: None for job in plan.jobs for text in pipeline.texts(job.request)}
    states = np.asarray(wan.encode_text(list(texts), report))
    contexts = dict(zip(texts, states, strict=True))
    failed = 0
    for job in plan.jobs:
        context = np.stack([contexts[text] for text in pipeline.texts(job.request)])
        try:
            _make(values, wan, job, context, report)
        except (DivergedError, OSError, RuntimeError) as error:
            if len(plan.jobs) == 1:
                raise
            failed += 1
            say(f"failed {job.output}: {' '.join(str(error).split())[:300]}")
    say(report.line())
    if failed:
        raise RuntimeError(f"{failed} of {len(plan.jobs)} videos failed, the others are made")


def _start(values: flags.FlagValues) -> None:
    """Settle on a device; RuntimeError if JAX cannot start (without a plugin it only asserts)."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        named = os.environ.get("JAX_PLATFORMS", "")
        raise RuntimeError(
            f"JAX_PLATFORMS={named} has no device that starts here: {error}"
        ) from None
    if jax.default_backend() != "cpu" and not _cache_chosen():
        # Programs are kept: the next run starts in seconds and, as what was tuned by timing is kept
        # with them, gives the same bits.
        cache = Path(values.cache_dir) if values.cache_dir else loading.default_cache_dir()
        jax.config.update("jax_compilation_cache_dir", str(cache / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _cache_chosen() -> bool:
    """Whether the user has said where JAX keeps compiled programs."""
    return bool(getattr(jax.config, "jax_compilation_cache_dir", None))


def _make(
    values: flags.FlagValues, wan: wan_jax.Wan, job: Job, context: np.ndarray, report: Reporter
) -> None:
    """Denoise, decode into the file, write the record."""
    run = _Run(values, wan, job)
    latents = run.denoise(context, report)
    record = _record(values, wan, run.job)

    def described() -> dict[str, Any]:
        record.update(seconds=report.lap(), peak_memory_bytes=machine.peak_bytes())
        return record

    raw = job.output.suffix.lower() == ".npz"
    try:
        media.save_video(
            wan.decode(latents, dtype="float32" if raw else "uint8", callback=report),
            job.output,
            fps=wan.config.defaults.fps,
            latents=np.asarray(latents)[0] if raw else None,
            metadata=described,
        )
        labels.write_json(record, record_path(job.output, job.settings["frames"]))
    except BaseException:
        run.save()  # the next run only decodes
        raise
    run.finish()
    say(f"saved {media.output_path(job.output, job.settings['frames'])}")


class _Run:
    """One job from noise to latents, and its state on disk where --resume_dir is given."""

    def __init__(self, values: flags.FlagValues, wan: wan_jax.Wan, job: Job) -> None:
        self.job = job
        self._wan = wan
        self._carry: Carry | None = None
        self._store: resume.Store | None = None
        if values.resume_dir is not None:
            # A drawn seed is told by the state, so the same command finds it.
            given = {k: v for k, v in job.settings.items() if k != "seed" or not job.seed_drawn}
            identity = given | {"checkpoint": wan.digest}
            self._store = resume.Store(Path(values.resume_dir), identity)

    def denoise(self, context: np.ndarray, report: Reporter) -> jax.Array:
        """Latents [1, t, h, w, c]; Stopped after a step if a signal came and the state is saved."""
        start = self._start()
        with _held_back(active=self._store is not None) as signals:

            def on_progress(progress: Progress) -> None:
                report(progress)
                if progress.carry is None or self._store is None:
                    return
                self._carry = progress.carry
                if signals:
                    self.save()
                    raise Stopped(
                        f"stopped after step {progress.done} of {progress.total}; the same command "
                        f"takes it up from {self._store.file}",
                        signals[0],
                    )

            return self._wan.denoise(self.job.request, context, start, on_progress)

    def _start(self) -> jax.Array | Carry:
        saved = None if self._store is None else self._store.load()
        if saved is not None:
            if saved.made_by != _made_by():
                say("warning: other versions or another device left the state; bits may differ")
            request = self.job.request._replace(seed=saved.seed)
            settings = self.job.settings | {"seed": saved.seed}
            self.job = dataclasses.replace(self.job, request=request, settings=settings)
            self._carry = saved.carry
            say(f"seed {saved.seed}, taken up after step {saved.carry.done}")
            return saved.carry
        if self.job.noise is not None:
            return jnp.asarray(self.job.noise)
        request = self.job.request
        say(f"seed {request.seed}")
        first = self.job.settings["video"]
        return noise.initial_noise(request.seed, 1, shape=request.latent_shape, first=first)

    def save(self) -> None:
        """Write the state after the last step that was done, if there is a place for it."""
        if self._store is not None and self._carry is not None:
            self._store.save(self._carry, seed=self.job.request.seed, made_by=_made_by())

    def finish(self) -> None:
        """The video is there: the state is of no more use."""
        if self._store is not None:
            self._store.remove()


def _made_by() -> dict[str, Any]:
    return {"versions": machine.versions(), "device": machine.device(), "xla": machine.xla_flags()}


@contextlib.contextmanager
def _held_back(*, active: bool) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM of the block are listed, not raised; a second one is raised."""
    signals: list[int] = []
    if not active:
        yield signals
        return

    def handle(signum: int, frame: Any) -> None:
        del frame
        if signals:
            raise Stopped("stopped at once", signum)
        signals.append(signum)
        say("stopping after this step; a second signal stops at once")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _record(values: flags.FlagValues, wan: wan_jax.Wan, job: Job) -> dict[str, Any]:
    """What there is to know of a video; seconds and memory are added when it is made."""
    return {
        **job.settings,
        "fps": wan.config.defaults.fps,
        "seed_drawn": job.seed_drawn,
        "checkpoint_digest": wan.digest,
        "offload_model": values.offload_model,
        "t5_cpu": values.t5_cpu,
        **_made_by(),
    }
