"""Step builders: who shares a step, and how many tokens each gets."""
