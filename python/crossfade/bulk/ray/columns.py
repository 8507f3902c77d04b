"""The columns of a pipeline from files, which tasks that read and write know without any model."""

INDEX = "index"  # the place of a prompt among those of all files
LINE = "line"  # the prompt as JSON, and then its result
ERROR = "error"  # why a prompt failed
