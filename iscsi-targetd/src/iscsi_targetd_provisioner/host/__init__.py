"""The storage host's side of the lio-ssh backend; see ``source`` for how it gets there."""
