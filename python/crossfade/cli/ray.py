"""``crossfade generate --ray N``: files of prompts on actors of Ray, into a folder of results."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from typing import Any

from . import options, searches

# Options that have no meaning with actors: what they do is of one process.
ALONE = ("stream", "text")


def add_ray_options(parser: argparse.ArgumentParser) -> None:
    """The options of commands whose prompts may go through Ray."""
    group = parser.add_argument_group(
        "Ray", "Texts are those of one process; they depend on the place of each prompt alone."
    )
    group.add_argument(
        "--ray",
        type=options.positive,
        metavar="N",
        help="let N actors of Ray, each with all models, work on --prompts, a file or a folder of "
        ".jsonl, .parquet and .txt files, and write the results into --output, a folder. The "
        "cluster is that of RAY_ADDRESS, or one on this machine",
    )
    group.add_argument(
        "--ray-functions",
        action="store_true",
        help="let actors import the modules that --reward names",
    )


def check(arguments: argparse.Namespace) -> None:
    """Refuse options that do not go together with --ray, or only with it."""
    if arguments.ray is None:
        if arguments.ray_functions:
            raise ValueError("--ray-functions is given without --ray, whose actors it is about")
        return
    for name in ALONE:
        if getattr(arguments, name):
            raise ValueError(f"--ray and --{name} are both given; results go into a folder")
    if arguments.prompt or arguments.prompts in (None, "-"):
        raise ValueError("--ray is given without --prompts FILE or FOLDER, which actors read")
    if arguments.output is None:
        raise ValueError("--ray is given without --output FOLDER, into which results are written")
    if arguments.reward and not arguments.ray_functions:
        raise ValueError(
            f"--reward is {arguments.reward[0]!r}, a function; with --ray, actors import its "
            "module, which --ray-functions must allow"
        )


def spec_of(arguments: argparse.Namespace, common: Mapping[str, Any]) -> dict[str, Any]:
    """What actors are told, as plain data.

    Args:
        common: the arguments of `generate` that all prompts share.
    """
    from ..bulk.ray.actor_spec import spec

    names: tuple[str, ...] = (
        "model",
        "blend",
        "system",
        "fader",
        "value",
        "reward",
        "judge",
        "tilt",
        "draft",
    )
    names += ("draft_length", "device", "dtype", "n", "logprobs", "terms", "chat", "template")
    names += ("principle", "seed", "batch_size", "keep")
    given = {name: getattr(arguments, name) for name in names}
    given = {name: x for name, x in given.items() if x not in (None, [], False) or name == "chat"}
    search = searches.settings_of(arguments)
    more: dict[str, Any] = {"generation": dict(common), "functions": arguments.ray_functions}
    return spec(**given, **more, **({"search": search} if search else {}))


def run(arguments: argparse.Namespace, common: Mapping[str, Any]) -> int:
    """Run ``crossfade generate --ray``, and say what was done on stderr."""
    from ..bulk.ray.driver import run as work

    start = time.perf_counter()
    try:
        done = work(
            spec_of(arguments, common),
            arguments.prompts,
            arguments.output,
            actors=arguments.ray,
            resume=arguments.resume,
            progress=sys.stderr.isatty(),
        )
    except RuntimeError as error:  # what an actor has said
        raise ValueError(str(error)) from error
    seconds = time.perf_counter() - start
    more = [f"{done.errors} with an error"] if done.errors else []
    more += [f"{done.kept} more were in the folder"] if done.kept else []
    aside = f" ({', '.join(more)})" if more else ""
    plural = "" if done.rows == 1 else "s"
    speed = f", {done.tokens / seconds:.1f} tokens/s" if done.tokens else ""
    print(f"{done.rows} prompt{plural}{aside}, {done.tokens} tokens{speed}", file=sys.stderr)
    return 0
