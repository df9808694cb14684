"""What a user can put right."""


class ConfigError(Exception):
    """A setting, path or combination that cannot work: says what was given, what is accepted and what to do.

    The command line prints the sentence without a traceback and ends with exit code 2.
    """
