"""A trainer of conditioned policies: REINFORCE on the policy's own responses.

Source: Wang et al., arXiv:2407.15762.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ...blends.blend import Model
from ...blends.values import as_value
from ...decoding.generation import generate
from ...decoding.inputs import Requests, encode
from ...decoding.search.finished import TextValuer
from ...losses import clp
from ...models.adapters import adapter_parameters
from ...models.hf import place, text_config
from ...models.saved_adapters import fill_adapter
from ...pareto.points import failed
from ...policies.conditioned import ConditionedPolicy, PromptedPolicy
from ..clp_config import CLPConfig
from ..processes import STANDS_IN, InParallel, check_processes
from ..sampling import as_decoded, noise
from .learner import Learner
from .prompts import Prompt, Prompts
from .rollouts import Rollouts

ROLLOUTS = "rollouts"  # the key of a batch that has its responses


class CLPTrainer(InParallel, transformers.Trainer):
    """A `transformers.Trainer` that trains a conditioned policy by policy gradient.

    At each step every prompt gets weights of rewards from a Dirichlet and a KL weight from a range,
    and the policy at these weights writes `num_generations` responses, all prompts' in one call of
    `crossfade.generate` at temperature 1. A response's return is
    ``(1 - kl) sum_k weights[k] R_k - kl (log pi - log pi_ref)``, and the loss is the mean of
    `losses.clp`. Log-probs of the policy and of the reference come from the same modules, in which
    each row has its own mix of adapters, and from `linear_logp`, which keeps no logits.

    Weights and noise of a prompt depend on ``args.seed``, the global step and the prompt's place in
    the dataset alone. So a run that is resumed from a checkpoint ends in the same weights, and
    several processes sample what one would.

    It logs, as means of responses, `objective` (the return), `reward` (``sum_k weights[k] R_k``),
    `rewards/NAME`, `kl` (the log-ratio), `samples/length` and `samples/finished`, the share that
    ended by itself; and in evaluations, on weights and noise that stay the same, the same with
    ``eval_``.

    Args:
        policy: a `ConditionedPolicy` or a `PromptedPolicy`, most often one that `create` made, on
            the device where it is trained. Its adapters are trained, and it can be used as soon as
            training is over.
        args: the settings.
        rewards: for each reward of the policy, by its name, a function ``fn(prompts, responses) ->
            scores``, or another value that scores texts: a `Reward`, a `RewardModel`, a `LogRatio`.
            Their sizes are beside the KL in nats.
        train_dataset, eval_dataset: lists of rows, or datasets that have a length, with `prompt`, a
            text or a chat, or `prompt_ids`, or both: the ids then are what models read, and the
            prompt is what rewards read. `eval_dataset` may also be a dict of these.
        processing_class: the tokenizer; None is the policy's.
        callbacks, optimizers: as in Transformers.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be; while training,
            a reward that gives NaN or infinity, and the response that it was of.
    """

    def __init__(
        self,
        policy: Any,
        args: CLPConfig,
        rewards: Mapping[str, Any],
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[transformers.TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if not isinstance(policy, (ConditionedPolicy, PromptedPolicy)):
            raise TypeError(
                f"policy is a {type(policy).__name__}; it must be a ConditionedPolicy or a "
                "PromptedPolicy, such as ConditionedPolicy.create makes"
            )
        if not isinstance(args, CLPConfig):
            raise TypeError(f"args is a {type(args).__name__}; it must be a CLPConfig")
        if policy.base is None:
            raise ValueError(
                "policy has no adapter to train; it must be one that PromptedPolicy.create made"
            )
        self.policy = policy
        self.args: Any = args  # Transformers sets it as well; this tells type checkers
        self._tokenizer: Any = processing_class or policy.tokenizer
        if self._tokenizer is None:
            raise ValueError(
                "processing_class is None, and so is the policy's tokenizer; rewards read texts"
            )
        self._values = self._checked(rewards)
        args.draw(policy.rewards, 0)  # one for each reward must be there
        self._adapters = policy.trained
        base = policy.base
        if place(base.device) != place(args.device):
            raise ValueError(
                f"policy is on {base.device} and training runs on {args.device}; make it of a base "
                "that is there"
            )
        if args.n_gpu > 1:
            raise NotImplementedError(
                f"one process has {args.n_gpu} GPUs, whose copies would not know their rows' "
                "mixes; it must have one, as accelerate launch gives it"
            )
        for name in self._adapters:
            if getattr(policy.model.peft_config[name], "lora_bias", False):
                raise NotImplementedError(
                    f"the adapter {name!r} has lora_bias=True; only adapters without are trained"
                )
        for p in adapter_parameters(policy.model, self._adapters):
            p.requires_grad_(True)
        self._sizes = (
            text_config(base).vocab_size,
            (float("inf") if args.max_length is None else args.max_length - args.max_new_tokens),
        )
        self._seen: list[Tensor] = []
        read = {}
        sets = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        for key, rows in sets.items():
            name = f"eval_dataset[{key!r}]" if key else "eval_dataset"
            read[key] = None if rows is None else self._prompts(rows, name)
        super().__init__(
            model=Learner(base, policy.model, self._adapters),
            args=args,
            data_collator=_as_they_are,
            train_dataset=(
                None if train_dataset is None else self._prompts(train_dataset, "train_dataset")
            ),
            eval_dataset=read if isinstance(eval_dataset, dict) else read[""],
            processing_class=self._tokenizer,
            compute_metrics=self._metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_processes(self, whole=True)

    def _checked(self, rewards: Any) -> dict[str, Any]:
        """What scores texts, by the names of the policy's rewards."""
        names = list(self.policy.rewards)
        if not isinstance(rewards, Mapping) or set(rewards) != set(names):
            given = list(rewards) if isinstance(rewards, Mapping) else type(rewards).__name__
            raise ValueError(
                f"rewards is {given}; it must be a mapping with a function for each reward of the "
                f"policy, {names}"
            )
        return {name: as_value(rewards[name], f"rewards[{name!r}]") for name in names}

    def train(self, *args: Any, **options: Any) -> Any:
        """As in Transformers. The policy is in eval mode afterwards."""
        self._seen = []
        try:
            return super().train(*args, **options)
        finally:
            self.policy.model.eval()

    # ---- data

    def _prompts(self, rows: Any, name: str) -> Prompts:
        return Prompts(rows, self._tokenizer, *self._sizes, name)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in Transformers. Rows that the trainer was not made with are read now."""
        if eval_dataset is not None and not isinstance(eval_dataset, (str, Prompts)):
            eval_dataset = self._prompts(eval_dataset, "eval_dataset")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As `get_eval_dataloader`."""
        return super().get_test_dataloader(self._prompts(test_dataset, "test_dataset"))

    # ---- a step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: Any
    ) -> tuple[list[Any], Any]:
        """As in Transformers: the batches of a step. Responses are sampled for all of them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        prompts = [prompt for batch in batches for prompt in batch["prompts"]]
        if not prompts:
            return batches, None
        when = f"step {self.state.global_step + 1}"
        written = self._write(prompts, self.state.global_step, when)
        ends = itertools.accumulate((len(batch["prompts"]) for batch in batches), initial=0)
        parts = [written.part(a, b) for a, b in itertools.pairwise(ends)]
        idle = [batch.get(STANDS_IN, False) for batch in batches]
        made = [
            {ROLLOUTS: part, STANDS_IN: stands_in}
            for part, stands_in in zip(parts, idle, strict=True)
        ]
        count = sum(len(x[ROLLOUTS].responses) for x in made if not x[STANDS_IN])
        if self._several:
            count = self.accelerator.reduce(torch.tensor(count, device=device)).item()
        return made, count

    def _write(self, prompts: Sequence[Prompt], step: Any, when: str) -> Rollouts:
        """Responses to some prompts, each at weights that are drawn for it, and their rewards.

        Args:
            step: what the draws depend on, beside the run's seed and the prompt.
            when: the same as errors say it.
        """
        policy, n = self.policy, self.args.num_generations
        seeds = [noise(self.args.seed, step, prompt.place) for prompt in prompts]
        drawn = [self.args.draw(policy.rewards, noise("weights", seed)) for seed in seeds]
        kl = torch.tensor([x for _, x in drawn])
        weights = {name: torch.tensor([w[name] for w, _ in drawn]) for name in policy.rewards}
        read = [self._read(prompt, *own) for prompt, own in zip(prompts, drawn, strict=True)]
        mix = policy.mix(weights, kl)
        with as_decoded(policy.model):
            out: Any = generate(
                Model(policy.model, adapter=mix, tokenizer=self._tokenizer, name="policy"),
                read,
                seed=seeds,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=self.args.max_new_tokens,
                num_return_sequences=n,
                progress=False,
            )
        asked = [prompt.item for prompt in prompts for _ in range(n)]
        mixes = torch.stack(
            [torch.as_tensor(mix[name]).float().expand(len(prompts)) for name in self._adapters], 1
        )
        return Rollouts(
            read=read,
            plain=[prompt.ids for prompt in prompts],
            responses=out.responses,
            mixes=mixes,
            kl=kl,
            weights=torch.stack(list(weights.values()), 1),
            scores=self._scores(asked, out.text, when),
            finished=out.finished.cpu(),
        )

    def _read(self, prompt: Prompt, weights: dict[str, float], kl: float) -> list[int]:
        """The ids that the policy reads of a prompt."""
        if not isinstance(self.policy, PromptedPolicy):
            return prompt.ids
        told = self.policy.told(prompt.item, weights, kl)
        return encode(told, self._tokenizer, "the policy")

    def _scores(self, prompts: Sequence[Any], texts: Sequence[str], when: str) -> Tensor:
        """``[responses, rewards]``: what each reward says of each response."""
        requests, places = Requests(list(prompts)), range(len(prompts))
        each = []
        for name, value in self._values.items():
            try:
                found = TextValuer.of(value, requests, self._tokenizer)(places, texts)
            except Exception as error:  # It may raise whatever it likes.
                raise failed(error, f"rewards[{name!r}] at {when}") from error
            if not found.isfinite().all():
                i = int((~found.isfinite()).nonzero()[0])
                raise ValueError(
                    f"the reward {name!r} is {float(found[i])} at {when} for the response "
                    f"{texts[i]!r:.80}; it must be finite"
                )
            each.append(found.float())
        return torch.stack(each, 1)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean loss of a response, see the class."""
        written: Rollouts = inputs[ROLLOUTS]
        log_probs, reference = self._log_probs(model, written)
        rewards = written.rewards.to(log_probs).view(-1, written.n)
        losses = clp(log_probs, reference, rewards, written.kl.to(log_probs))
        figures = written.figures((log_probs.detach() - reference).flatten().cpu())
        self._seen.append(figures[: 0 if inputs[STANDS_IN] else None])
        if num_items_in_batch is None:
            loss = losses.mean()
        else:  # the number counts the responses of all processes, which are averaged
            loss = losses.sum() / num_items_in_batch * self.accelerator.num_processes
        if inputs[STANDS_IN]:
            loss = 0 * loss
        return (loss, {"log_probs": log_probs}) if return_outputs else loss

    def _log_probs(self, model: Any, written: Rollouts) -> tuple[Tensor, Tensor]:
        """``[prompts, n]`` each: those of responses under the policy and under the reference."""
        shares, device = self.accelerator.unwrap_model(model).shares, self.args.device
        # The reference comes first: what is computed last must be what gradients go through.
        with torch.no_grad():
            reference = model(**written.reference_batch(shares, device))
        found = model(**written.batch(shares, device))
        return found.view(-1, written.n), reference.view(-1, written.n)

    # ---- figures

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """The figures of the responses to a batch, at weights that do not depend on the step."""
        written = self._write(inputs["prompts"], "evaluation", "the evaluation")
        with torch.no_grad():
            log_probs, reference = self._log_probs(model, written)
        each = written.figures((log_probs - reference).flatten().cpu())
        # One row a prompt, as several processes count the rows of a last batch by its prompts.
        figures = each.view(-1, written.n, each.shape[1]).mean(dim=1).to(self.args.device)
        return None, figures, figures[:, :1]

    def _names(self) -> list[str]:
        rewards = [f"rewards/{name}" for name in self.policy.rewards]
        return ["objective", "reward", "kl", "samples/length", "samples/finished", *rewards]

    def _metrics(self, found: transformers.EvalPrediction) -> dict[str, float]:
        means = torch.as_tensor(found.predictions).double().mean(dim=0).tolist()
        return dict(zip(self._names(), means, strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Transformers, with the figures of the responses since the last log."""
        if "loss" in logs and self._seen:
            figures = torch.cat(self._seen).double()
            self._seen = []
            sums = torch.cat([figures.sum(dim=0), torch.tensor([float(len(figures))])])
            if self.accelerator.num_processes > 1:
                device = self.args.device
                sums = self.accelerator.reduce(sums.float().to(device), reduction="sum").cpu()
            logs |= dict(zip(self._names(), (sums[:-1] / sums[-1]).tolist(), strict=True))
        super().log(logs, start_time)

    # ---- files

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir or "."
        self.policy.save(folder)
        self._tokenizer.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        for name in self._adapters:
            fill_adapter(self.policy.model, Path(resume_from_checkpoint) / name, name)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _as_they_are(rows: list[Prompt]) -> dict[str, list[Prompt]]:
    """A batch of prompts, whose responses are yet to be written."""
    return {"prompts": rows}
