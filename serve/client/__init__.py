"""Clients of a server's HTTP API: measuring, calibrating, collecting what an adapter is to learn. Nothing here runs inside it."""
