"""Text to and from sessions."""
