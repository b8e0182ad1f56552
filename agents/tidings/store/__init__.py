"""The only code that knows a database: the port, and one adapter a database."""
