"""The shell that puts guards inside vLLM: ``api`` runs in the API-server process, ``engine`` in the worker, ``registry`` keeps
what is to be forgotten, ``wire`` is what crosses between them."""
