"""Suppression: phrases whose text cannot be generated, whatever the tokenisation.

Rooms: ``folding`` (text -> symbols -> hashes), ``vocabulary`` (the tokens as symbols, sorted), ``automaton`` (phrases compiled
against a vocabulary: the artifact), ``mask`` (the step: which tokens are banned in which row).

Covered: every occurrence of a phrase in the generated text, across any split into tokens, in any letter case, composed or
decomposed (a phrase as a whole, not letter by letter), continuing text that the prompt left half-said. Not covered: paraphrase,
translation, other spellings (ligatures, "ss" for one of several "ß", a mix of composed and decomposed letters), other white space,
invisible characters, homoglyphs, letters set apart ("H a r r y"): those are the similarity filter's work, not this guard's.
"""
