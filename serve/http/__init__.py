"""Requests come in and go out: vLLM's own OpenAI app behind our middleware, and the admin API.

``launch`` checks how the server is started, ``app`` puts it together, ``middleware`` lets requests in (``rules`` says which),
``admin_routes`` and ``experiment_routes`` are the admin API, ``refusal`` and ``errors`` shape what goes out.
"""
