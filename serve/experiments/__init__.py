"""Experiments on live traffic, a room that can be taken out. What an experiment is, `serve.experiment` says.

``store``; ``live`` (what is observed); ``shadow`` (answers nobody sees); ``measurements``; ``statistics``; ``report``, ``page``.
"""
