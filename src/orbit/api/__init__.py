"""The HTTP API: JSON in camelCase, problem documents, and the server that offers it."""
