"""The shell that puts guards inside vLLM. Which room runs in which process:

- vLLM's API server: ``http`` (requests come in), ``generation`` (the choke point, what is judged), ``control`` (what is in force),
  ``experiments``, ``registry`` (what is stored)
- vLLM's worker: ``engine``
- the operator's machine: ``cli`` and ``client``, which talk to the server over HTTP
- all of them: ``protocol`` (what crosses between server and worker) and the leaves beside this file
"""
