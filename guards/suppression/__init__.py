"""Suppression: phrases whose text cannot be generated, whatever the tokenisation.

Rooms: ``elements`` (bytes -> characters), ``folding`` (characters -> symbols -> hashes), ``spelling`` (a phrase -> every run of
symbols that counts as it), ``vocabulary`` (the tokens as symbols, sorted), ``automaton`` (compiles phrases against a vocabulary),
``artifact`` (what it makes), ``mask`` (the step: which tokens are banned in which row), ``guard``, ``declaration``.

Covered: every occurrence of a phrase in the generated text, across any split into tokens, as running text may write it: any letter
case of any script (Turkish dotless i, ß and ss, Greek capitals without tonos), composed, decomposed or mixed; any run of white
space for white space, also around a slash between verses; any apostrophe, quote, hyphen; full-width and other compatibility forms;
soft hyphens, invisible characters, tatweel and vowel marks in between; numbers in any grouping; continuing text that the prompt
left half-said.

Not covered: paraphrase, translation, transliteration, letters without their accents ("Muller" for "Müller"), another spelling or
word division ("Jean Luc" for "Jean-Luc"), homoglyphs, letters set apart ("H a r r y"), dates in another order, "[at]" for "@":
those are the similarity filter's work, not this guard's. With ``match="exact"`` only letter case is folded.
"""
