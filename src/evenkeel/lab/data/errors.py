"""What is said about data that can't be used."""


class DataError(ValueError):
    """A file or folder of the reader's that is missing or broken: which one, what is wrong with it, what to do."""
