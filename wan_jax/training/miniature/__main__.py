"""Train the miniature from nothing, stage by stage.

    python -m wan_jax.training.miniature --stages all --out DIR

The stages, each in minutes on one H200: tokenizer, vae, reader (the text encoder), t2v (with it),
i2v (with the CLIP tower), flf2v, evaluate, pack, and examples, which writes clips of a new colour
for a LoRA into DIR/lime. A stage needs those before it in the same DIR (examples none); one that
was cut short goes on from its newest checkpoint. Ctrl-C, SIGTERM and --minutes let the step end and
write one; the exit status is then 130, 143 or, after --minutes, 75.
"""

import json
import sys
import time
from pathlib import Path

from absl import app, flags, logging

from wan_jax import runner
from wan_jax.cli import Stopped
from wan_jax.training.loop import Report
from wan_jax.training.miniature.running import Paused, Stop, until

_TEMPORARY = 75  # EX_TEMPFAIL: try again
STAGES = ("tokenizer", "vae", "reader", "t2v", "i2v", "flf2v", "evaluate", "pack", "examples")
_OUT = flags.DEFINE_string("out", None, "where the stages write", required=True)
_STAGES = flags.DEFINE_list("stages", ["all"], f"all, or some of {', '.join(STAGES)}")
_SEED = flags.DEFINE_integer("seed", 0, "what every random draw comes from")
_MINUTES = flags.DEFINE_float("minutes", None, "leave, with a checkpoint, after so many", 0.0)
_CLIPS = flags.DEFINE_integer("clips", 200, "evaluate: clips of one object, and of images")
_PAIRS = flags.DEFINE_integer("pairs", 100, "evaluate: clips of two objects")


def main(_: list[str]) -> None:
    """Run the stages in their order."""
    chosen = STAGES if _STAGES.value == ["all"] else tuple(_STAGES.value)
    unknown = [stage for stage in chosen if stage not in STAGES]
    if unknown:
        raise app.UsageError(f"--stages has {unknown}; accepted: all, or some of {STAGES}")
    logging.set_verbosity(logging.FATAL)  # Orbax tells its own story
    end = None if _MINUTES.value is None else time.monotonic() + 60 * _MINUTES.value
    with runner.held_back(active=True) as signals:
        leave = until(signals, end)
        try:
            for stage in STAGES:
                if stage in chosen:
                    if leave():
                        raise Paused(f"stopped before stage {stage}")
                    _say(f"stage {stage}")
                    _run(stage, Path(_OUT.value), leave)
        except Paused as error:
            _say(f"{error}; the same command goes on")
            sys.exit(128 + signals[0] if signals else _TEMPORARY)
        except Stopped as error:  # a second signal
            sys.exit(error.status)
        except ValueError as error:
            _say(f"error: {error}")
            sys.exit(2)


def _run(stage: str, out: Path, stop: Stop) -> None:
    """One stage; what it needs is imported here, so that a wrong flag is answered at once."""
    from wan_jax.training.miniature import (
        autoencoder,
        captions,
        evaluate,
        examples,
        pack,
        reader,
        text,
        transformer,
    )

    if stage == "tokenizer":
        text.train_tokenizer(captions.corpus(20_000, _SEED.value), out / "tokenizer")
    elif stage == "vae":
        autoencoder.train(out, seed=_SEED.value, tell=_report, stop=stop)
    elif stage == "reader":
        reader.train(out, seed=_SEED.value, tell=_report, stop=stop)
    elif stage == "evaluate":
        _evaluate(out, evaluate, stop)
    elif stage == "pack":
        sizes = pack.pack(out, out / "assets")
        _say(f"{out / 'assets'}: {sum(sizes.values()) / 1e6:.1f} MB")
    elif stage == "examples":
        examples.write(out / examples.COLOUR, seed=_SEED.value)
    else:
        transformer.train(stage, out, seed=_SEED.value, tell=_report, notify=_say, stop=stop)


def _evaluate(out: Path, evaluate, stop: Stop) -> None:  # type: ignore[no-untyped-def]
    """Score every transformer that there is; OUT/scores.json."""
    from wan_jax.training.miniature import autoencoder, files, networks

    arrays, config = files.network(out, "vae")
    decibels = autoencoder.reconstruction(arrays, config, count=16)
    found = {"vae": {"mean dB": sum(decibels) / len(decibels), "least dB": min(decibels)}}
    for kind in networks.DITS:
        if stop():
            raise Paused(f"stopped before {kind} is scored")
        if (out / f"{kind}.safetensors").exists():
            wan = evaluate.from_stages(out, kind)
            found[kind] = evaluate.scores(wan, clips=_CLIPS.value, pairs=_PAIRS.value, notify=_say)
    text = json.dumps(found, indent=2)
    (out / "scores.json").write_text(text + "\n", encoding="utf-8")
    _say(text)


def _report(report: Report) -> None:
    """A line on the terminal now and then."""
    if report.step % 250 == 0 or report.step == report.steps:
        values = ", ".join(f"{name} {value:.4g}" for name, value in report.metrics.items())
        _say(f"step {report.step} of {report.steps}: {values}; {report.seconds:.3f} s a step")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    app.run(main)
