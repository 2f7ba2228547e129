"""What :mod:`heron.hf` is made of, beside its models: configuration, vocabulary, padding and packed documents."""
