"""The life of the processes: one, or several under a supervisor."""
