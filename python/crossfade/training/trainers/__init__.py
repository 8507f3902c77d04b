"""TRL's trainers, whose log-probs come from `linear_logp`: it never stores all logits at once.

All that TRL documents of these classes holds here too: arguments, datasets, PEFT, references,
metrics and checkpoints. The products of the head are float32, also under bfloat16 autocast.

A row of a dataset has one of these forms, and all rows of a dataset have the same one:

* Texts: `SFTTrainer` takes ``{"prompt": "Hot?", "completion": " Yes."}`` or ``{"text": "Hot?"}``,
  `DPOTrainer` ``{"prompt": "Hot?", "chosen": " Yes.", "rejected": " No."}``, and `KTOTrainer`
  ``{"prompt": "Hot?", "completion": " Yes.", "label": True}``, or pairs, each of which becomes two
  rows. A response begins with its own space. EOS is put at the end of a text that lacks it.
* Chats: prompts and responses are lists of messages, each with ``role`` and ``content``, such as
  ``"chosen": [{"role": "assistant", "content": "Yes."}]``. `SFTTrainer` also takes whole
  conversations, ``{"messages": [...]}``. The tokenizer's chat template makes texts of them, with
  the tools of a column ``tools`` if there is one.
* Token ids: ``prompt_ids`` with ``completion_ids`` (and ``label``), or with ``chosen_ids`` and
  ``rejected_ids``. They are trained on as they are: nothing is put at their end. That matters for
  sampled responses: the text of a response, encoded again, may give other tokens than those that
  were sampled. Texts beside ids, as `training.pairs` gives both, are not read. `SFTTrainer` also
  takes ``input_ids`` with a ``completion_mask``, or with ``labels``, -100 where there is no loss.

Columns by other names are not read. Rows that are longer than ``args.max_length`` are cut, and
those of which only the prompt would be left are left out; how many is logged. A wrong row is an
error that names its number and its column.
"""
