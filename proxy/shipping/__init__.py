"""Mirrors the files of the spool into their destination. Knows nothing of traffic."""
