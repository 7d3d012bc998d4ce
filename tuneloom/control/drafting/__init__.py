"""Training rows drafted by a language model. See `reconcile` for the life of a draft, `run` for that of a drafter."""
