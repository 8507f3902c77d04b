"""The cases of trl_parity.py: every option that changes a loss, a metric or a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
import transformers
import trl
from crossfade.training import DPOTrainer, KTOTrainer, SFTTrainer
from tokenizers import Tokenizer, models, pre_tokenizers

KINDS = {
    "sft": (SFTTrainer, trl.SFTTrainer, trl.SFTConfig),
    "dpo": (DPOTrainer, trl.DPOTrainer, trl.DPOConfig),
    "kto": (KTOTrainer, trl.KTOTrainer, trl.KTOConfig),
}
VOCABULARY = 61
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "tied": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "dropout": lambda: transformers.LlamaConfig(**SHAPE, attention_dropout=0.3),
    "soft cap": lambda: transformers.Gemma2Config(
        **SHAPE,
        head_dim=8,
        query_pre_attn_scalar=8,
        final_logit_softcapping=3.0,
        attn_implementation="eager",
    ),
    "scale": lambda: transformers.CohereConfig(**SHAPE, logit_scale=0.3),
    "division": lambda: transformers.GraniteConfig(**SHAPE, logits_scaling=2.5),
    "bias": lambda: transformers.PhiConfig(**SHAPE | {"num_key_value_heads": 2}),
    "experts": lambda: transformers.MixtralConfig(
        **SHAPE, num_local_experts=3, num_experts_per_tok=2, output_router_logits=True
    ),
}
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
ADAPTERS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft.LoraConfig(**LORA),
    "DoRA": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "LoRA, dropout": lambda: peft.LoraConfig(**LORA, lora_dropout=0.3),
    "LoRA, head trained": lambda: peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "LoRA on the head": lambda: peft.LoraConfig(**LORA | {"target_modules": ["lm_head"]}),
    "IA3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@dataclass
class Case:
    """One option, or several that go together.

    Attributes:
        kind: "sft", "dpo" or "kto".
        options: of the trainer's config.
        rows: the form of the rows, see `rows_of`.
        evaluated: whether there is an evaluation too, on the same rows, after each step.
        trained: whether a trained adapter is given with the model, which TRL copies as reference.
        by_name: whether our trainer takes its one loss from `crossfade.losses`, as ``loss=``.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    model: str = "llama"
    adapter: str | None = None
    rows: str = "texts"
    evaluated: bool = False
    trained: bool = False
    by_name: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        parts = [f"{k}={v}" for k, v in self.options.items()]
        parts += [x for x in (self.model, self.adapter, self.rows) if x not in ("llama", "texts")]
        parts += ["evaluated"] * self.evaluated + ["trained adapter"] * self.trained
        parts += ["by name"] * self.by_name
        self.name = f"{self.kind}: {', '.join(filter(None, parts)) or 'defaults'}"


def cases() -> Iterator[Case]:
    """Every option that changes a loss, a metric or a gradient."""
    for kind in KINDS:
        yield Case(kind)
        yield Case(kind, evaluated=True)
        for model in CONFIGS:
            yield Case(kind, {"disable_dropout": False} if kind != "sft" else {}, model)
        for adapter in ADAPTERS:
            yield Case(kind, adapter=adapter)
        yield Case(kind, adapter="LoRA", trained=True)
        yield Case(kind, rows="chats")
        for options in (
            {"max_length": 6},
            {"max_length": None},
            {"gradient_accumulation_steps": 3},
            {"gradient_checkpointing": True},
            {"pad_to_multiple_of": 4},
            {"max_grad_norm": 1.0},
            {"per_device_train_batch_size": 3, "dataloader_drop_last": True},
            {"activation_offloading": True},
            {"use_cache": False},
            {"neftune_noise_alpha": 5.0},
            {"label_smoothing_factor": 0.1},
            {"max_length": 6, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        ):
            yield Case(kind, options, evaluated="max_length" in options)
        yield Case(kind, {"gradient_checkpointing": True}, adapter="LoRA")
        for coefficient in (0.0, 0.5):
            yield Case(kind, {"router_aux_loss_coef": coefficient}, "experts")
    for kind in ("dpo", "kto"):
        for adapter in (None, "LoRA"):
            yield Case(kind, {"precompute_ref_log_probs": True}, adapter=adapter, evaluated=True)
            sync = {"sync_ref_model": True, "ref_model_sync_steps": 1}
            yield Case(kind, sync, adapter=adapter)
        yield Case(kind, {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 2})
        yield Case(kind, {"beta": 2.0})
    yield from dpo_cases()
    yield from sft_cases()
    for options in (
        {"loss_type": "apo_zero_unpaired"},
        {"desirable_weight": 2.0},
        {"undesirable_weight": 0.3},
        {"loss_type": "apo_zero_unpaired", "desirable_weight": 0.5, "beta": 1.0},
        {"precompute_ref_log_probs": True, "loss_type": "apo_zero_unpaired"},
        {"train_sampling_strategy": "random"},
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.9},
        {"per_device_train_batch_size": 1},
    ):
        yield Case("kto", options)
    yield Case("kto", rows="pairs")


def all_cases() -> list[Case]:
    """The cases whose options their trainer has, each once."""
    known = {kind: set(config.__dataclass_fields__) for kind, (*_, config) in KINDS.items()}
    return list({c.name: c for c in cases() if c.options.keys() <= known[c.kind]}.values())


LOSSES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")


def dpo_cases() -> Iterator[Case]:
    for loss in LOSSES:
        options: dict[str, Any] = {"loss_type": [loss]}
        yield Case("dpo", {**options, "label_smoothing": 0.1})
        yield Case("dpo", {**options, "label_smoothing": 0.1, "beta": 1.0}, adapter="LoRA")
        if loss != "exo_pair":
            yield Case("dpo", options)
        yield Case("dpo", {**options, "ld_alpha": 0.4, "label_smoothing": 0.1})
        if loss != "sft":  # which is SFTTrainer's here
            named = {**options, "beta": 0.3}
            # TRL's sigmoid does not read label_smoothing; ours has that of conservative DPO
            named |= {"label_smoothing": 0.1} if loss in SMOOTHED else {}
            yield Case("dpo", named, by_name=True)
            yield Case("dpo", named, adapter="LoRA", by_name=True)
        yield Case("dpo", {**options, "use_weighting": True, "label_smoothing": 0.1})
    for divergence in ("forward_kl", "js_divergence", "alpha_divergence"):
        for loss in ("sigmoid", "ipo", "hinge", "aot"):
            yield Case("dpo", {"f_divergence_type": divergence, "loss_type": [loss]})
    mixed = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    for options in (
        mixed,
        {**mixed, "ld_alpha": 0.4, "precompute_ref_log_probs": True},
        {"ld_alpha": 0.4, "precompute_ref_log_probs": True},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"loss_type": ["discopop"], "discopop_tau": 0.5},
        {"use_weighting": True},
        {"use_weighting": True, "max_length": 4},
        {**mixed, "use_weighting": True},
        {"padding_free": True},
        {"truncation_mode": "keep_end", "max_length": 6},
        {"truncation_mode": "keep_end", "max_length": 3, "precompute_ref_log_probs": True},
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.9},
        {"sync_ref_model": True, "precompute_ref_log_probs": True},
        {"pad_token": "<unk>"},
        {"disable_dropout": True},
    ):
        yield Case("dpo", options, "dropout" if "disable_dropout" in options else "llama")
    for model in ("soft cap", "scale", "bias", "experts"):
        yield Case("dpo", {"use_weighting": True}, model)
    weighted = {"loss_type": ["sigmoid_norm"], "use_weighting": True}
    yield Case("dpo", weighted, by_name=True)
    yield Case("dpo", {**weighted, "loss_type": ["aot"]}, by_name=True)  # refused, as TRL does
    yield Case("dpo", {"use_weighting": True}, rows="chats", evaluated=True)


def sft_cases() -> Iterator[Case]:
    for rows in ("texts", "ids", "chats"):
        for options in (
            {"completion_only_loss": False},
            {"completion_only_loss": True},
            {"loss_type": "dft"},
            {"loss_type": "chunked_nll"},
        ):
            # TRL reads a completion_mask only where it is told to; ours does without that
            told = {"completion_only_loss": True} if rows == "ids" else {}
            yield Case("sft", {**told, **options}, rows=rows)
    yield Case("sft", {"assistant_only_loss": True}, rows="messages")
    yield Case("sft", {"assistant_only_loss": True}, rows="chats")
    yield Case("sft", {"assistant_only_loss": True}, rows="texts")
    yield Case("sft", {"max_length": 6, "truncation_mode": "keep_end"})
    yield Case("sft", {"max_length": 6, "truncation_mode": "keep_end"}, rows="whole")
    for rows in ("whole", "messages"):
        yield Case("sft", rows=rows)
        yield Case("sft", {"loss_type": "dft", "gradient_accumulation_steps": 2}, rows=rows)
    for strategy in ("bfd", "bfd_split", "wrapped"):
        for rows in ("whole", "texts"):
            options = {"packing": True, "packing_strategy": strategy, "max_length": 16}
            yield Case("sft", options, rows=rows)
            yield Case("sft", {**options, "eval_packing": False}, rows=rows, evaluated=True)
    yield Case("sft", {"padding_free": True, "max_length": None})
    yield Case("sft", {"padding_free": True, "max_length": None, "loss_type": "dft"})
    yield Case("sft", {"padding_free": True})
    yield Case("sft", {"shuffle_dataset": True})
    yield Case("sft", {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2})
    yield Case("sft", {"eos_token": "<unk>"})
    yield Case("sft", {"pad_token": "<unk>"})
    yield Case("sft", {"dataset_text_field": "body"}, rows="body")
    yield Case("sft", {"label_smoothing_factor": 0.1, "loss_type": "dft"})


# ---- Models and rows ---------------------------------------------------------------------------


def make(name: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.4)
    return model


def make_tokenizer() -> Any:
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "user", "assistant", ":"]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.chat_template = (
        "{% for m in messages %}<bos> {{ m['role'] }} : {% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }} <eos> {% endgeneration %}"
        "{% else %}{{ m['content'] }} <eos> {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<bos> assistant : {% endif %}"
    )
    return tokenizer


def words(first: int, count: int) -> str:
    return "".join(f" w{(first + i) % 50}" for i in range(count))


def rows_of(kind: str, form: str, count: int = 12) -> list[dict[str, Any]]:
    """Prompts and responses of several lengths; no prompt is twice in a batch."""
    found = []
    for i in range(count):
        prompt, good, bad = words(i, 2 + i % 3), words(20 + i, 2 + i % 4), words(30 + i, 1 + i % 5)
        if form == "chats":
            prompt, good, bad = (
                [{"role": role, "content": text.strip()}]
                for role, text in (("user", prompt), ("assistant", good), ("assistant", bad))
            )  # type: ignore[assignment]
        if form in ("whole", "body"):
            found.append({"text" if form == "whole" else "body": prompt + good})
        elif form == "messages":
            turns = (("user", prompt), ("assistant", good), ("user", bad), ("assistant", prompt))
            found.append({"messages": [{"role": r, "content": t.strip()} for r, t in turns]})
        elif kind == "dpo" or form == "pairs":
            found.append({"prompt": prompt, "chosen": good, "rejected": bad})
        elif kind == "sft":
            found.append({"prompt": prompt, "completion": good})
        else:
            label = i % 3 != 1
            found.append({"prompt": prompt, "completion": good if label else bad, "label": label})
    return [as_ids(row, kind) for row in found] if form == "ids" else found


def as_ids(row: dict[str, Any], kind: str) -> dict[str, Any]:
    """A row as ids, under the names that TRL takes them by."""
    encode = make_tokenizer()
    ids = {k: encode(x)["input_ids"] for k, x in row.items() if k != "label"}
    ids = {k: x if k == "prompt" else [*x, 1] for k, x in ids.items()}
    if kind == "sft":
        mask = [0] * len(ids["prompt"]) + [1] * len(ids["completion"])
        return {"input_ids": ids["prompt"] + ids["completion"], "completion_mask": mask}
    return {f"{k}_ids": x for k, x in ids.items()} | {k: row[k] for k in ("label",) if k in row}
