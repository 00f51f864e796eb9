"""Measuring and comparing what servers say, as a client of them: nothing here runs inside the server."""
