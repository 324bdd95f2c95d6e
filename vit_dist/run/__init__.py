"""From a command line to a running thing, and from a running thing back to a person."""
