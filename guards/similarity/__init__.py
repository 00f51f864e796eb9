"""Similarity: does a text touch a forget set? Names by their letters, meaning by embeddings, with a stated error rate.

`skeleton` and `disguise` undo what hides a name; `windows` cuts texts into what is embedded; `encoder` embeds; `index` finds the
nearest entries of forget sets; `gate` judges conversations; `stream` judges an answer clause by clause while it is held back;
`calibrate` states how often either is wrong.
"""
