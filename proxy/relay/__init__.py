"""The traffic path: client ⇄ relay ⇄ model server. It knows nothing of events or storage."""
