"""What the figures in bench/results/ say, as Markdown: a file a report.

Each has a function `render` of the JSON alone, which the script that measures prints and from which
`tables.py` makes the pages. Nothing but the standard library is imported, so that neither torch nor
a trainer is needed to say what was measured.
"""

OURS = "crossfade"  # the contender that the others are set against
