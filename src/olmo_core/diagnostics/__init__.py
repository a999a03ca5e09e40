"""What ``doctor``, ``verify`` and ``bench`` find out, as values: nothing here prints."""
