"""The registry: forget sets, policies and keys, in one database, with a revision and an audit trail.

``nouns`` says what it holds, ``store`` writes and reads, ``audit`` chains, ``snapshot`` is what the request path sees.
"""
