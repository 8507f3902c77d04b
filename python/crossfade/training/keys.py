"""What the settings file of ``crossfade train`` may say, for people: keys, meanings, data rows.

Nothing here imports torch or TRL, so that ``--help`` comes at once. The tests hold the defaults to
those of the trainers.
"""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of training.

    Attributes:
        does: a sentence about what is learnt from what.
        trainer: its class in `crossfade.training`.
        own: keys of the settings file that this kind alone has, and what they mean.
        arguments: the more important keys of `arguments`, their defaults and what they mean.
        rows: a row of the data in each form that it may have.
        columns: what the columns of a row are.
        example: keys of a settings file, beside `model`, `data` and `arguments.output_dir`.
        forms: what prompts and responses may be.
        model: the one of the example.
    """

    does: str
    trainer: str
    own: dict[str, tuple[str, str]]
    arguments: dict[str, tuple[str, str]]
    rows: tuple[str, ...]
    columns: str
    example: str
    forms: str = "Texts, chats, or token ids."
    model: str = "smollm2"


# For all kinds: the default of a key, "" where there is none, and what it means.
SETTINGS: dict[str, tuple[str, str]] = {
    "model": ("", 'a folder, an id on the Hugging Face hub, or "smollm2"; or BASE@ADAPTER'),
    "data": ("", "a .jsonl file, one row a line"),
    "arguments": ("", "of the trainer, see below; output_dir must be among them"),
    "dtype": ("float32", "of the weights: float32, bfloat16, float16, or auto, as they were saved"),
    "eval_data": ("none", "a file as data, to evaluate on, after each epoch by default"),
    "lora": ("none", "trains an adapter of this shape, see below; without it, all weights"),
    "seed": ("0", "of everything that is random"),
}
LORA = {
    "r": ("8", "the rank of the adapter"),
    "lora_alpha": ("8", "the adapter is scaled by lora_alpha / r"),
    "lora_dropout": ("0.0", "dropout before the adapter"),
    "target_modules": ("by model", "names of layers to adapt, such as [q_proj, v_proj, o_proj]"),
    "modules_to_save": ("none", "names of layers to train whole, such as [lm_head]"),
    "use_rslora": ("false", "scale by lora_alpha / sqrt(r) instead"),
    "use_dora": ("false", "weights split into direction and size (DoRA)"),
}
VALUE = {
    "kind": ("q", "q: a value for each next token; scalar: one for the text so far"),
    "rank": ("full", "the rank of a q head, for fewer weights than hidden size x vocabulary"),
}
# The losses of ``loss:``, with the options that ``loss_options:`` may have and their defaults.
LOSSES = {
    "sigmoid": ("DPO", "beta=0.1, label_smoothing=0.0"),
    "sigmoid_norm": ("DPO of mean log-ratios", "beta=5.0"),
    "ipo": ("IPO", "beta=0.1"),
    "hinge": ("SLiC", "beta=0.1"),
    "robust": ("robust DPO, for flipped labels", "beta=0.1, label_smoothing=0.0"),
    "discopop": ("DiscoPOP", "beta=0.1, tau=0.05"),
    "apo_zero": ("APO, chosen better than the model", "beta=0.1"),
    "apo_down": ("APO, chosen worse than the model", "beta=0.1"),
    "nca_pair": ("NCA", "beta=0.1"),
    "exo_pair": ("EXO", "beta=0.1, label_smoothing=0.001"),
    "sppo_hard": ("SPPO", "beta=0.1"),
    "bco_pair": ("BCO", "beta=0.1, shift=0.0"),
    "aot": ("AOT of pairs", "beta=0.1, label_smoothing=0.0"),
    "aot_unpaired": ("AOT of responses", "beta=0.1, label_smoothing=0.0"),
    "orpo": ("ORPO, no reference", "lam=0.1"),
    "simpo": ("SimPO, no reference", "beta=2.0, gamma=1.0"),
    "modpo": ("MODPO, rows have margins", "weight, other_weights, beta=0.1"),
}


def _arguments(
    rate: str, logging_steps: str = "10", **own: tuple[str, str]
) -> dict[str, tuple[str, str]]:
    """Arguments that all trainers have, then `own`."""
    return {
        "output_dir": ("", "the folder for checkpoints and for what was trained"),
        "learning_rate": (rate, "the highest; adapters need some 10 times that of all weights"),
        "num_train_epochs": ("3.0", "how often the data is read"),
        "max_steps": ("-1", "how many steps are made at most; -1 for no limit"),
        "per_device_train_batch_size": ("8", "rows of a batch on each device"),
        "gradient_accumulation_steps": ("1", "batches of a step"),
        "lr_scheduler_type": ("linear", "linear, cosine, constant, ..."),
        "warmup_steps": ("0", "steps until the learning rate is reached; a share if below 1"),
        "logging_steps": (logging_steps, "steps between the figures that are printed"),
        "save_steps": ("500", "steps between checkpoints; a share of all if below 1"),
        "eval_steps": ("none", "steps between evaluations, with eval_strategy: steps"),
        "report_to": ("none", "trackers, such as tensorboard or wandb"),
        **own,
    }


_LENGTH = ("1024", "tokens of a row, prompt and response; longer ones are cut")
_BEFORE = ("false", "compute the reference's log-probs once, before training")
_CHAT = '[{"role": "user", "content": "How was it?"}]'

_JUDGE = {
    "template": ("hh", "of the judge's prompt: hh, ultrafeedback, or a mapping of its fields"),
    "principles": ("none", "aspects that are judged: names of the template, or {name: phrase}"),
}
_LOSS = {
    "loss": ("none", "a loss below; none is arguments.loss_type, DPO by default"),
    "loss_options": ("none", "options of this loss, such as {beta: 2.0, gamma: 1.0}"),
}

KINDS = {
    "sft": Kind(
        does="Learn to write texts, or responses to prompts, as they are in the data.",
        trainer="SFTTrainer",
        own={},
        arguments=_arguments(
            "2e-05",
            max_length=_LENGTH,
            completion_only_loss=("none", "false: prompts are learnt too; none: not if there are"),
            packing=("false", "join short rows, so that no place of a batch is empty"),
        ),
        rows=(
            '{"prompt": "How was it?", "completion": " Great."}',
            f'{{"prompt": {_CHAT}, "completion": [{{"role": "assistant", "content": "Great."}}]}}',
            '{"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}',
            '{"text": "How was it? Great."}',
            '{"prompt_ids": [504, 28], "completion_ids": [1061, 2]}',
            '{"input_ids": [504, 28, 1061, 2], "completion_mask": [0, 0, 1, 1]}',
        ),
        columns="EOS is put at the end of texts, and nothing at the end of ids.",
        example="arguments: {output_dir: tuned, learning_rate: 1e-4}",
    ),
    "dpo": Kind(
        does="Learn from pairs of responses to a prompt, one of which is preferred.",
        trainer="DPOTrainer",
        own=_LOSS,
        arguments=_arguments(
            "1e-06",
            max_length=_LENGTH,
            beta=("0.1", "how strongly the model is held to the reference, without loss"),
            loss_type=("[sigmoid]", "TRL's losses, summed by loss_weights, without loss"),
            precompute_ref_log_probs=_BEFORE,
            use_weighting=("false", "weigh pairs by how likely the model finds them (WPO)"),
        ),
        rows=(
            '{"prompt": "How was it?", "chosen": " Great.", "rejected": " Bad."}',
            f'{{"prompt": {_CHAT}, "chosen": [{{"role": "assistant", "content": "Great."}}], '
            '"rejected": [{"role": "assistant", "content": "Bad."}]}',
            '{"prompt_ids": [504, 28], "chosen_ids": [1061, 2], "rejected_ids": [4026, 2]}',
        ),
        columns="With loss: modpo each row also has margins, such as [0.5, -1.0]: by how much the "
        "reward of each other objective is higher for chosen.",
        example="loss: sigmoid\nloss_options: {beta: 0.1}\n"
        "arguments: {output_dir: tuned, learning_rate: 1e-4}",
    ),
    "kto": Kind(
        does="Learn from single responses, each of which is labelled good or bad.",
        trainer="KTOTrainer",
        own={},
        arguments=_arguments(
            "1e-06",
            max_length=_LENGTH,
            beta=("0.1", "how strongly the model is held to the reference"),
            loss_type=("kto", "kto, or apo_zero_unpaired, which has no KL term"),
            desirable_weight=("1.0", "of good responses; weights balance unequal numbers"),
            undesirable_weight=("1.0", "of bad responses"),
            precompute_ref_log_probs=_BEFORE,
        ),
        rows=(
            '{"prompt": "How was it?", "completion": " Great.", "label": true}',
            f'{{"prompt": {_CHAT}, "completion": [{{"role": "assistant", "content": "Bad."}}], '
            '"label": false}',
            '{"prompt_ids": [504, 28], "completion_ids": [1061, 2], "label": true}',
            '{"prompt": "How was it?", "chosen": " Great.", "rejected": " Bad."}',
        ),
        columns="A pair becomes two rows. There must be two different prompts at least.",
        example="arguments: {output_dir: tuned, learning_rate: 1e-4}",
    ),
    "value": Kind(
        does="Learn what reward a response will get, from what is written of it so far.",
        trainer="ValueTrainer",
        own={"value": ("{kind: q}", "the head, see below")},
        arguments=_arguments(
            "0.001",
            "500",
            objective=("fudge", "fudge: towards the reward; cd_q: towards the next token's value"),
            unfinished=("none", "drop or score responses that were cut; none: by the objective"),
            cache_hidden=("false", "compute hidden states once; without lora alone"),
        ),
        rows=(
            '{"prompt": "How was it?", "completion": " Great.", "reward": 0.8, "finished": true}',
            f'{{"prompt": {_CHAT}, "completion": [{{"role": "assistant", "content": "Great."}}], '
            '"reward": 0.8, "finished": true}',
            '{"prompt_ids": [504, 28], "completion_ids": [1061, 2], "reward": 0.8, '
            '"finished": true}',
        ),
        columns="finished is false where a limit cut the response before its end.",
        example="value: {kind: q, rank: 16}\narguments: {output_dir: head, objective: fudge}",
    ),
    "jsft": Kind(
        does="Learn to answer prompts, and to judge which of two answers is better.",
        trainer="JSFTTrainer",
        own={
            "judge_weight": ("1.0", "how often the label of a judgment counts beside a token"),
            **_JUDGE,
        },
        arguments=_arguments(
            "2e-05",
            max_length=("1024", "tokens of a row, prompt and response; longer ones are left out"),
        ),
        rows=(
            '{"prompt": "How was it?", "chosen": " Great.", "rejected": " Bad."}',
            f'{{"prompt": {_CHAT}, "chosen": [{{"role": "assistant", "content": "Great."}}], '
            '"rejected": [{"role": "assistant", "content": "Bad."}]}',
            '{"prompt": "How was it?", "chosen": " Great.", "rejected": " Bad.", '
            '"principle": "honest", "rationale": "Assistant {chosen} says more."}',
            '{"prompt": "How was it?", "responses": [{"text": " Great.", "ratings": {"a": 5}}, '
            '{"text": " Bad.", "ratings": {"a": 1}}]}',
            '{"prompt": "How was it?", "completion": " Great."}',
        ),
        columns="A file may mix these rows. Each pair gives two judgments. Of rated responses the "
        "best is chosen, and a worse one at random is rejected. Answers are learnt of the rows "
        "with a completion or, where there are none, of those that were chosen. The paper's "
        "settings: one epoch, a rate of 2e-5 that falls as a cosine, batches of 16.",
        example="judge_weight: 10\narguments: {output_dir: judge, num_train_epochs: 1}",
    ),
    "self-judge": Kind(
        does="Learn from a model's own responses, of which it judges itself which is better.",
        trainer="SelfJudgeTrainer",
        own={**_JUDGE, **_LOSS},
        arguments=_arguments(
            "5e-06",
            lr_scheduler_type=("constant_with_warmup", "linear, cosine, constant, ..."),
            warmup_steps=("0.1", "steps until the learning rate is reached; a share if below 1"),
            temperature=("1.0", "of the responses that are sampled"),
            top_p=("0.9", "the share of the probability that is sampled from"),
            max_new_tokens=("256", "tokens of a response, at most"),
            max_length=("1024", "tokens of a prompt and its response; longer ones are left out"),
            beta=("0.1", "how strongly the model is held to the reference"),
        ),
        rows=(
            '{"prompt": "How was it?"}',
            f'{{"prompt": {_CHAT}}}',
            '{"prompt_ids": [504, 28]}',
        ),
        columns="model is one that crossfade train jsft made: its folder, or BASE@FOLDER, where "
        "the folder has an adapter. It judges, and is the reference, as it is in the beginning. "
        "With lora, output_dir has both adapters in one, so that BASE@OUTPUT_DIR decodes with it. "
        "Rows of eval_data are pairs, as those of dpo.",
        example="arguments: {output_dir: tuned, max_new_tokens: 128}",
        model="smollm2@judge",
    ),
    "metaaligner": Kind(
        does="Learn to correct answers toward any objectives, in three stages.",
        trainer="SFTTrainer",
        own={
            "objectives": ("all", "what answers are compared by: names, or {name: description}"),
            "margins": ("0.0", "rewards that differ by no more are equal; or {name: number}"),
            "noun": ("context", "what the prompts call the query: context or query"),
            "per_prompt": ("all", "how many pairs are drawn of a row's responses"),
            "warm_up": ("1.0", "the share of equal rows that the warm-up reads"),
            "validation": ("0.0", "the share of prompts that are evaluated on, not trained on"),
            "stages": ("all", "some of [warm-up, equal, better], or {name: {arguments}}"),
        },
        arguments=_arguments("2e-05", max_length=_LENGTH),
        rows=(
            '{"prompt": "How was it?", "first": "Great.", "second": "It was a great film.", '
            '"preferences": {"brevity": "better", "helpfulness": "worse", "humour": "equal"}}',
            f'{{"prompt": {_CHAT}, "chosen": [{{"role": "assistant", "content": "Great."}}], '
            '"rejected": [{"role": "assistant", "content": "Bad."}], '
            '"preferences": {"positivity": "better"}}',
            '{"prompt": "How was it?", "responses": [{"text": "Great.", "rewards": {"brevity": 5}}'
            ', {"text": "It was great.", "rewards": {"brevity": 3}}]}',
        ),
        columns="A file may mix these rows. A preference says how the first answer, or the chosen "
        "one, is beside the other. Of responses any two are a pair. Stages: warm-up copies an "
        "answer, equal turns it into one that is as good, better into one that is better by the "
        "objectives that its prompt names. Each has a folder of its own in output_dir, with its "
        "checkpoints, begins with what the last one saved, and may have arguments of its own, "
        "such as stages: {warm-up: {max_steps: 50}, equal: {}, better: {}}; --resume goes on in "
        "the stage that was stopped. The paper's settings: two epochs, a rate of 1e-5 that falls "
        "as a cosine, warmup_steps: 0.05, weight_decay: 1e-5, batches of 512.",
        example="objectives: [brevity, helpfulness, humour]\n"
        "arguments: {output_dir: tuned, learning_rate: 1e-4}",
        forms="Texts or chats.",
    ),
    "clp": Kind(
        does="Learn from rewards to follow their weights: a conditioned language policy.",
        trainer="CLPTrainer",
        own={
            "rewards": ("", "{name: MODULE:FUNCTION, or the folder of a reward model}"),
            "scope": ("full", "what the weights change: full, attention or head"),
            "shared": ("none", "what is trained besides, the same for all weights: as lora"),
            "shared_as": ("scaled", "scaled: kl=1 is the model; trained: the same at any kl"),
        },
        arguments=_arguments(
            "1e-4",
            num_generations=("4", "responses of a prompt at a step, with the same weights"),
            max_new_tokens=("128", "tokens of a response, at most"),
            max_length=("1024", "tokens of a prompt and its response; longer ones are left out"),
            concentration=("1.0", "of the Dirichlet that weights come from; or one a reward"),
            kl=("0.1", "the weight of the KL to the model; or [low, high], to draw from"),
        ),
        rows=(
            '{"prompt": "How was it?"}',
            f'{{"prompt": {_CHAT}}}',
            '{"prompt_ids": [504, 28]}',
        ),
        columns="Each step draws weights of the rewards and a KL weight for each prompt, and the "
        "policy at these weights writes the responses that it learns from. lora is needed: each "
        "reward has an adapter of this shape, in a folder of its name in output_dir, which "
        "crossfade.ConditionedPolicy.load reads. Rows of eval_data are as those of data.",
        example="rewards: {sentiment: rewards:sentiment, brevity: rewards:brevity}\n"
        "arguments: {output_dir: tuned, max_new_tokens: 48, kl: [0.0, 0.5]}",
        forms="Texts, chats, or token ids.",
    ),
}
# Keys of other tools and of other places, and where they belong in a settings file.
ELSEWHERE = {
    **dict.fromkeys(("lr", "learning-rate"), "arguments.learning_rate"),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs"), "arguments.num_train_epochs"),
    **dict.fromkeys(("steps", "num_steps", "iterations"), "arguments.max_steps"),
    **dict.fromkeys(
        ("batch_size", "micro_batch_size", "train_batch_size"),
        "arguments.per_device_train_batch_size",
    ),
    **dict.fromkeys(("grad_accum", "accumulation_steps"), "arguments.gradient_accumulation_steps"),
    **dict.fromkeys(("output", "out", "save_dir", "out_dir"), "arguments.output_dir"),
    **dict.fromkeys(
        ("max_seq_length", "max_seq_len", "seq_length", "cutoff_len", "max_tokens"),
        "arguments.max_length",
    ),
    **dict.fromkeys(("dataset", "train_data", "train_dataset", "train_file", "data_path"), "data"),
    **dict.fromkeys(
        ("eval_dataset", "eval_file", "val_data", "valid_data", "validation_data", "test_data"),
        "eval_data",
    ),
    **dict.fromkeys(("base_model", "model_name", "model_name_or_path", "model_path"), "model"),
    **dict.fromkeys(("torch_dtype", "precision"), "dtype"),
    **dict.fromkeys(("rank", "lora_r", "lora_rank"), "lora.r"),
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    **dict.fromkeys(("targets", "modules", "lora_target"), "lora.target_modules"),
    **dict.fromkeys(("peft", "peft_config", "adapter", "use_lora", "lora_config"), "lora"),
    "head": "value",
}
