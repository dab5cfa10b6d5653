"""Published results, made again: one folder each, with a specification (`spec.yaml`) and an experiment.

    python -m experiments.published                  all of them, in full; writes docs/published.md's table to stdout
    python -m experiments.published vllm --reduced   one, in the small form that the tests run

Each experiment puts what a paper says beside what came out here, with a rule that decides whether they agree. Where
they do not, it says so; nothing is fitted to agree.
"""
