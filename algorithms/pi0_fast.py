"""pi0-FAST as a method: next-token prediction on FAST tokens (Pertsch et al., 2025, arXiv 2501.09747).

The baseline that papers report under the policy's own name. There is nothing in it but supervised fine-tuning, so it is
`sft` on the policies that decode such tokens; the evaluation before and after is that of every other method.
"""

from vlarl_bench.algorithms.sft import SFT


class Pi0Fast(SFT):
    """Supervised fine-tuning on FAST tokens."""

    name = "pi0-fast"
    summary = "pi0-FAST (Pertsch et al.): supervised fine-tuning on FAST tokens, the papers' baseline"
    requires = frozenset({"sft", "fast"})
