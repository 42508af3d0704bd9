"""Client formats: from bytes to types and back. Nothing here decides, counts or calls."""
