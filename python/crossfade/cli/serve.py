"""``crossfade serve``: OpenAI's endpoints and a page of faders over models that share a batch."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..extras import require
from . import options, parsed

if TYPE_CHECKING:
    from ..loading import Served, ServerPlan

HELP = "Serve a blend by OpenAI's API, with faders for each request."
USAGE = "[--model [NAME=]PATH ...] [options]"
EXAMPLES = """\
examples:
  crossfade serve
  crossfade serve --model base=smollm2 --model kind=smollm2@sentiment \\
      --blend "base + w * (kind - base)" --fader w=0.8
  crossfade serve --model smollm2 --host 0.0.0.0 --api-key-file keys.txt

Without --model the two moods of crossfade demo are served. The key may also be
in the environment, as CROSSFADE_API_KEY. docs/serving.md says what requests may
ask for.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add_blend_options(parser)
    group = parser.add_argument_group(
        "searches and drafts", "What requests may name. A request itself names no file or function."
    )
    group.add_argument(
        "--value",
        action="append",
        default=[],
        metavar="NAME=FORMULA",
        help='what a search may be decided by, such as likely="tuned - ref"; value heads, reward '
        "models and functions of --reward are there by their own names",
    )
    group.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="[NAME=]MODULE:FUNCTION",
        help="a Python function (prompts, responses) -> scores",
    )
    group.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="NAME=FORMULA",
        help="what may compare the texts of a tournament: the name of a --model",
    )
    group.add_argument(
        "--draft",
        action="append",
        default=[],
        metavar="NAME=FORMULA",
        help="what may guess tokens: the name of a small --model; prompt is always there",
    )
    _add_address(parser.add_argument_group("address and access"))
    _add_limits(parser.add_argument_group("limits"))


def _add_address(group: Any) -> None:
    group.add_argument("--host", default="127.0.0.1", help="the address (default: %(default)s)")
    group.add_argument(
        "--port", type=_port, default=8000, help="0 takes a free one (default: %(default)s)"
    )
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="let nobody in without it; may be given several times. Other users of this machine "
        "can see it: prefer a file or the environment",
    )
    group.add_argument("--api-key-file", metavar="FILE", help="a file with a key on each line")
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which the server is reached, such as that of a proxy",
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of https://that.server ask from browsers; none may by default",
    )
    group.add_argument(
        "--name",
        default="crossfade",
        help="what the blend is called as a model (default: %(default)s)",
    )
    group.add_argument("--quiet", action="store_true", help="print no line for each request")


def _add_limits(group: Any) -> None:
    group.add_argument(
        "--max-batch",
        type=options.positive,
        metavar="N",
        help="rows that are decoded at a time (default: 32 on CPUs, 64 on GPUs)",
    )
    group.add_argument(
        "--max-waiting",
        type=options.positive,
        metavar="N",
        default=256,
        help="texts that may wait for a row; one more is refused (default: %(default)s)",
    )
    group.add_argument(
        "--max-tokens",
        type=options.positive,
        metavar="N",
        default=4096,
        help="tokens that a text may have (default: %(default)s)",
    )
    group.add_argument(
        "--max-length",
        type=options.positive,
        metavar="N",
        help="tokens that a prompt and its text may have together, which bounds the memory of "
        "caches (default: as many as the models have contexts for)",
    )
    group.add_argument(
        "--max-cost",
        type=options.positive,
        metavar="N",
        default=512,
        help="rows times terms that a request may ask for (default: %(default)s)",
    )
    group.add_argument(
        "--max-load",
        type=options.positive,
        metavar="N",
        default=8192,
        help="rows times terms of all requests together (default: %(default)s)",
    )
    group.add_argument(
        "--max-body",
        type=options.positive,
        metavar="KB",
        default=4096,
        help="kilobytes that the body of a request may have (default: %(default)s)",
    )
    group.add_argument(
        "--timeout", type=_seconds, metavar="SECONDS", help="cut a text after so long"
    )
    group.add_argument(
        "--grace",
        type=_seconds,
        metavar="SECONDS",
        default=60.0,
        help="how long requests may go on after the server is told to stop (default: %(default)s)",
    )


def _port(text: str) -> int:
    if text.isdecimal() and int(text) < 2**16:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 to 65535")


def _seconds(text: str) -> float:
    seconds = options.number(text)
    if seconds == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0")
    return seconds


def run(arguments: argparse.Namespace) -> int:
    require("fastapi", "serve")  # what is missing is said before the work
    require("uvicorn", "serve")
    require("prometheus_client", "serve")
    from ..serve import server, settings
    from ..serve.keys import Keys, read_keys

    keys = Keys(read_keys(arguments.api_key, arguments.api_key_file))
    settings.check_host(arguments.host, keys)
    plan = _plan(arguments)
    plan.check()
    if arguments.name in plan.plan.specs:
        raise ValueError(f"--name is {arguments.name!r}, which is a --model; it must differ")
    try:  # before models are loaded, which takes longer
        at = server.bind(arguments.host, arguments.port)
    except OSError as error:
        raise OSError(f"--host and --port: {error}") from None
    with at:
        served = _load(arguments, plan)
        _serve(arguments, served, keys, at)
    return 0


def _plan(arguments: argparse.Namespace) -> ServerPlan:
    from ..loading import ServerPlan
    from .fader import FORMULA, MOODS

    model, blend = arguments.model, arguments.blend
    system, fader = arguments.system, arguments.fader
    if not model and blend is None:
        model = [f"{name}=smollm2" for name in ("base", *MOODS)]
        blend = FORMULA
        system = [f"{name}={text}" for name, text in MOODS.items()] + system
        fader = fader or ["w=0"]
    return ServerPlan.read(
        model,
        blend,
        system=system,
        fader=fader,
        reward=arguments.reward,
        value=arguments.value,
        judge=arguments.judge,
        draft=arguments.draft,
    )


def _load(arguments: argparse.Namespace, plan: ServerPlan) -> Served:
    parsed.quiet()
    device = parsed.device_of(arguments.device)
    return plan.load(
        device, arguments.dtype, lambda path: parsed.note(arguments, f"loading {path} on {device}")
    )


def _serve(arguments: argparse.Namespace, served: Served, keys: Any, at: Any) -> None:
    """Serve what is loaded until the process is told to stop."""
    import crossfade as cf

    from ..serve import create_app, server
    from ..serve.settings import LOOPBACK, Settings

    loaded = served.loaded
    settings = Settings(
        name=arguments.name,
        values=served.values,
        judges=_judges(served),
        drafts=served.drafts,
        keys=keys,
        hosts=frozenset(h.lower() for h in (*LOOPBACK, arguments.host, *arguments.allow_host)),
        origins=tuple(arguments.allow_origin),
        limits=_limits(arguments),
    )
    session = cf.Session(
        served.terms,
        blend=loaded.formula,
        weights=loaded.faders,
        max_batch=arguments.max_batch,
        max_waiting=arguments.max_waiting,
        max_length=arguments.max_length,
    )
    port = at.getsockname()[1]
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host

    def begun() -> None:
        parsed.note(arguments, f"{session.blend}, at http://{host}:{port}/ (Ctrl-C stops)")

    with session, _lines(arguments.quiet):
        app = create_app(session, settings)
        server.run(server.Server(app, grace=arguments.grace, begun=begun), at)


def _judges(served: Served) -> dict[str, Any]:
    """The judges, each asked the template's own question."""
    from ..policies.self_judge.question import Question

    if not served.judges:
        return {}
    question = Question()
    return {n: question.judge(blend, f"--judge {n}") for n, blend in served.judges.items()}


def _limits(arguments: argparse.Namespace) -> Any:
    from ..serve.limits import Limits

    return Limits(
        body=arguments.max_body * 1024,
        max_tokens=arguments.max_tokens,
        cost=arguments.max_cost,
        load=arguments.max_load,
        seconds=arguments.timeout,
    )


@contextmanager
def _lines(quiet: bool) -> Iterator[None]:
    """Print what the server has to say on stderr, with the time."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    loggers = [logging.getLogger(name) for name in ("crossfade.serve", "uvicorn")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
    if not quiet:
        loggers[0].setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
