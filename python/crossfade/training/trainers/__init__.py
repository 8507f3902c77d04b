"""TRL's trainers, whose log-probs come from `linear_logp`: it never stores all logits at once.

All that TRL documents of these classes holds here too: arguments, datasets, PEFT, references,
metrics and checkpoints. The products of the head are float32, also under bfloat16 autocast.

Besides TRL's formats, datasets may hold token ids, with texts beside them or without: `prompt_ids`
with `chosen_ids` and `rejected_ids`, or `prompt_ids` with `completion_ids`. Training reads ids as
they are and puts nothing at their end. That matters for sampled responses: the text of a response,
encoded again, may give other tokens than those that were sampled.
"""
