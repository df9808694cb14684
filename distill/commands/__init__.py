"""What the commands do, one file each: a function whose parameters are the options and whose docstring is the help."""
