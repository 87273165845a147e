"""An error in the input of `klcore compare`, as one sentence."""


class InputError(Exception):
    """The message is printed for the user; the exit status is 2."""
