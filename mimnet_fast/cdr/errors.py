"""The one exception of the recommender that is the user's to correct."""


class UserError(ValueError):
    """Wrong data, options or files; the message says what was got, what is needed, what to do.

    The command line prints the message without a traceback and exits with code 2.
    """
