"""The real panel: an engine that runs a language model on a GPU or a CPU under a policy stack."""
