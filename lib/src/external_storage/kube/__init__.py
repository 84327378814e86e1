"""The only code that talks to the API server: transport, credentials, object types, quantities."""
