"""What the verbs of the command line do, and the flags they take."""
