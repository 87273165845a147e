"""What is wrong with the input of `klcore compare`, in one sentence."""


class InputError(Exception):
    """Its text is what the user reads; the exit status is 2."""
