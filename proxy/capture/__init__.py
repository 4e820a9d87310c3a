"""What is recorded of an exchange, and how it becomes event lines."""
