"""``payload-logger selftest``: the same requests directly and through the proxy, and what differs."""
