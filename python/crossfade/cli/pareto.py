"""``crossfade pareto``: methods at many weightings of rewards, and the fronts that they reach."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import require
from .options import add_device_option
from .parsed import device_of, note, quiet

if TYPE_CHECKING:
    from ..pareto import Front

HELP = "Sweep methods over weightings of rewards, and draw the fronts that they reach."
USAGE = "--config FILE --output DIR [options]"
EXAMPLES = """\
keys of the file, which is YAML (relative paths begin at the current folder):
  models      a mapping of names to PATH or PATH@GUIDE, as --model of crossfade
              generate takes them; or to a policy, which follows the weights:
              PATH@FOLDER of a saved one, or a mapping of rewards to
              PATH@ADAPTER, whose adapters are averaged (a rewarded soup)
  methods     a mapping of names to formulas of the models, in which w_NAME is
              the weight of the reward NAME, and a policy is what it is at the
              weights; or to {blend: FORMULA, ...} with arguments of generate
              and a search: best_of: N, tournament: N or search: [W, N, L]. It
              prefers the weighted sum of the rewards, or value: FORMULA
  rewards     a mapping of names to MODULE:FUNCTION, a function
              fn(prompts, responses) -> scores, or to the PATH of a reward model
  prompts     a list of texts, or a file with one on each line, or a .jsonl file
              with a "prompt" or "messages" on each line
  weights     a number n, for all weightings in steps of 1 / (n - 1), or a list
              of mappings of the rewards' names, and "kl", to numbers [11]
  kl_to       a formula of the models: points have the divergence from it and
              the perplexity under it
  reference   a number for each reward: hypervolumes are measured above it
  generation  arguments of crossfade.generate, such as {max_new_tokens: 48,
              do_sample: true}
  chat        whether texts are sent as chats [as the first method's models say]
  dtype       of the weights: auto, float32, bfloat16 or float16 [auto]
  seed        of all draws [0]

DIR gets front.json, front.png and front.html, and texts.jsonl, to which each
text goes as soon as it is written; --resume goes on from it.

such as pareto.yaml:
  models:
    base: smollm2
    kind: smollm2@sentiment
    brief: smollm2@brevity
    soup: {sentiment: smollm2@sentiment, brevity: smollm2@brevity}
  methods:
    blend: "base + w_sentiment * (kind - base) + w_brevity * (brief - base)"
    mod: "w_sentiment * kind + w_brevity * brief"
    soup: soup
    best: {blend: base, best_of: 8}
  rewards: {sentiment: rewards:sentiment, brevity: rewards:brevity}
  prompts: prompts.txt
  reference: {sentiment: -1, brevity: -60}
  kl_to: base
  generation: {max_new_tokens: 48, do_sample: true}

example:
  crossfade pareto --config pareto.yaml --output fronts
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="the YAML file, whose keys are below"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="the folder of the results"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from what the folder has, if anything"
    )
    add_device_option(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Sweep, draw and print. After Ctrl-C, do so with the points that are finished."""
    from .. import formula
    from ..pareto import sweep
    from ..pareto.fronts import check_reference
    from ..pareto.weightings import objectives, weightings
    from . import sweep_methods, sweeps

    settings = sweeps.read(arguments.config)
    each = weightings(settings.weights, list(settings.rewards))
    names = objectives(each, list(settings.rewards))
    if settings.reference is not None:
        check_reference(settings.reference, names)
    prompts = sweeps.prompts(settings.prompts)
    methods = sweep_methods.read(settings)
    weighed = [name for name in names if any(w[name] for w in each)]
    policies = sweep_methods.policies_of(settings, weighed)
    plan = sweep_methods.plan_of(settings, methods, policies, names)
    texts = arguments.output / "texts.jsonl"
    if texts.exists() and not arguments.resume:
        raise FileExistsError(
            f"--output is {str(arguments.output)!r}, which has {texts.name}; give --resume to go "
            "on, remove it or name another folder"
        )
    require("matplotlib", "plot")  # what is missing is said before the work
    arguments.output.mkdir(parents=True, exist_ok=True)
    quiet()
    loaded = plan.load(device_of(arguments.device), settings.dtype)
    assert loaded.value is not None
    values = dict(zip(loaded.value.names, loaded.value.values, strict=True))
    functions = sweep_methods.functions(methods, policies, loaded.terms, values)
    generation = dict(settings.generation)
    if settings.kl_to is not None:
        generation["kl_to"] = formula.parse(settings.kl_to, **loaded.terms)
    chat = settings.chat
    if chat is None:
        first = next(iter(methods.values()))
        given = first.at(loaded.terms, values, dict.fromkeys(names, 0.5))
        chat = loaded.answers_chats(given["blend"])
        if chat and any(isinstance(prompt, str) for prompt in prompts):
            note(
                arguments, "the models answer chats: texts are sent as chats (chat: false does not)"
            )
    front = sweep(
        functions,
        [
            [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt
            for prompt in prompts
        ],
        {name: values[name] for name in settings.rewards},
        weights=settings.weights,
        seed=settings.seed,
        path=texts,
        **generation,
    )
    front.save(arguments.output / "front.json")
    if front.points:
        _show(arguments, front, settings.reference)
    return 130 if front.interrupted else 0


def _show(arguments: argparse.Namespace, front: Front, reference: Any) -> None:
    """Draw the fronts, and print their figures."""
    volumes = {} if reference is None else front.hypervolume(reference)
    front.plot(arguments.output / "front.png")
    front.to_html(arguments.output / "front.html")
    if arguments.json:
        found = {
            "points": front.points,
            "steerability": front.steerability,
            "correlations": front.correlations,
            "hypervolume": {name: x._asdict() for name, x in volumes.items()},
        }
        print(json.dumps(found))
    else:
        print(front)
        for name, (value, low, high) in volumes.items():
            print(f"hypervolume of {name}: {value:.4g}, 95 % interval {low:.4g} to {high:.4g}")
    where = arguments.output
    said = f"front.json, front.png and front.html are in {str(where)!r}"
    print(said, file=sys.stderr if arguments.json else sys.stdout)
