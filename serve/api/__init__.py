"""Runs in vLLM's API-server process: vLLM's own OpenAI app, behind our admission and on top of our engine client.

A request passes ``admission`` (route, key, body, policy -> snapshot), then vLLM's handlers, then ``engine_client`` (the choke
point: the plan is stamped on, outputs are checked). ``control`` changes what is in force, ``admin`` is its HTTP face.
"""
