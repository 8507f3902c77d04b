"""TRL's trainers with the log-probs of `linear_logp`: few logits are computed, in tiles.

All that TRL documents of these classes holds: arguments, datasets, PEFT, references, metrics and
checkpoints. Products of the head are float32, also under bfloat16 autocast.

Besides TRL's formats, datasets may be of ids, with texts beside them or without: `prompt_ids` with
`chosen_ids` and `rejected_ids`, or with `completion_ids`. They are trained on as they are: sampled
tokens are not what their text would be encoded as, and nothing is put at their end.
"""
