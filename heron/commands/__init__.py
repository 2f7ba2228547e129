"""What the verbs of the command line do, and the flags they take."""

EXIT_FAILED, EXIT_USAGE, EXIT_PREEMPTED = 1, 2, 75
