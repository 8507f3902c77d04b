"""How every kernel is compared with the reference: on `blend`, and on draws of every kind."""

from cases import INF, Backend, Problem, assert_blend_agrees, assert_samples_agree

POWERS = (-2.0, -1.0, -0.5, 0.01, 0.5, 1.0, 2.0, INF, -INF)
CUT = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
IDS = {"seed": 2**63 + 11, "stream": 2**32 + 3, "step": 2**31}


def assert_agrees(kernel: Backend, p: Problem) -> None:
    """`blend`, plain draws, truncated draws and greedy ones."""
    assert_blend_agrees(kernel, p)
    assert_samples_agree(kernel, p, **IDS)
    assert_samples_agree(kernel, p, **IDS, **CUT)
    assert_samples_agree(kernel, p, **IDS, do_sample=False)
