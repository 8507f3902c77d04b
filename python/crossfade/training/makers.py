"""The trainers that settings ask for, with their models and data."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import get_available_reporting_integrations
from transformers.pytorch_utils import Conv1D

from .. import models
from ..blends.blend import Model
from ..checks import did_you_mean
from ..extras import old_names, require
from ..loading import Plan
from ..models.hf import is_peft
from ..models.saved import load_tokenizer
from ..models.saved_adapters import add_adapter
from ..policies.conditioned import ConditionedPolicy
from ..policies.self_judge import Judge, jsft_rows
from ..progress import print_line
from ..specs import Spec
from . import chain, rows, stages
from .config import Settings, config_of, lora_config, trainer_config, value_options
from .data import read_jsonl
from .processes import is_main_process
from .ratings import rated_pairs


def _sft(s: Settings, data: Mapping[str, Any]) -> Any:
    from .trainers.sft import SFTTrainer

    return _trainer(SFTTrainer, s, data, trainer_config(config_of("sft"), s), _load(s))


def _dpo(s: Settings, data: Mapping[str, Any]) -> Any:
    from .trainers.dpo import WITHOUT_REFERENCE, DPOTrainer

    args = trainer_config(config_of("dpo"), s)
    options: dict[str, Any] = {"loss": s.loss, "loss_options": s.loss_options}
    if s.loss not in WITHOUT_REFERENCE:
        options |= _reference(s, args)
    return _trainer(DPOTrainer, s, data, args, _load(s), **options)


def _kto(s: Settings, data: Mapping[str, Any]) -> Any:
    from .trainers.kto import KTOTrainer

    args = trainer_config(config_of("kto"), s)
    return _trainer(KTOTrainer, s, data, args, _load(s), **_reference(s, args))


def _reference(s: Settings, args: Any) -> dict[str, Any]:
    """The reference as an argument of a trainer, unless it is the model without its adapter.

    TRL would load it by itself, along with an adapter that lies in the model's folder.
    """
    needed = s.lora is None and not args.precompute_ref_log_probs
    return {"ref_model": _load(s)[0]} if needed else {}


def _value(s: Settings, data: Mapping[str, Any]) -> Any:
    from ..models.value_heads import value_model
    from .value.trainer import ValueTrainer

    args = trainer_config(config_of("value"), s)
    value = value_options(s)
    base, tokenizer = _load(s)
    base = base.to(args.device)
    torch.manual_seed(s.seed)
    model = value_model(base, value["kind"], rank=value.get("rank"))
    needs_base = args.objective == "cd_q" and value["kind"] == "q"
    given = {"base": base} if needs_base else {}
    return _trainer(ValueTrainer, s, data, args, (model, tokenizer), **given)


def _jsft(s: Settings, data: Mapping[str, Any]) -> Any:
    from .trainers.jsft import JSFTTrainer

    model, tokenizer = _load(s)
    read = {key: _of_judging(s, key, found, tokenizer) for key, found in data.items()}
    args = trainer_config(config_of("jsft"), s)
    return _trainer(JSFTTrainer, s, read, args, (model, tokenizer), judge_weight=s.judge_weight)


def _of_judging(s: Settings, key: str, found: list[Any], tokenizer: Any) -> Any:
    """The rows of answers and judgments that a file's rows of any kind give."""
    answers, rated, pairs = [], [], []
    for row in found:
        if row.keys() & {"completion", "completion_ids"}:
            answers.append(row)
        elif "responses" in row:
            rated.append(row)
        else:
            pairs.append(row)
    pairs += rated_pairs(rated, seed=s.seed) if rated else []
    made = jsft_rows(
        pairs,
        tokenizer,
        s.template,
        principles=s.principles,
        sft=answers or "chosen",
    )
    if is_main_process():
        print_line(f"the {key} data: {made.summary()}", sys.stderr)
    return _dataset(list(made))


def stage_trainer(stage: stages.Stage, before: Path | None) -> Any:
    """The trainer of an aligner's stage, after the one whose folder is given."""
    from .trainers.sft import SFTTrainer

    s = stage.settings
    args = trainer_config(config_of(s.kind), s)
    if before is not None and s.lora is None:
        loaded = models.load(before, dtype=_dtype(s))
    else:
        loaded = _load(s)
    if before is not None and s.lora is not None:
        loaded = add_adapter(loaded[0], before, "the stage before", trainable=True), loaded[1]
    data = {key: _dataset(found) for key, found in stage.data.items()}
    return _trainer(SFTTrainer, s, data, args, loaded)


def _self_judge(s: Settings, data: Mapping[str, Any]) -> Any:
    from .on_policy import SelfJudgeTrainer
    from .trainers.dpo import WITHOUT_REFERENCE

    args = trainer_config(config_of("self-judge"), s)
    model, tokenizer = _load(s)
    options: dict[str, Any] = {"loss": s.loss or "sigmoid", "loss_options": s.loss_options}
    if s.loss is None:
        options["loss_options"] = {"beta": args.beta, **(s.loss_options or {})}
    as_judge = {"template": s.template, "principles": s.principles}
    if s.lora is None:
        frozen = _load(s)[0].to(args.device)
        options["judge"] = Judge(frozen, tokenizer, **as_judge)
        if s.loss not in WITHOUT_REFERENCE:
            options["ref_model"] = frozen
    else:

        def judge(policy: Any) -> Judge:
            return Judge(Model(policy, tokenizer=tokenizer, adapter=None), **as_judge)

        options["judge"] = judge
    return _trainer(SelfJudgeTrainer, s, data, args, (model, tokenizer), **options)


def _clp(s: Settings, data: Mapping[str, Any]) -> Any:
    from .clp.trainer import CLPTrainer

    args = trainer_config(config_of("clp"), s)
    _check_trackers(args)
    base, tokenizer = _load(s)
    base = base.to(args.device).eval()
    torch.manual_seed(s.seed)
    shared = None if s.shared is None else lora_config(s, "shared")
    for name, config in (("lora", lora_config(s)), ("shared", shared)):
        if config is not None:
            _check_layers(base, config.target_modules, name)
    policy = ConditionedPolicy.create(
        base,
        [*s.rewards],
        lora_config(s),
        scope=s.scope,
        shared=shared,
        shared_as=s.shared_as,
        tokenizer=tokenizer,
    )
    plan = Plan.of_rewards({"reference_model": s.model}, s.rewards)
    rewards = plan.load_rewards(args.device, s.dtype)
    return CLPTrainer(
        policy,
        args,
        rewards,
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
    )


MAKERS = {
    "sft": _sft,
    "dpo": _dpo,
    "kto": _kto,
    "value": _value,
    "jsft": _jsft,
    "self-judge": _self_judge,
    "clp": _clp,
}


def _check_trackers(args: Any) -> None:
    for name in args.report_to:
        if name not in get_available_reporting_integrations():
            raise ValueError(f"arguments.report_to is {name!r}, whose package is not installed")


def _trainer(
    trainer: Any,
    s: Settings,
    data: Mapping[str, Any],
    args: Any,
    loaded: tuple[Any, Any],
    **options: Any,
) -> Any:
    model, tokenizer = loaded
    _check_trackers(args)
    adapter = None if is_peft(model) else lora_config(s)
    if adapter is not None:
        _check_layers(model, adapter.target_modules)
    return trainer(
        model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        processing_class=tokenizer,
        peft_config=adapter,
        **options,
    )


def _check_layers(model: Any, names: Any, key: str = "lora") -> None:
    """Refuse names of layers that the model does not have: PEFT passes over them, if one is there.

    Args:
        names: `target_modules`, of which only several names are looked at, not a pattern.
        key: the key of the settings that they are of.
    """
    if not isinstance(names, (set, list, tuple)):
        return
    layers = [name for name, _ in model.named_modules() if name]
    kinds = torch.nn.Linear, torch.nn.Embedding, Conv1D
    known = {n.rpartition(".")[2]: None for n, m in model.named_modules() if isinstance(m, kinds)}
    for name in sorted(names):
        if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
            raise ValueError(
                f"{key}.target_modules has {name!r}, which is no layer of the model; it has "
                f"{', '.join(known)}{did_you_mean(name, known)}"
            )


def _load(s: Settings) -> tuple[Any, Any]:
    """The model and its tokenizer, with the adapter of ``BASE@FOLDER`` merged into the weights."""
    spec = Spec.read(s.model, "model")
    model, tokenizer = models.load(models.folder_of(spec.path), dtype=_dtype(s))
    if spec.guide is not None:
        if spec.is_value_head:
            raise ValueError(f"model is {s.model!r}, whose guide is a value head; it must be none")
        with old_names():
            model = chain.merged(model, spec.guide, f"model is {s.model!r}")
    return model, tokenizer


def _dtype(s: Settings) -> Any:
    return s.dtype if s.dtype == "auto" else getattr(torch, s.dtype)


def tokenizer_of(s: Settings) -> Any:
    """The model's tokenizer alone."""
    return load_tokenizer(models.folder_of(Spec.read(s.model, "model").path))


def rows_of(s: Settings, key: str, path: str) -> Any:
    """The rows of a .jsonl file, in the form that the trainer takes."""
    found = read_jsonl(path)
    if not found:
        raise ValueError(f"{key} is {path!r}, which has no rows")
    if s.kind in ("value", "jsft", "clp"):
        return found
    kind = {"eval_data": "dpo", "data": "prompts"}[key] if s.kind == "self-judge" else s.kind
    rows.check_rows(kind, found, path, str(s.arguments.get("dataset_text_field", "text")))
    return _dataset(found)


def _dataset(found: list[Any]) -> Any:
    datasets = require("datasets", "train")
    if not sys.stderr.isatty():  # the bars of each step of preparing rows would fill a log
        datasets.disable_progress_bars()
    return datasets.Dataset.from_list(found)
