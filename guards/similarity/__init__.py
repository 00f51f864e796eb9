"""Similarity: does a text touch a forget set? Names by their letters, meaning by embeddings, with a stated error rate.

Names: `keys` compiles them, `names` finds them by letters (`shapes`, `skeleton`, `fit`, `affixes`), with one edit (`near`), with
stars (`masked`), and in texts that were turned (`turned`). `disguise` decodes what is encoded (`codes`, `alphabets`). `windows`
cuts texts into what is embedded; `encoder` embeds; `index` finds the nearest entries of forget sets; `gate` judges conversations;
`stream` judges an answer clause by clause while it is held back; `calibrate` states how often either is wrong.
"""
