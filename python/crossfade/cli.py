"""The command line: ``crossfade demo | generate | score | train | inspect | bench | info``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 2 after a mistake, which one line on stderr explains."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
        if arguments.traceback:
            raise
        print(f"crossfade {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        from .decoding.memory import is_out_of_memory

        if arguments.traceback or not is_out_of_memory(error):
            raise
        said = str(error).partition("\n")[0] or "memory ran out"
        print(f"crossfade {arguments.command}: error: {said}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="crossfade", description="Decode with several language models at once."
    )
    version = f"%(prog)s {metadata.version('crossfade')}"
    top.add_argument("--version", action="version", version=version)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, **options: Any
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, **options)
        added.add_argument("--traceback", action="store_true", help="show where an error came from")
        added.set_defaults(run=run)
        return added

    _demo_options(command("demo", _demo, "Fade a small real model from praise to brevity."))
    _generate_options(
        command("generate", _generate, "Decode prompts under a blend; a JSON line for each.")
    )
    _score_options(
        command("score", _score, "Log-probs and perplexities of given responses under a blend.")
    )
    _train_options(command("train", _train, "Train an adapter, a model or a value function."))
    inspect = command("inspect", _inspect, "What a blend means and costs.")
    _blend_options(inspect)
    inspect.add_argument("--json", action="store_true", help="print JSON")
    bench = command("bench", _bench, "Measure the kernels on this machine.")
    bench.add_argument("suite", choices=["ops"], help="ops: blend and sample")
    bench.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    bench.add_argument("--json", metavar="FILE", type=Path, help="also write the figures here")
    info = command("info", _info, "Versions, the native build, and the backends that work here.")
    info.add_argument("--json", action="store_true", help="print JSON")
    return top


def _demo_options(p: argparse.ArgumentParser) -> None:
    positions = (0.0, 0.25, 0.5, 0.75, 1.0)
    p.add_argument(
        "--weights", type=float, nargs="+", default=positions, metavar="W", help="fader positions"
    )
    p.add_argument(
        "--samples", type=int, default=8, help="texts about each of 8 movies (%(default)s)"
    )
    p.add_argument("--max-new-tokens", type=int, default=40, help="of each text (%(default)s)")
    p.add_argument("--temperature", type=float, default=0.7, help="of sampling (%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of all texts (%(default)s)")
    p.add_argument(
        "--output",
        type=Path,
        default=Path("crossfade-demo.png"),
        help="the plot, a .png (%(default)s)",
    )
    p.add_argument("--device", help="by default a GPU if torch finds one, else the CPU")
    p.add_argument("--json", action="store_true", help="print JSON")


def _blend_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=PATH[@GUIDE]",
        help="a model, once for each; a folder, a hub id or smollm2; GUIDE: the folder of a PEFT "
        "adapter or of a value head over it, or sentiment, brevity or sentiment_value, which ship "
        "for smollm2; NAME= may be left out if there is one model",
    )
    p.add_argument(
        "--blend", metavar="FORMULA", help='of the names, such as "base + 0.8 * (tuned - ref)"'
    )
    p.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="a system prompt for one model; implies --chat where there are prompts",
    )
    p.add_argument("--device", help="by default a GPU if torch finds one, else the CPU")
    p.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the weights; auto: as they were saved",
    )


def _batch_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--chat", action="store_true", help="send texts as a user's message, by the chat template"
    )
    p.add_argument(
        "--batch-size", type=_positive, default=8, help="requests at a time (%(default)s)"
    )
    p.add_argument("--output", metavar="FILE", help="by default stdout")


def _generate_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("prompt", nargs="*", help="texts; by default --prompts or lines of stdin")
    p.add_argument(
        "--prompts",
        metavar="FILE",
        help='a text a line, or .jsonl with "prompt" or "messages"; - is stdin',
    )
    _blend_options(p)
    _batch_options(p)
    p.add_argument("--max-new-tokens", type=int, default=128, help="%(default)s by default")
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--greedy", action="store_true", help="take the likeliest token")
    mode.add_argument("--sample", action="store_true", help="draw; the options below imply it")
    p.add_argument("--temperature", type=float, help="as in Hugging Face, as the next three")
    p.add_argument("--top-k", type=int)
    p.add_argument("--top-p", type=float)
    p.add_argument("--min-p", type=float)
    p.add_argument(
        "--seed", type=int, default=0, help="each prompt draws from it and its own index"
    )
    p.add_argument(
        "--value",
        metavar="FORMULA",
        help='what a search chooses by: a log-ratio of the names, such as "tuned - ref", or value '
        "heads",
    )
    how = p.add_mutually_exclusive_group()
    how.add_argument("--best-of", type=_positive, metavar="N", help="the best of N texts")
    how.add_argument(
        "--search",
        type=_search,
        metavar="W,N,L",
        help="beams of chunks: keep W rows, continue each N times, choose after every L tokens",
    )
    p.add_argument(
        "--resume", action="store_true", help="keep what --output has and write what is missing"
    )


def _score_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "data",
        metavar="FILE",
        help='.jsonl with "prompt" or "messages", and "response"; - is stdin',
    )
    _blend_options(p)
    _batch_options(p)
    p.add_argument("--terms", action="store_true", help="also the log-prob under each term alone")


def _train_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("kind", choices=["sft", "dpo", "value"], help="the trainer")
    p.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        required=True,
        help="YAML with model, data and arguments (the trainer's own, output_dir among them); "
        "also dtype, eval_data, lora, loss, loss_options, value, seed",
    )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="in place of what the file says, such as arguments.learning_rate=1e-4",
    )
    p.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in output_dir"
    )
    p.add_argument("--json", action="store_true", help="print JSON")


def _demo(a: argparse.Namespace) -> int:
    from . import demo

    settings = demo.Settings(tuple(a.weights), a.samples, a.max_new_tokens, a.temperature, a.seed)
    if a.output.suffix != ".png":
        raise ValueError(f"--output is {str(a.output)!r}; it must end in .png")
    _check_folder("--output", a.output)
    _quiet()
    return demo.run(settings, a.output, as_json=a.json, device=_device(a.device))


def _generate(a: argparse.Namespace) -> int:
    drawing = {
        name: getattr(a, name)
        for name in ("temperature", "top_k", "top_p", "min_p")
        if getattr(a, name) is not None
    }
    if a.greedy and drawing:
        name = next(iter(drawing)).replace("_", "-")
        raise ValueError(f"--greedy and --{name} are both given; greedy decoding does not draw")
    wanted = a.best_of is not None or a.search is not None
    if wanted != (a.value is not None):
        raise ValueError("--value goes with --best-of or --search, and they with it")
    if wanted and a.greedy:
        raise ValueError("--greedy is given; a search draws its rows")
    if a.greedy or a.sample or drawing:
        drawing["do_sample"] = not a.greedy  # else the model's generation config decides
    from . import batch
    from .bulk import records

    batch.check_output(a.output, a.resume)
    _check_folder("--output", a.output)
    prompts = batch.read_prompts(a.prompt, a.prompts, chat=a.chat or bool(a.system))
    with records.Results(a.output, resume=a.resume) as results:
        blend, value = _load(a, a.value)
        if value is not None:
            drawing["search"] = _make_search(a, value)
        batch.run_generate(
            blend,
            prompts,
            results=results,
            batch_size=a.batch_size,
            seed=a.seed,
            max_new_tokens=a.max_new_tokens,
            **drawing,
        )
    return 0


def _make_search(a: argparse.Namespace, value: Any) -> Any:
    from .search import BestOfN, ChunkBeamSearch

    if a.best_of is not None:
        return BestOfN(a.best_of, value)
    width, samples, chunk_length = a.search
    return ChunkBeamSearch(width, samples, chunk_length, value)


def _score(a: argparse.Namespace) -> int:
    from . import batch
    from .bulk import records

    batch.check_output(a.output, False)
    _check_folder("--output", a.output)
    items = batch.read_lines(a.data)
    with records.Results(a.output) as results:
        batch.run_score(
            _load(a)[0],
            items,
            results=results,
            batch_size=a.batch_size,
            chat=a.chat or bool(a.system),
            terms=a.terms,
        )
    return 0


def _train(a: argparse.Namespace) -> int:
    from .training import config

    settings = config.read(a.kind, a.config, a.set)
    _quiet()
    with contextlib.redirect_stdout(sys.stderr):  # Trainer prints its figures as it goes
        metrics = config.run(settings, resume=a.resume)
    folder = settings.arguments["output_dir"]
    if metrics is None:
        return 0
    if a.json:
        print(json.dumps({"output_dir": folder, **metrics}))
    else:
        figures = ", ".join(f"{name} {x:.4g}" for name, x in metrics.items())
        print(f"saved in {folder}: {figures}")
    return 0


def _inspect(a: argparse.Namespace) -> int:
    blend, _ = _load(a)
    if a.json:
        costs = [cost._asdict() for cost in blend.models]
        print(json.dumps({"formula": str(blend), "models": costs, "blend": blend.to_dict()}))
    else:
        print(f"{blend}\n{blend.models}")
    return 0


def _bench(a: argparse.Namespace) -> int:
    from . import bench

    _check_folder("--json", a.json)
    report = bench.run_ops(quick=a.quick, output=a.json)
    print("\n".join(bench.table(report)))
    return 0


def _info(a: argparse.Namespace) -> int:
    from . import info

    found = info.collect()
    print(json.dumps(found, indent=2) if a.json else info.text(found))
    return 0


def _check_folder(option: str, path: str | Path | None) -> None:
    """Said before the work whose result would have no place."""
    if path is not None and Path(path).is_dir():
        raise IsADirectoryError(f"{option} is {str(path)!r}, a folder; it must be a file")
    if path is not None and not Path(path).parent.is_dir():
        raise FileNotFoundError(
            f"{option} is {str(path)!r}: there is no folder {str(Path(path).parent)!r}"
        )


def _load(a: argparse.Namespace, value: str | None = None) -> tuple[Any, Any]:
    """The blend, and the value if there is one."""
    from .loading import load_blend

    _quiet()
    device = _device(a.device)
    return load_blend(a.model, a.blend, a.system, value=value, device=device, dtype=a.dtype)


def _device(name: str | None) -> str:
    """The device asked for, or the best there is."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch's ways to say that it is not there
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device is {name!r}, which torch cannot use: {reason}") from None
    return name


def _quiet() -> None:
    """No bars for each load of weights, which are done before they are read."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _search(text: str) -> tuple[int, ...]:
    numbers = tuple(map(_positive, text.split(",")))
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} must be three numbers: W,N,L")
    return numbers


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return value
