"""The registry: forget sets, policies and keys, in one database, with a revision and an audit trail.

``models`` says what it holds, ``store`` changes it, ``reader`` reads it, ``rows`` is between the two and the ``tables``, which
``migrations`` bring up to date; ``audit`` chains. ``snapshot`` is what the request path sees, ``plans`` what policies do for sets.
``usage`` counts what keys use, ``backup`` copies all of it, ``position`` notices an older copy.
"""
